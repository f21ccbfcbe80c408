"""Streaming reductions behind the statistics: float64 sums, int64 counts, nothing that grows with the data.

Every accumulator takes rows `[R, C]` (a channel is a column). Law: any split of the rows, merged in any order, gives
the same result: exactly for counts, extremes and samples, to float64 noise for sums, to float32 noise of the products
in a Gram matrix. NaN or infinity raises `DataError`.
"""

from __future__ import annotations

import sys
from typing import Any, Self

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64
from onnxcomp.stats import Need, Of, Per, Stat

__all__ = ["BINS", "Key", "accumulator", "family", "fetched", "finish", "row_keys"]

Key = tuple[Of, str]  # a value of one of the two graphs

BINS = 65536  # one per pattern of a float32's upper 16 bits: sign, exponent, 7 bits of mantissa
PAIRS = ("cross_gram", "cosine", "paired")
FAMILY = {"absmax": "extremes", "minmax": "extremes", "mean": "moments", "var": "moments", "norm2": "moments"}
CHUNK = 1 << 18  # elements converted to float64 at a time
BUFFER = 1024  # rows gathered before a product pays (engine.md: few rows cost the d x d output, not the product)
LARGEST = 4096  # rows in one float32 product
UPPER = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)


def family(stat: Stat) -> Stat:
    """The statistic whose accumulator answers `stat`: mean, variance and norm share one, and so do the extremes."""
    return Stat(FAMILY.get(stat.kind, stat.kind), stat.per, stat.other, stat.n, stat.other_of)  # type: ignore[arg-type]


def fetched(need: Need) -> list[Key]:
    """The values a statistic reads, each of its graph."""
    second: list[Key] = [(need.stat.other_of or need.of, need.stat.other)] if need.stat.kind in PAIRS else []
    return [(need.of, need.value), *second]


def accumulator(stat: Stat) -> Any:
    """An empty accumulator for a statistic; `finish` reads the statistic from its result."""
    match FAMILY.get(stat.kind, stat.kind):
        case "extremes":
            return Extremes(stat.per)
        case "moments":
            return Moments(stat.per)
        case "gram" | "cross_gram":
            return Gram()
        case "histogram":
            return Histogram()
        case "cosine":
            return Cosine()
        case "counts":
            return Counts(stat.n)
        case _:
            return Sample(stat.n)


def finish(stat: Stat, result: Array) -> Array:
    """The statistic itself, from the result of its family's accumulator."""
    match stat.kind:
        case "absmax":
            return np.asarray(np.abs(result).max(axis=0))
        case "mean":
            return np.asarray(result[1])
        case "var":
            return np.asarray(result[2] / result[0])
        case "norm2":
            return np.asarray(np.sqrt(result[2] + result[0] * result[1] ** 2))
        case _:
            return result


def _finite(a: Any) -> None:
    if not np.isfinite(a).all():
        raise DataError("NaN or infinity")


def _nothing() -> DataError:
    return DataError("the data has no rows that count (everything is padding)")


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
        _finite(low)
        _finite(high)
        self._add(low, high)

    def _add(self, low: Array, high: Array) -> None:
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def merge(self, other: Self) -> None:
        if other.low is not None and other.high is not None:
            self._add(other.low, other.high)

    def result(self) -> Array:
        if self.low is None or self.high is None:
            raise _nothing()
        return np.stack([self.low, self.high])


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
            _finite(mean)
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
            raise _nothing()
        out = np.stack([np.full_like(self.mean, self.count), self.mean, self.m2])
        return out[:, 0] if self.per == "tensor" else out


class Gram:
    """`X^T X`, or `X^T Y` when updated with pairs: `[C, D]`, float64, from float32 products over many rows."""

    def __init__(self) -> None:
        self.sum: Float64 | None = None
        self.buffers: list[Array] = []
        self.filled = 0

    def update(self, x: Array, extra: Array | None = None) -> None:
        xs = [x] if extra is None else [x, extra]
        for a in xs:
            _finite(a)  # at once, not when the buffer is full, so that the batch can be named
        if self.filled == 0 and x.shape[0] >= BUFFER:
            return self._product(xs)
        if not self.buffers:
            self.buffers = [np.empty((BUFFER, a.shape[1]), a.dtype) for a in xs]
        start = 0
        while start < x.shape[0]:
            n = min(BUFFER - self.filled, x.shape[0] - start)
            for buffer, a in zip(self.buffers, xs, strict=True):
                buffer[self.filled : self.filled + n] = a[start : start + n]
            self.filled, start = self.filled + n, start + n
            if self.filled == BUFFER:
                self.flush()
        return None

    def flush(self) -> None:
        """Multiply what is buffered."""
        if self.filled:
            self._product([b[: self.filled] for b in self.buffers])
            self.filled = 0

    def _product(self, xs: list[Array]) -> None:
        for i in range(0, xs[0].shape[0], LARGEST):
            parts = [a[i : i + LARGEST] for a in xs]
            product = parts[0].T @ parts[-1]
            _finite(product.diagonal() if len(xs) == 1 else product)
            if self.sum is None:
                self.sum = np.zeros(product.shape, np.float64)
            self.sum += product

    def merge(self, other: Self) -> None:
        self.flush()
        other.flush()
        if other.sum is not None:
            self.sum = other.sum.copy() if self.sum is None else self.sum + other.sum

    def result(self) -> Float64:
        self.flush()
        self.buffers = []
        if self.sum is None:
            raise _nothing()
        return self.sum


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
            raise _nothing()
        return self.counts


class Counts:
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
            raise _nothing()
        return self.counts


class Cosine:
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
            _finite(na + nb)
            scale = na * nb
            cosines = np.einsum("ij,ij->i", a, b) / np.where(scale > 0, scale, 1.0)
            self.sum += float(np.where((na == 0) & (nb == 0), 1.0, cosines).sum())
        self.count += x.shape[0]

    def merge(self, other: Self) -> None:
        self.count += other.count
        self.sum += other.sum

    def result(self) -> Float64:
        if self.count == 0:
            raise _nothing()
        return np.asarray(self.sum / self.count)


class Sample:
    """At most `n` rows, those with the smallest keys: `[<=n, C]`; a key is drawn from the row's place in its sample."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise DataError(f"a sample of {n} rows was asked for; ask for at least one")
        self.n = n
        self.keys = np.zeros(0, np.uint64)
        self.rows: Array | None = None

    def update(self, x: Array, extra: Array | None = None) -> None:
        _finite(x)
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
            raise _nothing()
        return self.rows


def mix(x: Array) -> Array:
    """Scatter 64-bit integers (splitmix64), so that the smallest of them are a fair draw."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def row_keys(x: Array) -> Array:
    """Keys from the content of the rows, for values whose rows belong to no sample: `[R]`, uint64."""
    words = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    odd = mix(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return mix((mix(words) * odd).sum(axis=1, dtype=np.uint64))
