"""Ranking by error curves and by sensitivity: layers give what loses the model least, by trial cuts of each."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.maths.allocation import Candidate
from onnxcomp.methods.width import trial_cuts
from onnxcomp.validation.variants import Variants
from tests import tiny

QUIET = 1e-3  # what the quiet layer's outputs are multiplied with, and its inputs' weights divided by


def quiet_first() -> Graph:
    """Three layers; what the first adds hardly counts, though its hidden values are the largest of all."""
    g = tiny.encoder(layers=3, norm="pre")
    quiet = blocks.mlps(g)[0]
    for x, by in ((quiet.linears[0], 1 / QUIET), (quiet.down, QUIET**2)):
        g.put(x.weight, (g.array(x.weight) * by).astype(np.float32))
    return g


def data(g: Graph, count: int = 6):
    return as_dataset([Batch(tiny.feeds(g, 4, 9, seed=i)) for i in range(count)], g)


def widths(g: Graph, **options) -> list[int]:
    result = PassManager([catalog.load("prune-ffn")(ratio=0.3, multiple_of=1, **options)]).run(g, data(g)).model
    return [m.width for m in blocks.mlps(result)]


@pytest.mark.parametrize("score", ["energy", "wanda", "fluctuation"])
@pytest.mark.parametrize(
    ("repair", "ranking"), [("least-squares", None), ("bias", None), ("none", None), ("least-squares", "sensitivity")]
)
def test_the_layer_that_hardly_counts_gives_most(score, repair, ranking):
    g = quiet_first()
    whole = blocks.mlps(g)[0].width
    first, *others = widths(g, score=score, repair=repair, ranking=ranking)
    assert first < min(others)
    assert whole - first > 0.75 * (3 * whole - first - sum(others))  # nearly all that goes, goes there


def test_by_default_curves_decide_where_data_is_asked_for():
    g = quiet_first()
    assert widths(g) == widths(g, ranking="curves") != widths(g, ranking="layer")
    plain = {"score": "magnitude", "repair": "none"}
    assert widths(g, **plain) == widths(g, **plain, ranking="layer")
    assert widths(g, **plain) != widths(g, **plain, ranking="curves")
    assert widths(g, **plain) != widths(g, **plain, ranking="sensitivity")
    assert len(set(widths(g, uniform=True))) == 1


def test_curves_that_see_no_loss_decide_nothing_and_say_so(monkeypatch):
    g = quiet_first()
    monkeypatch.setattr(trial_cuts, "loss_of", lambda value, name: 1e-14)
    cut = catalog.load("prune-ffn")(ratio=0.3, multiple_of=1)
    result = PassManager([cut]).run(g, data(g))
    assert [m.width for m in blocks.mlps(result.model)] == widths(g, ranking="layer")
    assert sum("no trial cut lost anything" in n.what for n in result.report.step("prune-ffn").noted) == 3


@pytest.mark.parametrize("ranking", ["curves", "sensitivity"])
def test_trial_cuts_without_data_are_refused_with_the_way_out(ranking):
    p = catalog.load("prune-ffn")(ratio=0.3, score="magnitude", repair="none", ranking=ranking)
    with pytest.raises(DataError, match="calibration="):
        PassManager([p]).run(tiny.encoder())


@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn"])
def test_the_order_within_a_layer_is_that_of_the_score(name):
    """As many as sensitivity leaves in each layer, and exactly those that its score puts first."""
    g = tiny.encoder(layers=3, norm="pre", heads=4)
    made = PassManager([catalog.load(name)(ratio=0.4, multiple_of=1, repair="none")]).run(g, data(g)).model
    for i, x in enumerate(readers_of(g, name)):
        kept = readers_of(made, name)[i].sizes[0]
        alone = catalog.load(name)(ratio=1 - kept / x.sizes[0], multiple_of=1, ranking="layer", repair="none")
        other = PassManager([alone]).run(g, data(g)).model
        np.testing.assert_array_equal(weight(made, name, i), weight(other, name, i))


def readers_of(g: Graph, name: str) -> list[blocks.Linear]:
    return [a.o for a in blocks.attentions(g)] if name == "prune-heads" else [m.down for m in blocks.mlps(g)]


def weight(g: Graph, name: str, i: int) -> np.ndarray:
    return g.array(readers_of(g, name)[i].weight)


def test_the_scores_of_the_silenced_half_sum_to_the_measured_loss():
    losses, asked = [0.3, 2.0], []

    def evaluate(edits, metric, samples):
        asked.append((len(edits), metric, samples))
        return [SimpleNamespace(value=v) for v in losses]

    env = SimpleNamespace(evaluate=evaluate)
    found = [Candidate(np.array([4.0, 1.0, 3.0, 2.0])), Candidate(np.arange(6.0)), Candidate(np.ones(4), floor=4)]
    parts = [(Group(4, ()), ())] * 3
    scaled = trial_cuts.scaled(None, parts, found, env, "kl", "none")
    assert [np.sort(c.scores)[: c.units // 2].sum() for c in scaled[:2]] == pytest.approx(losses)
    assert [list(np.argsort(c.scores)) for c in scaled] == [list(np.argsort(c.scores)) for c in found]
    assert asked == [(2, "kl", trial_cuts.SAMPLES)]  # the third layer gives nothing, so it is not tried
    assert trial_cuts.scaled(None, parts[:1], found[:1], env, "kl", "none") == found[:1]
    assert len(asked) == 1


def test_no_more_samples_are_run_than_asked_for():
    seen = []

    class Counting(PassManager):
        def _reference(self, original, dataset, *rest):
            seen.append(len(dataset))
            return super()._reference(original, dataset, *rest)

    g = tiny.encoder(layers=2)
    many = as_dataset([Batch(tiny.feeds(g, 4, 9, seed=i)) for i in range(50)], g)
    Counting([catalog.load("prune-ffn")(ratio=0.5, ranking="sensitivity")]).run(g, many)
    assert trial_cuts.SAMPLES in seen


def test_curves_are_judged_on_samples_that_no_repair_has_seen():
    """With fewer rows than channels a repair fits all rows it sees, and every cut would seem free."""
    g = tiny.encoder(layers=2, ffn=64)
    few = as_dataset([Batch(tiny.feeds(g, 4, 2, seed=i)) for i in range(6)], g)
    made = PassManager([catalog.load("prune-ffn")(ratio=0.25, multiple_of=1)]).run(g, few)
    losses = [n.values["loss_alone"] for n in made.report.steps[-1].noted if "loss_alone" in n.values]
    assert max(losses) > 1e-3


def test_progress_tells_how_many_trial_cuts_are_left():
    g, told = tiny.encoder(layers=2), []
    p = catalog.load("prune-ffn")(ratio=0.25, multiple_of=1)
    PassManager([p], watch=lambda *x: told.append(x)).run(g, data(g))
    trials = 2 * len(trial_cuts.CURVE_SHARES)
    assert [x for x in told if x[0] == "trial models"] == [("trial models", i, trials) for i in range(trials)]


@pytest.mark.parametrize(("ranking", "trials"), [("curves", 2 * len(trial_cuts.CURVE_SHARES)), ("sensitivity", 2)])
def test_trials_are_remembered_by_their_content(tmp_path, monkeypatch, ranking, trials):
    """With a cache another ratio tries nothing again; another model does."""
    g, ran = tiny.encoder(layers=2), []
    compared = Variants._compared
    monkeypatch.setattr(Variants, "_compared", lambda *a: ran.append(1) or compared(*a))
    data = as_dataset([Batch(tiny.feeds(g, 4, 9, seed=i)) for i in range(4)], g)

    def cut(model, ratio):
        p = catalog.load("prune-ffn")(ratio=ratio, multiple_of=1, ranking=ranking)
        return PassManager([p], cache=tmp_path).run(model, data).model

    first = cut(g, 0.25)
    assert len(ran) == trials
    cut(g, 0.5)
    assert len(ran) == trials
    alone = catalog.load("prune-ffn")(ratio=0.25, multiple_of=1, ranking=ranking)
    with_cache, without = cut(g, 0.25), PassManager([alone]).run(g, data)
    assert [x.sizes for x in blocks.linears(first)] == [x.sizes for x in blocks.linears(with_cache)]
    assert [x.sizes for x in blocks.linears(first)] == [x.sizes for x in blocks.linears(without.model)]
    other = g.clone()
    other.put(blocks.linears(other)[0].weight, other.array(blocks.linears(other)[0].weight) * np.float32(2))
    before = len(ran)
    cut(other, 0.25)
    assert len(ran) == before + trials
