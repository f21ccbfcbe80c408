"""How much units matter, as plain functions of weights and statistics; `W [K, N]`, a row is an in-channel."""

from __future__ import annotations

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.solve import damped

__all__ = ["best", "flap", "head_energy", "head_loss", "magnitude", "per_unit", "wanda"]


def magnitude(weights: Array, block: int = 1) -> Float64:
    """L2 norm of every group of `block` in-channels: shape `[K / block]`."""
    squares = np.square(np.asarray(weights, np.float64)).reshape(len(weights), -1).sum(axis=1)
    return np.asarray(np.sqrt(_blocks(squares, block)))


def wanda(weights: Array, norm: Array) -> Float64:
    """Score of every weight, `|W_kn| * ||X_k||_2` (Wanda, arXiv 2306.11695): `norm` is `[K]`, the result `[K, N]`."""
    return np.asarray(np.abs(np.asarray(weights, np.float64)) * np.asarray(norm, np.float64)[:, None])


def head_energy(gram: Array, weights: Array, heads: int) -> Float64:
    """Squared norm of what every head adds to the output, `||X_h W_h||^2` over the calibration rows: `[heads]`."""
    g, w = np.asarray(gram, np.float64), np.asarray(weights, np.float64)
    width = _width(w, heads)
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return np.array([np.einsum("kn,kn->", w[p], g[p, p] @ w[p]) for p in parts])


def head_loss(gram: Array, weights: Array, heads: int, damp: float = 1e-6) -> Float64:
    """Squared error that remains when a head is cut and the others make up for it by least squares: `[heads]`.

    A head that the others can imitate costs nothing, however much it adds to the output.
    """
    g, w = np.asarray(gram, np.float64), np.asarray(weights, np.float64)
    width = _width(w, heads)
    losses = []
    for h in range(heads):
        cut = np.arange(h * width, (h + 1) * width)
        kept = np.setdiff1d(np.arange(len(w)), cut)
        own = g[np.ix_(cut, cut)]
        if kept.size:
            between = g[np.ix_(kept, cut)]
            own = own - between.T @ np.linalg.solve(damped(g[np.ix_(kept, kept)], damp)[0], between)
        losses.append(max(0.0, float(np.einsum("kn,kn->", w[cut], own @ w[cut]))))
    return np.array(losses)


def flap(variance: Array, weights: Array) -> Float64:
    """Fluctuation of every in-channel, `Var(X_k) ||W_k||^2` (FLAP, arXiv 2312.11983, eq. 4): `variance` is `[K]`."""
    squares = np.square(np.asarray(weights, np.float64)).sum(axis=1)
    return np.asarray(np.asarray(variance, np.float64) * squares)


def per_unit(values: Array, units: Array, count: int, mean: bool = False) -> Float64:
    """Sum or mean of the values of each unit's positions: `values` and `units` are `[K]`, -1 is no unit's."""
    u = np.asarray(units, np.int64)
    kept = u >= 0
    total = np.bincount(u[kept], np.asarray(values, np.float64)[kept], count)
    return np.asarray(total / np.maximum(np.bincount(u[kept], minlength=count), 1) if mean else total)


def best(scores: Array, n: int) -> Array:
    """Indices of the `n` highest scores, ascending; among equals the first wins."""
    if not 0 < n <= len(scores):
        raise DataError(f"{n} of {len(scores)} units cannot be kept")
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:n])


def _width(weights: Array, heads: int) -> int:
    if heads < 1 or len(weights) % heads:
        raise DataError(f"{len(weights)} in-channels do not divide into {heads} heads")
    return len(weights) // heads


def _blocks(values: Float64, block: int) -> Float64:
    if len(values) % block:
        raise DataError(f"{len(values)} in-channels do not divide into groups of {block}")
    return np.asarray(values.reshape(-1, block).sum(axis=1))
