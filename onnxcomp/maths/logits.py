"""A matrix before a table of classes, fitted so that the classes' probabilities come closest to given ones.

One row: `q = softmax(z turn table + shift)`; its divergence from given probabilities `p` is convex in `turn`, with the
Hessian `z z^T` times `table (diag(q) - q q^T) table^T`, summed over rows. Taken apart as in `maths.feedforward`, with
the mean of either factor, that is the preconditioner; and the damping, so that steps are small where probabilities
depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.conjugate import Change, solve
from onnxcomp.maths.solve import damped, invert_lower

__all__ = ["Classes", "Turned", "fit"]

ROUNDS = 6  # Newton steps at most
ENOUGH = 0.01  # a round that gains less, of the divergence on rows that were not fitted to, is the last
PRODUCTS = 8  # with the Hessian, each round
DAMP = 0.01  # of the mean square of what the matrix reads
CHECKED = 8  # one row of so many is not fitted to
CHUNK = 1 << 22  # numbers at a time


@dataclass(frozen=True)
class Classes:
    """`turn` `[K, d]` before `table` `[d, N]`, with what is added to the scores, `[N]` or `[1]`."""

    turn: Array
    table: Array
    shift: Array

    def scores(self, z: Array) -> Array:
        """Of rows `[R, K]`: `[R, N]`."""
        return z @ self.turn @ self.table + self.shift


@dataclass(frozen=True)
class Turned:
    """The fitted matrix, and the mean divergence in nats before and after on the rows that were not fitted to."""

    turn: Array
    before: float
    after: float


def fit(start: Classes, z: Array, there: Classes, x: Array, damp: float = DAMP) -> Turned:
    """The `turn` with which rows `z` `[R, K]` give the probabilities that rows `x` `[R, D]` give `there`.

    Every eighth row is left out of the fit. Law: the divergence falls on the rows fitted to and on those left out, or
    nothing changes.
    """
    out = np.arange(len(z)) % CHECKED == CHECKED - 1
    seen, unseen = (z[~out], x[~out]), (z[out], x[out])
    part = start
    before, error = (_divergence(part, there, *rows) for rows in (unseen, seen))
    after = before
    for _ in range(ROUNDS if len(unseen[0]) and before > 0 else 0):
        system = _System(part, there, *seen, damp)
        (change,) = solve([system.gradient], system.product, system.preconditioned, PRODUCTS)
        new, less = _line(part, change, there, *seen, error)
        checked = _divergence(new, there, *unseen)
        if less >= error or checked >= after:
            damp *= 10
            continue
        gain, part, error, after = 1 - checked / after, new, less, checked
        if gain < ENOUGH:
            break
    return Turned(part.turn, before, after)


def _line(part: Classes, change: Array, there: Classes, z: Array, x: Array, error: float) -> tuple[Classes, float]:
    """The first of the full, half and quarter step that lowers the divergence, and that; else the matrix as it is."""
    for by in (1.0, 0.5, 0.25):
        new = replace(part, turn=(part.turn + by * change).astype(part.turn.dtype))
        if (found := _divergence(new, there, z, x)) < error:
            return new, found
    return part, error


def _rows(part: Classes, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    step = max(1, CHUNK // max(part.table.shape[1], 1))
    for i in range(0, len(arrays[0]), step):
        yield tuple(a[i : i + step] for a in arrays)


def _logs(scores: Array) -> Array:
    """The logarithms of the probabilities, in the same memory."""
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores


def _divergence(part: Classes, there: Classes, z: Array, x: Array) -> float:
    """The mean of `KL(p | q)` over rows, in nats."""
    total = 0.0
    for a, b in _rows(part, z, x):
        p, q = _logs(there.scores(b)), _logs(part.scores(a))
        total += float(np.vdot(np.exp(p), p - q))
    return total / max(len(z), 1)


class _System:
    """The damped Hessian over rows `z` as products, and half of the way down: the gradient's negative."""

    def __init__(self, part: Classes, there: Classes, z: Array, x: Array, damp: float) -> None:
        self.part, self.z = part, z
        k, d = part.turn.shape
        gradient, inner, outer = np.zeros((k, d)), np.zeros((k, k)), np.zeros((d, d))
        often = np.zeros(part.table.shape[1])
        for a, b in _rows(part, z, x):
            q, p = np.exp(_logs(part.scores(a))), np.exp(_logs(there.scores(b)))
            means = q @ part.table.T
            gradient += a.T @ (p @ part.table.T - means)
            inner += a.T @ a
            outer -= means.T @ means
            often += q.sum(axis=0)
        outer = (outer + (part.table * often) @ part.table.T) / max(len(z), 1)
        dtype = part.turn.dtype
        self.gradient = gradient.astype(dtype)
        self.outer, (self.before, level), (self.behind, _) = outer.astype(dtype), _inverse(inner, damp), _inverse(outer)
        self.level = level

    def product(self, change: Change) -> Change:
        """The damped Hessian times a change."""
        total = self.level * change[0] @ self.outer
        for (a,) in _rows(self.part, self.z):
            q, moved = np.exp(_logs(self.part.scores(a))), a @ change[0] @ self.part.table
            moved -= np.einsum("rn,rn->r", q, moved)[:, None]
            moved *= q
            total += a.T @ (moved @ self.part.table.T)
        return [total]

    def preconditioned(self, change: Change) -> Change:
        """Nearly the inverse times a change: exact where a row's input tells nothing of its probabilities."""
        dtype = self.part.turn.dtype
        return [(self.before @ change[0] @ self.behind).astype(dtype)]


def _inverse(m: Array, damp: float = 1e-6) -> tuple[Array, float]:
    """The inverse of a damped matrix, and what was added to its diagonal."""
    level = float(np.diag(m).mean())
    _, lower, used = damped(m, damp)
    factor = invert_lower(lower)
    return factor.T @ factor, used * level
