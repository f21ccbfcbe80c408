"""Sparsity: which weights become zero, and how the others are refitted.

Layout of ONNX's MatMul: `y = x W`, `W [K, N]`; a mask `[K, N]` is true where a weight stays. N:M patterns and blocks
run along `K`, the axis that is summed over, as sparse tensor cores want it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.maths import LAZY, Array, Float64
from onnxcomp.maths.scores import wanda
from onnxcomp.maths.solve import error, inverse_factor

__all__ = ["Pattern", "Sparse", "compensate", "mask", "order", "sparsegpt", "zeroed"]

Mask = NDArray[np.bool_]
Choose = Callable[[Float64, Float64, int], Mask]  # weights of a span, their diagonal of U, where the span starts
SWEEP_DAMP = 0.01  # of a Gram matrix, relative to the mean of its diagonal, as in the SparseGPT and GPTQ papers
ROUNDING = 1e-6  # relative gain of a swap below which it is float32 noise


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: anywhere, all but `n` of every `m` in-channels, or in whole blocks of `n x m`."""

    kind: str
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `unstructured`, `2:4` or `block 16x1`; raises `DataError`."""
        if text == "unstructured":
            return cls(text)
        if (sizes := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(sizes[1]) < int(sizes[2]) <= LAZY:
            return cls("n:m", int(sizes[1]), int(sizes[2]))
        if (sizes := re.fullmatch(r"block (\d+)x(\d+)", text)) and int(sizes[1]) * int(sizes[2]) > 1:
            return cls("block", int(sizes[1]), int(sizes[2]))
        raise DataError(
            f"'{text}' is no sparsity pattern: say unstructured, N:M such as 2:4, or block RxC such as block 16x1"
        )

    def refuses(self, k: int, n: int) -> str:
        """Why weights `[K, N]` cannot take the pattern, empty if they can."""
        if self.kind == "n:m" and k % self.m:
            return f"its {k} in-channels do not divide into groups of {self.m}"
        if self.kind == "block" and (k % self.n or n % self.m):
            return f"{k}x{n} does not divide into blocks of {self.n}x{self.m}"
        return ""

    def holds(self, weights: Array, ratio: float) -> bool:
        """Whether weights have at least these zeros already."""
        zero = np.asarray(weights) == 0
        if self.kind == "n:m":
            return bool((zero.reshape(-1, self.m, zero.shape[1]).sum(axis=1) >= self.m - self.n).all())
        if self.kind == "block":
            return bool(_tiles(zero, self.n, self.m).all(axis=(1, 3)).mean() >= ratio)
        return bool(zero.mean() >= ratio)


@dataclass(frozen=True)
class Sparse:
    """Weights with zeros, float64, their squared error on the calibration data, and that of zeroing alone."""

    weights: Float64
    loss: float
    plain_loss: float


def _tiles(a: Array, rows: int, columns: int) -> Array:
    return a.reshape(a.shape[0] // rows, rows, a.shape[1] // columns, columns)


def mask(scores: Array, pattern: Pattern, ratio: float, *, per_output: bool = False) -> Mask:
    """The weights of highest score that the pattern keeps: exactly a share `ratio` is removed, rounded to whole ones.

    `per_output` compares only within an out-channel (Wanda); ties go to the first.
    """
    s = np.asarray(scores, np.float64)
    k, n = s.shape
    if pattern.kind == "n:m":
        groups = s.reshape(k // pattern.m, pattern.m, n)
        return _highest(groups, pattern.n, 1).reshape(k, n)
    if pattern.kind == "block":
        tiles = _tiles(s, pattern.n, pattern.m).sum(axis=(1, 3))
        kept = mask(tiles, Pattern("unstructured"), ratio, per_output=per_output)
        return np.repeat(np.repeat(kept, pattern.n, axis=0), pattern.m, axis=1)
    if per_output:
        return _highest(s, k - round(ratio * k), 0)
    return _highest(s.reshape(-1), s.size - round(ratio * s.size), 0).reshape(k, n)


def _highest(s: Float64, count: int, axis: int) -> Mask:
    """True at the `count` largest along an axis."""
    order = np.argsort(-s, axis=axis, kind="stable")
    chosen = np.zeros(s.shape, bool)
    np.put_along_axis(chosen, np.take(order, np.arange(count), axis=axis), True, axis=axis)
    return chosen


def zeroed(weights: Array, pattern: Pattern, ratio: float, method: str, inputs: Array | None, repair: bool) -> Float64:
    """Weights with zeros by `magnitude`, `wanda` or `sparsegpt`; `inputs` is the Gram matrix or, for wanda, norms.

    With `repair` (which needs the Gram matrix) the other weights are refitted.
    """
    w = np.asarray(weights, np.float64)
    if method == "magnitude":
        keep = mask(np.abs(w), pattern, ratio)
    elif inputs is None:
        raise DataError(f"'{method}' needs statistics of the inputs")
    elif method == "sparsegpt":
        return sparsegpt(inputs, w, pattern, ratio).weights
    else:
        norm = inputs if inputs.ndim == 1 else np.sqrt(np.diag(inputs))
        keep = mask(wanda(w, norm), pattern, ratio, per_output=True)
    return compensate(inputs, w, keep).weights if repair and inputs is not None else w * keep


def compensate(gram: Array, weights: Array, keep: Mask, damp: float = SWEEP_DAMP) -> Sparse:
    """Weights with the given zeros, the others refitted in-channel by in-channel (the sweep of SparseGPT).

    Law: no out-channel's error on the calibration data is larger than by zeroing alone.
    """
    w = np.asarray(weights, np.float64)
    swept = _sweep(gram, w, damp, lambda rest, upper, start: keep[start : start + len(rest)])
    return _better(np.asarray(gram), w, swept * keep, w * keep)


def sparsegpt(gram: Array, weights: Array, pattern: Pattern, ratio: float, damp: float = SWEEP_DAMP) -> Sparse:
    """Zeros chosen by `W_kn^2 / U_kk^2` and compensated in one sweep (SparseGPT, Frantar 2023, arXiv 2301.00774).

    Law: the error on the calibration data is not larger than that of zeroing the smallest weights.
    """
    w = np.asarray(weights, np.float64)

    def choose(rest: Float64, upper: Float64, start: int) -> Mask:
        return mask(np.square(rest / upper[:, None]), pattern, ratio)

    keep = mask(np.abs(w), pattern, ratio)
    plain = float(error(gram, w * keep - w).sum())
    ours = _sweep(gram, w, damp, choose, _span(pattern), pattern.m if pattern.kind == "n:m" else 0)
    lost = float(error(gram, ours - w).sum())
    if lost <= plain:
        return Sparse(ours, lost, plain)
    return compensate(gram, w, keep, damp)  # few in-channels: early choices cannot know the last ones


def _span(pattern: Pattern) -> int:
    """In-channels among which zeros are chosen at once: a whole number of groups."""
    step = pattern.m if pattern.kind == "n:m" else pattern.n if pattern.kind == "block" else 1
    return max(1, LAZY // step) * step


def _better(gram: Array, w: Float64, ours: Float64, plain: Float64) -> Sparse:
    """Out-channel by out-channel the one of two that loses less."""
    a, b = error(gram, ours - w), error(gram, plain - w)
    return Sparse(np.where(a <= b, ours, plain), float(np.minimum(a, b).sum()), float(b.sum()))


def _sweep(gram: Array, w: Float64, damp: float, choose: Choose, span: int = LAZY, step: int = 0) -> Float64:
    """Visit in-channels in order; the error of each zero is spread over the later ones.

    Zeros are chosen `step` in-channels at a time, on the weights updated so far, or for a whole span at once.
    """
    g = np.asarray(gram, np.float64)
    dead = np.diag(g) <= 0
    upper, _ = inverse_factor(np.where(np.eye(len(g), dtype=bool) & dead, 1.0, (g + g.T) / 2), damp)
    diagonal = np.diag(upper)
    rest = w.copy()
    for start in range(0, len(w), span):
        end = min(start + span, len(w))
        keep = np.zeros((end - start, w.shape[1]), bool)
        errors = np.zeros((end - start, w.shape[1]))
        for i in range(start, end):
            if (i - start) % (step or span) == 0:
                group = slice(i, min(end, i + (step or span)))
                keep[i - start : group.stop - start] = choose(rest[group], diagonal[group], i)
            e = np.where(keep[i - start], 0.0, rest[i]) / upper[i, i]
            rest[i + 1 : end] -= np.outer(upper[i, i + 1 : end], e)
            rest[i] = np.where(keep[i - start], rest[i], 0.0)
            errors[i - start] = e
        rest[end:] -= upper[start:end, end:].T @ errors
    return rest


def order(scores: Array, pattern: Pattern, rounds: int, rng: np.random.Generator) -> Array:
    """An order of the in-channels in which an N:M pattern keeps more of the scores: `[K]`, by swaps that pay.

    Every round pairs the groups by chance and swaps one channel of each where that raises what both keep
    (after Pool and Yu, "Channel permutations for N:M sparsity", 2021). Law: never keeps less than the order given.
    """
    s = np.asarray(scores, np.float32)
    groups = np.arange(len(s)).reshape(-1, pattern.m)

    def kept(channels: Array) -> Array:
        """What each group of channels `[g, m]` keeps."""
        best = np.partition(s[channels], pattern.m - pattern.n, axis=1)[:, pattern.m - pattern.n :]
        return np.asarray(best.sum(axis=(1, 2)))

    held = kept(groups)
    for _ in range(rounds if len(groups) > 1 else 0):
        pairs = rng.permutation(len(groups))[: len(groups) // 2 * 2].reshape(-1, 2)
        a, b = pairs.T
        at, to = rng.integers(pattern.m, size=(2, len(pairs)))
        first, second = groups[a].copy(), groups[b].copy()
        rows = np.arange(len(pairs))
        first[rows, at], second[rows, to] = groups[b, to], groups[a, at]
        new = np.stack([kept(first), kept(second)])
        pays = new.sum(axis=0) > (held[a] + held[b]) * (1 + ROUNDING)
        groups[a[pays]], groups[b[pays]] = first[pays], second[pays]
        held[a[pays]], held[b[pays]] = new[0, pays], new[1, pays]
    return groups.reshape(-1)
