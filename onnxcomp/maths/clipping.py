"""Clip rules from the 65536-bin histogram (counts by the upper 16 bits of the float32 pattern), in milliseconds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64

__all__ = ["BINS", "Clip", "bin_counts", "bin_edges", "clip_loss", "clip_range"]

Clip = Literal["minmax", "percentile", "entropy", "mse"]
BINS = 65536  # one per pattern of a float32's upper 16 bits: sign, exponent, 7 bits of mantissa
UPPER = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)
FINITE = 0x7F80  # bins of finite values of one sign
KL_BINS = 2048  # even bins of the divergence, as in TensorRT's calibration
KL_STEP = 16  # bins between two thresholds that are tried: a range is then at most 0.8 % of the largest too wide
# Grid of the mean squared error: ranges from everything down to 2 %, then around the best one ever closer.
SHRINK = np.geomspace(1.0, 0.02, 64)
NEARER = (0.8, 0.3, 0.1, 0.02)  # half widths of the later grids, relative to the best range
GRID = 24  # ranges in each of them
MOST_BINS = 4096  # of a histogram in that search: more cost time, and no step of 8 bits resolves them
COARSE = 8  # bins that are joined for a quick search: ranges are then at most 6 % off
LEAST_DIVISOR = 1e-9  # in place of a quantized probability of zero in a divergence


def bin_counts(x: Array) -> Array:
    """How many numbers of any shape lie in each bin: `[65536]`, int64."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    return np.bincount(flat.view(np.uint16)[UPPER], minlength=BINS)


@cache
def _order() -> Array:
    """Histogram indices of all finite bins, from the most negative to the most positive."""
    return np.concatenate([np.arange(0x8000 + FINITE - 1, 0x7FFF, -1), np.arange(FINITE)])


