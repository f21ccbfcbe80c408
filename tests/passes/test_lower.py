"""The pass `lower`: what measuring changes, what the table decides, what is declined and explained."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.catalog import load
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph, extract
from onnxcomp.lowering import costs, race
from onnxcomp.lowering.choices import Choices
from onnxcomp.methods.quantize import payoff
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.pipeline import Fidelity
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU, CPU_VNNI, CUDA, TENSORRT
from tests import tiny
from tests.hand import ops

SHAPES = [{"batch": 2, "sequence": 8}]


def content(g: Graph) -> bytes:
    return ir.to_proto(g.model).SerializeToString(deterministic=True)


def lower(g: Graph, target=CPU, **options):
    made = Lower(**{k: options.pop(k) for k in ("standard", "approximate") if k in options})
    return PassManager([made], target=target, shapes=SHAPES if options.get("measure") else (), **options).run(g)


class Clock:
    """A clock that gives each form of micro-model the time a function says, and counts sessions."""

    def __init__(self, seconds) -> None:
        self.seconds, self.laps = seconds, 0

    def __call__(self, entry: race.Entry, target, threads, *, fetch: bool):
        self.laps += 1
        outputs = {}
        if fetch:
            with Session(entry.model) as session:
                outputs = session.run(entry.feeds[0])
        entry.laps.append(tuple(self.seconds(entry) for _ in entry.feeds))
        return outputs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Install a clock by form name: `clock({"MultiHeadAttention": 0.5})`, all others take one second."""

    def install(times: dict[str, float]) -> Clock:
        made = Clock(lambda entry: times.get(entry.form, 1.0))
        monkeypatch.setattr(race, "_lap", made)
        return made

    return install


def agree(a: Graph, b: Graph, tolerance: float = 2e-6) -> None:
    for feeds in (tiny.feeds(a, 2, 7, padding="right"), tiny.feeds(a, 3, 5, seed=1)):
        with Session(a) as x, Session(b) as y:
            for want, got in zip(x.run(feeds).values(), y.run(feeds).values(), strict=True):
                rows = feeds["attention_mask"].astype(bool)
                assert np.abs(got[rows] - want[rows]).max() <= tolerance * np.abs(want[rows]).max()


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder])
def test_without_measuring_two_runs_give_the_same_bytes(build, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the clock was asked")

    monkeypatch.setattr(race, "_lap", never)
    monkeypatch.setattr(costs, "_time", never)
    first, second = (lower(build()) for _ in range(2))
    assert content(first.model) == content(second.model)
    assert {c.source for c in first.report.step("lower").choices} == {"table"}


@pytest.mark.parametrize("target", [CUDA, TENSORRT], ids=lambda t: t.name)
@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder])
def test_other_targets_get_their_tables_forms_and_equal_outputs(build, target):
    g = build()
    new = lower(g, target).model
    assert not list(new.nodes("Attention"))
    assert ops(new)["MultiHeadAttention"] == (2 if target is CUDA and build is tiny.encoder else 0)
    assert ops(new)["GroupQueryAttention"] == (2 if target is CUDA and build is tiny.decoder else 0)
    agree(g, new)


def test_a_target_that_is_elsewhere_is_not_timed(clock):
    made = clock({})
    lower(tiny.encoder(), CPU_VNNI, measure=True)
    assert made.laps == 0


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_the_fastest_form_takes_the_place_of_the_default(clock):
    clock({"MultiHeadAttention": 0.5, "decomposed": 0.7, "MultiHeadAttention padding": 0.9})
    g = tiny.encoder()
    result = lower(g, measure=True)
    assert ops(result.model)["MultiHeadAttention"] == 2
    assert not list(result.model.nodes("Attention"))
    (choice,) = [c for c in result.report.step("lower").choices if c.kind == "attention"]
    assert (choice.form, choice.default, choice.source, len(choice.sites)) == (
        "MultiHeadAttention",
        "Attention",
        "measured",
        2,
    )
    assert {c.form: c.ratio for c in choice.candidates}["MultiHeadAttention"] == pytest.approx(2)
    assert "2.00x" in choice.reason
    agree(g, result.model)


def test_ties_go_to_the_default(clock):
    clock({"MultiHeadAttention": 0.99, "decomposed": 1.0})
    result = lower(tiny.encoder(), measure=True)
    assert ops(result.model)["Attention"] == 2
    reasons = [c.reason for c in result.report.step("lower").choices if c.kind == "attention"]
    assert reasons == ["none of 3 other forms is reliably faster than Attention"]


