"""Batches in runs of a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnxcomp.maths import Array

__all__ = ["batch_size", "slices"]


def batch_size(feeds: Mapping[str, Array]) -> int | None:
    """Samples in a batch: the common first axis of all feeds, None where they do not have one."""
    sizes = {a.shape[0] if a.ndim else -1 for a in feeds.values()}
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None


def slices(feeds: Mapping[str, Array], chunk: int | None) -> Iterator[dict[str, Array]]:
    """A batch in runs of at most `chunk` samples; whole where it cannot be split."""
    n = batch_size(feeds)
    if n is None or chunk is None or chunk >= n:
        yield dict(feeds)
        return
    for i in range(0, n, chunk):
        yield {name: a[i : i + chunk] for name, a in feeds.items()}
