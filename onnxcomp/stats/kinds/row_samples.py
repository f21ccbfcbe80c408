"""Reproducible samples of rows, alone or with the same rows of another value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.stats.row_keys import row_keys
from onnxcomp.stats.statistic import Need, Of, OtherOf, Per, Stat, Statistic, finite, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["paired", "sample"]


def sample(v: ir.Value | str, n: int, of: Of = "current") -> Need:
    """A reproducible sample of at most `n` rows, independent of batch size: shape `[<=n, C]`."""
    return Need(name_of(v), Stat("sample", "channel", n=n), of)


def paired(v: ir.Value | str, other: ir.Value | str, n: int, of: Of = "current", other_of: OtherOf = "") -> Need:
    """A sample of rows, each with the same row of `other` behind it: shape `[<=n, C + D]`.

    The rows are those of any other pair or sample of `v` of that size.
    """
    return Need(name_of(v), Stat("paired", "channel", other=name_of(other), n=n, other_of=other_of), of)


class SmallestKeys:
    """At most `n` rows, those with the smallest keys: `[<=n, C]`; a key is drawn from the row's place in its sample."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise DataError(f"a sample of {n} rows was asked for; ask for at least one")
        self.n = n
        self.keys = np.zeros(0, np.uint64)
        self.rows: Array | None = None

    def update(self, x: Array, extra: Array | None = None) -> None:
        finite(x)
        self._add(row_keys(x) if extra is None else extra, x)

    def _add(self, keys: Array, rows: Array) -> None:
        if self.rows is not None:
            keys, rows = np.concatenate([self.keys, keys]), np.concatenate([self.rows, rows])
        self.keys, first = np.unique(keys, return_index=True)
        self.keys, self.rows = self.keys[: self.n], rows[first[: self.n]]

    def merge(self, other: Self) -> None:
        if other.rows is not None:
            self._add(other.keys, other.rows)

    def result(self) -> Array:
        if self.rows is None or not len(self.rows):
            raise no_rows()
        return self.rows


class Sample(Statistic):
    """`sample`."""

    kind: ClassVar[str] = "sample"
    per: ClassVar[tuple[Per, ...]] = ("channel",)
    sized: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @classmethod
    def accumulator(cls, stat: Stat) -> SmallestKeys:
        """Keeps the rows with the smallest keys."""
        return SmallestKeys(stat.n)


class Paired(Sample):
    """`paired`."""

    kind: ClassVar[str] = "paired"
    pairs: ClassVar[bool] = True

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """Rows of both values side by side, float32."""
        return super().nbytes(stat, [sum(widths)])
