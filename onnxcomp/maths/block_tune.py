"""Weights of one part of a layer, and of the norm behind it, tuned to target outputs by Adam (arXiv 1412.6980).

One row: `y = norm(rest + scale * part(x))`, `x [d]`, `rest`, `y [N]`; the part is a feed-forward part or one linear.
Gradients are written out, so that nothing but numpy is needed. Each batch is worked on in pieces of fixed size, whose
gradients are added in order: results do not depend on the number of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.newton import Change, Fitted

__all__ = ["ROWS_READ", "Affine", "Block", "Norm", "Rows", "tune"]

BATCH = 512  # rows of a step: 240 steps are three passes over 41,000 rows, some thousand sentences
STEPS = 240
ROWS_READ = BATCH * STEPS
CHECKS = 6  # times the unseen rows are looked at: the best state of these is kept
PIECE = 128  # rows of a piece: its hidden values stay in the second cache, and four pieces a batch feed the cores
RATE = 0.01  # of a step, in spreads of each weight; it falls to zero along a cosine
FIRST, SECOND = 0.9, 0.99  # decay of the moments: the second forgets in 100 steps, of 240
LEAST_SPREAD = 0.1  # of the mean magnitude: gains that are all alike have no spread
TINY = 1e-12  # added to the root of the second moment, of gradients of an error relative to the target's squares


class Part(Protocol):
    """What makes the rows that are added: a function of `x` with weights."""

    @property
    def weights(self) -> list[Array]:
        """All that is tuned."""
        ...

    def having(self, weights: Sequence[Array]) -> Self:
        """The part with other weights."""
        ...

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Outputs `[R, N]` for rows `[R, d]`, and what `gradients` needs again."""
        ...

    def gradients(self, x: Array, kept: Any, e: Array) -> Iterator[Array]:
        """The gradient by every weight, for gradients `e` `[R, N]` by the outputs."""
        ...


@dataclass(frozen=True)
class Affine:
    """One linear `[K, N]`; where it has a bias, the last row with a column of ones in `x`."""

    weight: Array

    @property
    def weights(self) -> list[Array]:
        """The weight."""
        return [self.weight]

    def having(self, weights: Sequence[Array]) -> Affine:
        """Another weight."""
        return Affine(weights[0])

    def forward(self, x: Array) -> tuple[Array, Any]:
        """`x W`."""
        return x @ self.weight, None

    def gradients(self, x: Array, kept: Any, e: Array) -> Iterator[Array]:
        """`x^T e`."""
        yield x.T @ e


@dataclass(frozen=True)
class Norm:
    """A LayerNorm (`centred`) or RMSNorm over the channels, with gain `[N]` and maybe bias `[N]`."""

    gain: Array
    bias: Array | None
    epsilon: float
    centred: bool

    @property
    def weights(self) -> list[Array]:
        """Gain, and bias if there is one."""
        return [self.gain] if self.bias is None else [self.gain, self.bias]

    def having(self, weights: Sequence[Array]) -> Norm:
        """The norm with other weights."""
        return replace(self, gain=weights[0], bias=None if self.bias is None else weights[1])

    def normalized(self, s: Array) -> tuple[Array, Array]:
        """Rows `[R, N]` of mean square one, and the factors `[R, 1]` that made them so."""
        if self.centred:
            s = s - s.mean(axis=1, keepdims=True)
        factor = 1 / np.sqrt(np.square(s).mean(axis=1, keepdims=True) + np.asarray(self.epsilon, s.dtype))
        return s * factor, factor

    def scaled(self, z: Array) -> Array:
        """Normalized rows with gain and bias."""
        return z * self.gain if self.bias is None else z * self.gain + self.bias

    def gradients(self, z: Array, factor: Array, e: Array) -> tuple[Array, list[Array]]:
        """The gradient by the norm's input `[R, N]`, and those by its weights, for gradients `e` by its output."""
        own = [(e * z).sum(axis=0)] if self.bias is None else [(e * z).sum(axis=0), e.sum(axis=0)]
        by_z = e * self.gain
        ahead = by_z - z * (by_z * z).mean(axis=1, keepdims=True)
        if self.centred:
            ahead -= by_z.mean(axis=1, keepdims=True)
        return ahead * factor, own


@dataclass(frozen=True)
class Rows:
    """Rows that belong together: inputs `[R, d]`, what else is added `[R, N]`, and the target `[R, N]`."""

    x: Array
    rest: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)

    def take(self, at: Array | slice) -> Rows:
        """Some of them."""
        return Rows(self.x[at], self.rest[at], self.y[at])

    def pieces(self) -> list[Rows]:
        """All of them in order, few at a time."""
        return [self.take(slice(i, i + PIECE)) for i in range(0, len(self), PIECE)]


