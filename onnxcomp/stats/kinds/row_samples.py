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
        self._keys, self._rows = list[Array](), list[Array]()
        self._limit: np.uint64 | None = None  # the largest key that stays, once `n` are there

    def update(self, x: Array, extra: Array | None = None) -> None:
        finite(x)
        self._add(row_keys(x) if extra is None else extra, x)

    def _add(self, keys: Array, rows: Array) -> None:
        near = np.ones(len(keys), bool) if self._limit is None else keys < self._limit
        if not near.any():
            return
        self._keys.append(keys[near])
        self._rows.append(rows[near])
        if sum(map(len, self._keys)) >= held(self.n):
            self._sort()

    def _sort(self) -> None:
        """Keep the rows of the smallest keys, each key once."""
        keys, first = np.unique(np.concatenate(self._keys), return_index=True)
        self._limit = keys[self.n - 1] if len(keys) >= self.n else None
        self._keys, self._rows = [keys[: self.n]], [np.concatenate(self._rows)[first[: self.n]]]

    def merge(self, other: Self) -> None:
        for keys, rows in zip(other._keys, other._rows, strict=True):
            self._add(keys, rows)

    def result(self) -> Array:
        if not self._keys:
            raise no_rows()
        self._sort()
        return self._rows[0]


def held(n: int) -> int:
    """Rows that are held of a sample of `n`: a fourth more, so that they are sorted rarely."""
    return n + max(n // 4, 1)


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

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """Rows in float32, with those that wait to be sorted."""
        return widths[0] * 4 * held(stat.n)


class Paired(Sample):
    """`paired`."""

    kind: ClassVar[str] = "paired"
    pairs: ClassVar[bool] = True

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """Rows of both values side by side, float32."""
        return super().nbytes(stat, [sum(widths)])
