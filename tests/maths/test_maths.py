"""Number formats, clip rules, Gram solvers and scores against slow formulas and by their laws."""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.errors import DataError
from onnxcomp.maths import clipping, formats, rounding, scores, solve
from onnxcomp.stats.kinds.histograms import Histogram

INTEGERS = ["int8", "uint8", "int4", "uint4", "int2", "uint2"]
finite = st.floats(-1e4, 1e4, width=32)


def arrays(low: int = 1, high: int = 12) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=low, max_side=high), elements=finite
    )


def histogram(x: np.ndarray) -> np.ndarray:
    h = Histogram()
    h.update(np.asarray(x, np.float32).reshape(-1, 1))
    return h.result()


def squared_error(x: np.ndarray, low: float, high: float, symmetric: bool = False) -> float:
    fmt = "int8" if symmetric else "uint8"
    scale, zero = formats.affine(low, high, fmt, symmetric=symmetric)
    x = x.astype(np.float32)
    return float(np.mean((formats.dequantize(formats.quantize(x, scale, zero, fmt), scale, zero) - x) ** 2))


# ---- formats -------------------------------------------------------------------------------------------------------


@given(arrays(), st.sampled_from(INTEGERS), st.booleans(), st.sampled_from([(None, 0), (0, 0), (1, 0), (0, 3), (1, 4)]))
@settings(max_examples=150, deadline=None)
def test_rounding_errs_by_half_a_step_at_most(w: np.ndarray, fmt: str, symmetric: bool, place: tuple) -> None:
    axis, block = place
    q = formats.fit(w, fmt, axis=axis, block=block, symmetric=symmetric)
    step = np.broadcast_to(formats.spread(q.scale, w.shape, axis, block), w.shape)
    # An asymmetric range may lose up to half a step more at an end where the zero point was rounded.
    assert np.all(np.abs(q.array() - w) <= step * (0.501 if symmetric else 1.001) + 1e-6)
    assert q.codes.dtype == formats.FORMATS[fmt].dtype
    assert q.codes.shape == w.shape


@given(arrays(), st.sampled_from(INTEGERS), st.booleans())
@settings(max_examples=80, deadline=None)
def test_zero_is_always_representable_and_scales_are_sane(w: np.ndarray, fmt: str, symmetric: bool) -> None:
    q = formats.fit(w, fmt, axis=1, symmetric=symmetric)
    zeros = formats.quantize(np.zeros_like(w), q.scale, q.zero, fmt, axis=1)
    assert np.all(formats.dequantize(zeros, q.scale, q.zero, axis=1) == 0)
    assert np.all(np.isfinite(q.scale) & (q.scale > 0))
    if symmetric and fmt.startswith("int"):
        assert not q.zero.any()


@given(arrays(), st.sampled_from(INTEGERS))
@settings(max_examples=60, deadline=None)
def test_quantizing_twice_changes_nothing(w: np.ndarray, fmt: str) -> None:
    q = formats.fit(w, fmt, axis=0, symmetric=False)
    assert np.array_equal(formats.quantize(q.array(), q.scale, q.zero, fmt, axis=0), q.codes)


@pytest.mark.parametrize("scale_type", [np.float32, np.float16])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-9, 1e6, 3e38])
def test_scales_stay_normal_numbers(value: float, scale_type: type) -> None:
    w = np.full((4, 4), value, np.float32)
    q = formats.fit(w, "int8", axis=1, scale_type=scale_type)
    assert q.scale.dtype == scale_type
    assert np.all(q.scale >= np.finfo(scale_type).tiny)
    assert np.all(np.isfinite(q.scale))
    assert np.all(np.isfinite(q.array()))


def test_empty_range_and_bad_values() -> None:
    scale, zero = formats.affine(0.0, 0.0, "uint8")
    assert (float(scale), int(zero)) == (1.0, 0)
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="not finite"):
            formats.affine(-1.0, bad, "int8")
        with pytest.raises(DataError, match="NaN"):
            formats.fit(np.array([[1.0, bad]], np.float32))
    with pytest.raises(DataError, match="unknown number format 'int9'"):
        formats.fit(np.ones((2, 2), np.float32), "int9")


