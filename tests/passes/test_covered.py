"""What quantizers note of the ranges they chose: what numbers there are, what codes cover, what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.graph import Graph
from onnxcomp.maths.clipping import bin_counts, clip_loss, clip_range
from onnxcomp.maths.formats import affine, dequantize, quantize
from onnxcomp.reports.outcome import Step
from onnxcomp.validation.gates import Gate
from tests import tiny


def step(g: Graph, spec: str) -> Step:
    """What a pass says of itself."""
    data = [tiny.feeds(g, 2, 9, seed=i) for i in range(4)]
    return PassManager([parse_pass(spec)]).run(g, data).report.steps[0]


def test_the_loss_of_a_clip_is_that_of_rounding_the_numbers() -> None:
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) ** 3
    low, high = clip_range(bin_counts(x))
    scale, zero = affine(low, high, "uint8")
    made = dequantize(quantize(x, scale, zero, "uint8"), scale, zero)
    least, most, outside, error = clip_loss(bin_counts(x), low, high, 8)
    assert least <= x.min() <= least * 0.99
    assert most * 0.99 <= x.max() <= most
    half = (high - low) / 255 / 2
    assert outside == pytest.approx(np.mean((x < low - half) | (x > high + half)), abs=1e-3)
    assert outside > 0
    assert error == pytest.approx(np.linalg.norm(made - x) / np.linalg.norm(x), rel=0.05)


def test_a_range_of_everything_leaves_nothing_out() -> None:
    x = np.linspace(-1, 2, 999, dtype=np.float32)
    assert clip_loss(bin_counts(x), *clip_range(bin_counts(x), "minmax"), 8)[2] == 0
    assert clip_loss(bin_counts(np.zeros(5, np.float32)), 0.0, 0.0, 8)[3] == 0


def test_static_int8_notes_each_input_once_and_each_weight() -> None:
    g = tiny.encoder()
    done = step(g, "qdq: {min_size: 1, clip: minmax}")
    inputs, weights = ([x for x in done.covered if x.of == of] for of in ("input", "weight"))
    assert len(weights) == done.changed == 12
    assert len(inputs) == 8  # q, k and v read one
    assert all(x.outside == 0 and 0 < x.error < 0.02 for x in inputs)
    assert all(x.covered_high - x.covered_low >= 0.98 * (x.high - x.low) for x in inputs)
    for x in weights:
        w = g.array(g.value(x.value))
        assert (x.low, x.high) == (pytest.approx(w.min()), pytest.approx(w.max()))
        assert max(abs(x.covered_low), abs(x.covered_high)) == pytest.approx(np.abs(w).max(), rel=0.01)
        assert x.bits == 8


@pytest.mark.parametrize(("bits", "least"), [(4, 0.02), (2, 0.1)])
def test_few_bits_note_what_they_cost(bits: int, least: float) -> None:
    done = step(tiny.encoder(), f"quantize-weights: {{min_size: 1, bits: {bits}, method: nearest}}")
    assert len(done.covered) == done.changed
    assert all(x.bits == bits and least < x.error < 20 * least and x.outside is None for x in done.covered)


def test_what_is_rolled_back_or_stays_float_notes_nothing() -> None:
    g = tiny.encoder()
    assert {x.site for x in step(g, "dynamic-quant: {min_size: 1, skip: ['*q_proj*']}").covered}.isdisjoint({"q_proj"})
    data: list[Any] = [tiny.feeds(g, 2, 9, seed=i) for i in range(4)]
    manager = PassManager([parse_pass("qdq: {min_size: 1}")], gate=Gate(["sqnr>=200"]), on_fail="rollback")
    undone = manager.run(g, data, data).report.steps[0]
    assert undone.rolled_back
    assert undone.covered == []
