"""The width passes: counts as predicted, cut equals masked before repair, scores and repair against plain maths."""

import re

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import blocks, coupling
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.compress import compress_each
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.lowering import costs
from onnxcomp.maths import scores, solve
from onnxcomp.maths.allocation import Candidate, choose, isotonic
from onnxcomp.methods.width.budgets import Clock
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, TENSORRT
from tests import cuts, tiny

RNG = np.random.default_rng(0)
DATA_FREE = {"score": "magnitude", "repair": "none"}


def run(g: Graph, name: str, data=(), **options):
    return PassManager([catalog.load(name)(**options)]).run(g, data)


def batches(g: Graph, count: int = 6) -> list[Batch]:
    return [Batch(tiny.feeds(g, 4, 9, seed=i)) for i in range(count)]


def output(g: Graph, batch: Batch) -> np.ndarray:
    with Session(g) as s:
        return next(iter(s.run(batch.feeds).values()))


# ---- amounts ---------------------------------------------------------------------------------------------------------

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.lists(st.floats(0, 10), min_size=2, max_size=24).map(np.array),
        st.floats(1, 5),
        multiple=st.integers(1, 8),
        floor=st.integers(1, 3),
    ),
    min_size=1,
    max_size=5,
)


@given(CANDIDATES, st.floats(0, 0.99), st.sampled_from(["layer", "global"]), st.booleans())
@settings(deadline=None)
def test_what_stays_scores_highest_and_obeys_multiples_and_floor(candidates, ratio, ranking, uniform):
    for c, keep in zip(candidates, choose(candidates, ratio, ranking, uniform), strict=True):
        assert np.all(np.diff(keep) > 0)
        assert len(keep) == c.units or len(keep) % c.multiple == 0
        assert len(keep) >= min(c.floor, c.units)
        gone = np.setdiff1d(np.arange(c.units), keep)
        assert not gone.size or c.scores[gone].max() <= c.scores[keep].min()
        if ranking == "layer" and c.multiple == 1:
            wanted = max(min(c.floor, c.units), c.units * (1 - ratio))
            assert abs(len(keep) - wanted) <= 0.5 + 1e-9 or uniform


def test_parts_keep_equally_many():
    c = Candidate(np.array([5.0, 4, 3, 2, 1, 0, 9, 8]), parts=(0, 0, 0, 0, 1, 1, 1, 1))
    (keep,) = choose([c], 0.5)
    assert keep.tolist() == [0, 1, 6, 7]


def test_a_global_ranking_cuts_its_share_where_counts_go_in_steps():
    groups = [Candidate(RNG.random(6), parts=(0, 0, 0, 1, 1, 1)) for _ in range(6)]
    assert sum(len(k) for k in choose(groups, 1 / 3, "global")) == 24
    lowest = Candidate(np.array([1.0, 9, 9, 9, 9, 1]), parts=(0, 0, 0, 1, 1, 1))
    uneven = Candidate(np.array([0.0, 9, 9, 9, 9, 9]), parts=(0, 0, 0, 1, 1, 1))  # its lowest pair means more
    assert [len(k) for k in choose([uneven, lowest], 1 / 6, "global")] == [6, 4]


def test_a_global_ranking_takes_from_the_layer_that_matters_least():
    rich, poor = Candidate(np.arange(10, 18.0)), Candidate(np.arange(8.0))
    assert [len(k) for k in choose([rich, poor], 0.25, "global")] == [8, 4]
    assert [len(k) for k in choose([rich, poor], 0.25, "global", uniform=True)] == [6, 6]


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn", "prune-hidden"])
def test_parameters_and_products_are_as_predicted(name, tied):
    g = tiny.decoder(tied=tied)
    p = catalog.load(name)(ratio=0.25, **DATA_FREE)
    places = p.places(coupling.Coupling(g))
    keeps = p._amounts(g, places, p._candidates(g, places, [p._scores(g, x, None) for x in places], CPU))
    predicted = [count(g, [(x.group, k) for x, k in zip(places, keeps, strict=True)]) for count in (parameters, macs)]
    result = run(g, name, ratio=0.25, **DATA_FREE).model
    assert [parameters(result), macs(result)] == predicted
    assert parameters(result) < parameters(g)
    assert macs(result) < macs(g)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_budget_is_kept_and_used(budget, ranking):
    g, count = tiny.decoder(), {"parameters": parameters, "macs": macs}[budget]
    result = run(g, "prune-ffn", ranking=ranking, multiple_of=1, **{budget: 0.8}, **DATA_FREE).model
    assert 0.78 * count(g) <= count(result) <= 0.8 * count(g)


