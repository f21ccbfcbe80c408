"""Alignment of several heads that are replaced by one: rotations (Procrustes), or weighted low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxcomp.maths import Float64

__all__ = ["rotations", "spans"]

Number = npt.NDArray[np.inexact]

ROUNDS = 8  # of alternating mean and rotations: none raises the distance to the mean, each costs one SVD a head
EMPTY = 1e-12  # share of the largest eigenvalue below which a direction counts as absent: float64 noise of the moments
TINY = 1e-300  # in place of zero where all eigenvalues are zero


def rotations(
    heads: Float64, gram: Float64, pairs: Sequence[tuple[int, int]] = (), free: Sequence[int] = ()
) -> Float64:
    """Rotations `[H, D, D]` that bring the outputs of `heads` `[H, K, D]` closest to their common mean.

    Generalized orthogonal Procrustes (Gower, 1975) in the metric of the input's Gram matrix `[K, K]`: columns in `free`
    rotate together, each pair of `pairs` in its own plane (all that commutes with a rotary embedding).
    """
    count, _, width = heads.shape
    turns = np.broadcast_to(np.eye(width), (count, width, width)).copy()
    for _ in range(ROUNDS):
        mean = np.mean(heads @ turns, axis=0)
        for h in range(count):
            turns[h] = _onto(heads[h].T @ gram @ mean, pairs, list(free))
    return turns


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


def spans(
    moments: Float64, reads: Float64, pairs: Sequence[tuple[int, int]] = (), free: Sequence[int] = ()
) -> tuple[Float64, Float64]:
    """Maps `A`, `B` `[H, D, D]` for which `B_h^T` of the mean of all `x_h A_h` is closest to each head's `x_h`.

    `moments` `[H D, H D]` are those of all heads side by side, `reads` `[H, D, D]` the moments of what each head is
    multiplied with, which say how much an error counts (Eckart and Young, 1936, in both metrics). Columns in `free` mix
    freely, each pair of `pairs` is one complex number (all that commutes with a rotary embedding). Law: the weighted
    squared error is the least of all such maps, so not larger than that of a mean of rotated heads.
    """
    count, width = reads.shape[:2]
    m = moments.reshape(count, width, count, width)
    into, back = np.zeros((2, count, width, width))
    if free:
        at = np.ix_(range(count), free, free)
        n = len(free)
        inner = m[:, free][:, :, :, free].reshape(count * n, count * n)
        into[at], back[at] = _span(inner, reads[at])
    for a, b in pairs:
        s = m[:, a, :, a] + m[:, b, :, b] + 1j * (m[:, a, :, b] - m[:, b, :, a])
        x, y = (z[:, 0, 0] for z in _span(s, (reads[:, a, a] + reads[:, b, b])[:, None, None]))
        for z, out in ((x, into), (y, back)):
            out[:, a, a], out[:, b, b], out[:, a, b], out[:, b, a] = z.real, z.real, z.imag, -z.imag
    return into, back


def _span(moments: Number, reads: Float64) -> tuple[Number, Number]:
    """The maps where all columns mix freely, real or complex: best approximation of lower rank in both metrics."""
    count, width = reads.shape[:2]
    values, basis = np.linalg.eigh(moments)
    present = values > EMPTY * max(float(values.max(initial=0)), TINY)
    root = (basis * np.sqrt(np.where(present, values, 0))) @ basis.conj().T
    inverse = (basis * np.where(present, 1 / np.sqrt(np.where(present, values, 1)), 0)) @ basis.conj().T
    sides = root.reshape(count * width, count, width)
    weighed = np.einsum("ahd,hde,bhe->ab", sides, reads, sides.conj(), optimize=True)
    best = np.linalg.eigh(weighed)[1][:, ::-1][:, :width]
    q, r = np.linalg.qr(inverse @ best)
    into = q.reshape(count, width, width) * np.sqrt(count)
    across = (r @ best.conj().T @ root).reshape(width, count, width) * np.sqrt(count)
    return into, across.transpose(1, 2, 0).conj()
