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
    of two which replace each other one stays. Units go in rounds: the next ones are chosen one by one
    among the cheapest until these cost more than the others did; then the rest is updated. The order is that of one by
    one but where a unit's cost falls as others go, which is rare.
    """
    u = np.asarray(units, np.int64)
    w, p = np.array(weights, np.float64), _inverse(damped(np.asarray(gram, np.float64), damp)[1])
    added, most = np.zeros(count), 0.0
    while (left := np.unique(u[u >= 0])).size:
        costs = _costs(p, w, u, left)
        order = np.argsort(costs, kind="stable")
        number = max(1, left.size // AT_ONCE)
        near, far = left[order[: NEAR * number]], order[NEAR * number :]
        bound = float(costs[far[0]]) if far.size else np.inf
        rows = np.flatnonzero(np.isin(u, near))
        gone = _cheapest(p[np.ix_(rows, rows)], w[rows], u[rows], number, bound)
        for unit, loss in gone:
            added[unit] = most = max(most, loss)
        out = np.isin(u, [unit for unit, _ in gone])
        _take_out(p, w, np.flatnonzero(out))
        stays = np.flatnonzero(~out)
        u, w, p = u[stays], w[stays], _shrunk(p, stays)
    return added


def _costs(p: Float64, w: Float64, u: Array, left: Array) -> Float64:
    """The squared error that each of the units adds if it goes next; units of equally many channels at a time."""
    order = np.argsort(u, kind="stable")
    starts, ends = (np.searchsorted(u[order], left, side) for side in ("left", "right"))
    sizes, found = ends - starts, np.zeros(len(left))
    for size in np.unique(sizes):
        alike = np.flatnonzero(sizes == size)
        own = order[starts[alike][:, None] + np.arange(size)]
        part = w[own]
        solved = (
            part / np.diag(p)[own][..., None] if size == 1 else np.linalg.solve(p[own[:, :, None], own[:, None]], part)
        )
        found[alike] = np.einsum("ukn,ukn->u", part, solved)
    return found


def _cheapest(p: Float64, w: Float64, u: Array, number: int, bound: float) -> list[tuple[int, float]]:
    """The next units to go with what each costs: at least one, then those that cost no more than any other can."""
    left, found = np.unique(u), list[tuple[int, float]]()
    while len(found) < number:
        costs = _costs(p, w, u, left)
        at = int(np.argmin(costs))
        if found and costs[at] > bound:
            break
        found.append((int(left[at]), float(costs[at])))
        _take_out(p, w, np.flatnonzero(u == left[at]))
        left = np.delete(left, at)
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
