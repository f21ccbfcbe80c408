"""Backward elimination of units (groups of in-channels) one by one, the others refitted by least squares each time.

With `P = G^-1 [K, K]` and the refitted weights `W [K, N]`, removing unit `u` adds the error `tr(W_u^T P_uu^-1 W_u)`;
then `W -= P_:u P_uu^-1 W_u` and `P -= P_:u P_uu^-1 P_u:` (optimal brain surgeon, Hassibi and Stork, 1993, for groups).
"""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.solve import SINGULAR_DAMP, damped, invert_lower

__all__ = ["elimination"]

# A round removes at most 1 / 32 of the units between two updates of all others: fewer cost time, more lose the exact
# order. They are chosen among four times as many candidates, which are updated after each.
ROUND_SHARE = 32
CANDIDATES = 4
PIECE = 512  # rows updated at a time, so that no second matrix of that size is in memory


def elimination(gram: Array, weights: Array, units: Array, count: int, damp: float = SINGULAR_DAMP) -> Float64:
    """Squared error that each unit adds when units are removed, the cheapest next, the rest refitted: `[count]`.

    `units` `[K]` is the unit of every in-channel, -1 for those that are kept. Errors never fall in the order of
    removal, so that of two units which replace each other one is kept. Units are removed in rounds: one by one among
    the cheapest until these cost more than any other did at the start of the round; then all others are updated. The
    order is that of one by one except where a unit's cost falls when others are removed, which is rare.
    """
    u = np.asarray(units, np.int64)
    w, p = np.array(weights, np.float64), _inverse(damped(np.asarray(gram, np.float64), damp)[1])
    added, most = np.zeros(count), 0.0
    while (remaining := np.unique(u[u >= 0])).size:
        costs = _costs(p, w, u, remaining)
        order = np.argsort(costs, kind="stable")
        number = max(1, remaining.size // ROUND_SHARE)
        near, far = remaining[order[: CANDIDATES * number]], order[CANDIDATES * number :]
        bound = float(costs[far[0]]) if far.size else np.inf
        rows = np.flatnonzero(np.isin(u, near))
        removed = _cheapest(p[np.ix_(rows, rows)], w[rows], u[rows], number, bound)
        for unit, loss in removed:
            added[unit] = most = max(most, loss)
        is_removed = np.isin(u, [unit for unit, _ in removed])
        _eliminate(p, w, np.flatnonzero(is_removed))
        kept = np.flatnonzero(~is_removed)
        u, w, p = u[kept], w[kept], _compacted(p, kept)
    return added


def _costs(p: Float64, w: Float64, u: Array, remaining: Array) -> Float64:
    """The squared error that removing each of the units next would add; units of equally many channels at a time."""
    order = np.argsort(u, kind="stable")
    starts, ends = (np.searchsorted(u[order], remaining, side) for side in ("left", "right"))
    sizes, costs = ends - starts, np.zeros(len(remaining))
    for size in np.unique(sizes):
        alike = np.flatnonzero(sizes == size)
        channels = order[starts[alike][:, None] + np.arange(size)]  # [units, size]
        part = w[channels]  # [units, size, N]
        solved = (
            part / np.diag(p)[channels][..., None]
            if size == 1
            else np.linalg.solve(p[channels[:, :, None], channels[:, None]], part)
        )
        costs[alike] = np.einsum("ukn,ukn->u", part, solved)
    return costs


def _cheapest(p: Float64, w: Float64, u: Array, number: int, bound: float) -> list[tuple[int, float]]:
    """The next units to remove with their costs: at least one, then those that cost no more than `bound`."""
    remaining, chosen = np.unique(u), list[tuple[int, float]]()
    while len(chosen) < number:
        costs = _costs(p, w, u, remaining)
        at = int(np.argmin(costs))
        if chosen and costs[at] > bound:
            break
        chosen.append((int(remaining[at]), float(costs[at])))
        _eliminate(p, w, np.flatnonzero(u == remaining[at]))
        remaining = np.delete(remaining, at)
    return chosen


def _eliminate(p: Float64, w: Float64, channels: Array) -> None:
    """Remove channels: the other weights are refitted in place, the rows of the removed ones become zero."""
    share = np.linalg.solve(p[np.ix_(channels, channels)], p[channels])
    columns, lost = p[:, channels], w[channels]
    for start in range(0, len(p), PIECE):
        at = slice(start, start + PIECE)
        w[at] -= share[:, at].T @ lost
        p[at] -= columns[at] @ share


def _compacted(p: Float64, kept: Array) -> Float64:
    """The kept rows and columns, moved to the front of the same memory."""
    n = len(kept)
    flat = p.reshape(-1)
    for to, row in enumerate(kept):  # ascending, so that nothing is overwritten before it is read
        flat[to * n : (to + 1) * n] = p[row, kept]
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
