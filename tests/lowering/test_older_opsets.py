"""The way down: every canonical operator spelled out gives the same outputs and a valid older model."""

import dataclasses

import numpy as np
import pytest

from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph
from onnxcomp.lowering.older_opsets import lower_opset
from onnxcomp.passes.lower import Lower
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, TENSORRT
from tests import tiny
from tests.hand import graph

MODELS = {"encoder": tiny.encoder, "decoder": tiny.decoder, "gated": lambda: tiny.mlp(gated=True), "tanh": tiny.mlp}


def run(g: Graph, feeds: dict) -> np.ndarray:
    with Session(g) as s:
        return next(iter(s.run(feeds).values()))


@pytest.mark.parametrize("version", [18, 20, 22])
@pytest.mark.parametrize("name", MODELS)
def test_older_spelling_gives_the_same_outputs(name, version):
    g = MODELS[name]()
    old = PassManager([Lower()], target=dataclasses.replace(CPU, max_opset=version)).run(g).model
    old.verify()
    assert old.opset == version
    for batch, sequence in ((2, 7), (1, 3)):
        feeds = tiny.feeds(g, batch, sequence, padding="right")
        want, got = run(g, feeds), run(old, feeds)
        rows = feeds["attention_mask"].astype(bool) if "attention_mask" in feeds else ...
        assert np.linalg.norm(got[rows] - want[rows]) < 3e-6 * np.linalg.norm(want[rows])


def test_tensorrt_gets_scale_on_the_query():
    g = PassManager([Lower()], target=TENSORRT).run(tiny.encoder()).model
    assert not list(g.nodes("Attention"))
    for node in g.nodes("MatMul"):
        if node.name.endswith("_scores"):
            assert node.inputs[0].producer().op_type == "Mul"
            assert node.inputs[1].producer().op_type == "Transpose"


@pytest.mark.parametrize("partial", [0, 4])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_of_every_kind_is_spelled(partial, interleaved):
    g = graph(23, x=("b", "s", 32), c=("b", "s", (partial or 8) // 2), z=("b", "s", (partial or 8) // 2))
    attrs = {"num_heads": 4, "interleaved": interleaved} | ({"rotary_embedding_dim": partial} if partial else {})
    g = tiny.finish(g, g.op("RotaryEmbedding", *g.model.graph.inputs, **attrs), "y", ["b", "s", 32])
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.standard_normal((2, 5, v.shape[2])).astype(np.float32) for v in g.inputs}
    old = g.clone()
    lower_opset(old, 18)
    np.testing.assert_allclose(run(g, feeds), run(old, feeds), atol=1e-6)


def test_too_old_is_refused():
    with pytest.raises(TargetError, match="opset 17 is too old"):
        lower_opset(tiny.encoder(), 17)


def test_operator_without_a_spelling_is_named():
    g = tiny.encoder()
    node = next(g.nodes("Attention"))
    g.set_attr(node, is_causal=1)
    with pytest.raises(TargetError, match=str(node.name)):
        lower_opset(g, 22)


@pytest.mark.parametrize("shape", ["dynamic", "static", "rank-2"])
def test_standard_form_keeps_integer_products_at_every_rank(shape):
    from onnxcomp.passes.qdq import Qdq
    from onnxcomp.runtime.sessions import integer_check

    g = {
        "dynamic": tiny.encoder,
        "static": lambda: tiny.encoder(batch=2, sequence=7),
        "rank-2": lambda: tiny.linear(64, 64, rank=2),
    }[shape]()
    data = [tiny.feeds(g, 2, 7, seed=i) for i in range(5)]
    quantized = PassManager([Qdq(min_size=1), Lower(standard=True)]).run(g, data).model
    assert all(node.domain == "" for node in quantized.nodes())
    check = integer_check(quantized)
    assert check.ok
    assert check.integer_products == check.quantized_linears > 0
    for node in quantized.nodes("Sum"):  # an Add here would be a float Gemm at rank 2 and static shapes
        node.op_type = "Add"
    assert integer_check(quantized).ok is (shape == "dynamic")


def test_skip_pattern_that_matches_nothing_is_reported():
    from onnxcomp.passes.qdq import Qdq

    g = tiny.linear(64, 64)
    data = [tiny.feeds(g, 2, 7, seed=i) for i in range(5)]
    step = PassManager([Qdq(skip=("*down_proj*",))]).run(g, data).report.steps[0]
    assert [d.site for d in step.declined] == ["skip: *down_proj*"]
    assert "called like" in step.declined[0].why
