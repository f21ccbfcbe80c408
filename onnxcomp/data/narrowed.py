"""Caches of heads that were cut: a graph takes and gives fewer of them, so it is fed data without caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcomp.data.datasets import Batch, Dataset, TensorSpec, specs
from onnxcomp.data.inputs import past_length, total_mask
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["Narrowed", "has_caches", "narrowed", "sized", "sizes_of", "suited", "without_caches"]

Sizes = tuple[int | None, ...]


def narrowed(before: Iterable[ir.Value], now: Iterable[ir.Value]) -> dict[str, Sizes]:
    """Values that have fewer entries along an axis of fixed size than before, with the sizes they have now."""
    old = sizes_of(before)
    found = {}
    for name, sizes in sizes_of(now).items():
        was = old.get(name, ())
        pairs = zip(was, sizes, strict=True) if len(was) == len(sizes) else ()
        if any(a is not None and b is not None and b < a for a, b in pairs):
            found[name] = sizes
    return found


def sizes_of(values: Iterable[ir.Value]) -> dict[str, Sizes]:
    """The fixed sizes of values, None for an open axis, by name."""
    return {str(v.name): tuple(d if isinstance(d, int) else None for d in v.shape or ()) for v in values}


def sized(feeds: Mapping[str, Array], sizes: Mapping[str, Sizes]) -> dict[str, Array]:
    """Feeds whose empty caches have the fixed sizes that a graph takes."""
    return {name: _sized(a, sizes.get(name, ())) for name, a in feeds.items()}


def _sized(a: Array, sizes: Sizes) -> Array:
    if a.size or a.ndim != len(sizes):
        return a
    return np.zeros([have if n is None else n for have, n in zip(a.shape, sizes, strict=True)], a.dtype)


def has_caches(data: Dataset, cut: Mapping[str, Sizes]) -> bool:
    """Whether the data fills one of these caches."""
    return any(b.feeds[name].size for b in data for name in cut if name in b.feeds) if cut else False


def without_caches(data: Dataset, graph: Graph) -> Dataset:
    """The same samples with empty caches, and a mask of the new tokens only; those of a fixed length stay."""
    inputs = specs(graph)
    return data.changed(lambda batch: _emptied(batch, inputs))


def _emptied(batch: Batch, inputs: Sequence[TensorSpec]) -> Batch:
    past, mask, made = past_length(batch.feeds, inputs), total_mask(inputs), dict(batch.feeds)
    for s in inputs:
        if s.cache is not None and isinstance(s.shape[s.cache], str):
            made[s.name] = np.take(made[s.name], [], axis=s.cache)
        elif s.flag and any(t.cache is not None for t in inputs):
            made[s.name] = np.zeros_like(made[s.name])
    if mask is not None:
        made[mask.name] = made[mask.name][:, past:]
    return replace(batch, feeds=made)


def suited(data: Dataset, before: Graph, now: Graph) -> Dataset | Narrowed:
    """The data of one graph as what was made of it takes it: without caches, of its sizes, where their heads were cut.

    The data itself where none were cut.
    """
    cut = narrowed(before.inputs, now.inputs)
    return Narrowed(without_caches(data, before), cut) if cut else data


@dataclass(frozen=True)
class Narrowed:
    """The same batches with empty caches of the sizes that the result takes."""

    data: Dataset
    sizes: Mapping[str, Sizes]

    def __iter__(self) -> Iterator[Batch]:
        for b in self.data:
            if full := next((name for name in self.sizes if b.feeds[name].size), None):
                raise DataError(
                    f"the result takes '{full}' in another size, {list(self.sizes[full])}, since heads of its cache "
                    "were cut, and its length is fixed, so it cannot be fed empty"
                )
            yield Batch(sized(b.feeds, self.sizes), b.labels, b.samples)