def test_blocks_reach_the_tail_and_differ() -> None:
    w = np.array([[1.0], [2.0], [30.0], [40.0], [500.0]], np.float32)
    q = formats.fit(w, "int4", axis=0, block=2)
    assert q.scale.shape == (3, 1)
    assert np.allclose(q.scale[:, 0], np.array([2, 40, 500]) / 7)
    assert np.allclose(q.array()[[1, 3, 4]], w[[1, 3, 4]])


def test_reduced_range_keeps_seven_bits() -> None:
    f = formats.FORMATS["int8"].narrowed(7)
    q = formats.fit(np.linspace(-1, 1, 101, dtype=np.float32)[:, None], f)
    assert (f.low, f.high) == (-64, 63)
    assert q.codes.min() == -63
    assert q.codes.max() == 63
    assert np.abs(q.array() - np.linspace(-1, 1, 101)[:, None]).max() <= 1 / 126 + 1e-6
    with pytest.raises(DataError):
        f.narrowed(8)


@pytest.mark.parametrize(
    ("name", "dtype", "top"),
    [("float8e4m3fn", ml_dtypes.float8_e4m3fn, 448), ("float8e5m2", ml_dtypes.float8_e5m2, 57344)],
)
def test_fp8_saturates_and_rounds_like_the_type(name: str, dtype: type, top: float) -> None:
    x = np.concatenate([np.random.default_rng(0).standard_normal(500), [0.0, -9.0, 9.0]]).astype(np.float32)[:, None]
    q = formats.fit(x, name)
    assert np.isclose(float(q.scale), 9.0 / top)
    assert np.array_equal(q.codes.view(np.uint8), (x / q.scale).astype(dtype).view(np.uint8))
    beyond = formats.quantize(x * 100, q.scale, q.zero, name)
    assert np.isfinite(beyond.astype(np.float32)).all()
    assert float(np.abs(beyond.astype(np.float32)).max()) == top


def test_mse_is_never_worse_than_minmax_and_helps_with_outliers() -> None:
    w = np.random.default_rng(1).standard_t(3, (64, 32)).astype(np.float32)
    plain, tuned = (formats.fit(w, "int4", axis=1, mse=mse) for mse in (False, True))
    before, after = (((q.array() - w) ** 2).sum(axis=0) for q in (plain, tuned))
    assert np.all(after <= before + 1e-6)
    assert after.sum() < 0.9 * before.sum()


# ---- clip rules ----------------------------------------------------------------------------------------------------

SHAPES = {
    "normal": lambda r: r.standard_normal(20000),
    "heavy": lambda r: r.standard_t(3, 20000),
    "gelu": lambda r: (lambda t: t / (1 + np.exp(-1.7 * t)))(2 * r.standard_normal(20000)),
    "outlier": lambda r: np.concatenate([r.standard_normal(20000), [60.0]]),
    "negative": lambda r: -np.abs(r.standard_normal(20000)) - 1,
    "relu": lambda r: np.maximum(r.standard_normal(20000), 0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_clip_is_as_good_as_a_brute_force_search_on_the_data(shape: str, symmetric: bool) -> None:
    x = SHAPES[shape](np.random.default_rng(2))
    low, high = clipping.clip_range(histogram(x), "mse", symmetric=symmetric)
    ends = min(0.0, x.min()), max(0.0, x.max())
    grid = np.geomspace(1, 0.05, 25)
    if symmetric:
        brute = min(squared_error(x, -max(-ends[0], ends[1]) * a, max(-ends[0], ends[1]) * a, True) for a in grid)
    else:
        brute = min(squared_error(x, ends[0] * a, ends[1] * b) for a in grid for b in grid)
    assert squared_error(x, low, high, symmetric) <= 1.05 * brute


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize(
    "x", [np.zeros(50), np.full(50, 3.0), np.full(50, -1e-20), np.array([1e38, -1e38]), np.full(9, 1e-42)]
)
def test_every_rule_survives_constant_and_extreme_tensors(method: str, x: np.ndarray) -> None:
    low, high = clipping.clip_range(histogram(x), method)
    assert np.isfinite([low, high]).all()
    assert low <= 0 <= high
    scale, _ = formats.affine(low, high, "uint8")
    assert np.isfinite(scale)
    assert scale > 0
    if method in ("minmax", "mse") and np.abs(x).max() > 1e-30:
        assert squared_error(x / np.abs(x).max(), *(np.array([low, high]) / np.abs(x).max())) < 1e-4


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=finite), st.booleans())
@settings(max_examples=80, deadline=None)
def test_minmax_covers_all_and_hardly_more(x: np.ndarray, symmetric: bool) -> None:
    low, high = clipping.clip_range(histogram(x), "minmax", symmetric=symmetric)
    assert low <= x.min() + 1e-37
    assert high >= x.max() - 1e-37
    top = float(np.abs(x).max())
    assert max(-low, high) <= top * 1.008 + 1e-37
    if symmetric:
        assert low == -high


