"""Experts that are removed equal experts that cannot be chosen: batched and looped, in the exporters' spellings."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from tests import cuts, hand, tiny

PruneExperts = catalog.load("prune-experts")
TOKENS, WIDTH, FFN, EXPERTS, CHOSEN = 6, 8, 12, 4, 2


def mixture(form: str, bias: bool = False, chosen_by: str = "TopK") -> Graph:
    """`x + experts(x)` with softmax before the choice, as transformers' exporters write all forms."""
    rng = np.random.default_rng(3)
    g = hand.graph(x=["tokens", WIDTH])
    x = g.inputs[0]
    scores = g.op("MatMul", x, hand.f32(rng.standard_normal((WIDTH, EXPERTS))))
    if bias:
        scores = g.op("Add", scores, hand.f32(rng.standard_normal(EXPERTS)))
    weights, ids = choice(g, scores) if chosen_by == "TopK" else one_by_one(g, scores)
    up, down = (hand.f32(rng.standard_normal(s) / 4) for s in ((EXPERTS, FFN, WIDTH), (EXPERTS, WIDTH, FFN)))
    y = {"batched": batched, "looped": looped, "hit": looped_over_hits}[form](g, x, weights, ids, up, down)
    return tiny.finish(g, g.op("Add", x, y), "y", ["tokens", WIDTH])


def choice(g, scores):
    node_outputs = g.op("TopK", g.op("Softmax", scores, axis=-1), hand.i64(CHOSEN), axis=-1, outputs=2)
    weights, ids = node_outputs.producer().outputs
    return g.op("Div", weights, g.op("ReduceSum", weights, hand.i64(-1), keepdims=1)), ids


def one_by_one(g, scores):
    """The highest score, then the highest of the others, each with the weight of a softmax over what is near it."""
    weights, ids, left = [], [], scores
    for _ in range(CHOSEN):
        best = g.op("ArgMax", left, axis=-1, keepdims=1)
        high = g.op("ReduceMax", left, hand.i64(-1), keepdims=1)
        far = g.op("Div", g.op("Sub", high, scores), g.op("Max", g.op("Abs", scores), high))
        near = g.op("Where", g.op("Greater", far, np.array(0.9, np.float32)), np.array(-np.inf, np.float32), left)
        weights.append(g.op("GatherElements", g.op("Softmax", near, axis=-1), best, axis=-1))
        ids.append(best)
        low = g.op("Expand", np.array(-np.inf, np.float32), g.op("Shape", best))
        left = g.op("ScatterElements", left, best, low, axis=-1)
    return g.op("Concat", *weights, axis=-1), g.op("Concat", *ids, axis=-1)


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


def looped_over_hits(g, x, weights, ids, up, down):
    """As tracing writes a loop over the experts that some token chose, when its example chose all of them."""
    out = g.op("Sub", x, x)
    hit = g.op("OneHot", ids, np.array(EXPERTS + 1, np.int64), hand.i64(0, 1), axis=-1)
    hit = g.op("Transpose", hit, perm=[2, 1, 0])
    some = g.op("Greater", g.op("ReduceSum", hit, hand.i64(-1, -2), keepdims=0), np.array(0, np.int64))
    places = g.op("Transpose", g.op("NonZero", some), perm=[1, 0])
    for part in g.op("Split", places, hand.i64(*[1] * EXPERTS), axis=0, outputs=EXPERTS).producer().outputs:
        i = g.op("Squeeze", part, hand.i64(0, 1))
        at = g.op("Transpose", g.op("NonZero", g.op("Gather", hit, i, axis=0)), perm=[1, 0])
        slot, token = (g.op("Gather", at, hand.i64(j), axis=1) for j in (0, 1))
        w1, w2 = (g.op("Transpose", g.op("Gather", w, i, axis=0), perm=[1, 0]) for w in (up, down))
        y = g.op("MatMul", g.op("Relu", g.op("MatMul", g.op("GatherND", x, token), w1)), w2)
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


@pytest.mark.parametrize(
    ("form", "bias", "chosen_by"),
    [
        ("batched", False, "TopK"),
        ("batched", True, "ArgMax"),
        ("looped", True, "TopK"),
        ("looped", False, "TopK"),
        ("hit", True, "TopK"),
        ("hit", False, "ArgMax"),
    ],
)
def test_what_is_left_is_the_model_without_those_experts(form, bias, chosen_by):
    g = mixture(form, bias, chosen_by)
    canonicalize(g)
    assert g.declined == []
    (e,) = blocks.experts(g)
    form = "looped" if form == "hit" else form
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
    ids = probed.value(e.numbers.name)
    probed.model.graph.outputs.append(ids)
    return sum(np.bincount(cuts.run(probed, b.feeds)[ids.name].reshape(-1), minlength=EXPERTS) for b in data(g))


def test_a_loop_over_the_experts_that_are_hit_is_one_over_all():
    """Where the original runs both are equal; with too few tokens to hit every expert only the raised graph runs."""
    g = mixture("hit")
    raised = g.clone()
    canonicalize(raised)
    assert not any(n.op_type == "Split" for n in raised.nodes())
    assert len(blocks.mlps(raised)) == EXPERTS
    whole = np.concatenate([b.feeds["x"] for b in data(g)])
    cuts.assert_same(g, raised, {"x": whole})
    one = cuts.run(raised, {"x": whole[:1]})["y"]
    np.testing.assert_allclose(one, cuts.run(g, {"x": whole})["y"][:1], rtol=2e-6)
    with pytest.raises(OnnxcompError):
        cuts.run(g, {"x": whole[:1]})


def test_a_loop_over_some_of_the_experts_keeps_what_it_asks():
    """Five places of which six may be hit: which ones they are is not known before the model runs."""
    g = hand.graph(x=[6])
    places = g.op("Transpose", g.op("NonZero", g.op("Greater", g.inputs[0], np.array(0, np.float32))), perm=[1, 0])
    parts = g.op("Split", places, hand.i64(*[1] * 5), axis=0, outputs=5).producer().outputs
    y = g.op("Cast", g.op("Concat", *parts, axis=0), to=ir.DataType.FLOAT.value)
    g = tiny.finish(g, y, "y", [5, 1])
    canonicalize(g)
    assert [n.op_type for n in g.nodes()].count("Split") == 1
    x = np.array([1, 1, 0, 1, 1, 1], np.float32)
    assert cuts.run(g, {"x": x})["y"].ravel().tolist() == [0, 1, 3, 4, 5]


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