@pytest.mark.parametrize("form", ["joined", "packed", "bias inside", "scale merged"])
def test_wide_forms_are_chosen_and_equal(clock, form):
    clock({form: 0.5})
    g = tiny.encoder()
    result = lower(g, measure=True)
    assert {c.form for c in result.report.step("lower").choices if c.kind == "projections"} == {form}
    agree(g, result.model)


def test_every_form_together_is_equal(clock):
    fast = ("joined", "GroupQueryAttention", "Gemm", "Skip", "QuickGelu")
    clock(dict.fromkeys(fast, 0.5))
    g = tiny.decoder()
    result = lower(g, measure=True)
    assert {"GroupQueryAttention", "SkipSimplifiedLayerNormalization", "QuickGelu"} <= set(ops(result.model))
    agree(g, result.model, 5e-6)
    again = lower(result.model).report.step("lower")
    assert again.changed == 0


def test_equal_sites_are_measured_once(clock):
    counts = []
    for layers in (1, 4):
        made = clock({})
        lower(tiny.encoder(layers=layers), measure=True)
        counts.append(made.laps)
    assert counts[0] == counts[1]


def test_a_form_that_is_wrong_is_not_taken(clock, monkeypatch):
    clock({"decomposed": 0.1})
    monkeypatch.setattr("onnxcomp.lowering.older_opsets.scale_of", lambda node: 3.0)
    result = lower(tiny.encoder(), measure=True)
    (choice,) = [c for c in result.report.step("lower").choices if c.kind == "attention"]
    assert choice.form == "Attention"
    assert "differs from the default" in {c.form: c.note for c in choice.candidates}["decomposed"]


def test_a_form_slower_at_one_shape_is_not_taken(monkeypatch):
    def lap(entry: race.Entry, target, threads, *, fetch: bool):
        entry.laps.append((0.3, 1.2) if entry.form == "decomposed" else (1.0, 1.0))
        return {}

    monkeypatch.setattr(race, "_lap", lap)
    made = PassManager([Lower()], measure=True, shapes=[*SHAPES, {"batch": 4, "sequence": 8}])
    result = made.run(tiny.encoder())
    assert {c.form for c in result.report.step("lower").choices if c.kind == "attention"} == {"Attention"}


def test_one_disturbed_round_is_forgiven_and_two_are_not():
    def entries(lost: int) -> list[race.Entry]:
        g = tiny.linear()
        default, other = race.Entry("a", g, []), race.Entry("b", g, [])
        default.laps = [(1.0,)] * race.ROUNDS
        other.laps = [(2.0,)] * lost + [(0.5,)] * (race.ROUNDS - lost)
        other.ratios = [a[0] / b[0] for a, b in zip(default.laps, other.laps, strict=True)]
        return [default, other]

    assert race.winner(entries(1)).form == "b"
    assert race.winner(entries(2)).form == "a"
    half = entries(1)
    half[1].ratios.pop()
    assert race.winner(half).form == "a"
    assert race.unfinished(half)
    assert not race.unfinished(entries(2))


@pytest.mark.parametrize(
    ("won", "rounds"),
    [("wwwwwwww", 6), ("lwwwwwww", 8), ("wwwwwlww", 8), ("llwwwwww", 2), ("wlwlwwww", 4)],
)
def test_a_race_ends_when_the_form_has_won_or_lost(monkeypatch, won, rounds):
    def lap(entry: race.Entry, target, threads, *, fetch: bool):
        entry.laps.append((1.0 if entry.form == "a" or won[len(entry.laps)] == "l" else 0.5,))
        return {}

    monkeypatch.setattr(race, "_lap", lap)
    g = tiny.linear()
    default, other = race.Entry("a", g, []), race.Entry("b", g, [])
    race.race([default, other], CPU)
    assert len(other.laps) == len(default.laps) == rounds
    assert race.winner([default, other]).form == ("b" if rounds >= race.STRAIGHT else "a")
    assert not race.unfinished([default, other])


def test_a_real_race_runs_every_form_and_gives_times():
    result = lower(tiny.encoder(layers=1), measure=True)
    found = {c.kind: c for c in result.report.step("lower").choices}
    apart = found["projections"].form == "separate"  # a form that takes the projections in leaves no attention behind
    assert {"activation", "linear", "residual"} | ({"attention"} if apart else set()) <= set(found)
    assert {c.source for c in found.values()} <= {"measured", "remembered"}
    for choice in found.values():
        assert not [c.note for c in choice.candidates if c.note], choice
        assert all(len(c.ms) == 1 and c.ms[0] > 0 for c in choice.candidates)
    agree(tiny.encoder(layers=1), result.model, 5e-6)


