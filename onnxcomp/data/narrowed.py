"""Caches of heads that were cut, or of fewer bits: a graph takes and gives others, so it is fed data without caches."""

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

__all__ = ["KEPT", "Narrowed", "has_caches", "narrowed", "sized", "suited", "taken", "without_caches"]

KEPT = "kept_sequence_length"  # the axis of a cache that holds fewer tokens than were read
CODES = (ir.DataType.INT8, ir.DataType.UINT8)  # what a cache of fewer bits holds, where it held floats


@dataclass(frozen=True)
class Taken:
    """What a graph takes for an input: fixed sizes, None for an open axis, and an element type."""

    sizes: tuple[int | None, ...]
    dtype: ir.DataType | None

    def __str__(self) -> str:
        """Type and sizes."""
        return f"{self.dtype or 'any type'} {list(self.sizes)}"

    @property
    def coded(self) -> bool:
        """Whether it is of codes."""
        return self.dtype in CODES


def narrowed(before: Iterable[ir.Value], now: Iterable[ir.Value]) -> dict[str, Taken]:
    """Values with fewer entries along an axis of fixed size than before, or with codes instead of floats."""
    old = taken(before)
    found = {}
    for name, new in taken(now).items():
        was = old.get(name)
        if was is None or len(was.sizes) != len(new.sizes):
            continue
        pairs = zip(was.sizes, new.sizes, strict=True)
        floats = was.dtype is not None and was.dtype.is_floating_point()
        if (floats and new.coded) or any(a is not None and b is not None and b < a for a, b in pairs):
            found[name] = new
    return found


def taken(values: Iterable[ir.Value]) -> dict[str, Taken]:
    """What a graph takes, by name."""
    return {
        str(v.name): Taken(tuple(d if isinstance(d, int) else None for d in v.shape or ()), v.dtype) for v in values
    }


def sized(feeds: Mapping[str, Array], inputs: Mapping[str, Taken]) -> dict[str, Array]:
    """Feeds whose empty caches have the fixed sizes and the types that a graph takes."""
    return {name: _sized(a, inputs[name]) if name in inputs else a for name, a in feeds.items()}


def _sized(a: Array, to: Taken) -> Array:
    if a.size or a.ndim != len(to.sizes):
        return a
    dtype = to.dtype.numpy() if to.dtype is not None else a.dtype
    return np.zeros([have if n is None else n for have, n in zip(a.shape, to.sizes, strict=True)], dtype)


def has_caches(data: Dataset, cut: Mapping[str, Taken]) -> bool:
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
    inputs: Mapping[str, Taken]

    def __iter__(self) -> Iterator[Batch]:
        for b in self.data:
            if full := next((name for name in self.inputs if b.feeds[name].size), None):
                raise DataError(
                    f"the result takes '{full}' as {self.inputs[full]}, since heads of its cache were cut or it holds "
                    "codes, and its length is fixed, so it cannot be fed empty"
                )
            yield Batch(sized(b.feeds, self.inputs), b.labels, b.samples)
