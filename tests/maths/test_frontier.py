"""The choice of an option for each site: equal to brute force, monotone, within its budget."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.maths import frontier
from onnxcomp.maths.frontier import Frontier, Option

SITES = st.lists(
    st.lists(st.builds(Option, st.integers(1, 9).map(float), st.floats(0, 1)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(SITES)
def test_it_equals_brute_force(sites):
    found = Frontier.of(sites)
    every = [(sum(o.cost for o in x), sum(o.loss for o in x)) for x in itertools.product(*sites)]
    for budget in range(46):
        least = min((loss for cost, loss in every if cost <= budget), default=None)
        at = found.within(budget)
        assert (at is None) == (least is None)
        if at is not None:
            assert found.losses[at] == pytest.approx(least, abs=1e-12)
    for most in (0.1, 0.5, 2.0):
        cheapest = min((cost for cost, loss in every if loss <= most + 1e-12), default=None)
        at = found.losing(most + 1e-12)
        assert (at is None) == (cheapest is None)
        if at is not None:
            assert found.costs[at] == cheapest


@settings(max_examples=60, deadline=None)
@given(SITES)
def test_it_is_monotone_and_its_choices_are_what_they_say(sites):
    found = Frontier.of(sites)
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.losses) < 0).all()
    for at, (cost, loss) in enumerate(zip(found.costs, found.losses, strict=True)):
        picked = [options[i] for options, i in zip(sites, found.choice(at), strict=True)]
        assert sum(o.cost for o in picked) == pytest.approx(cost)
        assert sum(o.loss for o in picked) == pytest.approx(loss)


def test_with_more_totals_than_are_kept_it_stays_close(monkeypatch):
    rng = np.random.default_rng(0)
    sites = [[Option(float(c), float(1 / c + rng.random() / 9)) for c in rng.random(4) + 0.1] for _ in range(12)]
    exact = Frontier.of(sites)
    monkeypatch.setattr(frontier, "TOTALS", 256)
    few = Frontier.of(sites)
    assert len(few.costs) <= 257 < len(exact.costs)
    assert few.costs[0] == pytest.approx(exact.costs[0])
    for budget in np.linspace(exact.costs[0], exact.costs[-1], 20):
        assert few.losses[few.within(budget)] <= exact.losses[exact.within(budget * 0.95) or 0] + 1e-9
