"""What int8 does to the output of linears: products of rounded inputs and weights beside float ones, on rows of data.

Layout: rows `X [R, K]` of one input, weights `W [K, N]` of each linear that reads it. Inputs have one scale and a zero
point, weights one scale per column; both are rounded as `qdq` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.clipping import bin_counts, clip_range
from onnxcomp.maths.formats import FORMATS, affine, dequantize, fit, quantize
from onnxcomp.maths.saturation import nearest

__all__ = ["equalizing", "folds", "left_out_error", "output_error", "rounded_inputs", "thinned"]

FOLDS = 2  # halves of the rows: what is fitted to either is judged on the other
COLUMNS = 512  # out-channels of a linear that are judged: an error over more of them differs by a few per cent
LARGEST_GAIN = 1e4  # larger ones would leave float16, and say that a channel hardly has data


def thinned(w: Array) -> Array:
    """At most `COLUMNS` evenly spaced columns of a weight `[K, N]`."""
    n = w.shape[1]
    return w if n <= COLUMNS else w[:, np.linspace(0, n - 1, COLUMNS).astype(np.int64)]


def folds(rows: Array) -> Iterator[tuple[Array, Array]]:
    """Rows to fit to and rows to judge on, in turns; all rows twice where there are too few."""
    if len(rows) < 2 * FOLDS:
        yield rows, rows
        return
    for i in range(FOLDS):
        left = np.arange(len(rows)) % FOLDS == i
        yield rows[~left], rows[left]


def equalizing(inputs: Array, weights: Array, alpha: float, units: Array | None = None) -> Float64:
    """The factor `s [K]` of the weights' rows, and divisor of the inputs, of largest magnitudes `[K]` of both.

    `s = inputs^a / weights^(1 - a)` (SmoothQuant, arXiv 2211.10438, eq. 4) over its geometric mean; channels of one of
    the `units` `[K]` have the same. One where either is zero. Law: of inputs over s and weights times s it is one.
    """
    x, w = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    if units is not None:
        x, w = (_over(a, units) for a in (x, w))
    live = (x > 0) & (w > 0)
    log = alpha * np.log(x, where=live, out=np.zeros_like(x)) - (1 - alpha) * np.log(
        w, where=live, out=np.zeros_like(w)
    )
    log = np.where(live, log - (log[live].mean() if live.any() else 0.0), 0.0)
    return np.asarray(np.clip(np.exp(log), 1 / LARGEST_GAIN, LARGEST_GAIN))


def _over(a: Float64, units: Array) -> Float64:
    """The largest number of each unit, at every channel of it."""
    largest = np.zeros(int(units.max()) + 1)
    np.maximum.at(largest, units, a)
    return np.asarray(largest[units])


def rounded_inputs(fitted: Array, rows: Array) -> Array:
    """Rows rounded to 8 bits with the range, of least squared error, of other rows."""
    low, high = clip_range(bin_counts(fitted), "mse")
    scale, zero = affine(low, high, "uint8")
    return dequantize(quantize(rows, scale, zero, "uint8"), scale, zero)


def output_error(fitted: Array, rows: Array, weights: Sequence[Array], *, limited: bool) -> float:
    """Squared error of the outputs on rows, with the range of other rows; `limited` weights cannot saturate."""
    x, f = rounded_inputs(fitted, rows), FORMATS["int8"]
    total = 0.0
    for w in weights:
        q = nearest(w, f) if limited else fit(w, f, axis=1)
        total += float(np.square(rows @ w - x @ q.array()).sum(dtype=np.float64))
    return total


def left_out_error(
    rows: Array,
    weights: Sequence[Array],
    change: Callable[[Array], tuple[Float64, Array]] | None = None,
    *,
    limited: bool,
) -> float:
    """The error on rows that nothing is fitted to; `change` gives, of rows to fit to, divisors and channels left out.

    Inputs are divided by `[K]`, weights multiplied; channels `[C]` that are left out, or have no weight, are silent.
    """
    total, read = 0.0, np.any([w.any(axis=1) for w in weights], axis=0)
    for fitted, rest in folds(rows):
        s, out = (np.ones(rows.shape[1]), np.zeros(0, np.int64)) if change is None else change(fitted)
        keep = read & ~np.isin(np.arange(len(s)), out)
        over, by = (np.where(keep, a, 0.0).astype(np.float32) for a in (1 / s, s))
        total += output_error(fitted * over, rest * over, [w * by[:, None] for w in weights], limited=limited)
    return total