def test_a_budget_out_of_reach_is_refused_with_what_is_possible():
    with pytest.raises(RecipeError, match=r"prune-ffn: parameters=0\.1 cannot be reached: .* stay"):
        run(tiny.decoder(), "prune-ffn", parameters=0.1, **DATA_FREE)


def test_uniform_keeps_one_head_count():
    g = tiny.decoder(layers=3, heads=8, kv_heads=8, hidden=32)
    for a in blocks.attentions(g)[:1]:
        w = g.array(a.o.weight).copy()
        g.put(a.o.weight, w * np.float32(100))
    options = {"ratio": 0.4, "ranking": "global", **DATA_FREE}
    ragged = {a.heads for a in blocks.attentions(run(g, "prune-heads", **options).model)}
    even = {a.heads for a in blocks.attentions(run(g, "prune-heads", uniform=True, **options).model)}
    assert len(ragged) >= 1
    assert even == {5}


def test_a_layer_norm_stream_is_declined_and_left_alone():
    g = tiny.encoder()
    manager = PassManager([catalog.load("prune-hidden")(**DATA_FREE)], allow_unchanged=True)
    step = manager.run(g).report.steps[0]
    assert step.edits == step.changed == 0
    assert "takes mean and variance" in step.declined[0].why


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn", "prune-hidden"])
def test_before_repair_the_result_equals_the_masked_model(name):
    g = tiny.decoder()
    p = catalog.load(name)(ratio=0.25, **DATA_FREE)
    places = p.places(coupling.Coupling(g))
    keeps = p._amounts(g, places, p._candidates(g, places, [p._scores(g, x, None) for x in places], CPU))
    mask = g
    for place, keep in zip(places, keeps, strict=True):
        mask = cuts.masked(mask, place.group, np.setdiff1d(np.arange(place.group.units), keep))
    cuts.assert_same(mask, run(g, name, ratio=0.25, **DATA_FREE).model, tiny.feeds(g, 2, 7), tiny.feeds(g, 1, 5))


