"""Which units stay in each layer, from error curves: the choice that loses least under a ratio or budgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.allocation import best
from onnxcomp.maths.error_curves import Allocation, Curve
from onnxcomp.methods.width import budgets
from onnxcomp.methods.width.budgets import Currency

__all__ = ["by_curves"]


def by_curves(owner: str, unit: str, curves: Sequence[Curve], given: Sequence[Currency], ratio: float) -> list[Array]:
    """Kept units of each layer under the `given` budgets, or under a ratio where there are none."""
    return _by_budget(owner, unit, curves, given) if given else _by_ratio(curves, ratio)


def _by_ratio(curves: Sequence[Curve], ratio: float) -> list[Array]:
    """Kept units of each layer when a share `ratio` of the parameters is removed, to the nearest unit."""
    costs = [c.candidate.cost for c in curves]
    total = sum(cost * c.candidate.units for cost, c in zip(costs, curves, strict=True))
    steps = [cost * (n[-1] - n[-2]) for cost, c in zip(costs, curves, strict=True) if len(n := c.counts) > 1]
    found = Allocation.of(curves, lambda i, n: costs[i] * n)
    return _kept(curves, found.within((1 - ratio) * total + min(steps, default=0.0) / 2))


def _by_budget(owner: str, unit: str, curves: Sequence[Curve], currencies: Sequence[Currency]) -> list[Array]:
    """Kept units of each layer so that every budget is met; raises `RecipeError` where one cannot be.

    Of several budgets each counts the same in the choice of layers. What cuts of neighbouring layers save together may
    be less than the sum of what each saves, so the counts are those of the costliest choice that a recount lets pass.
    """
    found = Allocation.of(curves, lambda i, n: sum(c.cost(i, n) for c in currencies))

    def fits(counts: list[int]) -> bool:
        keeps = _kept(curves, counts)
        return all(c.budget.remaining(keeps) <= c.budget.share for c in currencies)

    if (counts := found.meeting(fits)) is not None:
        return _kept(curves, counts)
    least = _kept(curves, found.at(0))
    missed = next(c.budget for c in currencies if c.budget.remaining(least) > c.budget.share)
    raise budgets.out_of_reach(owner, unit, missed, least)


def _kept(curves: Sequence[Curve], counts: Sequence[int]) -> list[Array]:
    return [np.asarray(best(c.candidate, n)) for c, n in zip(curves, counts, strict=True)]
