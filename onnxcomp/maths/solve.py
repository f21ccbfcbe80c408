"""Solvers that use the data only through Gram matrices: least squares, repair after a cut.

Layout of ONNX's MatMul: `y = x W`, `x` in R^K, `W [K, N]`; a row of `W` is an in-channel. `G = X^T X` over the
calibration rows, so the squared error of weights `V` in place of `W` is `tr((V - W)^T G (V - W))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import LAZY, Array, Float64

__all__ = [
    "SINGULAR_DAMP",
    "Solution",
    "damped",
    "error",
    "inverse_factor",
    "invert_lower",
    "least_squares",
    "repair",
    "repair_affine",
    "symmetrized",
]

# Damping of a Gram matrix, relative to the mean of its diagonal: the solvers' own is only against singular matrices.
SINGULAR_DAMP = 1e-6
FIRST_DAMP = 1e-10  # where none was asked for and the factorisation fails; then tenfold
DAMP_LIMIT = 1e6  # a matrix that is not positive even then is no Gram matrix


@dataclass(frozen=True)
class Solution:
    """Weights `[K, N]`, float64, and the damping that was needed, relative to the mean of the Gram diagonal."""

    weights: Float64
    damp: float


def error(gram: Array, delta: Array) -> Float64:
    """Squared error per out-channel that a change of the weights makes: `diag(D^T G D)`, shape `[N]`."""
    d = np.asarray(delta, np.float64)
    return np.asarray(np.maximum(np.einsum("kn,kn->n", d, np.asarray(gram, np.float64) @ d), 0.0))


def symmetrized(gram: Array) -> Float64:
    """A symmetric copy."""
    even = _finite(gram).copy()
    for i in range(0, len(even), LAZY):
        rows, columns = even[i : i + LAZY, i:], even[i:, i : i + LAZY].T
        rows[...] = (rows + columns) / 2
        columns[...] = rows
    return even


def _finite(gram: Array) -> Float64:
    g = np.asarray(gram, np.float64)
    if g.ndim != 2 or g.shape[0] != g.shape[1] or not all(np.isfinite(row).all() for row in g):
        raise DataError(f"the Gram matrix is not a finite square matrix, its shape is {list(g.shape)}")
    return g


def damped(gram: Float64, damp: float, overwrite: bool = False) -> tuple[Float64, Float64, float]:
    """The Gram matrix with `damp * mean(diag)` on its diagonal, its lower Cholesky factor, and the damp that worked.

    The damp is raised tenfold until the factorisation succeeds; an all-zero matrix becomes the identity. With
    `overwrite` the matrix is overwritten.
    """
    level = float(np.diag(gram).mean()) if gram.size else 0.0
    if level <= 0:
        return np.eye(len(gram)), np.eye(len(gram)), damp
    h, diagonal = gram if overwrite else gram.copy(), np.diag(gram).copy()
    while damp < DAMP_LIMIT:
        np.einsum("ii->i", h)[...] = diagonal + damp * level
        try:
            return h, np.asarray(np.linalg.cholesky(h), np.float64), damp
        except np.linalg.LinAlgError:
            damp = max(damp * 10, FIRST_DAMP)
    raise DataError(f"the Gram matrix is not positive even with a damping of {damp:g} times its diagonal")


def least_squares(gram: Array, cross: Array, damp: float = SINGULAR_DAMP, start: Array | None = None) -> Solution:
    """Weights that minimise `||X W - Y||^2 + damp * mean(diag G) * ||W - start||^2`, `G = X^T X`, `C = X^T Y`.

    Law: the error on the calibration data is not larger than that of `start` (zero by default), whatever the damping.
    """
    g = _finite(gram)
    c = np.asarray(cross, np.float64)
    w0 = np.zeros_like(c) if start is None else np.asarray(start, np.float64)
    rest = c - g @ w0
    level = float(np.diag(g).mean()) if g.size else 0.0
    if level > 0 and damp > len(g) ** 2 * np.finfo(np.float64).eps:  # positive for sure, so nothing is to be tried
        return Solution(w0 + _solved(g, damp * level, rest), damp)
    h, _, damp = damped(symmetrized(g), damp, overwrite=True)
    return Solution(w0 + np.linalg.solve(h, rest), damp)


def _solved(g: Float64, more: float, b: Float64) -> Float64:
    """`(G + more I)^-1 b` without a second matrix of that size beside the solver's: the diagonal is put back."""
    g = g if g.flags.writeable else g.copy()
    diagonal = np.einsum("ii->i", g)
    before = diagonal.copy()
    try:
        diagonal += more
        return np.asarray(np.linalg.solve(g, b))
    finally:
        diagonal[:] = before


def repair(gram: Array, weights: Array, keep: Array, damp: float = SINGULAR_DAMP) -> Solution:
    """Weights of the kept in-channels `[len(keep), N]` that compensate the removed, `G_kk^-1 G_k: W` when undamped.

    Law: the error on the calibration data is not larger than that of cutting alone.
    """
    g, w = symmetrized(gram), np.asarray(weights, np.float64)
    kept = np.asarray(keep, np.int64)
    if w.shape[0] != len(g) or kept.size == 0:
        raise DataError(f"weights {list(w.shape)} and {kept.size} kept channels do not fit a Gram matrix of {len(g)}")
    inner, cross = g[np.ix_(kept, kept)], (g @ w)[kept]
    del g
    return least_squares(inner, cross, damp, start=w[kept])


def repair_affine(
    gram: Array, mean: Array, rows: float, weights: Array, bias: Array, keep: Array, damp: float = SINGULAR_DAMP
) -> tuple[Float64, Float64]:
    """`repair` of `y = x W + b` with the bias among the kept in-channels: weights `[len(keep), N]` and bias `[N]`.

    The bias is the weight of a channel that is always one; `mean` `[K]` and the number of `rows` give its products.
    """
    g, m = np.asarray(gram, np.float64), np.asarray(mean, np.float64)
    k = len(g)
    extended = np.block([[g, rows * m[:, None]], [rows * m[None, :], np.full((1, 1), rows)]])
    both = np.vstack([np.asarray(weights, np.float64), np.asarray(bias, np.float64).reshape(1, -1)])
    solved = repair(extended, both, np.append(np.asarray(keep, np.int64), k), damp).weights
    return solved[:-1], solved[-1]


def invert_lower(lower: Float64) -> Float64:
    """The inverse of a lower triangular matrix, in its own place, by halves: a third of a general inverse's work."""
    n = len(lower)
    if n <= LAZY:
        lower[...] = np.tril(np.linalg.inv(lower))
        return lower
    a, b, c = lower[: n // 2, : n // 2], lower[n // 2 :, : n // 2], lower[n // 2 :, n // 2 :]
    invert_lower(a)
    invert_lower(c)
    b[...] = c @ (b @ -a)
    return lower


def inverse_factor(h: Float64, damp: float, overwrite: bool = False) -> tuple[Float64, float]:
    """Upper triangular `U` with `U^T U = H^-1`, from the Cholesky factor of `H` read backwards.

    With `overwrite` the matrix is overwritten.
    """
    lower, used = damped(h[::-1, ::-1], damp, overwrite)[1:]
    return invert_lower(lower)[::-1, ::-1], used
