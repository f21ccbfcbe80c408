"""The pass manager: what it checks, refuses, undoes and reports; and the three ways a pass may use the engine."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError, GateFailed, RecipeError
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.pipeline import Fidelity, Pass, PassFault, SequentialPass, Site, Stage
from onnxcomp.stats import mean
from onnxcomp.validation.gates import Gate
from tests import tiny
from tests.passes.cut_repair import CutRepair
from tests.passes.gptq_linear import GptqLinear
from tests.passes.head_ablation import HeadAblation


def data(g, count=6, seed=0):
    return as_dataset([Batch(tiny.feeds(g, 2, 9, seed=seed + i, padding="right")) for i in range(count)], g)


@dataclass(frozen=True)
class Bend(Pass):
    """Scales the first linear's weight."""

    name: ClassVar[str] = "bend"
    stage: ClassVar[Stage] = Stage.RESCALE
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    by: float = 1.5
    """Factor."""

    def sites(self, g, target):
        return [x.site for x in blocks.linears(g)[:1]]

    def run(self, g, env):
        linear = blocks.linears(g)[0]
        g.scale(linear.weight, np.full(linear.sizes[1], self.by), 1)


@dataclass(frozen=True)
class Liar(Bend):
    """Says exact, is not."""

    name: ClassVar[str] = "liar"
    stage: ClassVar[Stage] = Stage.LOWER
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT


@dataclass(frozen=True)
class Lazy(Bend):
    """Finds sites, edits something else, declines nothing."""

    name: ClassVar[str] = "lazy"

    def sites(self, g, target):
        return [x.site for x in blocks.linears(g)]


@dataclass(frozen=True)
class Breaker(Bend):
    """Leaves an invalid graph."""

    name: ClassVar[str] = "breaker"

    def run(self, g, env):
        super().run(g, env)
        g.nodes("MatMul").__next__().op_type = "NoSuchOperator"


def test_the_callers_model_is_not_edited_and_edits_are_counted():
    g = tiny.encoder()
    edits, nodes = g.edits, g.model.graph.num_nodes()
    report = PassManager([Bend()]).run(g, (), data(g)).report
    assert (g.edits, g.model.graph.num_nodes()) == (edits, nodes)
    assert report.steps[0].changed == 1
    assert report.steps[0].drift["values"]["sqnr"] < 60


@pytest.mark.parametrize(
    ("pass_", "message"),
    [(Lazy(), "neither changed nor declined"), (Breaker(), "broken graph"), (Liar(), "promised equal outputs")],
)
def test_a_pass_that_breaks_its_contract_is_a_fault(pass_, message):
    g = tiny.encoder()
    with pytest.raises(PassFault, match=message):
        PassManager([pass_]).run(g, (), data(g))


def test_gate_refuses_and_its_report_tells():
    g = tiny.encoder()
    with pytest.raises(GateFailed, match="sqnr>=60") as e:
        PassManager([Bend()], gate=Gate(["sqnr>=60"])).run(g, (), data(g))
    assert [v.passed for v in e.value.report.verdicts] == [False]


def test_rollback_undoes_only_the_refused_pass():
    g = tiny.encoder()
    result = PassManager([Canonicalize(), Bend(), Lower()], gate=Gate(["sqnr>=60"]), on_fail="rollback").run(
        g, (), data(g)
    )
    bend = result.report.step("bend")
    assert "sqnr>=60" in bend.rolled_back
    assert result.report.step("lower").changed > 0
    assert result.report.validation.values()["sqnr"] > 80


def test_gates_without_data_are_refused():
    with pytest.raises(DataError, match="evaluation data"):
        PassManager([Bend()], gate=Gate(["sqnr>=60"])).run(tiny.encoder())


def test_order_is_enforced_unless_waived():
    with pytest.raises(RecipeError, match=r"'bend' .* must come before 'lower'"):
        PassManager([Lower(), Bend()])
    assert len(PassManager([Lower(), Bend()], any_order=True).passes) == 2


def test_one_fifth_is_held_out_and_said():
    g = tiny.encoder()
    report = PassManager([Qdq(min_size=1)]).run(g, data(g, 10)).report
    assert any("held out" in w for w in report.warnings)
    assert report.validation.samples == 4


def test_pass_that_needs_data_says_how_to_give_it():
    with pytest.raises(DataError, match="calibration="):
        PassManager([Qdq(min_size=1)]).run(tiny.encoder())


def test_options_are_checked_when_a_pass_is_made():
    with pytest.raises(RecipeError, match="option 'clip'"):
        Qdq(clip="nonsense")
    with pytest.raises(RecipeError, match="option 'percentile'"):
        Qdq(percentile=300)


