"""How often each integer occurs, such as a token's number."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.stats.statistic import Need, Of, Per, Stat, Statistic, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["counts"]


def counts(v: ir.Value | str, n: int, of: Of = "current") -> Need:
    """How often each integer below `n` occurs in an integer value: shape `[n]`, int64."""
    return Need(name_of(v), Stat("counts", n=n), of)


class Occurrences:
    """Occurrences of the integers below `n`: `[n]`, int64; exact up to 2^24, the integers a float32 row can hold."""

    def __init__(self, n: int) -> None:
        self.counts = np.zeros(n, np.int64)

    def update(self, x: Array, extra: Array | None = None) -> None:
        whole = x.astype(np.int64).reshape(-1)
        if whole.size and (whole.min() < 0 or whole.max() >= len(self.counts)):
            raise DataError(f"an integer outside 0 to {len(self.counts) - 1}")
        self.counts += np.bincount(whole, minlength=len(self.counts))

    def merge(self, other: Self) -> None:
        self.counts += other.counts

    def result(self) -> Array:
        if not self.counts.any():
            raise no_rows()
        return self.counts


class Counts(Statistic):
    """`counts`."""

    kind: ClassVar[str] = "counts"
    per: ClassVar[tuple[Per, ...]] = ("tensor",)
    sized: ClassVar[bool] = True
    integers: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @classmethod
    def accumulator(cls, stat: Stat) -> Occurrences:
        """Counts the integers below `n`."""
        return Occurrences(stat.n)
