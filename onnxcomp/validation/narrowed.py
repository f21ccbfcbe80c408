"""Caches of heads that were cut: the result takes and gives fewer of them, so only what needs no cache is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.data.datasets import Batch, Dataset
from onnxcomp.errors import DataError
from onnxcomp.maths import Array

__all__ = ["Narrowed", "narrowed"]

Sizes = tuple[int | None, ...]


def narrowed(before: Iterable[ir.Value], now: Iterable[ir.Value]) -> dict[str, Sizes]:
    """Values that have fewer entries along an axis of fixed size than before, with the sizes they have now."""
    old = {v.name: _sizes(v) for v in before}
    found = {}
    for v in now:
        was, sizes = old.get(v.name, ()), _sizes(v)
        pairs = zip(was, sizes, strict=True) if len(was) == len(sizes) else ()
        if any(a is not None and b is not None and b < a for a, b in pairs):
            found[str(v.name)] = sizes
    return found


def _sizes(v: ir.Value) -> Sizes:
    return tuple(d if isinstance(d, int) else None for d in v.shape or ())


@dataclass(frozen=True)
class Narrowed:
    """The same batches with empty caches of the sizes that the result takes."""

    data: Dataset
    sizes: Mapping[str, Sizes]

    def __iter__(self) -> Iterator[Batch]:
        for b in self.data:
            made = {name: self._fit(name, a) for name, a in b.feeds.items()}
            yield Batch(made, b.labels, b.samples)

    def _fit(self, name: str, a: Array) -> Array:
        sizes = self.sizes.get(name)
        if sizes is None:
            return a
        if a.size:
            raise DataError(
                f"the result takes '{name}' in another size, {list(sizes)}, since heads of its cache were cut; judge "
                "it on data without caches, which are then fed empty"
            )
        return np.zeros([have if n is None else n for have, n in zip(a.shape, sizes, strict=True)], a.dtype)
