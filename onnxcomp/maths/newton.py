"""Damped Newton and Gauss-Newton steps over several matrices at once, checked on rows that are not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from onnxcomp.maths import Array

__all__ = ["CHECKED", "PRODUCTS", "Change", "Fitted", "descend", "pieces", "solve"]

ROUNDS = 6  # linearisations at most
ENOUGH = 0.01  # a round that gains less, of the error on rows that were not fitted to, is the last
PRODUCTS = 8  # with the system's matrix, each round
CHECKED = 8  # one row of so many is not fitted to
CHUNK = 1 << 22  # elements of the widest matrix at a time

Change = list[Array]  # of every matrix, in its type: there are several at a time


class Part(Protocol):
    """What is fitted."""

    def moved(self, change: Sequence[Array], by: float) -> Self:
        """The part with its matrices moved by a multiple of a change."""
        ...


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Fitted(Generic[P]):
    """The fitted part, and the error before and after on the rows that were not fitted to."""

    part: P
    before: float
    after: float


def descend(
    start: P,
    rows: Sequence[Array],
    error: Callable[[P, Sequence[Array]], float],
    step: Callable[[P, Sequence[Array], float], Change],
    damp: float,
) -> Fitted[P]:
    """Take steps from `start` on arrays of `rows` that belong together, every eighth left out.

    `step` gives a change for some rows and a damping. Law: the error falls on the rows fitted to and on those left out,
    or nothing changes; a step that learns the former by heart is tried again with ten times the damping.
    """
    out = np.arange(len(rows[0])) % CHECKED == CHECKED - 1
    seen, unseen = [a[~out] for a in rows], [a[out] for a in rows]
    part, before, least = start, error(start, unseen), error(start, seen)
    after = before
    for _ in range(ROUNDS if len(unseen[0]) and before > 0 else 0):
        new, less = _line(part, step(part, seen, damp), seen, error, least)
        checked = error(new, unseen)
        if less >= least or checked >= after:
            damp *= 10
            continue
        gain, part, least, after = 1 - checked / after, new, less, checked
        if gain < ENOUGH:
            break
    return Fitted(part, before, after)


def _line(
    part: P, change: Change, rows: Sequence[Array], error: Callable[[P, Sequence[Array]], float], least: float
) -> tuple[P, float]:
    """The first of the full, half and quarter step that lowers the error, and the error; else the part itself."""
    for by in (1.0, 0.5, 0.25):
        new = part.moved(change, by)
        if (found := error(new, rows)) < least:
            return new, found
    return part, least


def pieces(width: int, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Rows of arrays that belong together, as many at a time as a matrix of that `width` may have."""
    step = max(1, CHUNK // max(width, 1))
    for i in range(0, len(arrays[0]), step):
        yield tuple(a[i : i + step] for a in arrays)


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
