"""Alignment of two sequences by dynamic programming (Needleman and Wunsch, J. Mol. Biol. 48, 1970), gaps are free."""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Float64

__all__ = ["align"]


def align(score: Float64) -> list[tuple[int, int]]:
    """Pairs (i, j), both ascending, with the largest sum of `score[i, j]`, `[n, m]`; only positive scores pair."""
    n, m = score.shape
    best = np.zeros((n + 1, m + 1))
    for i in range(n):
        paired = best[i, :-1] + np.maximum(score[i], 0.0)
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], paired))
    pairs: list[tuple[int, int]] = []
    i, j = n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]
