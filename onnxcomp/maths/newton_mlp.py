"""All weights of a feed-forward part fitted together to target outputs, by damped Gauss-Newton steps.

One row: `y = h down`, `h = act(x up)`, or `h = act(x gate) * (x up)` where there is a gate; with `tail` the last row of
`down` is a bias. To first order in all weights together `y` is linear in their change, so each step is one
least-squares problem. It is solved by conjugate gradients, which use the Gauss-Newton matrix only in products with
it and so never hold it (Martens, Deep learning via Hessian-free optimization, 2010). The preconditioner takes the
inputs of a matrix and its outputs apart (as Martens and Grosse, K-FAC, 2015, arXiv 1503.05671, section 3), which makes
a few products enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.activations import DERIVED
from onnxcomp.maths.newton import PRODUCTS, Change, Fitted, descend, pieces, solve
from onnxcomp.maths.solve import damped, invert_lower

__all__ = ["Ffn", "fit"]

# Damping of each weight, relative to the mean square of the inputs of its matrix. More takes smaller steps, less
# overfits: it is raised tenfold where a step does not lower the error on held-out rows.
WEIGHT_DAMP = 0.1
DEAD = 1e-30  # in place of the squared gradient of a channel that is never active, a divisor


@dataclass(frozen=True)
class Ffn:
    """`up` and `gate` `[d, K]`, `down` `[K, N]`, with `tail` `[K + 1, N]`, and the activation's name."""

    up: Array
    gate: Array | None
    down: Array
    activation: str
    tail: bool = False

    @property
    def weights(self) -> list[Array]:
        """Up, gate if there is one, down."""
        return [w for w in (self.up, self.gate, self.down) if w is not None]

    def moved(self, change: Sequence[Array], by: float = 1.0) -> Ffn:
        """The part with its weights moved by a multiple of a change."""
        return self.having([(w + by * c).astype(w.dtype) for w, c in zip(self.weights, change, strict=True)])

    def hidden(self, x: Array) -> tuple[Array, list[Array]]:
        """The input of `down`, `[R, K]` or with ones `[R, K + 1]`, and its derivatives `[R, K]` by `x up`, `x gate`."""
        act = DERIVED[self.activation]
        if self.gate is None:
            h, slope = act(x @ self.up)
            slopes = [slope]
        else:
            u = x @ self.up
            a, slope = act(x @ self.gate)
            h, slopes = a * u, [a, slope * u]
        if self.tail:
            h = np.concatenate([h, np.ones((len(h), 1), h.dtype)], axis=1)
        return h, slopes

    def having(self, weights: Sequence[Array]) -> Ffn:
        """The part with other weights, in the order of `weights`."""
        return replace(self, up=weights[0], gate=weights[1] if self.gate is not None else None, down=weights[-1])

    def forward(self, x: Array) -> tuple[Array, tuple[Array, list[Array]]]:
        """The outputs `[R, N]` for a few rows, with the hidden values and slopes that made them."""
        kept = self.hidden(x)
        return kept[0] @ self.down, kept

    def gradients(self, x: Array, kept: tuple[Array, list[Array]], e: Array) -> Iterator[Array]:
        """The gradient by every weight, for gradients `e` `[R, N]` by the outputs."""
        h, slopes = kept
        gradient = e @ self.down[: self.up.shape[1]].T  # [R, K]
        for s in slopes:
            yield x.T @ (s * gradient)
        yield h.T @ e

    def __call__(self, x: Array) -> Array:
        """The outputs `[R, N]` for rows `[R, d]`."""
        return np.concatenate([self.hidden(a)[0] @ self.down for (a,) in _rows(self, x)])


def fit(start: Ffn, x: Array, y: Array, damp: float = WEIGHT_DAMP) -> Fitted[Ffn]:
    """Weights whose outputs for rows `x` `[R, d]` are closer to `y` `[R, N]`; `start` where none are found.

    Every eighth row is held out of the fit. Law: the squared error falls on the fitted and on the held-out rows, or
    nothing changes.
    """
    return descend(start, (x, y), _error, lambda part, rows, damp: _step(part, rows[0], rows[1], damp), damp)


