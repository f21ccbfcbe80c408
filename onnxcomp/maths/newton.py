"""Damped Newton and Gauss-Newton steps over several matrices at once, validated on rows held out of the fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from onnxcomp.maths import Array

__all__ = ["HELD_OUT", "PRODUCTS", "Change", "Fitted", "descend", "pieces", "solve"]

ROUNDS = 6  # linearisations at most: each costs a pass over the rows for every product
LEAST_GAIN = 0.01  # a round that lowers the error on held-out rows by a smaller share is the last one
PRODUCTS = 8  # of conjugate gradients in a round: the preconditioner makes few enough, and a step is validated anyway
HELD_OUT = 8  # one row of so many is held out: enough to notice overfitting, few enough not to miss them in the fit
MORE_DAMPING = 10  # times the damping after a step that overfits
LINE = (1.0, 0.5, 0.25)  # shares of a step that are tried: the first that lowers the error is taken
CHUNK = 1 << 22  # elements of the widest matrix at a time, 16 MiB of float32: bounds memory, not the result

Change = list[Array]  # of every matrix, in its type: there are several at a time


class Part(Protocol):
    """What is fitted."""

    def moved(self, change: Sequence[Array], by: float) -> Self:
        """The part with its matrices moved by a multiple of a change."""
        ...


P = TypeVar("P", bound=Part)
T = TypeVar("T")


@dataclass(frozen=True)
class Fitted(Generic[T]):
    """The fitted part, and the error before and after on the held-out rows."""

    part: T
    before: float
    after: float


def descend(
    start: P,
    rows: Sequence[Array],
    error: Callable[[P, Sequence[Array]], float],
    step: Callable[[P, Sequence[Array], float], Change],
    damp: float,
) -> Fitted[P]:
    """Take steps from `start` on arrays of `rows` that belong together, every eighth row held out.

    `step` gives a change for some rows and a damping. Law: the error falls on the fitted and on the held-out rows, or
    nothing changes; a step that overfits is tried again with ten times the damping.
    """
    is_held_out = np.arange(len(rows[0])) % HELD_OUT == HELD_OUT - 1
    fitted, held_out = [a[~is_held_out] for a in rows], [a[is_held_out] for a in rows]
    part, before, least = start, error(start, held_out), error(start, fitted)
    after = before
    for _ in range(ROUNDS if len(held_out[0]) and before > 0 else 0):
        new, less = _line(part, step(part, fitted, damp), fitted, error, least)
        validated = error(new, held_out)
        if less >= least or validated >= after:
            damp *= MORE_DAMPING
            continue
        gain, part, least, after = 1 - validated / after, new, less, validated
        if gain < LEAST_GAIN:
            break
    return Fitted(part, before, after)


def _line(
    part: P, change: Change, rows: Sequence[Array], error: Callable[[P, Sequence[Array]], float], least: float
) -> tuple[P, float]:
    """The first of the full, half and quarter step that lowers the error, and the error; else the part itself."""
    for by in LINE:
        new = part.moved(change, by)
        if (lower := error(new, rows)) < least:
            return new, lower
    return part, least


def pieces(width: int, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Rows of arrays that belong together, as many at a time as a matrix of that `width` may have."""
    step = max(1, CHUNK // max(width, 1))
    for i in range(0, len(arrays[0]), step):
        yield tuple(a[i : i + step] for a in arrays)


def solve(
    rest: Change, product: Callable[[Change], Change], preconditioned: Callable[[Change], Change], products: int
) -> Change:
    """Approximate solution of `A x = rest` by preconditioned conjugate gradients, `A` positive definite.

    Takes so many `products` with `A` (Hestenes and Stiefel, 1952); `preconditioned` applies an easier matrix near the
    inverse of `A`; `rest`, the residual, is overwritten.
    """
    solution = [np.zeros_like(r) for r in rest]
    along = preconditioned(rest)
    power = _dot(rest, along)
    for _ in range(products):
        if power <= 0:
            break
        across = product(along)
        by = power / _dot(along, across)
        for f, r, a, c in zip(solution, rest, along, across, strict=True):
            f += by * a
            r -= by * c
        del across
        ahead = preconditioned(rest)
        last, power = power, _dot(rest, ahead)
        for a, h in zip(along, ahead, strict=True):
            a *= power / last
            a += h
    return solution


def _dot(a: Sequence[Array], b: Sequence[Array]) -> float:
    return float(sum(np.vdot(i, j) for i, j in zip(a, b, strict=True)))
