"""Searching blocks again: never worse, and as good as all choices on tiny blocks."""

import itertools

import numpy as np
import pytest

from onnxcomp.maths import formats, rounding, solve
from onnxcomp.maths.block_search import FACTORS, search_blocks


def problem(k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * k, k)) @ rng.standard_normal((k, k))
    return x.T @ x / len(x), rng.standard_normal((k, n)).astype(np.float32)


@pytest.mark.parametrize(("fmt", "bits", "symmetric"), [("uint4", 2, False), ("uint4", 4, False), ("int4", 3, True)])
def test_no_column_errs_more_and_most_err_less(fmt: str, bits: int, symmetric: bool) -> None:
    f = formats.FORMATS[fmt].narrowed(bits)
    g, w = problem(40, 30)
    start = formats.fit(w, f, axis=0, block=16, symmetric=symmetric, mse=True, full_range=symmetric)
    found = search_blocks(g, w, start, f, symmetric=symmetric)
    before, after = (solve.error(g, q.array() - w) for q in (start, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert np.median(after / before) < 0.9
    numbers = found.codes.astype(int)
    assert numbers.min() >= f.low
    assert numbers.max() <= f.high
    assert (found.zero.dtype, found.codes.dtype) == (f.dtype, f.dtype)
    assert symmetric <= (found.zero.astype(int) == start.zero.astype(int)).all()
    again = rounding.refit_scales(g, w, found, f)
    assert again.shape == found.scale.shape


def test_blocks_of_one_weight_take_the_best_of_all_scales_zero_points_and_codes() -> None:
    f = formats.FORMATS["uint4"].narrowed(2)
    g, w = np.eye(6) * np.arange(1, 7), problem(6, 20)[1]
    codes = np.ones(w.shape, f.dtype)
    start = formats.Quantized(codes, np.full(w.shape, 0.7, np.float32), codes, 0, 1)
    found = search_blocks(g, w, start, f, symmetric=False)
    steps = [s * 0.7 * (c - z) for s, z, c in itertools.product(FACTORS, (0, 1, 2), range(4))]
    best = np.abs(np.array(steps)[:, None, None] - w).min(axis=0)
    assert np.allclose(np.abs(found.array() - w), best, atol=1e-4)


def test_a_channel_that_never_fires_leaves_its_block_alone() -> None:
    f = formats.FORMATS["uint4"]
    g, w = problem(8, 5)
    g[3] = g[:, 3] = 0
    start = formats.fit(w, f, axis=0, block=4, symmetric=False)
    found = search_blocks(g, w, start, f, symmetric=False)
    assert np.array_equal(found.codes[:4], start.codes[:4])
