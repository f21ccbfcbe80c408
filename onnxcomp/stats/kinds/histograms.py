"""How often each magnitude occurs, for ranges that are chosen later."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.stats.statistic import Need, Of, Per, Stat, Statistic, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BINS", "Histogram", "histogram"]

BINS = 65536  # one per pattern of a float32's upper 16 bits: sign, exponent, 7 bits of mantissa
UPPER = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)


def histogram(v: ir.Value | str, of: Of = "current") -> Need:
    """Counts by the top 16 bits of the float32 pattern: shape `[65536]`, int64 (see `maths.formats`)."""
    return Need(name_of(v), Stat("histogram"), of)


class Histogram:
    """Counts by the upper 16 bits of the float32 pattern: `[65536]`, int64; needs no range, merges exactly."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def update(self, x: Array, extra: Array | None = None) -> None:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        counts = np.bincount(flat.view(np.uint16)[UPPER], minlength=BINS)
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
        return Histogram()

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """One int64 per pattern."""
        return 8 * BINS
