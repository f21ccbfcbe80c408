"""Backward elimination: in-channels, or groups of them, go one by one, and least squares makes up for each.

With `P = G^-1` and weights `W [K, N]` of what is left, unit `u` costs `tr(W_u^T P_uu^-1 W_u)`; when it goes, `W` and
`P` lose what it explains (optimal brain surgeon, Hassibi and Stork 1993, for groups; SparseGPT's update of rows).
"""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.solve import damped, invert_lower

__all__ = ["elimination"]

AT_ONCE = 32  # 1 / the largest share of the channels that goes between two updates of the rest
NEAR = 4  # times as many are candidates
PIECE = 512  # rows updated at a time, so that no second matrix of that size is needed


def elimination(gram: Array, weights: Array, units: Array, count: int, damp: float = 1e-6) -> Float64:
    """Squared error that each unit adds as they go, the cheapest next, and what is left makes up for it: `[count]`.

    `units` is the unit of every in-channel, -1 for those that stay. Never falls in the order in which units go, so that
    of two which replace each other one stays. Units of one channel go in rounds: the next ones are chosen one by one
    among the cheapest until these cost more than the others did; then the rest is updated. The order is that of one by
    one but where a channel's cost falls as others go, which is rare.
    """
    u = np.asarray(units, np.int64)
    w, p = np.array(weights, np.float64), _inverse(damped(np.asarray(gram, np.float64), damp)[1])
    sizes = np.bincount(u[u >= 0], minlength=count)
    return (_groups if sizes.max(initial=0) > 1 else _singles)(p, w, u, count)


def _groups(p: Float64, w: Float64, u: Array, count: int) -> Float64:
    """Units of several channels, one by one."""
    left = {i: own for i in range(count) if (own := np.flatnonzero(u == i)).size}
    added, most = np.zeros(count), 0.0
    while left:
        costs = {i: np.vdot(w[own], np.linalg.solve(p[np.ix_(own, own)], w[own])) for i, own in left.items()}
        unit = min(costs, key=costs.__getitem__)
        added[unit] = most = max(most, float(costs[unit]))
        _take_out(p, w, left.pop(unit))
    return added


def _singles(p: Float64, w: Float64, u: Array, count: int) -> Float64:
    """Units of one channel, in rounds; the matrices shrink with what is left."""
    added, most = np.zeros(count), 0.0
    rows = np.arange(len(u))  # the channels that the matrices still have
    while (free := np.flatnonzero(u[rows] >= 0)).size:
        cost = np.einsum("kn,kn->k", w[free], w[free]) / np.diag(p)[free]
        number = max(1, free.size // AT_ONCE)
        order = np.argsort(cost, kind="stable")
        near, far = free[order[: NEAR * number]], order[NEAR * number :]
        bound = float(cost[far[0]]) if far.size else np.inf
        gone = []
        for at, loss in _cheapest(p[np.ix_(near, near)], w[near], number, bound):
            gone.append(near[at])
            added[u[rows[near[at]]]] = most = max(most, loss)
        _take_out(p, w, np.array(gone))
        stays = np.setdiff1d(np.arange(len(rows)), gone)
        rows, w, p = rows[stays], w[stays], _shrunk(p, stays)
    return added


def _cheapest(p: Float64, w: Float64, number: int, bound: float) -> list[tuple[int, float]]:
    """The next units to go with what each costs: at least one, then those that cost no more than any other can."""
    alive, found = np.ones(len(w), bool), []
    for _ in range(number):
        costs = np.full(len(w), np.inf)
        costs[alive] = np.einsum("kn,kn->k", w[alive], w[alive]) / np.diag(p)[alive]
        at = int(np.argmin(costs))
        if found and costs[at] > bound:
            break
        found.append((at, float(costs[at])))
        alive[at] = False
        _take_out(p, w, np.array([at]))
    return found


def _take_out(p: Float64, w: Float64, own: Array) -> None:
    """Update what is left for channels that go: their weights fall on the others, and their rows become zero."""
    share = np.linalg.solve(p[np.ix_(own, own)], p[own])
    columns, lost = p[:, own], w[own]
    for start in range(0, len(p), PIECE):
        at = slice(start, start + PIECE)
        w[at] -= share[:, at].T @ lost
        p[at] -= columns[at] @ share


def _shrunk(p: Float64, stays: Array) -> Float64:
    """Some rows and columns, moved to the front of the same memory."""
    n = len(stays)
    flat = p.reshape(-1)
    for to, row in enumerate(stays):  # ascending, so that nothing is overwritten before it is read
        flat[to * n : (to + 1) * n] = p[row, stays]
    return flat[: n * n].reshape(n, n)


def _inverse(lower: Float64) -> Float64:
    """`(L L^T)^-1` in the memory of `L`: the inverse of the factor, then its product with itself block row by row."""
    f = invert_lower(lower)
    for start in range(0, len(f), PIECE):
        at = slice(start, min(start + PIECE, len(f)))
        f[at, : at.stop] = f[start:, at].T @ f[start:, : at.stop]
    for start in range(0, len(f), PIECE):
        at = slice(start, min(start + PIECE, len(f)))
        f[at, at.stop :] = f[at.stop :, at].T
    return f