def test_unknown_sizes_leave_the_table_in_charge(clock):
    made = clock({})
    g = tiny.encoder()
    for v in g.inputs:
        v.shape = ir.Shape([None, None, 2][: len(v.shape)])
    other = ir.Value(name="extra", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "anything"]))
    g.model.graph.inputs.append(other)
    g = Graph(g.model)
    result = PassManager([Lower()], measure=True).run(g)
    assert made.laps == 0
    assert any("--shape" in w for w in result.report.warnings)
    sites = [c.site for c in result.report.step("lower").choices]
    assert any("?" in w for w in sites)
    assert not any("scalar" in w for w in sites)


@pytest.mark.parametrize(
    ("shape", "sizes", "says"),
    [
        (None, {}, "?"),
        (["b", None, 8], {}, "?x?x8"),
        ([], {}, "scalar"),
        (None, {"x": ()}, "scalar"),
        (["b", 8], {"x": (2, 8)}, "2x8"),
    ],
)
def test_a_site_is_described_by_the_sizes_that_are_known(shape, sizes, says):
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=None if shape is None else ir.Shape(shape))
    node = ir.node("Relu", [x])
    g = Graph(ir.Model(ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 18}), ir_version=10))
    assert extract.describe(g, sizes) == f"Relu of {says}"


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (None, "the type of its input is unknown; run canonicalize first"),
        (ir.DataType.DOUBLE, "dynamic quantization takes no inputs of double"),
    ],
)
def test_dynamic_quantization_says_why_an_input_does_not_suit(dtype, why):
    g = tiny.linear()
    (linear,) = blocks.linears(g)
    linear.source.type = None if dtype is None else ir.TensorType(dtype)
    DynamicQuant(min_size=1).run(g, SimpleNamespace(target=CPU))  # nothing else is read before it declines
    assert [d.why for d in g.declined] == [why]


# ---- what is remembered ----------------------------------------------------------------------------------------------


def test_a_warm_cache_is_not_timed_again(clock, tmp_path: Path):
    made = clock({"decomposed": 0.5})
    first = lower(tiny.encoder(), measure=True, cache=tmp_path)
    cold = made.laps
    again = lower(tiny.encoder(seed=4), measure=True, cache=tmp_path)
    assert made.laps == cold > 0
    assert ops(again.model) == ops(first.model)
    assert "remembered" in {c.source for c in again.report.step("lower").choices}


def test_a_file_of_choices_is_taken_elsewhere_without_a_clock(clock, tmp_path: Path):
    made = clock({"decomposed": 0.5})
    manager = PassManager([Lower()], measure=True, shapes=SHAPES)
    tuned = manager.run(tiny.encoder())
    path = tmp_path / "choices.json"
    foreign = dataclasses.replace(manager.choices.header, machine="another machine")
    Choices(foreign, manager.choices.sites, manager.choices.numbers).save(path)
    laps = made.laps
    for measure in (False, True):
        result = PassManager([Lower()], measure=measure, shapes=SHAPES, choices=path).run(tiny.encoder(layers=3))
        assert made.laps == laps
        assert not list(result.model.nodes("Attention"))
        assert {c.source for c in result.report.step("lower").choices} <= {"file", "table"}
    assert not list(tuned.model.nodes("Attention"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a file of choices"),
        ('{"header": {"target": "cuda", "machine": "", "runtime": ""}}', "measured for target 'cuda'"),
        ('{"header": {"target": "cpu", "machine": "", "runtime": "", "forms": 0}}', "another version"),
    ],
)
def test_a_wrong_file_of_choices_is_one_message(tmp_path: Path, text: str, message: str):
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        PassManager([Lower()], choices=path)


def test_a_damaged_cache_counts_as_absent(clock, tmp_path: Path):
    clock({})
    lower(tiny.encoder(), measure=True, cache=tmp_path)
    (file,) = tmp_path.glob("choices-*.json")
    file.write_text("broken")
    assert lower(tiny.encoder(), measure=True, cache=tmp_path).report.step("lower").choices


# ---- options ---------------------------------------------------------------------------------------------------------


