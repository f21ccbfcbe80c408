"""Error curves and the choice of amounts: monotone, through what was measured, and the least of all choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.maths.allocation import Candidate, allowed, removed
from onnxcomp.maths.error_curves import Allocation, Curve


@st.composite
def curves(draw, most=7):
    c = Candidate(
        np.array(draw(st.lists(st.floats(0, 10), min_size=2, max_size=most))),
        draw(st.floats(1, 5)),
        multiple=draw(st.integers(1, 2)),
        floor=draw(st.integers(1, 2)),
    )
    fewer = allowed(c)[:-1]
    kept = draw(st.lists(st.sampled_from(fewer), max_size=3, unique=True)) if fewer else []
    return Curve(c, tuple(kept), tuple(draw(st.floats(0, 5)) for _ in kept))


@given(curves())
@settings(deadline=None)
def test_a_curve_is_zero_uncut_and_never_falls_when_more_is_removed(curve):
    losses = curve.at(allowed(curve.candidate))
    assert losses[-1] == 0
    assert np.all(np.diff(losses) <= 1e-9)


def test_it_goes_through_what_was_measured_and_follows_the_scores_between():
    c = Candidate(np.array([1.0, 2.0, 3.0, 4.0, 10.0]))
    curve = Curve(c, (2, 4), (9.0, 1.0))
    assert curve.at([5, 4, 2]) == pytest.approx([0, 1, 9])
    assert curve.at([3])[0] == pytest.approx(1 + 8 * 2 / 5)  # removed 1 + 2 of 1 to 6
    assert curve.at([1])[0] == pytest.approx(9 + 8 * 4 / 5)  # the last slope goes on
    falling = Curve(c, (2, 4), (1.0, 3.0))
    assert falling.at([4, 2]) == pytest.approx([2, 2])  # pooled


def test_units_of_score_zero_still_cost_what_was_measured():
    curve = Curve(Candidate(np.zeros(4)), (2,), (1.0,))
    assert curve.at([4, 3, 2, 1]) == pytest.approx([0, 0.5, 1, 1.5])


@given(st.lists(curves(most=5), min_size=1, max_size=3), st.floats(0, 1))
@settings(deadline=None)
def test_no_choice_within_the_budget_loses_less(found, share):
    def cost(i, n):
        return found[i].candidate.cost * n

    options = [allowed(c.candidate) for c in found]
    every = list(itertools.product(*options))
    costs = np.array([sum(cost(i, n) for i, n in enumerate(x)) for x in every])
    losses = np.array([sum(c.at([n])[0] for c, n in zip(found, x, strict=True)) for x in every])
    budget = costs.min() + share * (costs.max() - costs.min())
    chosen = Allocation.of(found, cost).within(budget)
    at = every.index(tuple(chosen))
    assert costs[at] <= budget * (1 + 1e-6)
    assert losses[at] <= losses[costs <= budget].min() + 1e-9


def test_the_costliest_choice_that_a_recount_lets_pass():
    found = [Curve(Candidate(np.arange(1.0, 9.0)), (4,), (1.0,)), Curve(Candidate(np.arange(1.0, 9.0)), (4,), (3.0,))]
    allocation = Allocation.of(found, lambda i, n: n)
    assert sum(allocation.meeting(lambda counts: sum(counts) <= 11)) == 11
    assert allocation.meeting(lambda counts: False) is None
    first, second = allocation.within(12)
    assert first < second  # where it costs least


def test_what_goes_is_the_lowest_of_each_part():
    c = Candidate(np.array([5.0, 4, 3, 0, 9, 8]), parts=(0, 0, 0, 1, 1, 1))
    assert removed(c, [6, 4, 2]).tolist() == [0, 3, 3 + 4 + 8]