def _rows(part: Ffn, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    return pieces(part.down.shape[0], *arrays)


def _error(part: Ffn, rows: Sequence[Array]) -> float:
    return sum(float(np.square(part(a) - b, dtype=np.float64).sum()) for a, b in _rows(part, *rows))


def _step(part: Ffn, x: Array, y: Array, damp: float) -> Change:
    """The change of all weights that is best to first order, approximately: a few products of conjugate gradients."""
    system = _System(part, x, damp)
    return solve(system.gradient(y), system.product, system.preconditioned, PRODUCTS)


class _System:
    """The damped Gauss-Newton matrix of a part over rows `x`, as products; hidden values are recomputed for each.

    The damping of each weight is relative to the mean square of its matrix's inputs and of its output's gradient.
    """

    def __init__(self, part: Ffn, x: Array, damp: float) -> None:
        self.part, self.x = part, x
        d, k = x.shape[1], part.down.shape[0]
        inner, outer = np.zeros((d, d)), np.zeros((k, k))
        squares = [np.zeros(part.up.shape[1]) for _ in part.weights[:-1]]
        for (a,) in _rows(part, x):
            h, slopes = part.hidden(a)
            inner += a.T @ a
            outer += h.T @ h
            for total, slope in zip(squares, slopes, strict=True):
                total += np.square(slope).sum(axis=0, dtype=np.float64)
        reach = np.square(self._read, dtype=np.float64).sum(axis=1)
        dtype = part.down.dtype
        # Mean square of the gradient of each column of up and gate, `[K]` each.
        means = (np.maximum(s / max(len(x), 1) * reach, DEAD) for s in squares)
        self.gradients = [m.astype(dtype) for m in means]
        del h, slopes
        self.damps, self.factors = list[float](), list[Array]()
        for m in (inner, outer):
            level = float(np.diag(m).mean())
            _, lower, used = damped(m, damp, overwrite=True)
            self.damps.append(used * level)
            self.factors.append(invert_lower(lower).astype(dtype))

    @property
    def _read(self) -> Array:
        """`down` without its bias."""
        return self.part.down[: self.part.up.shape[1]]

    def gradient(self, y: Array) -> Change:
        """Half of the descent direction: the residual, back through the part."""
        total = [np.zeros_like(w) for w in self.part.weights]
        for a, b in _rows(self.part, self.x, y):
            h, slopes = self.part.hidden(a)
            self._back(total, a, (h, slopes), b - h @ self.part.down)
        return total

    def product(self, change: Change) -> Change:
        """The damped Gauss-Newton matrix times a change of the weights."""
        total = self._damped(change)
        *ahead, last = change
        for (a,) in _rows(self.part, self.x):
            h, slopes = self.part.hidden(a)
            moved = np.asarray(sum(s * (a @ c) for s, c in zip(slopes, ahead, strict=True)))
            self._back(total, a, (h, slopes), moved @ self._read + h @ last)
        return total

    def _back(self, total: Change, x: Array, kept: tuple[Array, list[Array]], e: Array) -> None:
        for t, g in zip(total, self.part.gradients(x, kept, e), strict=True):
            t += g

    def _damped(self, change: Change) -> Change:
        inner, outer = self.damps
        return [*(inner * b * c for b, c in zip(self.gradients, change, strict=False)), outer * change[-1]]

    def preconditioned(self, change: Change) -> Change:
        """Approximately the inverse times a change: exact for each matrix if inputs and gradients were independent."""
        inner, outer = self.factors
        ahead = [inner.T @ (inner @ c) / b for b, c in zip(self.gradients, change, strict=False)]
        return [*ahead, outer.T @ (outer @ change[-1])]
