"""Backward elimination against exact greedy elimination by least squares on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.maths import solve
from onnxcomp.maths.elimination import elimination

UNITS = {
    "of three channels": np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1]),
    "of one channel": np.array([3, 1, 2, -1, 0, 4, -1, -1, 5, 6, 7, 8]),
}


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS.keys())
def test_each_step_costs_what_least_squares_loses_and_is_the_cheapest(units: np.ndarray):
    rng = np.random.default_rng(0)
    count = units.max() + 1
    x, w = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12)), rng.standard_normal((12, 5))
    gram = x.T @ x
    added = elimination(gram, w, units, count, damp=1e-12)
    np.testing.assert_array_equal(gram, x.T @ x)  # what is given is not written to
    before = most = 0.0
    for place, u in enumerate(order := np.argsort(added, kind="stable")):
        left = {
            v: np.linalg.lstsq(x[:, ~np.isin(units, [*order[:place], v])], x @ w, rcond=None)[1].sum()
            for v in order[place:]
        }
        assert min(left, key=left.__getitem__) == u
        most = max(most, left[u] - before)
        assert added[u] == pytest.approx(most, rel=1e-6)
        before = left[u]


def test_rounds_leave_the_error_of_one_by_one():
    """Hundreds of channels go in rounds; what is left after a cut is as good as by exact greedy elimination."""
    rng = np.random.default_rng(0)
    k = 300
    x = rng.standard_normal((900, k)) @ (rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k)))
    gram, w = x.T @ x, rng.standard_normal((k, 20))
    added, exact, single = elimination(gram, w, np.arange(k), k), _one_by_one(gram, w), _alone(gram, w)
    for share in (0.3, 0.6):
        ours, best, plain = (_error(gram, w, np.sort(np.argsort(s)[int(share * k) :])) for s in (added, exact, single))
        assert ours == pytest.approx(best, rel=0.01)
        assert ours < 0.97 * plain  # scores of each channel for itself are worse


def test_of_two_units_that_replace_each_other_one_stays():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 8)), rng.standard_normal((8, 5))
    x[:, 4:6] = x[:, :2] + 1e-3 * x[:, 4:6]
    alone = [_loss_without(x, w, [2 * u, 2 * u + 1]) for u in range(4)]
    assert alone[0] < 0.01 * alone[1]
    assert alone[2] < 0.01 * alone[1]
    added = elimination(x.T @ x, w, np.arange(8) // 2, 4)
    assert min(added[0], added[2]) < 0.01 * min(added[1], added[3]) < max(added[0], added[2])


def test_channels_that_never_move_go_first():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((50, 6)), rng.standard_normal((6, 3))
    x[:, [1, 4]] = 0
    added = elimination(x.T @ x, w, np.arange(6), 6)
    assert set(np.argsort(added, kind="stable")[:2]) == {1, 4}
    np.testing.assert_array_equal(elimination(np.zeros((6, 6)), np.zeros((6, 3)), np.arange(6), 6), np.zeros(6))


def _loss_without(x: np.ndarray, w: np.ndarray, channels: list[int]) -> float:
    """Squared error that remains without some channels when the others are refitted."""
    return float(np.linalg.lstsq(np.delete(x, channels, axis=1), x @ w, rcond=None)[1].sum())


def _error(gram: np.ndarray, w: np.ndarray, keep: np.ndarray) -> float:
    left = np.zeros_like(w)
    left[keep] = solve.repair(gram, w, keep).weights
    return float(solve.error(gram, left - w).sum())


def _alone(gram: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (w**2).sum(axis=1) / np.diag(np.linalg.inv(gram))


def _one_by_one(gram: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The place of each channel in exact greedy elimination."""
    p, v, place = np.linalg.inv(gram), w.copy(), np.full(len(w), -1)
    for i in range(len(w)):
        free = np.flatnonzero(place < 0)
        k = free[np.argmin((v[free] ** 2).sum(axis=1) / np.diag(p)[free])]
        place[k] = i
        share = p[k] / p[k, k]
        v, p = v - np.outer(share, v[k]), p - np.outer(p[:, k], share)
    return place