def test_standard_has_no_operators_of_the_runtime(clock):
    clock({"MultiHeadAttention": 0.1, "Skip": 0.1, "BiasGelu": 0.1, "Gemm": 0.5})
    g = tiny.encoder()
    new = lower(g, measure=True, standard=True).model
    assert not [n for n in new.nodes() if n.domain]
    agree(g, new)


def test_approximations_make_the_pass_a_lossy_one(clock):
    assert Lower().fidelity is Fidelity.EXACT
    assert Lower(approximate=True).fidelity is Fidelity.LOSSY
    assert load("lower").fidelity is Fidelity.EXACT
    clock({"FastGelu approximated": 0.5})
    exact, near = (lower(tiny.encoder(), measure=True, approximate=a).model for a in (False, True))
    assert not list(exact.nodes("FastGelu"))
    assert ops(near)["FastGelu"] == 2
    agree(exact, near, 5e-3)


@pytest.mark.parametrize("version", [18, 20, 22])
def test_an_older_operator_set_gets_plain_products(version):
    g = tiny.encoder()
    new = lower(g, dataclasses.replace(CPU, max_opset=version, contrib=())).model
    assert new.opset == version
    assert not [n for n in new.nodes() if n.domain]
    agree(g, new)


# ---- whether quantizing pays -----------------------------------------------------------------------------------------


def costed(monkeypatch: pytest.MonkeyPatch, seconds) -> list[Sequence[int]]:
    """Replace the clock of `env.cost`: `seconds(form, fan_out)`; returns the shapes that were asked."""
    asked: list[Sequence[int]] = []

    def fake(forms, shapes, target, threads):
        asked.extend([tuple(shapes["x"])] if forms else [])
        return {n: seconds(n, sum(v.shape[-1] for v in g.outputs)) for n, g in forms.items()}

    monkeypatch.setattr(costs, "_time", fake)
    return asked


def quantize(g: Graph, p=None, **options):
    data = as_dataset([tiny.feeds(g, 2, 7, seed=i) for i in range(5)], g)
    manager = PassManager([p or Qdq(min_size=1)], shapes=SHAPES, allow_unchanged=True, **options)
    return manager.run(g, data).report.steps[0]


@pytest.mark.parametrize("p", [Qdq(min_size=1), DynamicQuant(min_size=1)], ids=lambda p: p.name)
def test_linears_that_would_get_slower_stay_float(monkeypatch, clock, p):
    clock({})
    g = tiny.encoder()
    asked = costed(monkeypatch, lambda form, n: 1e-3 if form == "float" else (2e-3 if n == 64 else 0.5e-3))
    step = quantize(g, p, measure=True)
    lost = [d for d in step.declined if "slower" in d.why]
    assert len(lost) == 2  # the wide linear of each of two layers
    assert "2.000 for 1.000 ms" in lost[0].why
    assert step.changed == step.eligible - 2
    assert set(asked) == {(1, 16, 32), (1, 16, 64)}
    assert len(asked) == 4  # q, k, v together; o; up; down
    assert 0 < step.choosing < step.seconds


@pytest.mark.parametrize("p", [Qdq(min_size=1), DynamicQuant(min_size=1)], ids=lambda p: p.name)
def test_without_measuring_no_linear_is_left_out(monkeypatch, p):
    asked = costed(monkeypatch, lambda form, n: 1.0 if form == "int8" else 0.1)
    step = quantize(tiny.encoder(), p)
    assert not asked
    assert step.changed == step.eligible


def test_differences_below_a_call_s_noise_do_not_count(monkeypatch):
    costed(monkeypatch, lambda form, n: 1e-6 if form == "float" else 9e-6)
    step = quantize(tiny.encoder(), measure=True)
    assert step.changed == step.eligible


@pytest.mark.parametrize("dynamic", [False, True])
def test_integer_trials_run_as_integers_and_are_one_model_per_group(dynamic):
    g = tiny.encoder()
    canonicalize(g)
    group = blocks.siblings(blocks.linears(g))[0]
    made = payoff.models(group, CPU, dynamic=dynamic)
    assert [v.name for v in made["int8"].outputs] == [v.name for v in made["float"].outputs] == ["y0", "y1", "y2"]
    check = integer_check(made["int8"])
    assert (check.quantized_linears, check.ok) == (3, True)
    x = {"x": np.random.default_rng(0).standard_normal((1, 5, 32), np.float32)}
    with Session(made["float"]) as a, Session(made["int8"]) as b:
        assert {n: v.shape for n, v in a.run(x).items()} == {n: v.shape for n, v in b.run(x).items()}
