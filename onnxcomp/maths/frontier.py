"""The choice of one option for each site: the least loss for every cost, where losses of sites add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Array, Float64

__all__ = ["Frontier", "Option"]

# Totals that are kept from site to site. With as few distinct costs as a model's linears have (a handful of shapes) all
# of them fit, and the choice is exact; else totals at equal distances in cost stay.
TOTALS = 8192


@dataclass(frozen=True)
class Option:
    """What one option of a site costs (bytes, seconds) and loses."""

    cost: float
    loss: float


@dataclass(frozen=True)
class Frontier:
    """The choices that no other one beats, by rising cost and falling loss.

    Law: among all choices of one option per site none has both a lower cost and a lower loss than one of these, up to
    the distance of `TOTALS`.
    """

    costs: Float64
    losses: Float64
    _steps: tuple[tuple[Array, Array], ...]  # of each site: the total before it that a total extends, and the option

    @classmethod
    def of(cls, sites: Sequence[Sequence[Option]]) -> Frontier:
        """The frontier of sites with their options, by dynamic programming over Pareto-optimal totals.

        Of the sites seen so far the totals that no other one beats are kept, and extended by every option of the next
        site (Nemhauser and Ullmann, 1969).
        """
        costs, losses, steps = np.zeros(1), np.zeros(1), []
        for options in sites:
            c = np.array([o.cost for o in options])
            d = np.array([o.loss for o in options])
            total = (costs[:, None] + c).ravel()
            lost = (losses[:, None] + d).ravel()
            kept = _thinned(total, _undominated(total, lost))
            costs, losses = total[kept], lost[kept]
            steps.append(np.divmod(kept, len(options)))
        return cls(costs, losses, tuple(steps))

    def choice(self, at: int) -> list[int]:
        """The option of every site in one of the choices."""
        picked = []
        for before, option in reversed(self._steps):
            picked.append(int(option[at]))
            at = int(before[at])
        return picked[::-1]

    def within(self, budget: float) -> int | None:
        """The choice of least loss that costs at most so much; None where none does."""
        at = int(np.searchsorted(self.costs, budget * (1 + 1e-12), side="right")) - 1
        return at if at >= 0 else None

    def losing(self, most: float) -> int | None:
        """The cheapest choice that loses at most so much; None where none does."""
        fits = np.flatnonzero(self.losses <= most)
        return int(fits[0]) if fits.size else None


def _undominated(costs: Float64, losses: Float64) -> Array:
    """Indices of the totals that no other one beats, by rising cost."""
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    before = np.concatenate(([np.inf], best[:-1]))
    return np.asarray(order[losses[order] < before])


def _thinned(costs: Float64, kept: Array) -> Array:
    """At most `TOTALS` of them, at equal distances in cost, with both ends; the best of each distance stays."""
    if len(kept) <= TOTALS:
        return kept
    place = costs[kept]
    cells = ((place - place[0]) / (place[-1] - place[0]) * (TOTALS - 1)).astype(np.int64)
    last = np.append(np.flatnonzero(np.diff(cells)), len(kept) - 1)  # within a cell the costliest loses least
    return np.asarray(kept[np.union1d([0], last)])
