"""Two models value by value: what corresponds, where it differs first, and faults that were planted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.engine.asked import check_bisected
from onnxcomp.engine.bisect import Bisection, not_bisected
from onnxcomp.engine.by_layer import by_layer
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.maths.sequence_alignment import align
from onnxcomp.reports.layer_tables import layer_json, layer_tables
from onnxcomp.reports.outcome import Step
from onnxcomp.target import CPU
from onnxcomp.validation.gates import Gate, Verdict
from tests import planted, tiny
from tests.planted import Case

CHEAP = [Case("bert", "bias", 0), Case("qwen2", "mask", 1), Case("qwen2", "scale", 2), Case("qwen2", "weight", 3)]


def data(g: Graph) -> Any:
    from onnxcomp.data.datasets import as_dataset

    return as_dataset([tiny.feeds(g, 2, 9, seed=i) for i in range(2)], g)


def test_alignment_keeps_order_and_leaves_out_what_fits_nothing() -> None:
    score = np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.0], [0.0, 0.0, 0.7]])
    assert align(score) == [(0, 1), (2, 2)]
    assert align(np.full((2, 3), -1.0)) == []
    assert align(np.zeros((0, 3))) == []
    assert align(np.eye(4)) == [(i, i) for i in range(4)]


@pytest.mark.parametrize("case", CHEAP, ids=lambda c: f"{c.architecture}-{c.fault}")
def test_a_planted_fault_is_what_stands_out(case: Case) -> None:
    g, nodes = case.planted()
    found = by_layer(case.original(), g, case.data())
    assert found.culprits[0].candidate.node in nodes
    assert found.culprits[0].reference.outputs, "which outputs it reaches"


def test_without_a_fault_nothing_stands_out_and_exact_models_do_not_differ() -> None:
    case = Case("bert", "bias", 0)
    found = by_layer(case.original(), case.compressed(), case.data())
    assert found.culprits == []
    assert found.first is not None
    assert found.first.reference.product, "the first that differs is a linear that was quantized"
    same = by_layer(case.original(), Case("bert", "bias", 1).original(), case.data())
    assert same.first is None
    assert (same.worst, same.missing) == ([], ())


def test_among_exact_values_an_error_is_no_multiple_of_anything() -> None:
    g = tiny.encoder(layers=2)
    other = g.clone()
    x = blocks.mlps(other)[0].down
    other.put(x.weight, (other.array(x.weight) * 1.5).astype(np.float32))
    found = by_layer(g, other, data(g))
    assert found.culprits[0].outstanding == math.inf
    assert {x.outstanding for x in found.values} == {0.0, math.inf}
    plain = layer_json(found)
    assert plain["culprits"][0]["outstanding"] is None
    assert "where most others are exact" in str(layer_tables(plain)[0])


def test_pruned_models_are_compared_where_widths_agree() -> None:
    g = tiny.decoder(layers=2, ffn=64)
    passes = [parse_pass(p) for p in ("canonicalize", {"prune-ffn": {"ratio": 0.5, "score": "magnitude"}})]
    cut = PassManager(passes).run(g, [tiny.feeds(g, 2, 9, seed=i) for i in range(6)]).model
    found = by_layer(g, cut, data(g))
    missing = {x.role for x in found.missing}
    assert {"MLP up", "MLP gate"} <= missing
    assert {(x.reference.layer, x.reference.role) for x in found.worst[:2]} == {(0, "MLP down"), (1, "MLP down")}


def test_a_stream_in_another_basis_is_no_fault_of_what_reads_it() -> None:
    g = tiny.decoder(layers=2, ffn=64)
    passes = [parse_pass("canonicalize"), parse_pass("slice: {ratio: 0.25}")]
    cut = PassManager(passes).run(g, [tiny.feeds(g, 2, 9, seed=i) for i in range(8)]).model
    found = by_layer(g, cut, data(g))
    assert found.culprits == []
    assert [x.reference.op == x.candidate.op for x in found.values] == [True] * len(found.values)
    roles = [(x.reference.layer, x.reference.role) for x in found.values if x.reference.product]
    assert roles == [(i, r) for i in range(2) for r in ("query", "key", "value", "MLP gate", "MLP up")] + [(-1, "")]


def test_models_with_other_weights_are_unrelated_and_nothing_stands_out() -> None:
    g = tiny.decoder(layers=2, ffn=64)
    found = by_layer(g, tiny.decoder(layers=2, ffn=64, seed=5), data(g))
    assert found.unrelated
    assert found.culprits == []
    assert not by_layer(g, g.clone(), data(g)).unrelated
    lines = layer_tables(layer_json(found))
    assert str(lines[0]).startswith("the two models have nothing in common")
    assert len(lines) == 1


def test_models_of_a_fixed_batch_are_run_by_whole_batches() -> None:
    g = tiny.encoder(batch=3)
    made = PassManager([parse_pass("dynamic-quant: {min_size: 1}")]).run(g, [tiny.feeds(g, 3, 9)]).model
    from onnxcomp.data.datasets import as_dataset

    found = by_layer(g, made, as_dataset([tiny.feeds(g, 3, 9, seed=i) for i in range(4)], g))
    assert found.samples == 1, "one batch of three samples"
    assert 0 < found.worst[0].error < 0.1


def test_gates_on_the_written_file_are_refused_for_bisecting() -> None:
    with pytest.raises(RecipeError, match=r"but latency<=1x, size<=0\.5x can only be judged on the written file"):
        check_bisected(Gate(["latency<=1x", "size<=0.5x"]))
    with pytest.raises(RecipeError, match="there is no gate"):
        check_bisected(Gate())
    check_bisected(Gate(["size<=0.5x", "sqnr>=20"]))


def test_a_size_that_refuses_says_what_each_pass_left() -> None:
    steps = [Step("canonicalize", "canonicalize", "exact", nbytes=(8_000_000, 8_000_000))]
    steps.append(Step("qdq", "qdq", "lossy", nbytes=(8_000_000, 3_600_000)))
    says = not_bisected([Verdict("size<=0.1x", 0.46, passed=False), Verdict("latency<=1x", 0.9, passed=True)], steps)
    assert says.startswith("--bisect names no pass for size<=0.1x, judged on the written file")
    assert says.endswith("constants were 8.0 MB, behind qdq 3.6 MB")
    slow = not_bisected([Verdict("latency<=1x", 1.1, passed=False)], steps)
    assert slow == "--bisect names no pass for latency<=1x, judged on the written file behind all passes"


def test_bisect_names_the_pass_and_the_site_that_broke_a_gate() -> None:
    case = Case("qwen2", "scale", 2)
    culprit, truth = case.bisected("sqnr>=20")
    assert culprit.name == "faulty"
    assert culprit.verdicts[0].startswith("sqnr>=20: measured")
    assert culprit.suspects[0].site in truth
    first, second = (culprit.suspects[i] for i in range(2))
    assert (first.outstanding, first.error) > (2 * second.outstanding, 2 * second.error)
    assert culprit.suspects[0].outputs == ("logits",)


def test_a_pass_whose_harm_a_later_one_mends_is_not_blamed() -> None:
    bisection = Bisection(active=True)
    p, g = parse_pass("cleanup"), tiny.linear()
    bisection.judged(p, g, g, [Verdict("sqnr>=20", 10.0, passed=False)])
    bisection.judged(p, g, g, [Verdict("sqnr>=20", 25.0, passed=True)])
    assert bisection.culprit(g, None, CPU) is None
    assert bisection.at is None


def test_every_planted_fault_has_a_place() -> None:
    assert len(planted.cases()) == 20