def test_percentile_cuts_its_share() -> None:
    x = np.random.default_rng(3).standard_normal(100_000)
    low, high = clipping.clip_range(histogram(x), "percentile", percentile=99.0)
    assert np.isclose(high, np.quantile(x, 0.995), rtol=0.02)
    assert np.isclose(low, np.quantile(x, 0.005), rtol=0.02)
    _, top = clipping.clip_range(histogram(x), "percentile", percentile=99.0, symmetric=True)
    assert np.isclose(top, np.quantile(np.abs(x), 0.99), rtol=0.02)
    assert clipping.clip_range(histogram(x), "percentile", percentile=100.0) == clipping.clip_range(
        histogram(x), "minmax"
    )
    with pytest.raises(DataError, match="between 0 and 100"):
        clipping.clip_range(histogram(x), "percentile", percentile=120)


def test_entropy_cuts_a_lone_outlier_and_keeps_a_flat_distribution() -> None:
    r = np.random.default_rng(4)
    _, high = clipping.clip_range(
        histogram(np.concatenate([r.standard_normal(50000), [100.0]])), "entropy", symmetric=True
    )
    assert high < 20
    _, high = clipping.clip_range(histogram(r.uniform(-1, 1, 50000)), "entropy", symmetric=True)
    assert high > 0.9


def test_a_histogram_must_hold_finite_values() -> None:
    with pytest.raises(DataError, match="empty"):
        clipping.clip_range(np.zeros(65536, np.int64))
    with pytest.raises(DataError, match="NaN"):
        clipping.clip_range(np.bincount([0x7FC0, 0x3F80], minlength=65536))
    with pytest.raises(DataError, match="65536"):
        clipping.clip_range(np.ones(10, np.int64))
    with pytest.raises(DataError, match="unknown clip rule"):
        clipping.clip_range(histogram(np.ones(3)), "best")


# ---- solvers -------------------------------------------------------------------------------------------------------


