"""Conjugate gradients for linear systems over several matrices at once, which are known by products only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxcomp.maths import Array

__all__ = ["Change", "solve"]

Change = list[Array]  # of every matrix, in its type: there are several at a time


def solve(
    rest: Change, product: Callable[[Change], Change], preconditioned: Callable[[Change], Change], products: int
) -> Change:
    """Nearly what a positive matrix makes `rest` of, after so many products with it; `rest` is used up.

    (Hestenes and Stiefel, 1952; with a preconditioner, an easier matrix near its inverse.)
    """
    found = [np.zeros_like(r) for r in rest]
    along = preconditioned(rest)
    power = _dot(rest, along)
    for _ in range(products):
        if power <= 0:
            break
        across = product(along)
        by = power / _dot(along, across)
        for f, r, a, c in zip(found, rest, along, across, strict=True):
            f += by * a
            r -= by * c
        del across
        ahead = preconditioned(rest)
        last, power = power, _dot(rest, ahead)
        for a, h in zip(along, ahead, strict=True):
            a *= power / last
            a += h
    return found


def _dot(a: Sequence[Array], b: Sequence[Array]) -> float:
    return float(sum(np.vdot(i, j) for i, j in zip(a, b, strict=True)))