@dataclass(frozen=True)
class Block:
    """A part whose output, times `scale` `[N]` or `[1]`, is added to the stream, and the norm of the sum if tuned."""

    part: Part
    scale: Array | None = None
    norm: Norm | None = None

    @property
    def weights(self) -> list[Array]:
        """Those of the part, then those of the norm."""
        return [*self.part.weights, *(self.norm.weights if self.norm is not None else ())]

    def having(self, weights: Sequence[Array]) -> Block:
        """The block with other weights."""
        count = len(self.part.weights)
        norm = None if self.norm is None else self.norm.having(weights[count:])
        return Block(self.part.having(weights[:count]), self.scale, norm)

    def added(self, x: Array) -> Array:
        """What the part adds to the stream: `[R, N]`."""
        out, _ = self.part.forward(x)
        return out if self.scale is None else out * self.scale

    def error(self, rows: Rows) -> float:
        """Squared error over some rows."""
        return sum(map(self._error, rows.pieces()))

    def _error(self, rows: Rows) -> float:
        s = rows.rest + self.added(rows.x)
        out = s if self.norm is None else self.norm.scaled(self.norm.normalized(s)[0])
        return float(np.square(out - rows.y, dtype=np.float64).sum())

    def gradients(self, rows: Rows) -> Change:
        """Half of the gradient of the squared error over a few rows, by every weight."""
        out, kept = self.part.forward(rows.x)
        s = rows.rest + (out if self.scale is None else out * self.scale)
        own: Change = []
        if self.norm is None:
            e = s - rows.y
        else:
            z, factor = self.norm.normalized(s)
            e, own = self.norm.gradients(z, factor, self.norm.scaled(z) - rows.y)
        return [*self.part.gradients(rows.x, kept, e if self.scale is None else e * self.scale), *own]


def tune(start: Block, fitted: Rows, unseen: Rows, rate: float = RATE) -> Fitted[Block]:
    """The block tuned on `fitted` rows, in the state of least error on `unseen` ones; `start` where none is better.

    Law: the squared error on the unseen rows falls, or nothing changes.
    """
    block, best = start, start
    before = after = start.error(unseen)
    if not len(fitted) or before <= 0:
        return Fitted(start, before, before)
    adam = _Adam(start.weights, rate, float(np.square(fitted.y, dtype=np.float64).mean()))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for i, at in enumerate(_batches(len(fitted))):
            block = block.having(adam.step(block.weights, _gradients(pool, block, fitted.take(at)), i))
            if (i + 1) % (STEPS // CHECKS) == 0 and (error := block.error(unseen)) < after:
                best, after = block, error
    return Fitted(best, before, after)


def _batches(count: int) -> Iterator[Array]:
    """Indices of the rows of every step: shuffled passes over all rows, one after another."""
    rng, waiting = np.random.default_rng(0), np.zeros(0, np.int64)
    for _ in range(STEPS):
        while len(waiting) < BATCH:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


def _gradients(pool: Executor, block: Block, rows: Rows) -> Change:
    """The mean gradient over the rows of a batch."""
    first, *rest = pool.map(block.gradients, rows.pieces())
    for total, *more in zip(first, *rest, strict=True):
        for m in more:
            total += m
        total /= len(rows)
    return first


class _Adam:
    """Steps of Adam, each weight at a rate relative to the spread of its matrix."""

    def __init__(self, weights: Sequence[Array], rate: float, level: float) -> None:
        self.rates = [rate * spread(w) for w in weights]
        self.level = max(level, TINY)
        self.first, self.second = ([np.zeros_like(w) for w in weights] for _ in range(2))

    def step(self, weights: Sequence[Array], gradients: Change, i: int) -> list[Array]:
        """The weights after step `i`, from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * i / STEPS))  # no numpy scalar, which would make float64 of float32
        new = []
        for w, g, m, v, rate in zip(weights, gradients, self.first, self.second, self.rates, strict=True):
            g /= self.level
            m *= FIRST
            m += (1 - FIRST) * g
            g *= g
            v *= SECOND
            v += (1 - SECOND) * g
            np.sqrt(v, out=g)
            g *= 1 / math.sqrt(1 - SECOND ** (i + 1))
            g += TINY
            np.divide(m, g, out=g)
            g *= -cosine * rate / (1 - FIRST ** (i + 1))
            new.append(w + g)
        return new


def spread(w: Array) -> float:
    """How far the numbers of a weight lie apart: their standard deviation, or a share of their mean magnitude."""
    return float(max(w.std(), LEAST_SPREAD * np.abs(w).mean()))
