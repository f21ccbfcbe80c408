"""Smallest and largest values."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.stats.statistic import Need, Of, Per, Stat, Statistic, finite, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Extremes", "absmax", "minmax"]


def absmax(v: ir.Value | str, per: Per = "tensor", of: Of = "current") -> Need:
    """Largest magnitude: shape `[]`, or `[C]` per channel."""
    return Need(name_of(v), Stat("absmax", per), of)


def minmax(v: ir.Value | str, per: Per = "tensor", of: Of = "current") -> Need:
    """Smallest and largest value: shape `[2]`, or `[2, C]` per channel."""
    return Need(name_of(v), Stat("minmax", per), of)


class Extremes:
    """Smallest and largest value: `[2]`, or `[2, C]` per channel."""

    def __init__(self, per: Per) -> None:
        self.per = per
        self.low: Array | None = None
        self.high: Array | None = None

    def update(self, x: Array, extra: Array | None = None) -> None:
        if x.shape[0] == 0:
            return
        axis = 0 if self.per == "channel" else None
        low, high = np.asarray(x.min(axis=axis)), np.asarray(x.max(axis=axis))
        finite(low)
        finite(high)
        self._add(low, high)

    def _add(self, low: Array, high: Array) -> None:
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def merge(self, other: Self) -> None:
        if other.low is not None and other.high is not None:
            self._add(other.low, other.high)

    def result(self) -> Array:
        if self.low is None or self.high is None:
            raise no_rows()
        return np.stack([self.low, self.high])


class Range(Statistic):
    """What both kinds are read from."""

    family: ClassVar[str] = "extremes"
    exact: ClassVar[bool] = True

    @classmethod
    def accumulator(cls, stat: Stat) -> Extremes:
        """Keeps both ends."""
        return Extremes(stat.per)


class Minmax(Range):
    """`minmax`."""

    kind: ClassVar[str] = "minmax"


class Absmax(Range):
    """`absmax`."""

    kind: ClassVar[str] = "absmax"

    @classmethod
    def finish(cls, stat: Stat, result: Array) -> Array:
        """The larger magnitude of the two ends."""
        return np.asarray(np.abs(result).max(axis=0))
