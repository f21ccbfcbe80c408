"""Closed-form refits after a cut, from moments only: an affine layer, or a gain per channel, to a target.

`X [R, K]` are the inputs as they are now over `R` calibration rows, `Y [R, N]` the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.solve import least_squares

__all__ = ["Means", "count", "linear", "scale"]

SILENT = 1e-12  # share of the largest channel's squares below which a channel counts as zero: its gain would be noise
CONSTANT = 1e-9  # share of its squares below which a channel's variance counts as zero: cancellation leaves that much
TINY = 1e-300  # in place of zero where all channels are zero


@dataclass(frozen=True)
class Means:
    """Mean of `X` `[K]`, of `Y` `[N]`, and the number of rows."""

    x: Float64
    y: Float64
    rows: float


def count(norm: Array, mean: Array, var: Array) -> float:
    """The number of rows behind the moments of a value: `sum x^2` over `mean x^2`, all channels together."""
    squares = float((np.asarray(var) + np.asarray(mean) ** 2).sum())
    return float((np.asarray(norm) ** 2).sum()) / squares if squares > 0 else 0.0


def linear(
    gram: Array, cross: Array, weights: Array, damp: float, means: Means | None = None
) -> tuple[Float64, Float64 | None]:
    """Weights `[K, N]` and, with `means`, the bias `[N]` of least `||X W + b - Y||^2`; `cross` is `X^T Y` `[K, N]`.

    Law: the squared error is not larger than with `weights` and any bias (without `means`, than without one).
    """
    g, c = np.asarray(gram, np.float64), np.asarray(cross, np.float64)
    if means is None:
        return least_squares(g, c, damp, start=weights).weights, None
    g = g - means.rows * np.outer(means.x, means.x)
    c = c - means.rows * np.outer(means.x, means.y)
    fitted = least_squares(g, c, damp, start=weights).weights
    return fitted, means.y - means.x @ fitted


def scale(squares: Array, cross: Array, means: Means | None = None) -> tuple[Float64, Float64]:
    """Per channel the gain `a` and, with `means`, the shift `c` that minimise `|a x + c - y|^2`; else `c` is zero.

    `squares` is the sum of `x^2`, `cross` that of `x y`, `[C]`; a channel without variance keeps `a = 1`. Law: no
    channel's squared error is larger than that of `x` itself.
    """
    s, c = np.asarray(squares, np.float64), np.asarray(cross, np.float64)
    if means is None:
        a = np.divide(c, s, out=np.ones_like(s), where=s > SILENT * max(float(s.max(initial=0)), TINY))
        return a, np.zeros_like(a)
    spread = s - means.rows * means.x**2
    a = np.divide(c - means.rows * means.x * means.y, spread, out=np.ones_like(s), where=spread > CONSTANT * s)
    return a, means.y - a * means.x