# ---- a sequential pass sees the changed prefix -----------------------------------------------------------------------


@dataclass(frozen=True)
class Doubling(SequentialPass):
    """Doubles each linear in turn and records the mean magnitude of its input at that moment."""

    name: ClassVar[str] = "doubling"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    seen: ClassVar[list[float]] = []

    def sites(self, g, target):
        return [x.site for x in blocks.linears(g)]

    def site_needs(self, g, site, target):
        yield mean(next(x for x in blocks.linears(g) if x.name == site.name).source, "tensor")

    def edit(self, g, site, env):
        linear = next(x for x in blocks.linears(g) if x.name == site.name)
        self.seen.append(float(env.stats[mean(linear.source, "tensor")]))
        g.put(linear.weight, g.array(linear.weight) * 2)


def test_sequential_pass_recollects_on_the_changed_prefix():
    g = tiny.mlp(hidden=8, ffn=16, gated=False, bias=False)
    batches = [
        Batch({"x": np.abs(np.random.default_rng(i).standard_normal((2, 5, 8))).astype(np.float32)}) for i in range(3)
    ]
    up, _ = blocks.linears(g)
    x = np.concatenate([b.feeds["x"].reshape(-1, 8) for b in batches]).astype(np.float64)
    Doubling.seen.clear()
    PassManager([Doubling()]).run(g, as_dataset(batches, g), as_dataset(batches, g))
    from math import erf

    hidden = x @ (2 * g.array(up.weight).astype(np.float64))
    gelu = hidden * 0.5 * (1 + np.vectorize(erf)(hidden / np.sqrt(2)))
    np.testing.assert_allclose(Doubling.seen, [x.mean(), gelu.mean()], rtol=1e-4)


def drift(pass_, g, calibration, evaluation, metric="rel-l2"):
    return PassManager([pass_]).run(g, calibration, evaluation).report.validation.values()[metric]


def test_gptq_beats_rounding_on_held_out_data():
    g = tiny.encoder(hidden=32, ffn=64)
    calibration, evaluation = data(g, 24), data(g, 8, seed=100)
    assert drift(GptqLinear(bits=3), g, calibration, evaluation) < drift(
        GptqLinear(bits=3, plain=True), g, calibration, evaluation
    )


def test_least_squares_repair_beats_the_plain_cut():
    g = tiny.encoder(hidden=16, ffn=64)
    calibration, evaluation = data(g, 24), data(g, 8, seed=100)
    repaired = PassManager([CutRepair(ratio=0.3)]).run(g, calibration, evaluation)
    plain = drift(CutRepair(ratio=0.3, repair=False), g, calibration, evaluation)
    assert repaired.report.validation.values()["rel-l2"] < plain
    assert all(m.down.sizes[0] == 45 for m in blocks.mlps(repaired.model))
    assert PassManager([CutRepair(ratio=0)]).run(g, calibration, evaluation).report.steps[0].edits == 0


def test_head_ablation_silences_the_least_important_head():
    g = tiny.encoder(layers=1)
    calibration = data(g, 4)
    result = PassManager([HeadAblation(count=1)]).run(g, calibration, calibration)
    best = result.report.validation.values()["rel-l2"]
    from tests.passes.head_ablation import silence

    for head in range(blocks.attentions(g)[0].heads):
        variant = g.clone()
        silence(0, head)(variant)
        from onnxcomp.validation.compare import validate

        assert best <= validate(g, variant, calibration).values()["rel-l2"] * (1 + 1e-5)


# ---- the cost of forms -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cheapest(Pass):
    """Asks what a small and a large linear cost and keeps the answer."""

    name: ClassVar[str] = "cheapest"
    stage: ClassVar[Stage] = Stage.LOWER
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    costs: ClassVar[list] = []

    def run(self, g, env):
        forms = {"small": tiny.linear(64, 64), "large": tiny.linear(64, 640)}
        self.costs[:] = env.cost(Site("x", ()), forms, {"x": (1, 16, 64)})


@pytest.mark.parametrize("measure", [True, False])
def test_cost_is_measured_or_tabled(measure):
    PassManager([Cheapest()], measure=measure).run(tiny.linear())
    small, large = Cheapest.costs
    assert (small.form, large.form) == ("small", "large")
    assert {small.source, large.source} == {"measured" if measure else "table"}
    assert small.nbytes < large.nbytes
    if not measure:
        assert large.seconds == pytest.approx(10 * small.seconds, rel=0.2)
