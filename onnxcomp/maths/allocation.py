"""Allocation of a cut: from scores to the units that are kept, by layer or over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

import numpy as np

from onnxcomp.maths import Array, Float64

__all__ = [
    "LARGEST_RATIO",
    "Candidate",
    "Normal",
    "allowed",
    "best",
    "choose",
    "isotonic",
    "ladder",
    "least_ratio",
    "normalised",
    "removed",
]

Normal = Literal["none", "l2", "standard"]
BISECTIONS = 24  # of a ratio, to 6e-8: finer than one unit of any layer
LARGEST_RATIO = 1.0 - 1e-6  # all but the fewest units of every group; 1 itself is no ratio


@dataclass(frozen=True)
class Candidate:
    """One group to cut: scores of its units (the highest are kept), the cost of one, and constraints on the count.

    `parts` is the part of each unit where all parts must keep equally many, `multiple` the steps of the count, `floor`
    the fewest that are kept.
    """

    scores: Float64
    cost: float = 1.0
    parts: tuple[int, ...] = ()
    multiple: int = 1
    floor: int = 1

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.scores)


def normalised(scores: Array, how: Normal) -> Float64:
    """Scores comparable between layers: over their L2 norm (Michel 2019), or less their mean over their deviation."""
    s = np.asarray(scores, np.float64)
    if how == "l2":
        norm = float(np.linalg.norm(s))
        return s / norm if norm > 0 else s
    if how == "standard":
        std = float(s.std())
        return (s - s.mean()) / std if std > 0 else s * 0
    return s


def choose(
    candidates: Sequence[Candidate],
    ratio: float,
    ranking: Literal["layer", "global"] = "layer",
    uniform: bool = False,
) -> list[Array]:
    """Kept units of each group (ascending) when a share `ratio` is removed: of each group, or of the cost of all.

    With `uniform` all groups of as many units keep equally many.
    """
    if ranking == "layer":
        counts = [c.units * (1 - ratio) for c in candidates]
    else:
        counts = _ranked(candidates, ratio)
    if uniform and candidates:
        share = sum(counts) / sum(c.units for c in candidates)
        counts = [c.units * share for c in candidates]
    return [best(c, _rounded(c, n)) for c, n in zip(candidates, counts, strict=True)]


def _ranked(candidates: Sequence[Candidate], ratio: float) -> list[float]:
    """How many units of each group are kept when the lowest of all are removed until `ratio` of the cost is.

    Units are removed in the steps that their count may take, so that rounding afterwards removes no more.
    """
    steps = [(score, i, size) for i, c in enumerate(candidates) for score, size in _steps(c)]
    kept = [c.units for c in candidates]
    budget = ratio * sum(c.cost * c.units for c in candidates)
    for _, i, size in sorted(steps, key=lambda s: s[0]):
        if budget < candidates[i].cost * size / 2:
            break
        kept[i] -= size
        budget -= candidates[i].cost * size
    return [float(n) for n in kept]


def _ordered(c: Candidate) -> Float64:
    """The scores of each part, ascending: `[parts, units of each]`."""
    parts = np.asarray(c.parts or (0,) * c.units)
    return np.stack([np.sort(c.scores[parts == p]) for p in np.unique(parts)])


def removed(c: Candidate, counts: Sequence[int]) -> Float64:
    """Sum of the scores of the units that go when a layer keeps so many, for each of the counts."""
    order = _ordered(c)
    sums = np.append(0.0, np.cumsum(order.sum(axis=0)))
    return np.asarray(sums[(c.units - np.asarray(counts, np.int64)) // len(order)])


def allowed(c: Candidate) -> list[int]:
    """Every number of units that may be kept, ascending."""
    step, lowest = _least(c)
    return [*range(lowest, c.units, step), c.units]


def _steps(c: Candidate) -> list[tuple[float, int]]:
    """Mean score and number of the units that are removed in each step of the count, from the lowest."""
    order = _ordered(c)
    step, lowest = _least(c)
    steps, kept = [], c.units
    while kept - (size := kept % step or step) >= lowest:
        first = (c.units - kept) // len(order)
        steps.append((float(order[:, first : first + size // len(order)].mean()), size))
        kept -= size
    return steps


def _least(c: Candidate) -> tuple[int, int]:
    """The steps of a count, and the fewest units that may be kept."""
    step = lcm(max(1, c.multiple), len(set(c.parts)) or 1)
    return step, -(-max(c.floor, 1) // step) * step


def _rounded(c: Candidate, count: float) -> int:
    """The nearest allowed count, the lower one where two are equally near; all units where no fewer are allowed."""
    step, lowest = _least(c)
    if count >= c.units:
        return c.units
    n = max(lowest, int(np.ceil(count / step - 0.5 - 1e-9)) * step)
    return n if n < c.units else c.units


def ladder(c: Candidate, shares: Sequence[float] = (0.0, 0.5, 0.75, 1.0)) -> list[int]:
    """Allowed counts near these shares of the units, ascending, from the fewest that may be kept to all."""
    return sorted({_rounded(c, c.units * s) for s in shares})


def best(c: Candidate, count: int) -> Array:
    """The highest scores, as many of each part; among equals the first wins."""
    if not c.parts:
        return np.sort(np.argsort(-c.scores, kind="stable")[:count])
    parts, kept = np.asarray(c.parts), []
    for p in sorted(set(c.parts)):
        members = np.flatnonzero(parts == p)
        kept.append(members[np.argsort(-c.scores[members], kind="stable")[: count // len(set(c.parts))]])
    return np.sort(np.concatenate(kept))


def least_ratio(fits: Callable[[float], bool], steps: int = BISECTIONS) -> float | None:
    """The smallest ratio in `[0, 1)` for which `fits` holds, by bisection; None where none does."""
    if fits(0.0):
        return 0.0
    low, high = 0.0, LARGEST_RATIO
    if not fits(high):
        return None
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def isotonic(values: Array) -> Float64:
    """The nearest sequence (least squares) that never falls, by pooling adjacent violators (Ayer et al., 1955)."""
    pools: list[tuple[float, int]] = []
    for x in np.asarray(values, np.float64):
        mean, count = float(x), 1
        while pools and pools[-1][0] > mean:
            other, n = pools.pop()
            mean, count = (mean * count + other * n) / (count + n), count + n
        pools.append((mean, count))
    return np.repeat([m for m, _ in pools], [n for _, n in pools])
