"""How much two values point the same way, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64
from onnxcomp.stats.statistic import CHUNK, Need, Of, OtherOf, Per, Stat, Statistic, finite, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["cosine"]


def cosine(v: ir.Value | str, other: ir.Value | str, of: Of = "current", other_of: OtherOf = "") -> Need:
    """Mean row-wise cosine of two values of equal shape: shape `[]` (ShortGPT's block influence is one minus it)."""
    return Need(name_of(v), Stat("cosine", other=name_of(other), other_of=other_of), of)


class MeanCosine:
    """Mean over rows of the cosine between two values: `[]`, float64; two zero rows count as equal."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0

    def update(self, x: Array, extra: Array | None = None) -> None:
        if extra is None or extra.shape != x.shape:
            raise DataError(
                f"a cosine needs two values of one shape, got {x.shape} and {None if extra is None else extra.shape}"
            )
        step = max(1, CHUNK // max(1, x.shape[1]))
        for i in range(0, x.shape[0], step):
            a, b = x[i : i + step].astype(np.float64), extra[i : i + step].astype(np.float64)
            na, nb = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            finite(na + nb)
            scale = na * nb
            cosines = np.einsum("ij,ij->i", a, b) / np.where(scale > 0, scale, 1.0)
            self.sum += float(np.where((na == 0) & (nb == 0), 1.0, cosines).sum())
        self.count += x.shape[0]

    def merge(self, other: Self) -> None:
        self.count += other.count
        self.sum += other.sum

    def result(self) -> Float64:
        if self.count == 0:
            raise no_rows()
        return np.asarray(self.sum / self.count)


class Cosine(Statistic):
    """`cosine`."""

    kind: ClassVar[str] = "cosine"
    per: ClassVar[tuple[Per, ...]] = ("tensor",)
    pairs: ClassVar[bool] = True

    @classmethod
    def accumulator(cls, stat: Stat) -> MeanCosine:
        """Sums cosines of rows."""
        return MeanCosine()
