"""Experts that are removed equal experts that cannot be chosen: batched and looped, in the exporters' spellings."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from tests import cuts, hand, tiny

PruneExperts = catalog.load("prune-experts")
TOKENS, WIDTH, FFN, EXPERTS, CHOSEN = 6, 8, 12, 4, 2


def mixture(form: str, bias: bool = False) -> Graph:
    """`x + experts(x)` with softmax before the choice, as transformers' exporters write both forms."""
    rng = np.random.default_rng(3)
    g = hand.graph(x=["tokens", WIDTH])
    x = g.inputs[0]
    scores = g.op("MatMul", x, hand.f32(rng.standard_normal((WIDTH, EXPERTS))))
    if bias:
        scores = g.op("Add", scores, hand.f32(rng.standard_normal(EXPERTS)))
    weights, ids = choice(g, scores)
    up, down = (hand.f32(rng.standard_normal(s) / 4) for s in ((EXPERTS, FFN, WIDTH), (EXPERTS, WIDTH, FFN)))
    y = batched(g, x, weights, ids, up, down) if form == "batched" else looped(g, x, weights, ids, up, down)
    return tiny.finish(g, g.op("Add", x, y), "y", ["tokens", WIDTH])


def choice(g, scores):
    node_outputs = g.op("TopK", g.op("Softmax", scores, axis=-1), hand.i64(CHOSEN), axis=-1, outputs=2)
    weights, ids = node_outputs.producer().outputs
    return g.op("Div", weights, g.op("ReduceSum", weights, hand.i64(-1), keepdims=1)), ids


def batched(g, x, weights, ids, up, down):
    flat = g.op("Reshape", ids, hand.i64(-1))
    rows = g.op(
        "Reshape", g.op("Expand", g.op("Unsqueeze", x, hand.i64(1)), hand.i64(1, CHOSEN, 1)), hand.i64(-1, WIDTH, 1)
    )
    hidden = g.op("Relu", g.op("MatMul", g.op("Gather", up, flat, axis=0), rows))
    out = g.op("Squeeze", g.op("MatMul", g.op("Gather", down, flat, axis=0), hidden), hand.i64(-1))
    scaled = g.op("Mul", out, g.op("Reshape", weights, hand.i64(-1, 1)))
    return g.op("ReduceSum", g.op("Reshape", scaled, hand.i64(-1, CHOSEN, WIDTH)), hand.i64(1), keepdims=0)


def looped(g, x, weights, ids, up, down):
    out = g.op("Sub", x, x)
    hit = g.op("OneHot", ids, np.array(EXPERTS, np.int64), hand.i64(0, 1), axis=-1)
    hit = g.op("Transpose", hit, perm=[2, 1, 0])
    for i in range(EXPERTS):
        at = g.op("Transpose", g.op("NonZero", g.op("Gather", hit, np.array(i, np.int64), axis=0)), perm=[1, 0])
        slot, token = (g.op("Gather", at, hand.i64(j), axis=1) for j in (0, 1))
        rows = g.op("GatherND", x, token)
        y = g.op("MatMul", g.op("Relu", g.op("MatMul", rows, up[i].T.copy())), down[i].T.copy())
        w = g.op("GatherND", weights, g.op("Concat", token, slot, axis=-1))
        out = g.op("ScatterND", out, token, g.op("Mul", y, g.op("Unsqueeze", w, hand.i64(1))), reduction="add")
    return out


def data(g):
    rng = np.random.default_rng(1)
    return as_dataset([{"x": rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)} for _ in range(8)], g)


def without(g: Graph, gone) -> Graph:
    """The model that never chooses some experts."""
    copy = g.clone()
    cuts.never_choose(copy, blocks.experts(copy)[0], gone)
    return copy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["batched", "looped"])
def test_what_is_left_is_the_model_without_those_experts(form, bias):
    g = mixture(form, bias)
    canonicalize(g)
    (e,) = blocks.experts(g)
    assert (e.form, e.count, e.chosen, e.width) == (form, EXPERTS, CHOSEN, FFN)
    result = PassManager([PruneExperts(ratio=0.5)]).run(g, data(g), data(g))
    (after,) = blocks.experts(result.model)
    assert (after.form, after.count, after.chosen) == (form, 2, CHOSEN)
    candidates = [(i, j) for i in range(EXPERTS) for j in range(i)]
    feeds = [b.feeds for b in data(g)][:3]
    want = {gone: cuts.run(without(g, gone), feeds[0])["y"] for gone in candidates}
    got = cuts.run(result.model, feeds[0])["y"]
    equal = [gone for gone, y in want.items() if np.max(np.abs(y - got)) <= 2e-6 * np.max(np.abs(y))]
    used = usage(g, e)
    assert equal == [tuple(sorted(np.argsort(used, kind="stable")[:2], reverse=True))]
    cuts.assert_same(without(g, equal[0]), result.model, *feeds)


def usage(g: Graph, e: blocks.Experts) -> np.ndarray:
    probed = g.clone()
    ids = probed.node(e.top_k.name).outputs[1]
    probed.model.graph.outputs.append(ids)
    return sum(np.bincount(cuts.run(probed, b.feeds)[ids.name].reshape(-1), minlength=EXPERTS) for b in data(g))


def test_as_many_stay_as_a_token_is_sent_to():
    g = mixture("looped")
    canonicalize(g)
    result = PassManager([PruneExperts(ratio=0.9)]).run(g, data(g), data(g))
    assert blocks.experts(result.model)[0].count == CHOSEN
    assert len(blocks.mlps(result.model)) == CHOSEN


def test_scores_that_are_an_output_hold_all_experts():
    g = mixture("batched")
    canonicalize(g)
    g.model.graph.outputs.append(blocks.experts(g)[0].router.output)
    whole = Graph(g.model)
    step = (
        PassManager([PruneExperts(ratio=0.5)], allow_unchanged=True)
        .run(whole, data(whole), data(whole))
        .report.steps[0]
    )
    assert [d.why for d in step.declined] == [
        f"the scores of its router are the model's output '{blocks.experts(g)[0].router.output.name}'"
    ]


def test_inspect_counts_experts_and_what_a_token_costs():
    g = mixture("batched")
    canonicalize(g)
    facts = describe(g)
    assert facts["experts"] == {"layers": 1, "per_layer": 4, "chosen": 2, "width": FFN, "form": "batched"}
    assert facts["not_recognised"] == []
    assert facts["parameters"]["experts"] == WIDTH * EXPERTS + 2 * EXPERTS * FFN * WIDTH
    assert facts["macs_per_token"]["experts"] == WIDTH * EXPERTS + 2 * CHOSEN * FFN * WIDTH