def problem(k: int = 24, n: int = 10, rows: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    x = r.standard_normal((rows, k)) @ (np.eye(k) + 0.4 * r.standard_normal((k, k)))
    return x, r.standard_normal((k, n))


def test_least_squares_is_the_textbook_solution() -> None:
    x, w = problem()
    y = x @ w + np.random.default_rng(1).standard_normal((len(x), w.shape[1]))
    found = solve.least_squares(x.T @ x, x.T @ y, damp=0.0)
    assert np.allclose(found.weights, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-9)
    assert found.damp == 0.0


@given(st.integers(0, 10**6), st.floats(0, 10), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_repair_never_raises_the_error_of_the_cut(seed: int, damp: float, rows: int) -> None:
    x, w = problem(k=12, n=4, rows=rows, seed=seed)
    keep = np.sort(np.random.default_rng(seed).choice(12, 7, replace=False))
    found = solve.repair(x.T @ x, w, keep, damp)
    plain = ((x[:, keep] @ w[keep] - x @ w) ** 2).sum()
    ours = ((x[:, keep] @ found.weights - x @ w) ** 2).sum()
    assert ours <= plain * (1 + 1e-9) + 1e-9
    assert found.damp >= damp


def test_repair_is_exact_where_kept_channels_span_the_cut_ones() -> None:
    x, w = problem(k=8)
    x = np.concatenate([x, x[:, :3] @ np.random.default_rng(5).standard_normal((3, 2))], axis=1)
    w = np.concatenate([w, np.ones((2, w.shape[1]))])
    found = solve.repair(x.T @ x, w, np.arange(8), damp=0.0)
    assert np.allclose(x[:, :8] @ found.weights, x @ w)


def test_a_singular_gram_is_damped_and_the_damp_is_told() -> None:
    x = np.ones((50, 6))
    found = solve.least_squares(x.T @ x, x.T @ np.ones((50, 2)), damp=0.0)
    assert found.damp > 0
    assert np.allclose(x @ found.weights, 1.0, atol=1e-4)
    zero = solve.repair(np.zeros((3, 3)), np.ones((3, 2)), np.array([0, 1]))
    assert np.array_equal(zero.weights, np.ones((2, 2)))
    with pytest.raises(DataError, match="finite square"):
        solve.least_squares(np.full((2, 2), np.nan), np.ones((2, 1)))


def naive_gptq(
    g: np.ndarray, w: np.ndarray, q: formats.Quantized, fmt: str, damp: float, order: np.ndarray
) -> np.ndarray:
    """Optimal brain quantization by the book: after each in-channel the inverse of what is left is computed anew."""
    h = g + damp * np.diag(g).mean() * np.eye(len(g))
    scale = np.broadcast_to(formats.spread(q.scale, w.shape, q.axis, q.block), w.shape).astype(np.float64)
    zero = np.broadcast_to(formats.spread(q.zero, w.shape, q.axis, q.block), w.shape).astype(np.float64)
    w, codes, left = w.copy(), np.zeros(w.shape, q.codes.dtype), list(order)
    while left:
        i = left[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        codes[i] = formats.quantize(w[i], scale[i], zero[i], fmt)
        gap = w[i] - (codes[i].astype(np.float64) - zero[i]) * scale[i]
        w[left] -= np.outer(inverse[:, 0] / inverse[0, 0], gap)
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_optimal_brain_quantization(act_order: bool, block: int, symmetric: bool) -> None:
    x, w = problem(k=150, n=6, rows=400)
    w = w.astype(np.float32)
    g = x.T @ x
    scales = formats.fit(w, "int4", axis=0 if block else 1, block=block, symmetric=symmetric, mse=True)
    order = np.argsort(-np.diag(g), kind="stable") if act_order else np.arange(len(g))
    codes = rounding.sweep(rounding.Visit.of(g, 0.01, act_order), w.astype(np.float64), scales, formats.FORMATS["int4"])
    assert np.mean(codes != naive_gptq(g, w.astype(np.float64), scales, "int4", 0.01, order)) < 0.002
    found = rounding.round_weights(g, w, "int4", block=block, symmetric=symmetric, act_order=act_order)
    assert np.isclose(found.loss, ((x @ (found.quantized.array().astype(np.float64) - w)) ** 2).sum(), rtol=1e-6)
    assert found.loss < 0.7 * found.rounding_loss


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(["int2", "int4", "uint4", "int8"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_gptq_is_never_worse_than_rounding(seed: int, rows: int, fmt: str, act_order: bool) -> None:
    x, w = problem(k=9, n=4, rows=rows, seed=seed)
    found = rounding.round_weights(x.T @ x, w.astype(np.float32), fmt, symmetric=fmt != "uint4", act_order=act_order)
    ours = solve.error(x.T @ x, found.quantized.array() - w)
    weights = np.diag(x.T @ x)[:, None]
    nearest = formats.fit(w.astype(np.float32), fmt, axis=1, symmetric=fmt != "uint4", mse=True, importance=weights)
    plain = solve.error(x.T @ x, nearest.array() - w)
    assert np.all(ours <= plain * (1 + 1e-6) + 1e-9)
    assert found.loss <= found.rounding_loss * (1 + 1e-9)


def brute_force(g: np.ndarray, w: np.ndarray, q: formats.Quantized, low: int, high: int) -> float:
    """The least error of one out-channel over all codes, and all scales of one block."""
    best = np.inf
    for codes in itertools.product(range(low, high + 1), repeat=len(w)):
        c = np.array(codes, np.float64)
        curvature = c @ g @ c
        s = max(c @ g @ w, 0.0) / curvature if curvature > 0 else 0.0
        best = min(best, float((c * s - w) @ g @ (c * s - w)))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_refits_come_near_the_best_of_all_codes_and_scales(seed: int) -> None:
    x, w = problem(k=6, n=5, rows=60, seed=seed)
    g, w = x.T @ x, w.astype(np.float32)
    losses = [rounding.round_weights(g, w, "int2", refits=n, damp=0.01).loss for n in (0, 1, 3)]
    assert losses[2] <= losses[1] * (1 + 1e-6) < losses[0]  # scales are float32
    nearest = formats.fit(w, "int2", axis=1)
    best = sum(brute_force(g, w[:, i].astype(np.float64), nearest, -2, 1) for i in range(5))
    assert best * (1 - 1e-9) <= losses[-1] < 2.5 * best
    assert losses[-1] < 0.96 * losses[0]


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("fmt", ["int4", "uint4", "uint2"])
def test_descent_and_refitted_scales_never_err_more(block: int, fmt: str) -> None:
    x, w = problem(k=150, n=6, rows=400)
    g, w = x.T @ x, w.astype(np.float32)
    options = {"block": block, "symmetric": fmt == "int4"}
    start = rounding.round_weights(g, w, fmt, **options)
    q, wide = start.quantized, w.astype(np.float64)
    before = solve.error(g, q.array() - w)
    codes = rounding.descend(g, wide, q, formats.FORMATS[fmt])
    moved = dataclasses.replace(q, codes=codes)
    assert np.all(solve.error(g, moved.array() - w) <= before * (1 + 1e-6))
    naive = q.codes.astype(np.float64)  # the same sweep, from the whole error each time
    s, z = (np.broadcast_to(formats.spread(a, w.shape, q.axis, q.block), w.shape) for a in (q.scale, q.zero))
    for i in range(len(g)):
        rest = g[i] @ (wide - (naive - z) * s)
        target = (naive[i] - z[i]) * s[i] + rest / g[i, i]
        naive[i] = np.clip(np.rint(target / s[i]) + z[i], formats.FORMATS[fmt].low, formats.FORMATS[fmt].high)
    assert np.mean(codes.astype(np.float64) != naive) < 0.002
    scale = rounding.refit_scales(g, wide, moved, formats.FORMATS[fmt])
    refitted = dataclasses.replace(moved, scale=scale)
    assert np.all(solve.error(g, refitted.array() - w) <= solve.error(g, moved.array() - w) * (1 + 1e-6))
    if not block:  # one scale an out-channel is a least-squares problem of one unknown
        c = codes.astype(np.float64) - z
        best = np.einsum("kn,kn->n", c, g @ wide) / np.einsum("kn,kn->n", c, g @ c)
        assert np.allclose(scale, best, rtol=1e-5)
    found = rounding.round_weights(g, w, fmt, refits=3, **options)
    assert found.loss < (0.99 if block else 0.97) * start.loss


def test_columns_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = problem(k=40, n=7, rows=90)
    whole = rounding.round_weights(x.T @ x, w.astype(np.float32), "uint4", block=16, symmetric=False, refits=1)
    monkeypatch.setattr(rounding, "COLUMNS", 3)
    parts = rounding.round_weights(x.T @ x, w.astype(np.float32), "uint4", block=16, symmetric=False, refits=1)
    assert np.array_equal(whole.quantized.codes, parts.quantized.codes)
    assert np.allclose(whole.quantized.scale, parts.quantized.scale, rtol=1e-6)
    assert np.isclose(whole.loss, parts.loss)


def test_gptq_rounds_channels_that_never_fire() -> None:
    x, w = problem(k=10)
    x[:, 3] = 0
    found = rounding.round_weights(x.T @ x, w.astype(np.float32), "int8")
    nearest = formats.fit(w.astype(np.float32), "int8", axis=1, mse=True)
    assert np.array_equal(found.quantized.codes[3], nearest.codes[3])


# ---- scores --------------------------------------------------------------------------------------------------------


def test_wanda_is_its_formula() -> None:
    x, w = problem(k=12)
    norm = np.linalg.norm(x, axis=0)
    assert np.allclose(scores.wanda(w, norm), np.abs(w) * norm[:, None])


@pytest.mark.parametrize("kind", ["own", "read-only", "transposed"])
def test_least_squares_leaves_the_gram_matrix_as_it_is(kind):
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((60, 7)), rng.standard_normal((60, 3))
    gram = x.T @ x
    given = gram.copy().T if kind == "transposed" else gram.copy()
    given.flags.writeable = kind != "read-only"
    found = solve.least_squares(given, x.T @ y, damp=1e-2).weights
    np.testing.assert_array_equal(given, gram)
    level = 1e-2 * np.diag(gram).mean()
    np.testing.assert_allclose(found, np.linalg.solve(gram + level * np.eye(7), x.T @ y), rtol=1e-10)
