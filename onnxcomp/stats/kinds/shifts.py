"""How far one value lies from another on average, where every row counts alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.stats.statistic import CHUNK, Need, Of, OtherOf, Per, Stat, Statistic, finite, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["shift"]


EXPONENTS = 64  # powers of two of mean squares that a model's rows may have, for what an accumulator holds


def shift(v: ir.Value | str, other: ir.Value | str, of: Of = "current", other_of: OtherOf = "") -> Need:
    """Mean of `other - v` over rows, where no row of `other` counts for its size: shape `[C]`.

    A row whose mean square is above the median, in powers of two, counts as much less: norms divide by it, and a token
    whose activations are a hundred times those of others would speak for all.
    """
    return Need(name_of(v), Stat("shift", "channel", other=name_of(other), other_of=other_of), of)


class Shift:
    """Counts of rows and sums of differences `[C]`, by the exponent of the mean square of a row."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sums: dict[int, Float64] = {}

    def update(self, x: Array, extra: Array | None = None) -> None:
        assert extra is not None
        size = max(1, CHUNK // max(1, x.shape[1]))
        for i in range(0, len(x), size):
            here, there = (np.asarray(a[i : i + size], np.float64) for a in (x, extra))
            finite(here)
            finite(there)
            exponents = np.frexp(np.square(there).mean(axis=1))[1]
            for e in np.unique(exponents).tolist():
                rows = exponents == e
                self._add(e, int(rows.sum()), (there[rows] - here[rows]).sum(axis=0))

    def _add(self, exponent: int, count: int, total: Float64) -> None:
        self.counts[exponent] = self.counts.get(exponent, 0) + count
        self.sums[exponent] = self.sums[exponent] + total if exponent in self.sums else total

    def merge(self, other: Self) -> None:
        for e, count in other.counts.items():
            self._add(e, count, other.sums[e])

    def result(self) -> Array:
        if not self.counts:
            raise no_rows()
        exponents = sorted(self.counts)
        counts = np.array([self.counts[e] for e in exponents])
        median = exponents[int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))]
        by = np.exp2([min(median - e, 0) for e in exponents])
        return np.asarray(by @ np.array([self.sums[e] for e in exponents]) / (by @ counts))


class ShiftKind(Statistic):
    """`shift`."""

    kind: ClassVar[str] = "shift"
    per: ClassVar[tuple[Per, ...]] = ("channel",)
    pairs: ClassVar[bool] = True

    @classmethod
    def accumulator(cls, stat: Stat) -> Shift:
        """Sums differences."""
        return Shift()

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """A row of float64 for each exponent."""
        return 8 * EXPONENTS * widths[0]
