"""Every output is compared: the worst one decides, integers are counted, and gates can name one."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.data.datasets import Batch
from onnxcomp.errors import DataError, ModelError, RecipeError
from onnxcomp.graph import Graph
from onnxcomp.reports import json_report, tables
from onnxcomp.validation.compare import Reference, validate
from onnxcomp.validation.drift import Drift, DriftSums, MatchSums
from onnxcomp.validation.gates import Condition, Gate, score_of
from onnxcomp.validation.outputs import OutputLayout, View
from onnxcomp.validation.results import Validation
from onnxcomp.validation.rows import OutputRows
from tests import hand, tiny

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def model(outputs: dict[str, np.ndarray], extra: dict[str, tuple[str, ir.DataType]] | None = None) -> Graph:
    """One product per output on the same input `[batch, 4]`; `extra` outputs are an operator of the first one."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", 4]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="heads"), ir_version=10))
    for name, w in outputs.items():
        out = g.op("MatMul", x, w.astype(np.float32))
        out.name, out.type, out.shape = name, ir.TensorType(FLOAT), ir.Shape(["batch", w.shape[1]])
        g.model.graph.outputs.append(out)
    for name, (op, dtype) in (extra or {}).items():
        out = g.op(op, g.outputs[0], **({"axis": 1, "keepdims": 0} if op == "ArgMax" else {"to": dtype.value}))
        axes = ["batch", "n"] if op == "Cast" else ["batch"]
        out.name, out.type, out.shape = name, ir.TensorType(dtype), ir.Shape(axes)
        g.model.graph.outputs.append(out)
    return Graph(g.model)


RNG = np.random.default_rng(0)
W, V = RNG.standard_normal((2, 4, 3))
FEEDS = [{"x": RNG.standard_normal((16, 4)).astype(np.float32)} for _ in range(2)]
HEADS = model({"start_logits": W, "end_logits": V})


def test_the_worst_output_decides_headline_values_and_gates():
    v = validate(HEADS, model({"start_logits": W, "end_logits": V * np.array([1, 0, 0])}), FEEDS)
    assert v.worst == "end_logits"
    assert v.outputs["start_logits"].equal
    assert not v.equal
    assert v.values()["sqnr"] == v.outputs["end_logits"].sqnr < 10
    assert v.values()["kl"] == v.outputs["end_logits"].kl > 0
    assert v.drift is v.outputs["end_logits"]
    verdicts = Gate(["sqnr>=20", "sqnr[start_logits]>=20", "sqnr[end_logits]<20", "agreement>=1"]).judge(v.values())
    assert [x.passed for x in verdicts] == [False, True, True, False]
    assert json_report.quality(v) == [f"SQNR {v.drift.sqnr:.1f} dB in 'end_logits', the worst of 2 outputs"]


def test_a_negated_second_output_is_not_equal():
    v = validate(HEADS, model({"start_logits": W, "end_logits": -V}), FEEDS)
    assert v.values()["sqnr"] == pytest.approx(-6.02, abs=0.01)
    assert v.values()["cosine"] == pytest.approx(-1)
    assert "equal outputs" not in json_report.quality(v)
    assert json_report.quality(validate(HEADS, HEADS.clone(), FEEDS)) == ["equal outputs"]


def test_integer_outputs_are_counted_entry_by_entry():
    g = model({"logits": W}, {"best": ("ArgMax", INT64)})
    h = model({"logits": W}, {"best": ("ArgMax", INT64)})
    h.replace(h.value("best"), h.op("Add", h.value("best"), np.array(1, np.int64)))
    v = validate(g, h, FEEDS)
    assert v.outputs["logits"].equal
    assert v.outputs["best"] == Drift(exact_match=0.0, rows=32)
    assert v.worst == "best"
    assert v.values()["exact-match"] == v.values()["exact-match[best]"] == 0
    assert json_report.quality(v) == ["0.00% of entries equal in 'best', the worst of 2 outputs"]
    assert not Gate(["exact-match>=0.9?"]).judge(v.values())[0].passed
    assert Gate(["exact-match>=0.9?"]).judge(validate(HEADS, HEADS, FEEDS).values()) == []


def test_a_model_of_integer_outputs_alone_is_compared_and_has_no_metric_of_scores():
    g = model({"logits": W}, {"best": ("ArgMax", INT64)})
    g.model.graph.outputs.pop(0)
    g = Graph(g.model)
    v = validate(g, g.clone(), FEEDS)
    assert v.equal
    assert v.values() == {"exact-match": 1.0, "exact-match[best]": 1.0}
    assert json_report.quality(v) == ["equal outputs"]
    with pytest.raises(DataError, match="'best' is int64"):
        Reference(g, FEEDS, metrics=["accuracy"])