@cache
def bin_edges() -> tuple[Float64, Float64]:
    """Lower and upper edge of every finite bin in ascending order: `[65280]` each, float64."""
    magnitudes = (np.arange(FINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    magnitudes[-1] = float(np.finfo(np.float32).max)
    low, high = magnitudes[:-1], magnitudes[1:]
    return np.concatenate([-high[::-1], low]), np.concatenate([-low[::-1], high])


@dataclass(frozen=True)
class _Bins:
    """The bins that are not empty, ascending: edges, middles and counts; joined ones are wider than steps."""

    low: Float64
    high: Float64
    count: Float64
    joined: bool = False

    @property
    def middle(self) -> Float64:
        return (self.low + self.high) / 2

    @property
    def width(self) -> Float64:
        return self.high - self.low

    @property
    def spread(self) -> Float64:
        """Mean squared distance from the middle, which joined bins leave to the rounding."""
        return np.zeros_like(self.low) if self.joined else self.width**2 / 12

    def folded(self) -> _Bins:
        """The same for magnitudes."""
        low, high = np.minimum(abs(self.low), abs(self.high)), np.maximum(abs(self.low), abs(self.high))
        order = np.argsort(high, kind="stable")
        return _Bins(low[order], high[order], self.count[order])


def _bins(histogram: Array, *, coarse: bool = False) -> _Bins:
    if histogram.shape != (BINS,):
        raise DataError(f"a histogram has 65536 bins, got shape {list(histogram.shape)}")
    counts = histogram[_order()]
    if not counts.any():
        raise DataError("the histogram is empty")
    if counts.sum() != histogram.sum():
        raise DataError("the histogram holds NaN or infinity")
    low, high = bin_edges()
    if coarse:
        low, high, counts = low[::COARSE], high[COARSE - 1 :: COARSE], counts.reshape(-1, COARSE).sum(axis=1)
    filled = np.flatnonzero(counts)
    low, high = low[filled], high[filled]
    # The bins next to zero hold zero itself and numbers that no scale can tell from it.
    tiny = np.maximum(abs(low), abs(high)) < float(np.finfo(np.float32).tiny)
    return _Bins(np.where(tiny, 0.0, low), np.where(tiny, 0.0, high), counts[filled].astype(np.float64), coarse)


def clip_range(
    histogram: Array,
    method: Clip = "mse",
    *,
    bits: int = 8,
    symmetric: bool = False,
    percentile: float = 99.99,
    coarse: bool = False,
) -> tuple[float, float]:
    """The range `(low, high)` to quantize, low <= 0 <= high; `low == -high` when symmetric.

    `minmax` covers everything (to the bins' edges, 0.8 %), `percentile` that share of the values (half of the rest is
    cut at either end, all of it by magnitude when symmetric), `entropy` minimises the divergence of the clipped and
    quantized distribution of magnitudes (TensorRT's rule), `mse` the expected squared error of rounding and clipping.
    `coarse` searches it among fewer bins, for trials.
    Raises `DataError` for an empty histogram and for one that counts NaN or infinity.
    """
    if method not in get_args(Clip):
        raise DataError(f"unknown clip rule '{method}'; there are {', '.join(get_args(Clip))}")
    b = _bins(histogram, coarse=coarse)
    low, high = min(0.0, float(b.low[0])), max(0.0, float(b.high[-1]))
    if low == high:
        return 0.0, 0.0
    if method == "percentile":
        low, high = _percentile(b, percentile, symmetric)
    elif method == "entropy":
        limit = _entropy(b.folded(), bits)
        low, high = max(low, -limit), min(high, limit)
    elif method == "mse":
        low, high = _mse(b, low, high, bits, symmetric)
    if symmetric:
        limit = max(-low, high)
        return -limit, limit
    return low, high


def clip_loss(histogram: Array, low: float, high: float, bits: int) -> tuple[float, float, float, float]:
    """The least and largest value of a histogram, the share outside a range, and what rounding to it errs (rel. L2).

    Values that lie less than half a step outside count as inside: they are rounded, not clipped.
    """
    b, near = _bins(histogram), (high - low) / (2**bits - 1) / 2
    outside = float(b.count[(b.middle < low - near) | (b.middle > high + near)].sum() / b.count.sum())
    size = float((b.middle**2 + b.spread) @ b.count)
    lost = float(_error(_thinned(b), np.array([low]), np.array([high]), bits)[0])
    return float(b.low[0]), float(b.high[-1]), outside, (lost / size) ** 0.5 if size else 0.0


def _percentile(b: _Bins, percentile: float, symmetric: bool) -> tuple[float, float]:
    if not 0 < percentile <= 100:
        raise DataError(f"a percentile lies between 0 and 100, got {percentile}")
    share = percentile / 100
    if symmetric:
        b = b.folded()
        return 0.0, float(b.high[np.searchsorted(_shares(b.count), share - 1e-12)])
    low = float(b.low[len(b.low) - 1 - np.searchsorted(_shares(b.count[::-1]), (1 + share) / 2 - 1e-12)])
    high = float(b.high[np.searchsorted(_shares(b.count), (1 + share) / 2 - 1e-12)])
    return min(0.0, low), max(0.0, high)


def _shares(count: Float64) -> Float64:
    shares = np.asarray(np.cumsum(count) / count.sum())
    shares[-1] = 1.0
    return shares


# ---- squared error -------------------------------------------------------------------------------------------------


def _error(b: _Bins, low: Float64, high: Float64, bits: int) -> Float64:
    """Expected squared error, times the count, for every candidate range: `[candidates]`.

    A bin much narrower than a step is a point with its own rounding error, a wider one errs by `step^2 / 12`.
    """
    step = ((high - low) / (2**bits - 1))[:, None]
    step = np.maximum(step, np.finfo(np.float64).tiny)
    x, spread = b.middle[None], b.spread[None]
    shift = np.rint(low[:, None] / step) * step  # zero is a code, so the grid is moved to it
    inside = np.clip(x, shift, shift + (2**bits - 1) * step)
    rounded = np.where(b.width[None] < step / 2, (np.rint(x / step) * step - x) ** 2, step**2 / 12 - spread)
    clipped = (x - inside) ** 2
    return np.asarray((np.where(clipped > 0, clipped, np.maximum(rounded, 0.0)) + spread) @ b.count)


def _mse(b: _Bins, low: float, high: float, bits: int, symmetric: bool) -> tuple[float, float]:
    """Grid search: both ends together, then each end in turn, ever finer."""
    b = _thinned(b)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    low, high = _best(b, low * SHRINK, high * SHRINK, bits)
    for width in NEARER:
        near = np.concatenate([[1.0], np.linspace(1 - width, 1 + width, GRID)])
        if symmetric:
            low, high = _best(b, low * near, high * near, bits)
            continue
        limits = float(b.low[0]), float(b.high[-1])
        low, high = _best(b, np.full_like(near, low), np.minimum(high * near, max(0.0, limits[1])), bits)
        low, high = _best(b, np.maximum(low * near, min(0.0, limits[0])), np.full_like(near, high), bits)
    return low, high


def _thinned(b: _Bins, most: int = MOST_BINS) -> _Bins:
    """At most `most` bins: the finest, nearest to zero, are joined, since no step resolves them."""
    if len(b.count) <= most:
        return b
    keep = np.sort(np.argsort(np.maximum(abs(b.low), abs(b.high)), kind="stable")[-most:])
    rest = np.setdiff1d(np.arange(len(b.count)), keep)
    counts = b.count[keep].copy()
    zero = int(np.argmin(abs(b.middle[keep])))
    counts[zero] += b.count[rest].sum()
    return _Bins(b.low[keep], b.high[keep], counts, b.joined)


def _best(b: _Bins, low: Float64, high: Float64, bits: int) -> tuple[float, float]:
    i = int(np.argmin(_error(b, low, high, bits)))
    return float(low[i]), float(high[i])


# ---- divergence ----------------------------------------------------------------------------------------------------


def _entropy(b: _Bins, bits: int) -> float:
    """The magnitude that minimises KL(clipped || quantized), of 2048 even bins down to as many as there are levels."""
    levels = 2 ** (bits - 1)
    top = float(b.high[-1])
    edges = np.linspace(0.0, top, KL_BINS + 1)
    x = np.concatenate([[0.0], b.high])
    cumulated = np.interp(edges, x, np.concatenate([[0.0], np.cumsum(b.count)]))
    counts = np.diff(cumulated)
    counts[0] = counts[1]  # zeros are exact under every threshold and would drown the rest
    candidates = range(levels, KL_BINS + 1, KL_STEP)
    best = min(candidates, key=lambda n: (_divergence(counts, n, levels), -n))
    return float(edges[best])


def _divergence(counts: Float64, n: int, levels: int) -> float:
    """KL divergence of the first `n` bins, with everything beyond in the last, from their quantized form."""
    kept = counts[:n]
    p = kept.copy()
    p[-1] += counts[n:].sum()
    group = np.arange(n) * levels // n
    held = kept > 0
    filled = np.bincount(group, held, levels)
    q = np.where(held, (np.bincount(group, kept, levels) / np.maximum(filled, 1))[group], 0.0)
    if not p.any() or not q.any():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], LEAST_DIVISOR))).sum())
