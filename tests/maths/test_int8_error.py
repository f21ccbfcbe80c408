"""What int8 does to outputs, against formulas written out, and choices on rows that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.maths import formats, int8_error, saturation
from onnxcomp.maths.clipping import bin_counts, clip_range


def case(seed: int = 0, rows: int = 60, k: int = 12, n: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)


@pytest.mark.parametrize("limited", [False, True])
def test_the_error_is_that_of_rounded_inputs_times_rounded_weights(limited: bool) -> None:
    x, w = case()
    low, high = clip_range(bin_counts(x[:30]), "mse", coarse=True)
    scale, zero = formats.affine(low, high, "uint8")
    q = np.clip(np.rint(x[30:] / scale) + float(zero), 0, 255) - float(zero)
    limit = np.abs(w).max(axis=0) / 127
    if limited:
        limit = np.maximum(limit, saturation.pair_sums(w) / saturation.PAIR_STEPS)
    y = x[30:].astype(np.float64) @ w
    errors = ((q * float(scale)) @ (np.rint(w / limit) * limit) - y) ** 2
    by = 1 / np.maximum((y**2).sum(axis=1), np.median((y**2).sum(axis=1)))
    want = float((errors.sum(axis=1) * by).sum())
    assert int8_error.output_error(x[:30], x[30:], [w], limited=limited) == pytest.approx(want, rel=0.02)


def test_each_row_is_judged_once_by_what_was_fitted_to_others() -> None:
    x, w = case(rows=61)
    seen = []

    def change(fitted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(fitted)
        return np.ones(12), np.zeros(0, np.int64)

    whole = int8_error.left_out_error(x, [w], change, limited=False)
    assert sorted(np.concatenate(seen)[:, 0].tolist()) == sorted(x[:, 0].tolist())
    assert whole == pytest.approx(int8_error.left_out_error(x, [w], limited=False))
    pairs = list(int8_error.folds(x))
    assert all(not set(a[:, 0]) & set(b[:, 0]) for a, b in pairs)


def test_channels_left_out_or_without_weights_count_for_no_range() -> None:
    x, w = case()
    clean = int8_error.left_out_error(x[:, 1:], [w[1:]], limited=False)
    x[:, 0] *= 1e4
    w[0] *= 1e-4
    assert int8_error.left_out_error(x, [w], limited=False) > 100 * clean
    out = int8_error.left_out_error(x, [w], lambda _: (np.ones(12), np.array([0])), limited=False)
    w[0] = 0
    silent = int8_error.left_out_error(x, [w], limited=False)
    assert out == pytest.approx(clean, rel=0.1)
    assert silent == pytest.approx(clean, rel=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_smoothing_leaves_nothing_to_smooth(alpha: float) -> None:
    rng = np.random.default_rng(1)
    x, w = rng.uniform(0.1, 9, 12), rng.uniform(0.1, 9, 12)
    x[3], w[4] = 0, 0
    units = np.arange(12) % 6
    s = int8_error.equalizing(x, w, alpha)
    assert np.allclose(int8_error.equalizing(x / s, w * s, alpha), 1)
    assert s[3] == s[4] == 1
    raw = np.where((x > 0) & (w > 0), x, 1) ** alpha / np.where((x > 0) & (w > 0), w, 1) ** (1 - alpha)
    live = [i for i in range(12) if i not in (3, 4)]
    assert np.allclose(s[live], raw[live] / np.exp(np.log(raw[live]).mean()))
    tied = int8_error.equalizing(x, w, alpha, units)
    assert np.array_equal(tied[:6], tied[6:])
    assert np.allclose(int8_error.equalizing(x / tied, w * tied, alpha, units), 1)


def test_a_range_is_near_the_best_of_a_fine_grid() -> None:
    x, w = case(rows=200)
    x[0] *= 60
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0], np.float32), (9, 9))
    by = int8_error.importance(np.square(x @ w @ signs).sum(axis=1))

    def error(low: float, high: float) -> float:
        scale, zero = formats.affine(low, high, "uint8")
        left = x - formats.dequantize(formats.quantize(x, scale, zero, "uint8"), scale, zero)
        return float(np.square(left @ w @ signs).sum(axis=1) @ by)

    low, high = float(x.min()), float(x.max())
    start = clip_range(bin_counts(x), "mse")
    found = int8_error.best_range(x, [w], start, (low, high), "uint8", symmetric=False)
    grid = np.geomspace(0.01, 1, 60)
    best = min(error(low * a, high * b) for a in grid for b in grid)
    assert error(*found) <= 1.1 * best
    assert error(*found) < 0.2 * error(*start)  # the large row decides that one
    again = int8_error.best_range(x, [w], found, (low, high), "uint8", symmetric=False)
    assert again == found  # nothing takes a tenth off it
