"""Turning bases of several heads onto each other, so that their average keeps what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcomp.maths import Float64

__all__ = ["rotations"]

ROUNDS = 8


def rotations(
    heads: Float64, gram: Float64, pairs: Sequence[tuple[int, int]] = (), free: Sequence[int] = ()
) -> Float64:
    """Rotations `[H, D, D]` that bring the outputs of `heads` `[H, K, D]` closest to their common mean.

    Generalized orthogonal Procrustes (Gower, 1975) in the metric of the input's Gram matrix `[K, K]`: columns in `free`
    turn together, each pair of `pairs` turns in its own plane (all that commutes with a rotary embedding).
    """
    count, _, width = heads.shape
    found = np.broadcast_to(np.eye(width), (count, width, width)).copy()
    for _ in range(ROUNDS):
        mean = np.mean(heads @ found, axis=0)
        for h in range(count):
            found[h] = _onto(heads[h].T @ gram @ mean, pairs, list(free))
    return found


def _onto(cross: Float64, pairs: Sequence[tuple[int, int]], free: list[int]) -> Float64:
    """The rotation `R` that maximises `trace(R^T cross)`, of the allowed form."""
    r = np.eye(cross.shape[0])
    if free:
        u, _, vt = np.linalg.svd(cross[np.ix_(free, free)])
        r[np.ix_(free, free)] = u @ vt
    for a, b in pairs:
        angle = np.arctan2(cross[b, a] - cross[a, b], cross[a, a] + cross[b, b])
        c, s = np.cos(angle), np.sin(angle)
        r[a, a], r[b, a], r[a, b], r[b, b] = c, s, -s, c
    return r
