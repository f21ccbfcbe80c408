"""`low-rank-correction`: the product beside a quantized linear is the best of its rank, and declines what it must."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.maths import formats
from onnxcomp.passes.low_rank_correction import LowRankCorrection
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.sessions import Session
from tests import tiny

NEAREST = QuantizeWeights(bits=3, method="nearest", min_size=1)


def run(g, feeds, *passes):
    return PassManager(passes, allow_unchanged=True).run(g, as_dataset([Batch(f) for f in feeds], g))


def output(g, feeds):
    with Session(g) as s:
        return next(iter(s.run(feeds).values())).astype(np.float64)


def rows(count=256, width=32):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((1, count, width)) * np.geomspace(5, 0.2, width)).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 4])
def test_one_linear_gets_the_best_correction_of_its_rank(rank):
    g, x = tiny.linear(32, 24), rows()
    result = run(g, [{"x": x}], NEAREST, LowRankCorrection(rank=rank))
    (first, *_) = blocks.linears(run(g, [{"x": x}], NEAREST).model)
    coded = run(g, [{"x": x}], NEAREST).model
    node = first.dequantize
    parts = [coded.array(v) for v in node.inputs]
    q = formats.dequantize(*parts, axis=0, block=node.attributes.get_int("block_size", 0)).astype(np.float64)
    error = x[0].astype(np.float64) @ (g.array(g.value("linear.weight")).astype(np.float64) - q)
    best = np.sum(np.linalg.svd(error, compute_uv=False)[rank:] ** 2)
    got = np.sum((output(result.model, {"x": x}) - output(g, {"x": x})) ** 2)
    assert got == pytest.approx(best, rel=2e-2)


@pytest.mark.parametrize(("quantizer", "share"), [(NEAREST, 0.9), (Qdq(min_size=1, only_faster=False), 1.0)])
def test_a_model_is_nearer_to_its_original_than_without(quantizer, share):
    g = tiny.decoder()
    feeds, unseen = (
        [tiny.feeds(g, 4, 9, seed=i) for i in range(24)],
        [tiny.feeds(g, 4, 9, seed=50 + i) for i in range(8)],
    )
    want = np.stack([output(g, x) for x in unseen])

    def error(*passes):
        model = run(g, feeds, quantizer, *passes).model
        return np.linalg.norm(np.stack([output(model, x) for x in unseen]) - want)

    assert error(LowRankCorrection(rank=6)) < share * error()


def test_what_has_no_counterpart_or_gains_nothing_is_declined():
    g, x = tiny.linear(32, 24), rows()
    coded = run(g, [{"x": x}], NEAREST).model
    step = run(coded, [{"x": x}], LowRankCorrection(rank=4)).report.steps[0]  # the original is quantized as well
    assert [d.why for d in step.declined] == ["the original has no float linear of its size that makes 'y'"]
    step = run(g, [{"x": x}], NEAREST, LowRankCorrection(rank=14)).report.steps[1]
    assert [d.why for d in step.declined] == ["rank 14 is no less work than its 32x24 weight"]
    step = run(g, [{"x": x}], NEAREST, LowRankCorrection(rank=4, skip=("Mat*",))).report.steps[1]
    assert [d.why for d in step.declined] == ["skipped by the pattern 'Mat*'"]
    assert run(g, [{"x": x}], NEAREST, LowRankCorrection(rank=0)).report.steps[1].edits == 0
