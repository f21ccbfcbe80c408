"""What the original answered, batch by batch, and a hash of what it was asked."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.maths import Array

__all__ = ["KeptAnswers", "digest"]

IN_MEMORY = 256 << 20  # bytes of original outputs kept in memory; the rest goes to disk


class KeptAnswers:
    """Outputs of the original per batch: in memory while they are few, then in files that are memory-mapped."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._batches: list[dict[str, Array | Path]] = []
        self._bytes = 0
        self._whole: KeptAnswers | None = None  # whose files these are

    def append(self, outputs: Mapping[str, Array]) -> None:
        size = sum(a.nbytes for a in outputs.values())
        if self._bytes + size <= IN_MEMORY:
            self._bytes += size
            self._batches.append(dict(outputs))
            return
        # Strings stay in memory: numpy writes them as pickles only.
        self._batches.append(
            {k: a if a.dtype == object else self._write(a, i) for i, (k, a) in enumerate(outputs.items())}
        )

    def _folder(self) -> Path:
        if self._scratch is None:
            stack = contextlib.ExitStack()
            self._scratch = stack.enter_context(scratch_folder())
            weakref.finalize(self, stack.close)
        return self._scratch

    def _write(self, a: Array, index: int) -> Path:
        folder = self._folder()
        path = folder / f"original-{id(self):x}-{len(self._batches)}-{index}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path, a, allow_pickle=False)
        except OSError as e:
            raise DataError(f"cannot keep the original's outputs in {folder}: {e}; use fewer samples") from e
        return path

    def __getitem__(self, i: int) -> dict[str, Array]:
        return {
            k: np.load(a, mmap_mode="r", allow_pickle=False) if isinstance(a, Path) else a
            for k, a in self._batches[i].items()
        }

    def __len__(self) -> int:
        return len(self._batches)

    def head(self, count: int) -> KeptAnswers:
        """Those of the first batches; they stay on disk as long as these here."""
        few = copy.copy(self)
        few._batches, few._whole = self._batches[:count], self
        return few


def digest(feeds: Mapping[str, Array]) -> bytes:
    """A hash of a batch, to notice data that does not repeat itself."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        h.update(f"{name}{feeds[name].dtype}{feeds[name].shape}".encode())
        a = feeds[name]
        h.update(repr(a.tolist()).encode() if a.dtype == object else np.ascontiguousarray(a).tobytes())
    return h.digest()