def test_float64_outputs_are_compared_in_float64():
    g = model({"logits": W}, {"wide": ("Cast", ir.DataType.DOUBLE)})
    h = g.clone()
    h.replace(h.value("wide"), h.op("Mul", h.value("wide"), np.array(1 + 1e-12)))
    v = validate(g, h, FEEDS)
    assert v.worst == "wide"
    assert v.drift.sqnr == pytest.approx(240, abs=3)


def test_booleans_and_strings_are_compared():
    sums = MatchSums()
    rows = np.array([["a", "b"], ["c", "d"]], object)
    other = np.array([["a", "b"], ["c", "x"]], object)
    at = np.arange(2)
    sums.update(OutputRows(rows, other, at, at, 2))
    assert sums.result() == Drift(exact_match=0.75, rows=2)
    g = model({"logits": W}, {"sure": ("Cast", ir.DataType.BOOL)})
    assert validate(g, g.clone(), FEEDS).outputs["sure"].equal


def test_nan_in_both_is_undefined_and_nan_in_the_result_alone_is_not_finite():
    x = np.array([[1.0, np.nan], [2.0, 3.0]], np.float32)
    at = np.arange(2)
    same, broken = DriftSums(logits=False), DriftSums(logits=False)
    same.update(OutputRows(x, x, at, at, 2))
    broken.update(OutputRows(np.where(x == 3, np.nan, x), x, at, at, 2))
    assert same.result().equal
    assert same.result().undefined == 1
    assert not broken.result().finite


def test_the_scored_output_is_that_of_class_scores_and_is_named():
    g = model({"hidden_state": np.eye(4), "logits": W})
    labels = np.zeros(16, np.int64)
    data = [(f, labels) for f in FEEDS]
    v = validate(g, g.clone(), [Batch(f, y) for f, y in data])
    assert v.scored == "logits"
    assert set(v.metrics) == {"accuracy"}
    assert v.json()["scored"] == "logits"


def test_agreement_is_that_of_class_scores_where_there_are_any():
    one = {"max_abs": 0.1, "rel_l2": 0.1, "sqnr": 20.0, "cosine": 0.9}
    v = Validation({"hidden": Drift(**one, agreement=0.5), "logits": Drift(**one, agreement=0.9, kl=0.1)}, {}, 4)
    assert v.values()["agreement"] == 0.9
    assert v.values()["agreement[hidden]"] == 0.5


def test_one_output_that_is_not_finite_fails_every_gate():
    v = validate(HEADS, model({"start_logits": W, "end_logits": V * np.nan}), FEEDS)
    assert v.worst == "end_logits"
    assert math.isnan(v.values()["sqnr[end_logits]"])
    assert not any(x.passed for x in Gate(["sqnr>=-99", "max-abs<=9e9", "sqnr[end_logits]>=-99"]).judge(v.values()))
    assert json_report.quality(v) == ["the result's output 'end_logits' is not finite"]


def test_scores_of_variants_are_of_the_worst_output_but_never_infinite_for_a_dead_one():
    ok, dead = {"max_abs": 0.1, "rel_l2": 0.2, "sqnr": 20.0, "cosine": 0.9}, {"rel_l2": math.inf, "sqnr": -math.inf}
    v = Validation({"a": Drift(**ok), "dead": Drift(max_abs=1e-9, cosine=1.0, **dead)}, {}, 4, scored="a")
    assert score_of(v, None) == 0.2
    assert score_of(v, "sqnr") == -20


# ---- gates on one output ---------------------------------------------------------------------------------------------


def test_a_gate_names_an_output():
    c = Condition.parse(" sqnr[end_logits] >= 20 dB ")
    assert (c.name, c.output, c.op, c.bound, c.measured) == ("sqnr", "end_logits", ">=", 20, "sqnr[end_logits]")
    assert Condition.parse("exact-match[/head/Arg.Max:0]>=90%?").output == "/head/Arg.Max:0"
    gate = Gate(["sqnr>=10", "sqnr[a]>=20", "sqnr[a]>=30"])
    assert [x.text for x in gate.conditions] == ["sqnr>=10", "sqnr[a]>=30"]


@pytest.mark.parametrize("text", ["size[logits]<=0.3x", "latency[a]<=1", "perplexity-rise[logits]<=1%"])
def test_what_has_no_value_per_output_is_refused(text):
    with pytest.raises(RecipeError, match="not measured for each output"):
        Gate([text])


