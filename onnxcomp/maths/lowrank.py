"""Low-rank factors of a weight that lose least on the calibration data, and how ranks are shared out.

Layout of ONNX's MatMul: `y = x W`, `W [K, N]`; `W ~ A B` with `A [K, r]`, `B [r, N]`. With `G = X^T X = S S^T` the
squared output error of the best rank `r` is the tail of the squared singular values of `S^T W` (SVD-LLM,
arXiv 2403.07378, theorem 3.2); ASVD (arXiv 2312.05821) takes a diagonal `S`, plain SVD the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.solve import damped, least_squares

__all__ = ["Factors", "blank", "break_even", "factor", "refit", "share"]

CHUNK = 1 << 22  # elements of a weight converted to float64 at a time, 32 MiB: bounds memory, not the result
# Damping of a Gram matrix, relative to the mean of its diagonal, above its float32 noise: directions that the data
# never shows are then kept by the size of the weights instead of by noise, and the Cholesky factorisation succeeds at
# once.
GRAM_DAMP = 1e-5
REFIT_DAMP = 1e-9  # only against a singular matrix: the factor is refitted to the metric it was chosen in
LEAST_DIAGONAL = (
    1e-12  # share of the largest entry of a diagonal metric in place of smaller ones, whose root is a divisor
)


@dataclass(frozen=True)
class Factors:
    """`A [K, r]` and `B [r, N]`, float64, and all squared singular values, falling: the first `r` are kept."""

    left: Float64
    right: Float64
    energies: Float64

    def loss(self, rank: int) -> float:
        """Squared error of keeping `rank` of them, in the metric that was asked for."""
        return float(self.energies[rank:].sum())

    def cut(self, rank: int) -> tuple[Float64, Float64]:
        """The first `rank` factors, each pair scaled to equal norms, so that both sides quantize alike."""
        a, b = self.left[:, :rank], self.right[:rank]
        na, nb = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
        scale = np.sqrt(np.divide(nb, na, out=np.ones_like(na), where=(na > 0) & (nb > 0)))
        return a * scale, b / scale[:, None]


def break_even(k: int, n: int) -> float:
    """The rank at which two factors have as many weights as the matrix."""
    return k * n / (k + n)


def blank(k: int, n: int, rank: int) -> Factors:
    """Factors of the right sizes for a dry run, with energies that fall alike for all weights."""
    return Factors(np.zeros((k, rank)), np.zeros((rank, n)), np.arange(min(k, n), 0.0, -1.0))


def factor(weights: Array, rank: int, metric: Array | None = None, damp: float = GRAM_DAMP) -> Factors:
    """The best factors of a weight `[K, N]` up to a rank, in the metric `G`: `[K, K]`, its diagonal `[K]`, or identity.

    Decomposes `W^T G W`, or `S^T W W^T S` where that is smaller. Raises `DataError` where the metric does not fit.
    """
    w = np.asarray(weights)
    k, n = w.shape
    if metric is not None and len(metric) != k:
        raise DataError(f"a metric of {len(metric)} in-channels does not fit weights {list(w.shape)}")
    r = min(rank, k, n)
    if k >= n:  # needs no root of the metric
        wide = w.astype(np.float64)
        values, basis = _falling(wide.T @ _weighted(metric, wide, damp))
        return Factors(wide @ basis[:, :r], np.ascontiguousarray(basis[:, :r].T), values)
    s = _root(metric, damp)
    inner = _times(None if s is None else s.T, _outer(w))
    values, basis = _falling(inner if s is None else inner * s if s.ndim == 1 else inner @ s)
    u = basis[:, :r]
    left = np.asarray(u if s is None else u / s[:, None] if s.ndim == 1 else np.linalg.solve(s.T, u), np.float64)
    return Factors(left, _chunked(w, _times(s, u)), values)


def _weighted(metric: Array | None, w: Float64, damp: float) -> Float64:
    """`G W`, a full Gram matrix damped as in `_root`."""
    product = _times(metric, w)
    if metric is not None and metric.ndim == 2:
        product += damp * float(np.diag(metric).mean()) * w
    return product


def _falling(matrix: Float64) -> tuple[Float64, Float64]:
    """Eigenvalues, largest first, and their vectors as columns."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), np.asarray(vectors[:, ::-1])


