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
from tests.mixtures import CHOSEN, EXPERTS, FFN, WIDTH, mixture

PruneExperts = catalog.load("prune-experts")
TOKENS = 6


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
