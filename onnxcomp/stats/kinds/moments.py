"""Mean, variance and Euclidean norm over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.stats.statistic import CHUNK, Need, Of, Per, Stat, Statistic, finite, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Moments", "mean", "norm2", "var"]


def mean(v: ir.Value | str, per: Per = "channel", of: Of = "current") -> Need:
    """Mean over rows: shape `[]`, or `[C]` per channel."""
    return Need(name_of(v), Stat("mean", per), of)


def var(v: ir.Value | str, per: Per = "channel", of: Of = "current") -> Need:
    """Population variance over rows: shape `[]`, or `[C]` per channel."""
    return Need(name_of(v), Stat("var", per), of)


def norm2(v: ir.Value | str, per: Per = "channel", of: Of = "current") -> Need:
    """Euclidean norm over rows: shape `[]`, or `[C]` per channel (Wanda's statistic)."""
    return Need(name_of(v), Stat("norm2", per), of)


class Moments:
    """Count, mean and sum of squared deviations, float64 (Chan's merge): `[3]`, or `[3, C]` per channel."""

    def __init__(self, per: Per) -> None:
        self.per = per
        self.count = 0
        self.mean: Any = 0.0
        self.m2: Any = 0.0

    def update(self, x: Array, extra: Array | None = None) -> None:
        x = x.reshape(-1, 1) if self.per == "tensor" else x
        step = max(1, CHUNK // max(1, x.shape[1]))
        for i in range(0, x.shape[0], step):
            part = x[i : i + step].astype(np.float64)
            mean = part.mean(axis=0)
            finite(mean)
            part -= mean
            self._add(part.shape[0], mean, np.einsum("ij,ij->j", part, part))

    def _add(self, count: int, mean: Any, m2: Any) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta**2 * (self.count * count / total)
        self.count = total

    def merge(self, other: Self) -> None:
        if other.count:
            self._add(other.count, other.mean, other.m2)

    def result(self) -> Float64:
        if self.count == 0:
            raise no_rows()
        out = np.stack([np.full_like(self.mean, self.count), self.mean, self.m2])
        return out[:, 0] if self.per == "tensor" else out


class Moment(Statistic):
    """What the three kinds are read from."""

    family: ClassVar[str] = "moments"

    @classmethod
    def accumulator(cls, stat: Stat) -> Moments:
        """Keeps count, mean and sum of squared deviations."""
        return Moments(stat.per)


class Mean(Moment):
    """`mean`."""

    kind: ClassVar[str] = "mean"

    @classmethod
    def finish(cls, stat: Stat, result: Array) -> Array:
        """As it is kept."""
        return np.asarray(result[1])


class Var(Moment):
    """`var`."""

    kind: ClassVar[str] = "var"
    degree: ClassVar[int] = 2

    @classmethod
    def finish(cls, stat: Stat, result: Array) -> Array:
        """Squared deviations over the count."""
        return np.asarray(result[2] / result[0])


class Norm2(Moment):
    """`norm2`."""

    kind: ClassVar[str] = "norm2"

    @classmethod
    def finish(cls, stat: Stat, result: Array) -> Array:
        """`sum x^2 = sum (x - mean)^2 + n mean^2`."""
        return np.asarray(np.sqrt(result[2] + result[0] * result[1] ** 2))
