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

Range = tuple[float, float]

__all__ = ["Range", "best_range", "equalizing", "folds", "left_out_error", "output_error", "rounded_inputs", "thinned"]

FOLDS = 2  # halves of the rows: what is fitted to either is judged on the other
COLUMNS = 128  # out-channels of a linear that are judged: of all that is compared, the same
SKETCH = 64  # random directions of outputs: their squares then differ from the whole by some per cent
SHRINK = np.geomspace(1.0, 0.02, 16)  # ranges that are tried for both ends, then for each around the best ever closer
NEARER = (np.geomspace(0.6, 1.6, 7), np.geomspace(0.9, 1.1, 5))
GAIN = 0.1  # share of its error that another range must take off: smaller gains on some hundred rows are chance
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
    low, high = clip_range(bin_counts(fitted), "mse", coarse=True)
    scale, zero = affine(low, high, "uint8")
    return dequantize(quantize(rows, scale, zero, "uint8"), scale, zero)


def output_error(fitted: Array, rows: Array, weights: Sequence[Array], *, limited: bool) -> float:
    """Weighted squared error of the outputs on rows, with the range of others; `limited` weights cannot saturate."""
    x, f = rounded_inputs(fitted, rows), FORMATS["int8"]
    errors, size = np.zeros(len(rows)), np.zeros(len(rows))
    for w in weights:
        q, y = nearest(w, f) if limited else fit(w, f, axis=1), rows @ w
        errors += np.square(y - x @ q.array()).sum(axis=1, dtype=np.float64)
        size += np.square(y).sum(axis=1, dtype=np.float64)
    return float(errors @ importance(size))


def importance(size: Float64) -> Float64:
    """What a unit of error counts in rows of outputs whose squares sum to `size` `[R]`: less in those above the median.

    Norms divide by it: the error of a token whose activations are a hundred times those of others would decide alone.
    """
    floor = float(np.median(size))
    return np.asarray(1.0 / np.maximum(size, floor if floor > 0 else 1.0))


def best_range(rows: Array, weights: Sequence[Array], start: Range, most: Range, fmt: str, *, symmetric: bool) -> Range:
    """The range inside `most` of inputs whose rounding errs least at the outputs, rows weighed by importance.

    Outputs are seen in `SKETCH` random directions. `start`, which follows from all data, stays where no other takes a
    `GAIN` off its error: of few rows the best range is narrower than that of all.
    """
    low, high = most
    w = np.concatenate(weights, axis=1)
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0], np.float32), (w.shape[1], min(SKETCH, w.shape[1])))
    sketch = np.asarray(w @ signs, np.float32)
    by = importance(np.square(rows @ sketch).sum(axis=1, dtype=np.float64))

    def error(ends: Range) -> float:
        scale, zero = affine(*ends, fmt, symmetric=symmetric)
        left = rows - dequantize(quantize(rows, scale, zero, fmt), scale, zero)
        return float(np.square(left @ sketch).sum(axis=1, dtype=np.float64) @ by)

    best = min(((low * f, high * f) for f in SHRINK), key=error)
    for near in NEARER:
        best = min(((best[0], min(best[1] * f, high)) for f in near), key=error)
        best = min(((max(best[0] * f, low), best[1]) for f in near), key=error)
    return best if error(best) < (1 - GAIN) * error(start) else start


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