def test_an_unknown_output_is_one_error_with_the_nearest_name():
    gate = Gate(["sqnr[end_logit]>=20"])
    with pytest.raises(RecipeError, match=r"gate 'sqnr\[end_logit\]>=20': .* did you mean 'end_logits'"):
        gate.check({"start_logits": ["sqnr"], "end_logits": ["sqnr"]})
    with pytest.raises(RecipeError, match="its outputs are ids"):
        gate.check({"ids": ["exact-match"]})
    gate.check({"end_logit": ["sqnr"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sqnr[label]>=20", "never measured of 'label'; there is exact-match"),
        ("exact-match[logits]>=1", "never measured of 'logits'"),
        ("pooled-sqnr>=20", "never measured of 'logits', 'label'; there is .*kl"),
        ("kl[label]<=1", "never measured"),
    ],
)
def test_a_gate_on_what_is_never_measured_is_refused_before_the_work(text, message):
    g = scores_and_label()
    with pytest.raises(RecipeError, match=message):
        Gate([text]).check(View.of(g).measures())
    Gate([f"{text}?", "sqnr>=20", "exact-match>=1", "kl<=1"]).check(View.of(g).measures())


def test_labels_are_scored_on_the_output_they_are_for():
    """Not on scores of other classes or of tokens; a label that the model gives itself is compared with them."""
    g, rng = scores_and_label(), np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((8, 4)).astype(np.float32)} for _ in range(2)]
    right = [f["x"].argmin(axis=1) for f in feeds]
    four = validate(g, g.clone(), [Batch(f, y) for f, y in zip(feeds, right, strict=True)])
    assert four.scored == "logits"
    assert "accuracy of 'logits'" in json_report.quality(four)[0]
    seven = validate(g, g.clone(), [Batch(f, y + 3 * i) for i, (f, y) in enumerate(zip(feeds, right, strict=True))])
    assert (seven.scored, seven.metrics["accuracy"].reference) == ("label", 0.5)  # 4 to 6 are no class of the scores
    asked = [Batch(f, y + 3) for f, y in zip(feeds, right, strict=True)]
    assert validate(g, g.clone(), asked, metrics=["agreement"]).scored == "logits"
    per_token = tiny.finish(h := hand.graph(x=("batch", 4)), h.op("Relu", h.model.graph.inputs[0]), "logits", [None, 4])
    spans = [Batch(feeds[0], np.full(8, 6))]
    assert validate(per_token, per_token.clone(), spans).metrics == {}


def test_scores_of_tokens_are_not_those_of_classes():
    layout = OutputLayout("start_logits", 1, True)
    view = View({"tokens": "ids"}, None, (layout, OutputLayout("logits", None, True)))
    made = {"start_logits": np.zeros((2, 16)), "logits": np.zeros((2, 7))}
    feeds = {"ids": np.zeros((2, 16), np.int64)}
    assert view.answering(np.array([0, 6]), made, feeds) == ["logits"]
    assert view.answering(np.array([0, 7]), made, feeds) == []
    fixed = replace(view, outputs=(replace(layout, tokens=None), view.outputs[1]))
    assert fixed.answering(np.array([0, 6]), made, feeds) == ["logits", "start_logits"]


def scores_and_label() -> Graph:
    """Scores of four classes `[batch, 4]`, and the class `[batch]` that is the largest of others."""
    g = hand.graph(x=("batch", 4))
    x = g.model.graph.inputs[0]
    tiny.finish(g, g.op("Relu", x), "logits", ["batch", 4])
    label = g.op("ArgMax", g.op("Neg", x), axis=1, keepdims=0)
    label.name, label.dtype, label.shape = "label", ir.DataType.INT64, ir.Shape(["batch"])
    g.model.graph.outputs.append(label)
    return Graph(g.model)


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_the_report_has_a_line_per_output():
    v = validate(HEADS, model({"start_logits": W, "end_logits": -V}), FEEDS)
    t = tables.outputs(v)
    assert list(t.columns[0].cells) == ["end_logits", "start_logits"]
    plain = json.loads(json.dumps(v.json(), allow_nan=False))
    assert [plain["outputs"][n]["equal"] for n in ("start_logits", "end_logits")] == [True, False]
    assert plain["worst"] == "end_logits"
    assert not any("[" in name for name in plain["values"])


def test_of_many_outputs_the_worst_are_shown():
    v = Validation({f"o{i}": Drift(1.0, 0.1, 20.0 + i, 0.9) for i in range(20)}, {}, 4)
    names = list(tables.outputs(v).columns[0].cells)
    assert names[:2] == ["o0", "o1"]
    assert names[-1] == "and 12 others, none of them worse (-v)"
    assert len(list(tables.outputs(v, every=True).columns[0].cells)) == 20


def test_a_model_whose_outputs_are_maps_is_refused():
    with pytest.raises(ModelError, match="are maps, so there is nothing to compare"):
        View.of(model({"logits": W})).with_types({})


def test_interface_of_a_decoder_has_one_output_per_value():
    g = tiny.decoder()
    v = validate(g, g.clone(), [tiny.feeds(g, 2, 5)])
    assert list(v.outputs) == [str(x.name) for x in g.outputs]