@pytest.mark.parametrize("score", ["magnitude", "wanda", "fluctuation", "energy", "ablation"])
@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn"])
def test_every_score_runs_and_finds_what_does_nothing(name, score):
    """A unit whose reading rows are zero goes first, whatever the score."""
    g = tiny.encoder(layers=1, ffn=16)
    a, m = blocks.attentions(g)[0], blocks.mlps(g)[0]
    linear, idle = (a.o, slice(a.head_dim, 2 * a.head_dim)) if name == "prune-heads" else (m.down, slice(3, 4))
    for x in (linear, *([a.q, a.k, a.v] if name == "prune-heads" else [m.up])):
        w = g.array(x.weight).copy()
        w[idle] *= 0 if x is linear else 1
        if x is not linear:
            w[:, idle] = 0
        g.put(x.weight, w)
    options = {"ratio": 0.25 if name == "prune-heads" else 1 / 16, "multiple_of": 1}
    result = run(g, name, as_dataset(batches(g), g), score=score, repair="none", **options)
    batch = batches(g)[0]
    np.testing.assert_allclose(output(result.model, batch), output(g, batch), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn"])
def test_repair_brings_the_output_nearer(name, bias):
    g = tiny.encoder(bias=bias, layers=1)
    data = batches(g, 20)

    def error(repair: str) -> float:
        done = run(g, name, as_dataset(data, g), ratio=0.5, repair=repair).model
        return float(np.mean([np.square(output(done, b) - output(g, b)).mean() for b in data]))

    none, by_bias, fitted = (error(r) for r in ("none", "bias", "least-squares"))
    assert fitted < by_bias < none


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn"])
def test_repair_in_order_makes_up_for_the_layers_before(name):
    """On the inputs that the cut model gives, the last layer comes nearer the uncut stream than when fitted alone."""
    g = tiny.encoder(layers=3, norm="pre")
    data = batches(g, 20)

    def error(sequential: bool) -> float:
        options = {"ratio": 0.5, "ranking": "layer", "score": "energy", "sequential": sequential}
        done = run(g, name, as_dataset(data, g), **options).model
        return float(np.mean([np.square(output(done, b) - output(g, b)).mean() for b in data]))

    assert error(True) < error(False)


def test_layers_that_share_a_weight_are_scored_together_and_cut_once():
    g = tiny.encoder(layers=2)
    first, second = blocks.mlps(g)
    for a, b in zip(first.linears, second.linears, strict=True):
        g.set_input(b.node, 1, a.weight)
    step = run(g, "prune-ffn", as_dataset(batches(g), g), ratio=0.5)
    assert step.report.steps[0].changed == 2
    assert len({m.width for m in blocks.mlps(step.model)}) == 1


# ---- maths -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_repair_never_increases_the_error_of_a_site(seed, k, n, bias):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, k)) @ rng.standard_normal((k, k)) + rng.standard_normal(k)
    w, b = rng.standard_normal((k, n)), rng.standard_normal(n)
    keep = np.sort(rng.choice(k, rng.integers(1, k), replace=False))
    y = x @ w + b
    plain = np.square(x[:, keep] @ w[keep] + b - y).sum()
    if bias:
        rows, new = solve.repair_affine(x.T @ x, x.mean(0), len(x), w, b, keep)
        better = x[:, keep] @ rows + new
        best = np.linalg.lstsq(np.c_[x[:, keep], np.ones(40)], y, rcond=None)[0]
        least = np.square(np.c_[x[:, keep], np.ones(40)] @ best - y).sum()
    else:
        better = x[:, keep] @ solve.repair(x.T @ x, w, keep).weights + b
        least = np.square(x[:, keep] @ np.linalg.lstsq(x[:, keep], y - b, rcond=None)[0] + b - y).sum()
    assert np.square(better - y).sum() <= plain * (1 + 1e-9)
    assert np.square(better - y).sum() <= least + 1e-3 * plain + 1e-9


def test_wanda_and_flap_agree_with_their_formulas():
    x, w = RNG.standard_normal((300, 12)) + RNG.standard_normal(12), RNG.standard_normal((12, 7))
    wanda = np.array([[abs(w[k, n]) * np.sqrt((x[:, k] ** 2).sum()) for n in range(7)] for k in range(12)])
    np.testing.assert_allclose(scores.wanda(w, np.linalg.norm(x, axis=0)), wanda)
    flap = [((x[:, k] - x[:, k].mean()) ** 2).mean() * (w[k] ** 2).sum() for k in range(12)]
    np.testing.assert_allclose(scores.flap(x.var(axis=0), w), flap)
    heads = scores.per_unit(flap, np.repeat(np.arange(3), 4), 3, mean=True)
    np.testing.assert_allclose(heads, np.reshape(flap, (3, 4)).mean(axis=1))


# ---- by the clock ----------------------------------------------------------------------------------------------------

# Seconds of calling the runtime, of any product, and of an operation, by the clock of these tests.
CALL, FIXED, RATE = 0.5, 2e-6, 1e-9
SHAPES = [{"batch": 1, "sequence": 8}, {"batch": 3, "sequence": 8}]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """A clock by which micro-models take `FIXED + RATE * operations`; what it was asked."""
    asked: list[set[str]] = []

    def fake(forms, shapes, target, threads):
        asked.append(set(forms))
        return {
            n: CALL if n in ("call", "attention") else CALL + FIXED + RATE * sum(costs.operations(g, shapes).values())
            for n, g in forms.items()
        }

    monkeypatch.setattr(costs, "_time", fake)
    return asked


def timed(g: Graph, name: str, measure: bool = True, target=CPU, **options):
    p = catalog.load(name)(**{"multiple_of": 1, **DATA_FREE, **options})
    return PassManager([p], measure=measure, target=target, shapes=SHAPES if measure else ()).run(g)


def share_of(sets: int, fixed: int, each: int, units: int, whole: int) -> float:
    """Mean share, over the shapes, of so many calls with `fixed + each * units` operations a row."""
    rows = [s["batch"] * s["sequence"] for s in SHAPES]
    time = [[sets * FIXED + RATE * r * 2 * (fixed + each * n) for n in (units, whole)] for r in rows]
    return float(np.mean([a / b for a, b in time]))


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("budget", [0.8, 0.55, 0.3])
def test_a_latency_budget_is_met_by_the_measured_times_and_used(clock, ranking, budget):
    step = timed(tiny.decoder(), "prune-ffn", latency=budget, ranking=ranking, uniform=True).report.steps[0]
    predicted = {n: share_of(2, 0, 3 * 32, n, 64) for n in range(1, 65)}  # gate and up in one call, down in another
    most = max(n for n, share in predicted.items() if share <= budget)
    said = f"64 > {most} channels, predicted {predicted[most]:.0%} of its time ({predicted[most]:.0%} of all sites)"
    assert [n.what for n in step.noted] == [said] * 2
    assert len([x for x in clock if x]) == 2 * len(SHAPES)  # equal layers are timed once
    assert {"x1", "x32", "x48", "x64"} <= set.union(*clock)


def test_what_the_cut_leaves_as_wide_still_takes_its_time(clock):
    g = tiny.decoder(layers=1, heads=8, kv_heads=8)
    head, hidden = 4, 32
    result = timed(g, "prune-heads", latency=0.5)
    most = max(n for n in range(1, 9) if share_of(2, 0, 4 * head * hidden, n, 8) <= 0.5)  # q, k and v; o
    assert [a.heads for a in blocks.attentions(result.model)] == [most]
    shared = timed(tiny.decoder(layers=1, heads=8, kv_heads=2), "prune-heads", latency=0.7).model
    kept = 2 * 2 * head * hidden  # keys and values stay, two heads of each
    most = max(n for n in (2, 4, 6, 8) if share_of(2, kept, 2 * head * hidden, n, 8) <= 0.7)
    assert [a.heads for a in blocks.attentions(shared)] == [most]


def test_attention_takes_time_in_proportion_to_its_heads(monkeypatch):
    monkeypatch.setattr(costs, "_time", lambda forms, *_: {n: 0.0 if n == "call" else 1e-3 for n in forms})
    g = tiny.decoder(layers=1, heads=8, kv_heads=8)
    result = timed(g, "prune-heads", latency=0.76)  # (2 + n / 8) ms of 3 ms: linears gain nothing
    assert [a.heads for a in blocks.attentions(result.model)] == [2]


def test_a_latency_budget_cuts_the_residual_stream_and_both_budgets_hold(clock):
    g = tiny.decoder()
    step = timed(g, "prune-hidden", latency=0.75)
    assert "predicted 7" in step.report.steps[0].noted[0].what
    by_count = timed(g, "prune-ffn", latency=0.9, macs=0.7).model
    assert 0.68 * macs(g) <= macs(by_count) <= 0.7 * macs(g)


def test_a_latency_budget_never_goes_below_the_floor(clock):
    assert [m.width for m in blocks.mlps(timed(tiny.decoder(), "prune-ffn", latency=0.77, floor=48).model)] == [48, 48]
    with pytest.raises(RecipeError, match=r"prune-ffn: latency=0\.5 cannot be reached: with all channels .* 7\d% stay"):
        timed(tiny.decoder(), "prune-ffn", latency=0.5, floor=48)


def test_a_latency_budget_without_a_clock_is_refused_with_what_to_say_instead(clock, tmp_path):
    with pytest.raises(RecipeError, match=r"prune-ffn: latency=0\.5 needs the clock.*measure=False.*say macs=0\.5"):
        timed(tiny.decoder(), "prune-ffn", measure=False, latency=0.5)
    with pytest.raises(RecipeError, match=r"latency=0\.5 needs the clock.*not on this machine"):
        timed(tiny.decoder(), "prune-ffn", target=TENSORRT, latency=0.5)
    path = tiny.external(tiny.decoder(), tmp_path)
    with pytest.raises(
        RecipeError, match=r"latency=0\.5 needs the clock, but a dry run \(plan=True\) has none; say macs"
    ):
        compress_each(path, tmp_path / "out", passes=["prune-ffn: {latency: 0.5}"], plan=True)
    g = tiny.decoder()
    half = run(g, "half", as_dataset(batches(g), g)).model
    with pytest.raises(RecipeError, match=r"needs the clock, but linear '.*' is not in float32"):
        timed(half, "prune-ffn", latency=0.5)
    assert not clock


@pytest.mark.parametrize("budget", ["parameters", "macs", "latency"])
def test_a_budget_of_all_changes_nothing_and_asks_no_clock(clock, budget):
    step = timed(tiny.decoder(), "prune-ffn", measure=False, **{budget: 1}).report.steps[0]
    assert (step.edits, step.changed, clock) == (0, 0, [])


def test_between_measured_widths_time_is_linear_and_every_shape_counts_the_same():
    times = Clock(((8, 16, 32),), (np.array([[1.0, 3.0, 4.0], [20.0, 20.0, 40.0]]),))
    assert times.at(0, 12).tolist() == [2.0, 20.0]
    assert times.share([np.arange(24)]) == pytest.approx((3.5 / 4 + 30 / 40) / 2)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_isotonic_times_never_fall_and_are_the_nearest_such(values):
    fitted = isotonic(np.array(values))
    assert np.all(np.diff(fitted) >= 0)
    assert fitted.sum() == pytest.approx(sum(values))
    rest = np.array(values) - fitted  # the conditions of the least squares problem (Barlow 1972)
    assert np.all(np.cumsum(rest) >= -1e-9)
    assert float(rest @ fitted) == pytest.approx(0, abs=1e-6)


# ---- the dry run -----------------------------------------------------------------------------------------------------


def test_a_plan_needs_no_data_and_tells_the_sizes_that_come(tmp_path):
    from onnxcomp.files import storage

    path = tiny.external(tiny.decoder(), tmp_path)
    passes = ["prune-heads: {ratio: 0.5, ranking: layer}", "prune-ffn: {parameters: 0.7}", "qdq: {min_size: 1}"]
    (planned,) = compress_each(path, tmp_path / "out", passes=passes, plan=True).values()
    told = planned.report.plan
    assert told.needs_data == ("qdq",)
    assert not (tmp_path / "out").exists()
    noted = [n.what for n in planned.report.step("prune-heads").noted]
    assert all(re.fullmatch(r"4 > 2 heads \(without [0-3], [0-3]\)", x) for x in noted)
    assert len(noted) == 2
    data = [tiny.feeds(storage.load(path), 4, 8, seed=i) for i in range(10)]
    made = compress_each(path, tmp_path / "out", passes=passes[:2], calibration=data, measure=False)["model"].model
    assert told.parameters == (parameters(storage.load(path)), parameters(made))
    assert told.macs == (macs(storage.load(path)), macs(made))


@pytest.mark.parametrize(
    "spec",
    [
        "prune-heads: {ratio: 0.5}",
        "prune-ffn: {ratio: 0.5, ranking: layer}",  # else weights are aligned in the file by other widths: 14 KB here
        "prune-hidden: {ratio: 0.5}",
        "low-rank: {ratio: 0.3, min_size: 64, multiple: 1}",
        "low-rank: {ratio: 0.3, min_size: 64, multiple: 1, method: asvd}",
        "slice: {ratio: 0.25, multiple: 1}",
        "drop-layers: {ratio: 0.5, protect: 0}",
        "sparsify: {compact: true, min_size: 64, method: magnitude, repair: false}",
    ],
)
def test_the_file_is_as_large_as_planned(tmp_path, monkeypatch, spec):
    from onnxcomp.files import storage

    if spec.startswith(("prune", "slice")):  # a data file beside the graph; else one file
        monkeypatch.setattr(storage, "INLINE_LIMIT", 0)
    path = tiny.external(tiny.decoder(hidden=96, ffn=192, opset=23), tmp_path)
    (planned,) = compress_each(path, None, passes=[spec], plan=True).values()
    told = planned.report.plan
    assert told.needs_data == ()
    data = [tiny.feeds(storage.load(path), 4, 8, seed=i) for i in range(10)]
    compress_each(path, tmp_path / "out", passes=[spec], calibration=data, measure=False)
    (made,) = storage.graphs_of(tmp_path / "out").values()
    assert told.nbytes == (storage.file_bytes(path), pytest.approx(storage.file_bytes(made), rel=0.01))


@pytest.mark.parametrize("name", ["prune-heads", "prune-ffn"])
@pytest.mark.parametrize(
    "how", [DATA_FREE, {"score": "wanda", "repair": "none"}, {"score": "fluctuation", "repair": "bias"}]
)
def test_quantized_models_are_cut_when_asked(name, how):
    g = tiny.encoder()
    data = as_dataset(batches(g), g)
    quantized = run(g, "qdq", data, min_size=1).model
    result = run(quantized, name, data, ratio=0.5, multiple_of=1, **how)
    assert result.report.steps[0].changed
    assert parameters(result.model) < parameters(quantized)
    feeds = batches(g)[0]
    moved = np.linalg.norm(output(result.model, feeds) - output(quantized, feeds))
    assert moved < 0.9 * np.linalg.norm(output(quantized, feeds))
    if how is DATA_FREE:  # the same units go as in the float model, whose codes these are
        early = run(g, name, ratio=0.5, multiple_of=1, **how).model
        far = np.linalg.norm(output(result.model, feeds) - output(early, feeds))
        assert far < 0.1 * np.linalg.norm(output(early, feeds))


def test_least_squares_on_codes_is_declined():
    g = tiny.encoder()
    data = as_dataset(batches(g), g)
    quantized = run(g, "qdq", data, min_size=1).model
    with pytest.raises(RecipeError, match="allow_unchanged"):
        run(quantized, "prune-ffn", data, ratio=0.5)


# ---- together with a quantizer, in one file --------------------------------------------------------------------------

RECIPE = """
passes:
  - canonicalize
  - drop-layers: {ratio: 0.34, protect: 0}
  - prune-heads: {ratio: 0.5}
  - prune-ffn: {ratio: 0.5}
  - qdq: {min_size: 1}
  - lower
"""
WRONG = {
    "passes: [canonicalize, qdq, prune-ffn, lower]": r"'prune-ffn' \(width\) must come before 'qdq' \(activations\)",
    "passes: [canonicalize, prune-heads, drop-layers, qdq]": r"'drop-layers' \(depth\) must come before 'prune-heads'",
}


def test_one_file_cuts_depth_and_width_and_quantizes(tmp_path):
    import onnxcomp as oc

    g = tiny.encoder(layers=3)
    path, recipe = tiny.external(g, tmp_path), tmp_path / "mine.yaml"
    recipe.write_text(RECIPE)
    data = [b.feeds for b in batches(g, 10)]
    result = oc.compress(path, tmp_path / "out", recipe=recipe, calibration=data, measure=False)
    changed = {s.name: s.changed for s in result.report.steps}
    assert (changed["drop-layers"], changed["prune-heads"], changed["prune-ffn"], changed["qdq"]) == (1, 2, 2, 12)
    assert result.report.integer.integer_products == 12
    for name, want in (("prune-heads", 4), ("prune-ffn", 64)):  # of both layers together
        kept = [n.values.get("kept", 0) for s in result.report.steps if s.name == name for n in s.noted]
        assert sum(kept) == want


@pytest.mark.parametrize("text", WRONG)
def test_a_file_in_the_wrong_order_is_refused_with_the_reason(tmp_path, text):
    import onnxcomp as oc

    path, recipe = tiny.external(tiny.encoder(), tmp_path), tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=f"{WRONG[text]}.*any_order: true"):
        oc.compress(path, tmp_path / "out", recipe=recipe, calibration=[tiny.feeds(tiny.encoder())] * 4)
    assert not (tmp_path / "out").exists()