def _root(metric: Array | None, damp: float) -> Float64 | None:
    """`S` with `S S^T = G`, as `[K, K]`, as a diagonal `[K]`, or None for the identity."""
    if metric is None:
        return None
    g = np.asarray(metric, np.float64)
    if g.ndim == 1:
        return np.asarray(np.sqrt(np.maximum(g, max(LEAST_DIAGONAL * float(g.max(initial=0)), 1e-300))))
    return damped((g + g.T) / 2, damp)[1]


def _times(m: Array | None, x: Float64) -> Float64:
    if m is None:
        return x
    return np.asarray(m[:, None] * x if m.ndim == 1 else m @ x)


def _outer(w: Array) -> Float64:
    """`W W^T` in float64, without a copy of all of W."""
    step, total = max(1, CHUNK // len(w)), np.zeros((len(w), len(w)))
    for i in range(0, w.shape[1], step):
        part = w[:, i : i + step].astype(np.float64)
        total += part @ part.T
    return total


def _chunked(w: Array, x: Float64) -> Float64:
    """`x^T W` in float64, without a copy of all of W."""
    step, out = max(1, CHUNK // len(w)), np.empty((x.shape[1], w.shape[1]))
    for i in range(0, w.shape[1], step):
        out[:, i : i + step] = x.T @ w[:, i : i + step].astype(np.float64)
    return out


def refit(gram: Array, weights: Array, left: Array, right: Array) -> Float64:
    """The second factor that fits the data best after a given first one, `(A^T G A)^-1 A^T G W`.

    Law: the error on the calibration data is not larger than that of `A` and `right`.
    """
    a = np.asarray(left, np.float64)
    weighted = np.asarray(gram, np.float64) @ a
    return least_squares(a.T @ weighted, _chunked(np.asarray(weights), weighted), damp=REFIT_DAMP, start=right).weights


def share(
    energies: Sequence[Array],
    sizes: Sequence[tuple[int, int]],
    ratio: float,
    multiple: int = 1,
    how: Literal["energy", "uniform"] = "energy",
    margin: float = 1.0,
) -> list[int]:
    """Ranks that keep `1 - ratio` of all weights; 0 where a matrix is not factored since its rank would save nothing.

    `uniform` gives every matrix the same share; `energy` spends weights where they keep most of a matrix's output
    energy, relative to all of it. Ranks are multiples of `multiple` and stay under `margin` times break-even.
    """
    limits = [margin * break_even(k, n) for k, n in sizes]
    if how == "uniform":
        asked = [int((1 - ratio) * break_even(k, n)) // multiple * multiple or multiple for k, n in sizes]
        return [r if r < limit else 0 for r, limit in zip(asked, limits, strict=True)]
    gains = [_gains(np.asarray(e), size, multiple) for e, size in zip(energies, sizes, strict=True)]
    unfactored: set[int] = set()
    total = sum(k * n for k, n in sizes)
    while True:
        factored = [i for i in range(len(sizes)) if i not in unfactored]
        budget = (1 - ratio) * total - sum(sizes[i][0] * sizes[i][1] for i in unfactored)
        ranks = _spend([gains[i] for i in factored], [sizes[i] for i in factored], budget, multiple)
        over = {i for i, r in zip(factored, ranks, strict=True) if r >= limits[i]}
        if not over:
            chosen = dict(zip(factored, ranks, strict=True))
            return [chosen.get(i, 0) for i in range(len(sizes))]
        unfactored |= over


def _gains(energies: Array, size: tuple[int, int], multiple: int) -> Float64:
    """What each next `multiple` of rank keeps of a matrix's energy, per weight it costs; the first one is given."""
    total, end = float(energies.sum()) or 1.0, min(size)
    starts = np.arange(multiple, end, multiple)
    kept = np.add.reduceat(energies[:end], starts) if len(starts) else np.zeros(0)
    return np.asarray(kept / total / sum(size), np.float64)


def _spend(gains: Sequence[Float64], sizes: Sequence[tuple[int, int]], budget: float, multiple: int) -> list[int]:
    """One multiple of rank each, then the next best per weight while the budget lasts."""
    costs = multiple * np.array([k + n for k, n in sizes], np.int64)
    owners = np.repeat(np.arange(len(sizes)), [len(x) for x in gains])
    order = owners[np.argsort(-np.concatenate(gains), kind="stable")] if len(owners) else owners
    paid = int((costs.sum() + np.cumsum(costs[order]) <= budget).sum())
    return [int(r) for r in multiple * (1 + np.bincount(order[:paid], minlength=len(sizes)))]
