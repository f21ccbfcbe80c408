"""Importance scores as plain functions of weights `W [K, N]` (a row is an in-channel) and input statistics."""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Array, Float64

__all__ = ["flap", "per_unit", "wanda"]


def wanda(weights: Array, norm: Array) -> Float64:
    """Score of every weight, `|W_kn| ||X_k||_2`, `[K, N]` (Wanda, arXiv 2306.11695, eq. 1); `norm` is `||X_k||_2`."""
    return np.asarray(np.abs(np.asarray(weights, np.float64)) * np.asarray(norm, np.float64)[:, None])


def flap(variance: Array, weights: Array) -> Float64:
    """Fluctuation of every in-channel, `Var(X_k) ||W_k||^2`, `[K]` (FLAP, arXiv 2312.11983, eq. 4)."""
    squares = np.square(np.asarray(weights, np.float64)).sum(axis=1)
    return np.asarray(np.asarray(variance, np.float64) * squares)


def per_unit(values: Array, units: Array, count: int, mean: bool = False) -> Float64:
    """Sum or mean of the values of each unit's in-channels: `values` and `units` `[K]`, -1 for those of no unit."""
    u = np.asarray(units, np.int64)
    kept = u >= 0
    total = np.bincount(u[kept], np.asarray(values, np.float64)[kept], count)
    return np.asarray(total / np.maximum(np.bincount(u[kept], minlength=count), 1) if mean else total)
