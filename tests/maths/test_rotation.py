"""Hadamard matrices of the sizes of real models, and random rotations of any."""

import numpy as np
import pytest

from onnxcomp.maths.rotation import hadamard, is_rotation, random_rotation
from onnxcomp.maths.trial_rounding import Trial, TrialRounding, most_columns


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 40, 60, 192, 384, 576, 896])
def test_hadamard_rows_are_orthogonal_signs(n):
    h = hadamard(n)
    assert h is not None
    assert set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [3, 6, 18, 92])
def test_sizes_without_a_known_one_are_told(n):
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [1, 12, 33, 64])
def test_random_rotations_are_orthogonal_and_spread_one_channel(n):
    q = random_rotation(n, np.random.default_rng(0))
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-14)
    if hadamard(n) is not None:
        np.testing.assert_allclose(np.abs(q), n**-0.5)
    assert not np.array_equal(q, random_rotation(n, np.random.default_rng(1))) or n == 1


def test_trial_error_is_that_of_rounding_by_hand():
    rng = np.random.default_rng(0)
    rows, w = rng.standard_normal((40, 6)), rng.standard_normal((6, 3))
    held = rows[::4]
    low, high = min(rows.min(), 0), max(rows.max(), 0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    x = (np.clip(np.rint(held / step) + zero, 0, 255) - zero) * step
    scale = np.abs(w).max(axis=0) / 127
    want = np.sum((x @ (np.rint(w / scale) * scale) - held @ w) ** 2) / np.sum((held @ w) ** 2)
    assert Trial(rows, [w], TrialRounding(8, 0, 8)).error() == pytest.approx(want, rel=1e-4)


def test_a_trial_without_rounding_has_no_error_whatever_is_rewritten():
    rng = np.random.default_rng(1)
    rows, w = rng.standard_normal((16, 12)), rng.standard_normal((12, 5))
    trial = Trial(rows, [w], TrialRounding(0, 0, 0))
    gain = np.exp(rng.standard_normal(12))
    assert trial.error(gain=gain) < 1e-25
    assert trial.error(basis=random_rotation(12, rng)) < 1e-25
    assert len(trial.seen) == 12
    assert most_columns(w, 2).shape == (12, 2)


def test_a_rotation_lowers_the_trial_error_of_rows_with_an_outlier():
    rng = np.random.default_rng(2)
    rows, w = rng.standard_normal((64, 16)), rng.standard_normal((16, 8))
    rows[:, 3] *= 100
    w[3] /= 100
    trial = Trial(rows, [w], TrialRounding(8, 0, 8))
    assert trial.error(basis=random_rotation(16, rng)) < 0.3 * trial.error()  # the range is 1 / sqrt(16) as wide


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rotations_are_told_from_weights(dtype):
    rng = np.random.default_rng(3)
    q = random_rotation(48, rng)
    assert is_rotation(q.astype(dtype))
    assert is_rotation(np.linalg.qr(rng.standard_normal((33, 33)))[0].astype(dtype))
    assert is_rotation((q - q.mean(axis=0)).astype(dtype))
    assert not is_rotation((q * np.linspace(1, 1.1, 48)).astype(dtype))
    assert not is_rotation(np.full((48, 48), 48**-0.5, dtype))
    assert not is_rotation((rng.standard_normal((48, 48)) / 48**0.5).astype(dtype))
    assert not is_rotation(q[:24].astype(dtype))
