"""How often each magnitude occurs, for ranges that are chosen later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.maths.clipping import BINS, bin_counts
from onnxcomp.stats.statistic import Need, Of, Per, Stat, Statistic, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Histogram", "histogram"]


def histogram(v: ir.Value | str, of: Of = "current", without: Iterable[int] = ()) -> Need:
    """Counts by the top 16 bits of the float32 pattern: shape `[65536]`, int64 (see `maths.formats`).

    Channels `without` are left out.
    """
    return Need(name_of(v), Stat("histogram", without=tuple(sorted(without))), of)


class Histogram:
    """Counts by the upper 16 bits of the float32 pattern: `[65536]`, int64; needs no range, merges exactly."""

    def __init__(self, without: tuple[int, ...] = ()) -> None:
        self.without = list(without)
        self.counts = np.zeros(BINS, np.int64)

    def update(self, x: Array, extra: Array | None = None) -> None:
        x = np.delete(x, self.without, axis=1) if self.without else x
        counts = bin_counts(x)
        if counts[0x7F80:0x8000].any() or counts[0xFF80:].any():
            raise DataError("NaN or infinity")
        self.counts += counts

    def merge(self, other: Self) -> None:
        self.counts += other.counts

    def result(self) -> Array:
        if not self.counts.any():
            raise no_rows()
        return self.counts


class HistogramKind(Statistic):
    """`histogram`."""

    kind: ClassVar[str] = "histogram"
    per: ClassVar[tuple[Per, ...]] = ("tensor",)
    exact: ClassVar[bool] = True

    @classmethod
    def accumulator(cls, stat: Stat) -> Histogram:
        """Counts patterns."""
        return Histogram(stat.without)

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """One int64 per pattern."""
        return 8 * BINS
