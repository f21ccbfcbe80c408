"""Formats and roundings of few bits against brute force on tiny weights."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from onnxcomp.errors import DataError
from onnxcomp.maths import formats, rounding
from onnxcomp.maths.block_floats import BLOCK_FLOATS
from onnxcomp.maths.hqq import hqq

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_scales_with_the_sign_of_the_extreme_use_every_code(bits):
    f = formats.FORMATS["int4"].narrowed(bits)
    w = RNG.standard_normal((64, 200)).astype(np.float32)
    plain, full = (formats.fit(w, f, axis=0, block=32, full_range=full) for full in (False, True))
    assert np.abs(full.array() - w).mean() < np.abs(plain.array() - w).mean()
    extreme = np.take_along_axis(w[:32], np.abs(w[:32]).argmax(axis=0)[None], 0)
    assert np.allclose(full.scale[0], extreme[0] / f.low)
    assert (full.codes.astype(np.int8).reshape(2, 32, 200).min(axis=1) == f.low).all()
    for m in (False, True):
        errors = [np.square(formats.fit(w, f, axis=0, block=32, full_range=m, mse=x).array() - w).sum() for x in (0, 1)]
        assert errors[1] <= errors[0]


@pytest.mark.parametrize("full", [False, True])
def test_few_codes_come_near_the_best_of_all(full):
    """Four in-channels of 2 bits: all codes under their best scale."""
    f = formats.FORMATS["int2"]
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, w = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 4)), rng.standard_normal((4, 1))
        g = x.T @ x
        best = np.inf
        for code in itertools.product(range(-2, 2), repeat=4):
            c = np.array(code, float)
            if (curve := c @ g @ c) > 0 and ((s := c @ g @ w[:, 0] / curve) > 0 or full):
                best = min(best, float((w[:, 0] - s * c) @ g @ (w[:, 0] - s * c)))
        found = rounding.round_weights(g, w, f, block=4, refits=3, damp=1e-6, full_range=full)
        assert found.loss >= best - 1e-9
        ratios.append(found.loss / best)
    assert np.median(ratios) < 1.5


def test_static_groups_in_any_order_are_brute_force_gptq():
    """Scales of blocks are fixed before in-channels are visited, by falling diagonal, as a loop without blocks does."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((40, 12)) * rng.uniform(0.2, 3, 12), rng.standard_normal((12, 3))
    g = x.T @ x
    f = formats.FORMATS["uint4"].narrowed(2)
    q = formats.fit(w, f, axis=0, block=4, symmetric=False, mse=True, importance=np.diag(g)[:, None])
    scale, zero = (formats.spread(a, w.shape, 0, 4).astype(np.float64) for a in (q.scale, q.zero))
    damped = g + 0.01 * np.diag(g).mean() * np.eye(12)
    order, rest, codes = list(np.argsort(-np.diag(g), kind="stable")), w.copy(), np.zeros((12, 3))
    while order:
        i, later = order[0], order[1:]
        codes[i] = np.clip(np.rint(rest[i] / scale[i]) + zero[i], 0, 3)
        error = rest[i] - (codes[i] - zero[i]) * scale[i]
        if later:  # the others take the error as least squares says
            rest[later] += np.outer(np.linalg.solve(damped[np.ix_(later, later)], damped[later, i]), error)
        order = later
    visit = rounding.Visit.of(g, 0.01)
    assert np.array_equal(rounding.sweep(visit, w, q, f).astype(float), codes)


def test_hqq_finds_zero_points_that_err_less_in_its_norm():
    w = RNG.standard_normal((64, 100)).astype(np.float32)
    w[RNG.random(w.shape) < 0.02] *= 5
    f = formats.FORMATS["uint4"]
    start = formats.fit(w, f, axis=0, block=32, symmetric=False)
    found = hqq(w, f, 32)
    errors = [float((np.abs(q.array() - w) ** 0.7).mean()) for q in (found, start)]
    assert errors[0] < errors[1]
    assert found.zero.dtype == f.dtype


@pytest.mark.parametrize("name", BLOCK_FLOATS)
def test_block_floats_are_the_nearest_elements_under_their_scales(name):
    f = BLOCK_FLOATS[name]
    w = RNG.standard_normal((70, 5)).astype(np.float32) * np.exp(RNG.standard_normal((1, 5))).astype(np.float32)
    w[:32, 0] = 0
    q = f.encode(w)
    codes = np.arange(2 ** ml_dtypes.finfo(f.element).bits, dtype=np.uint8)
    if ml_dtypes.finfo(f.element).bits == 4:
        grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        grid = np.concatenate([grid, -grid])
    else:
        grid = codes.view(f.element).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    scale = np.repeat(q.scale.astype(np.float64), f.block, axis=0)[:70] * q.whole
    want = np.zeros_like(w, np.float64)
    for i, j in np.ndindex(*w.shape):
        values = grid * scale[i, j]
        want[i, j] = values[np.abs(values - w[i, j]).argmin()]
    assert (
        np.abs(q.array() - want).max() <= 1e-6 * np.abs(w).max() + 1e-12
        or np.isclose(np.abs(q.array() - w), np.abs(want - w), atol=1e-6).all()
    )  # ties go to the even one
    rest = {"nvfp4": 0.12, "mxfp4": 0.16, "mxfp8": 0.04}[name]
    assert np.linalg.norm(q.array() - w) < rest * np.linalg.norm(w)
    assert (q.scale.shape, q.scale.dtype) == ((-(-70 // f.block), 5), f.scale)
    with pytest.raises(DataError, match="empty, NaN or infinite"):
        f.encode(np.array([[np.nan]]))
