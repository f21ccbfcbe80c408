"""Error curves of layers, and the amounts under which all layers together lose least, by dynamic programming.

A curve has, for each number of units that a layer may keep, what the layer costs (parameters, multiplications, seconds)
and what the model loses when this layer alone is cut so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Float64
from onnxcomp.maths.allocation import Candidate, allowed, isotonic, removed
from onnxcomp.maths.frontier import Frontier, Option

__all__ = ["Allocation", "Curve"]

# Counts of all layers together, spread evenly over those that each may keep. With 24 layers that is 170 a layer, steps
# of less than one percent of its width, and the choice takes seconds.
OPTIONS = 4096
FEWEST_OPTIONS = 32
TRIFLE = 1e-12  # of all scores of a layer: less than what tells two units apart
ROUNDING = 1e-10  # a loss: the square of a relative error of 1e-5, which sums in another order reach
ROUND = 1e-9  # of a budget: sums of costs differ by as much


@dataclass(frozen=True)
class Curve:
    """The model's loss by the number of units that a layer keeps, `losses` measured at a few numbers of `kept` ones.

    It never falls when more is removed (isotonic). Between measured amounts it is linear in the sum of the scores of
    the removed units: scores say the form of a curve, measurements its height. Beyond the last one the slope stays.
    """

    candidate: Candidate
    kept: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def tells(self) -> bool:
        """Whether some cut loses more than rounding does; few samples can be fitted exactly."""
        return any(loss > ROUNDING for loss in self.losses)

    @property
    def counts(self) -> list[int]:
        """Every number of units that may be kept, none only where that was measured."""
        return [*([0] if 0 in self.kept else []), *allowed(self.candidate)]

    def at(self, counts: Sequence[int]) -> Float64:
        """The loss at each of these numbers of kept units."""
        order = sorted(range(len(self.kept)), key=lambda i: -self.kept[i])
        x = np.append(0.0, self._removed([self.kept[i] for i in order]))
        y = np.append(0.0, isotonic(np.array([max(self.losses[i], 0.0) for i in order])))
        wanted, slope = self._removed(counts), (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
        return np.asarray(np.interp(wanted, x, y) + np.maximum(wanted - x[-1], 0.0) * slope)

    def _removed(self, counts: Sequence[int]) -> Float64:
        """Sum of the scores of the units that go, with a trifle for each so that units of score zero count."""
        c = self.candidate
        trifle = max(float(c.scores.sum()), TRIFLE) * TRIFLE
        return removed(c, counts) + trifle * (c.units - np.asarray(counts))


@dataclass(frozen=True)
class Allocation:
    """Counts of every layer along the frontier of cost and loss, cheapest first."""

    counts: tuple[tuple[int, ...], ...]
    front: Frontier

    @classmethod
    def of(cls, curves: Sequence[Curve], cost: Callable[[int, int], float]) -> Allocation:
        """From the curves of the layers and what layer `i` costs with `n` units."""
        most = max(FEWEST_OPTIONS, OPTIONS // max(1, len(curves)))
        counts = [_thinned(c.counts, most) for c in curves]
        options = [
            [Option(cost(i, n), float(loss)) for n, loss in zip(numbers, c.at(numbers), strict=True)]
            for i, (c, numbers) in enumerate(zip(curves, counts, strict=True))
        ]
        return cls(tuple(map(tuple, counts)), Frontier.of(options))

    def at(self, place: int) -> list[int]:
        """How many units each layer keeps at one place of the frontier."""
        return [self.counts[i][option] for i, option in enumerate(self.front.choice(place))]

    def within(self, budget: float) -> list[int]:
        """The counts of least loss that cost at most so much; the cheapest where all cost more."""
        return self.at(self.front.within(budget * (1 + ROUND)) or 0)

    def meeting(self, fits: Callable[[list[int]], bool]) -> list[int] | None:
        """The costliest counts that fit, where cheaper ones fit too, by bisection; None where none do."""
        low, high = 0, len(self.front.costs) - 1
        if not fits(self.at(low)):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(self.at(middle)) else (low, middle - 1)
        return self.at(low)


def _thinned(counts: Sequence[int], most: int) -> list[int]:
    if len(counts) <= most:
        return list(counts)
    places = np.unique(np.linspace(0, len(counts) - 1, most).round().astype(np.int64))
    return [counts[i] for i in places]
