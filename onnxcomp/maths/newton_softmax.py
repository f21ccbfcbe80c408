"""A matrix before a table of classes, fitted so that the classes' probabilities come closest to given ones.

One row: `q = softmax(z turn table + shift)`; its divergence from given probabilities `p` is convex in `turn`, with the
Hessian `z z^T` times `table (diag(q) - q q^T) table^T`, summed over rows. The product of the means of the two factors
(K-FAC, as in `maths.newton_mlp`) is the preconditioner; and the damping, so that steps are small where probabilities
depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.newton import PRODUCTS, Change, Fitted, descend, pieces, solve
from onnxcomp.maths.solve import damped, invert_lower

__all__ = ["Classes", "fit"]

# Damping of the matrix, relative to the mean square of its inputs. More takes smaller steps and overfits less; it is
# raised tenfold where a step does not lower the divergence on held-out rows.
TURN_DAMP = 0.01
TABLE_DAMP = 1e-6  # only so that the factor of the table can be inverted: a shift of all logits changes no probability


@dataclass(frozen=True)
class Classes:
    """`turn` `[K, d]` before `table` `[d, N]`, with the bias of the logits, `[N]` or `[1]`."""

    turn: Array
    table: Array
    shift: Array

    def scores(self, z: Array) -> Array:
        """Logits `[R, N]` of rows `[R, K]`."""
        return z @ self.turn @ self.table + self.shift

    def moved(self, change: Sequence[Array], by: float) -> Classes:
        """The same with `turn` moved by a multiple of a change."""
        return replace(self, turn=(self.turn + by * change[0]).astype(self.turn.dtype))


def fit(start: Classes, z: Array, there: Classes, x: Array, damp: float = TURN_DAMP) -> Fitted[Classes]:
    """The `turn` for which rows `z` `[R, K]` have the probabilities of rows `x` `[R, D]` in the reference `there`.

    Every eighth row is held out of the fit. Law: the mean divergence, in nats, falls on the fitted and on the held-out
    rows, or nothing changes.
    """
    return descend(
        start,
        (z, x),
        lambda part, rows: _divergence(part, there, *rows),
        lambda part, rows, damp: _step(part, there, rows[0], rows[1], damp),
        damp,
    )


def _step(part: Classes, there: Classes, z: Array, x: Array, damp: float) -> Change:
    system = _System(part, there, z, x, damp)
    return solve([system.gradient], system.product, system.preconditioned, PRODUCTS)


def _rows(part: Classes, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    return pieces(part.table.shape[1], *arrays)


def _logs(scores: Array) -> Array:
    """The logarithms of the probabilities `[R, N]`, in the memory of the scores."""
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
        """Approximately the inverse times a change: exact where a row's input and probabilities are independent."""
        dtype = self.part.turn.dtype
        return [(self.before @ change[0] @ self.behind).astype(dtype)]


def _inverse(m: Array, damp: float = TABLE_DAMP) -> tuple[Array, float]:
    """The inverse of a damped matrix, and what was added to its diagonal."""
    level = float(np.diag(m).mean())
    _, lower, used = damped(m, damp)
    factor = invert_lower(lower)
    return factor.T @ factor, used * level
