"""`drop-layers` against the same model with the parts masked, and against block influence computed by hand."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.blocks.branches import branches, layer_branches, residual_sum
from onnxcomp.data import open_axes
from onnxcomp.data.datasets import Batch, as_dataset, load_data
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError, ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.methods.repair import dropped_layers, sequential
from onnxcomp.passes.drop_layers import DropLayers
from onnxcomp.passes.qdq import Qdq
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation.compare import validate
from tests import cut_matrix, cuts, matrix, tiny, zoo

LAYERS = 5
SHARED = "its weights are shared, so they cannot be fitted for one place"


def data(g, count=5):
    return load_data("random", g, None, batch=2, samples=2 * count, sequence=9)


def run(g, feeds, *names):
    with Session(g, taps=names) as s:
        found = s.run(feeds)
    return [found[n] for n in names] if names else next(iter(found.values()))


def dropped(g, **options):
    result = PassManager([DropLayers(**options)]).run(g, data(g), data(g))
    return result.model, result.report.step("drop-layers")


def pre(**options):
    return tiny.encoder(layers=LAYERS, norm="pre", **options)


def post():
    """Norms without gain and bias do nothing to what is normalized already, so that a masked layer is no layer."""
    g = tiny.encoder(layers=LAYERS)
    for norm in blocks.norms(g):
        g.put(norm.gain, np.ones_like(g.array(norm.gain)))
        g.put(norm.bias, np.zeros_like(g.array(norm.bias)))
    return g


MODELS = {"pre": pre, "post": post, "decoder": lambda: tiny.decoder(layers=LAYERS)}


@pytest.mark.parametrize("part", ["layer", "attention", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_the_model_with_the_parts_masked(name, part):
    g = MODELS[name]()
    model, step = dropped(g, ratio=0.4, part=part, repair="none")
    assert step.changed == 2
    assert step.eligible == LAYERS
    gone = {b.name for b in branches(g)} - {b.name for b in branches(model)}
    assert len(gone) == (4 if part == "layer" else 2)
    masked = g.clone()
    for layer in blocks.layers(masked):
        for x in [*layer.attentions, layer.mlp]:
            if x.name in gone:
                last = x.o if isinstance(x, blocks.Attention) else x.down
                for v in (last.weight, last.bias):
                    if v is not None:
                        masked.put(v, np.zeros_like(masked.array(v)))
    for batch in data(g):
        want, got = run(masked, batch.feeds), run(model, batch.feeds)
        np.testing.assert_allclose(got, want, atol=1e-4 if name == "post" else 2e-6 * np.abs(want).max())
    assert model.nbytes < g.nbytes


def test_the_layer_with_the_least_influence_goes():
    g = pre()
    found = layer_branches(g)
    feeds = [b.feeds for b in data(g)]
    cosines = []
    for b in found:
        pairs = [run(g, f, b.entry.name, b.exit.name) for f in feeds]
        x, y = (np.concatenate([p[i].reshape(-1, p[i].shape[-1]) for p in pairs]).astype(np.float64) for i in (0, 1))
        cosines.append(float(np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))))
    least = 1 + int(np.argmax(cosines[1:-1]))
    _, step = dropped(g, ratio=0.2)
    kept_ones = {d.site for d in step.declined}
    assert {b.name for b in found} - kept_ones == {found[least].name}
    reasons = {d.site: d.why for d in step.declined}
    other = next(i for i in range(1, LAYERS - 1) if i != least)
    assert f"{1 - cosines[other]:.3g}" in reasons[found[other].name]


def test_scores_are_taken_again_after_each_one_that_goes():
    g, seen = pre(), []
    second = blocks.layers(g)[1]
    for x in (second.attention.o, second.mlp.down):  # the one that goes first, with others behind it
        g.put(x.weight, 0.05 * g.array(x.weight))

    class Spy(DropLayers):
        name = "drop-layers"

        def _scores(self, *args):
            seen.append(super()._scores(*args))
            return seen[-1]

    PassManager([Spy(ratio=0.4)]).run(g, data(g))
    assert [len(s) for s in seen] == [3, 2]
    assert all(seen[0][n] != seen[1][n] for n in seen[1])


def test_ablation_drops_what_the_outputs_miss_least():
    g = pre()
    losses = {}
    for b in layer_branches(g)[1:-1]:
        without = g.clone()
        one = next(x for x in layer_branches(without) if x.name == b.name)
        without.replace(one.exit, one.entry)
        errors = [np.sum((run(without, x.feeds) - run(g, x.feeds)).astype(np.float64) ** 2) for x in data(g)]
        losses[b.name] = sum(errors)
    _, step = dropped(g, ratio=0.2, score="ablation")
    assert {b.name for b in layer_branches(g)} - {d.site for d in step.declined} == {min(losses, key=losses.get)}


def test_the_ends_stay():
    g = tiny.encoder(layers=2, norm="pre")
    with pytest.raises(RecipeError, match="at each end"):
        dropped(g, ratio=0.9)
    model, step = dropped(g, ratio=0.5, protect=0)
    assert step.changed == 1
    assert len(blocks.layers(model)) == 1


def test_all_of_a_share_rounds_down():
    with pytest.raises(RecipeError, match="less than one of 5"):
        dropped(pre(), ratio=0.1)


# ---- repair ----------------------------------------------------------------------------------------------------------


def trained(norm="pre", **options):
    """Layers that do less and less, as those of trained models do."""
    g = tiny.encoder(layers=LAYERS, norm=norm, **options)
    for i, layer in enumerate(blocks.layers(g)):
        for x in (layer.attention.o, layer.mlp.down):
            g.put(x.weight, g.array(x.weight) * np.float32(0.4 / (1 + i)))
    return g


def held(g, count=6):
    return [tiny.feeds(g, 4, 9, seed=100 + i) for i in range(count)]


def error(g, model, feeds):
    return sum(float(np.sum((run(model, f) - run(g, f)).astype(np.float64) ** 2)) for f in feeds)


REPAIRED = {"pre": trained, "post": lambda: trained("post"), "decoder": lambda: tiny.decoder(layers=LAYERS)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pre", "layer"),
        ("pre", "mlp"),
        ("post", "attention"),
        ("post", "layer"),
        ("decoder", "mlp"),
        ("decoder", "layer"),
    ],
)
def test_repair_lowers_the_error_on_other_data(name, part):
    g = REPAIRED[name]()
    calibration = as_dataset([Batch(tiny.feeds(g, 8, 9, seed=i)) for i in range(20)], g)
    results = {
        how: PassManager([DropLayers(ratio=0.4, part=part, repair=how)]).run(g, calibration, held(g)[:1]).model
        for how in ("none", "least-squares")
    }
    assert results["least-squares"].nbytes == results["none"].nbytes
    errors = {how: error(g, model, held(g)) for how, model in results.items()}
    assert errors["least-squares"] < (0.8 if name != "decoder" else 0.95) * errors["none"]


def still(g, layer):
    """Let a layer add nothing but its biases."""
    for x in (layer.attention.o, layer.mlp.down):
        g.put(x.weight, np.zeros_like(g.array(x.weight)))


def test_a_layer_that_adds_a_constant_is_taken_over_exactly():
    g = pre()
    still(g, blocks.layers(g)[1])
    plain, _ = dropped(g, ratio=0.2, repair="none")
    model, step = dropped(g, ratio=0.2)
    assert step.changed == 1
    assert error(g, model, held(g)) < 1e-7 * error(g, plain, held(g))


def test_the_norm_before_a_gap_takes_over_that_behind_it():
    g = tiny.encoder(layers=3)
    first, second, _ = blocks.layers(g)
    still(g, second)
    for x in (second.attention.o, second.mlp.down):
        g.put(x.bias, np.zeros_like(g.array(x.bias)))
    model, _ = dropped(g, ratio=0.34)
    here, there = (blocks.layers(m)[i].norms[-1] for m, i in ((model, 0), (g, 1)))
    assert here.name == first.norms[-1].name
    np.testing.assert_array_equal(model.array(here.gain), g.array(there.gain))
    np.testing.assert_array_equal(model.array(here.bias), g.array(there.bias))
    plain, _ = dropped(g, ratio=0.34, repair="none")
    assert error(g, model, held(g)) < error(g, plain, held(g))


def test_no_fit_raises_the_error_at_its_place():
    g = trained()
    calibration = [tiny.feeds(g, 2, 7, seed=i) for i in range(4)]  # fewer rows than hidden units
    seen = []
    uncut, work = g.clone(), g.clone()
    gone = dropped_layers.leave_out(work, layer_branches(work)[2])
    gone = dropped_layers.leave_out(work, layer_branches(work)[2], gone)
    assert [(x.entry, x.exit) for x in gone] == [(layer_branches(g)[2].entry.name, layer_branches(g)[3].exit.name)]

    def fitted(g_, uncut_, env, x, target, damp, **how):
        end = residual_sum(x).end
        wanted = [run(uncut, f, target)[0] for f in calibration]

        def off():
            made = [run(work, f, end.name)[0] for f in calibration]
            return sum(float(np.sum((a - y) ** 2)) for a, y in zip(made, wanted, strict=True))

        before = off()
        sequential.refit_to_stream(g_, uncut_, env, x, target, damp, **how)
        seen.append((before, off()))

    class Spy(DropLayers):
        name = "drop-layers"

        def sites(self, g, target):
            return []

        def run(self, g, env):
            dropped_layers.refit_around_gaps(work, uncut, env, gone)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropped_layers, "refit_to_stream", fitted)
        PassManager([Spy()], allow_unchanged=True).run(g, calibration, calibration)
    assert len(seen) == 1 + 2
    assert all(after <= before * (1 + 1e-6) for before, after in seen)
    assert seen[0][1] < 0.9 * seen[0][0]


def test_order_of_leaving_out_does_not_matter_to_the_gaps():
    g = pre()
    found = {}
    for order in ((1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 3, 2)):
        work, made = g.clone(), []
        names = [b.name.split(" (")[0] for b in layer_branches(g)]
        for i in order:
            made = dropped_layers.leave_out(
                work, next(b for b in layer_branches(work) if b.name.startswith(names[i])), made
            )
        assert len(made) == 1
        found[order] = (made[0].entry, made[0].exit, made[0].read)
    assert len(set(found.values())) == 1


def test_shared_weights_stay_and_are_named():
    g = pre()
    found = blocks.layers(g)
    for layer in found[:2] + found[-1:]:
        g.set_input(layer.mlp.down.node, 1, found[0].mlp.down.weight)
    model, step = dropped(g, ratio=0.2, part="attention")
    assert any(n.what == f"not repaired: {SHARED}" for n in step.noted)
    held_ones = {str(v.name): v.const_value for v in model.model.graph.initializers.values()}
    assert held_ones[str(found[0].mlp.down.weight.name)] is found[0].mlp.down.weight.const_value


def test_a_first_layer_has_nothing_before_it():
    g = pre()
    stay = layer_branches(g)[0]
    for x in (blocks.layers(g)[0].attention.o, blocks.layers(g)[0].mlp.down):  # the one that goes
        g.put(x.weight, 0.01 * g.array(x.weight))
        g.put(x.bias, 0.01 * g.array(x.bias))
    model, step = dropped(g, ratio=0.2, protect=0)
    assert stay.name not in {d.site for d in step.declined}
    assert f"the gap is not repaired: {dropped_layers.NOTHING}" in {n.what for n in step.noted if n.site == stay.name}
    plain, _ = dropped(g, ratio=0.2, protect=0, repair="none")
    assert error(g, model, [b.feeds for b in data(g)]) < error(g, plain, [b.feeds for b in data(g)])


def test_a_stream_that_is_an_output_as_well_stays_what_it_is():
    g = pre()
    entry = layer_branches(g)[2].entry
    for x in (blocks.layers(g)[2].attention.o, blocks.layers(g)[2].mlp.down):  # the one that goes
        g.put(x.weight, 0.01 * g.array(x.weight))
    g.model.graph.outputs.append(entry)
    g = Graph(g.model)
    model, step = dropped(g, ratio=0.2)
    assert f"the gap is not repaired: {dropped_layers.READ}" in {n.what for n in step.noted}
    feeds = held(g)[0]
    np.testing.assert_allclose(run(model, feeds, entry.name)[0], run(g, feeds, entry.name)[0], rtol=1e-5, atol=1e-6)


def test_quantized_weights_stay_and_are_named():
    g = pre()
    passes = [Qdq(min_size=1), DropLayers(ratio=0.4)]
    step = PassManager(passes, any_order=True).run(g, data(g), data(g)).report.step("drop-layers")
    assert step.changed == 2
    assert any(n.what == "not repaired: its weights are quantized" for n in step.noted)


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_has_the_sizes_of_a_real_one(name):
    g = MODELS[name]()
    p = DropLayers(ratio=0.4)
    planned = PassManager([p.planning()], dry=True).run(g)
    real, step = dropped(g, ratio=0.4)
    assert planned.model.nbytes == real.nbytes
    assert planned.model.model.graph.num_nodes() == real.model.graph.num_nodes()
    assert [n.what for n in planned.report.step("drop-layers").noted] == ["dropped"] * 2
    assert [n.what for n in step.noted] == ["dropped"] * 2


# ---- caches ----------------------------------------------------------------------------------------------------------

CACHED = [n for n in zoo.kept() if "-cache." in n]


def cached(name, least=None):
    """A canonical decoder with caches, its data at two shapes, and one layer that does little."""
    g = cut_matrix.canonical(name)
    if least is not None:
        layer = blocks.layers(g)[least]
        for x in (layer.attention.o, layer.mlp.down):
            g.put(x.weight, 0.01 * g.array(x.weight))
    return g, [matrix.taken(g, zoo.feeds(zoo.kept()[name][0], *shape)) for shape in cut_matrix.SHAPES]


def names(values):
    return [str(v.name) for v in values]


@pytest.mark.parametrize("part", ["layer", "attention"])
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("name", CACHED)
def test_caches_go_with_their_layer(name, least, part):
    g, feeds = cached(name, least)
    find = layer_branches if part == "layer" else lambda g: [b for b in branches(g) if b.kind == "attention"]
    gone = find(g)[least]
    result = PassManager([DropLayers(ratio=0.5, protect=0, part=part, repair="none")]).run(g, feeds, feeds)
    model, step = result.model, result.report.step("drop-layers")
    first = 2 * least
    ports = {f"past_{i}" for i in (first, first + 1)}, {f"present_{i}" for i in (first, first + 1)}
    assert names(model.inputs) == [n for n in names(g.inputs) if n not in ports[0]]
    assert names(model.outputs) == [n for n in names(g.outputs) if n not in ports[1]]
    for v in (*model.inputs, *model.outputs):
        assert v.shape == g.value(v.name).shape
    said = f"dropped, with inputs past_{first}, past_{first + 1} and outputs present_{first}, present_{first + 1}"
    assert [(n.site, n.what) for n in step.noted] == [(gone.name, said)]
    mask = cut_matrix.handed_on(g, {gone.exit.name: gone.entry.name}, set(names(model.outputs)))
    cuts.assert_same(mask, model, *feeds)
    alone = [{k: a for k, a in f.items() if k not in ports[0]} for f in feeds]
    cuts.assert_same(model, model, *alone)  # it runs without them as well
    assert set(step.drift["outputs"]) == set(names(model.outputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED)
def test_a_model_with_caches_is_repaired(name):
    g, feeds = cached(name)
    kl = {
        how: PassManager([DropLayers(ratio=0.5, protect=0, repair=how)]).run(g, feeds, feeds).report.validation.drift.kl
        for how in ("none", "least-squares")
    }
    assert kl["least-squares"] < 0.5 * kl["none"]


@pytest.mark.parametrize("score", ["influence", "ablation"])
def test_ablation_and_influence_leave_out_the_layer_that_does_little(score):
    g, feeds = cached(CACHED[0], least=0)
    model = PassManager([DropLayers(ratio=0.5, protect=0, score=score)]).run(g, feeds, feeds).model
    assert names(model.inputs)[2:] == ["past_2", "past_3"]


def test_a_plan_without_data_takes_caches_out_as_well():
    g, feeds = cached(CACHED[0])
    planned = PassManager([DropLayers(ratio=0.5, protect=0).planning()], dry=True).run(g)
    real = PassManager([DropLayers(ratio=0.5, protect=0)]).run(g, feeds, feeds)
    assert len(planned.model.inputs) == len(real.model.inputs) == len(g.inputs) - 2
    assert planned.model.nbytes == real.model.nbytes
    assert "dropped, with inputs" in planned.report.step("drop-layers").noted[0].what


def test_a_file_without_some_caches_is_compared_with_the_original_on_its_data(tmp_path):
    g, feeds = cached(CACHED[0])
    result = PassManager([DropLayers(ratio=0.5, protect=0)]).run(g, feeds, feeds)
    original, done = storage.save(g, tmp_path / "a"), result.save(tmp_path / "b")
    found = validate(original, done, as_dataset([Batch(f) for f in feeds], g))
    assert np.isclose(found.drift.kl, result.report.validation.drift.kl, rtol=1e-4)
    assert set(found.outputs) == set(names(result.model.outputs))
    with pytest.raises(ModelError, match="differ in their inputs"):  # the other way round it lacks what it needs
        validate(done, original, as_dataset([Batch(f) for f in feeds], g))
    undeclared = result.model.clone()
    undeclared.model.metadata_props.clear()
    with pytest.raises(ModelError, match="differ in their inputs"):
        validate(g, undeclared, as_dataset([Batch(f) for f in feeds], g))
    with Session(done) as session, pytest.raises(DataError, match="has no input 'other'"):
        session.run(feeds[0] | {"other": feeds[0]["input_ids"]})


def test_sizes_of_axes_that_went_with_a_cache_may_still_be_said():
    g, feeds = cached("llama-cache.dynamo-sdpa-18", least=1)
    sizes = {v.shape[i].value: n for v in g.inputs for i, n in enumerate(feeds[0][v.name].shape) if i % 2 == 0}
    sizes |= {g.value("input_ids").shape[1].value: 12, g.value("attention_mask").shape[1].value: 18}
    model = PassManager([DropLayers(ratio=0.5, protect=0)]).run(g, feeds, feeds).model
    lost = {g.value(n).shape[2].value for n in ("past_2", "past_3")}
    assert lost < set(sizes)
    assert set(open_axes.shapes_of(model, sizes)) == set(names(model.inputs))
    with pytest.raises(DataError, match="has no axis 'other'"):
        open_axes.shapes_of(model, sizes | {"other": 3})


def test_a_cache_that_others_read_holds_its_layer():
    g, _ = cached(CACHED[0])
    past = g.value("past_0")
    out = g.op("ReduceSum", past, keepdims=0)
    out.name, out.type, out.shape = "total", past.type, ir.Shape([])
    g.model.graph.outputs.append(out)
    held = Graph(g.model)
    assert "its cache 'past_0' is also read by" in layer_branches(held)[0].why
    assert not layer_branches(held)[1].why


def test_a_length_that_no_other_cache_is_known_to_have_holds_its_layer():
    g, feeds = cached(CACHED[0])
    for name in ("past_2", "past_3"):
        v = g.value(name)
        v.shape = ir.Shape([v.shape[0], v.shape[1], f"other_{name}", v.shape[3]])
    second = blocks.layers(g)[1].attention
    g.set_input(second.node, 3, g.op("Identity", second.mask, like=second.mask))  # no longer one mask
    held = Graph(g.model)
    assert "the shape of its cache 'past_0' is read, and no other input" in layer_branches(held)[0].why
    assert not layer_branches(held)[1].why
    result = PassManager([DropLayers(ratio=0.5, protect=0)]).run(held, feeds, feeds)
    assert names(result.model.inputs)[2:] == ["past_0", "past_1"]


def test_the_last_cache_that_tells_the_length_stays():
    g, feeds = cached(CACHED[0])
    p = DropLayers(ratio=0.99, protect=0, part="attention")
    step = PassManager([p]).run(g, feeds, feeds).report.step("drop-layers")
    assert step.changed == 1
    three = PassManager([_All(ratio=0.5, protect=0, part="attention")], allow_unchanged=True).run(g, feeds, feeds)
    whys = [d.why for d in three.report.step("drop-layers").declined]
    assert any("no other input is known to have it" in why for why in whys)
    assert len(blocks.attentions(three.model)) == 1


class _All(DropLayers):
    """Tries all of them."""

    name = "drop-layers"

    def _free(self, every):
        object.__setattr__(self, "ratio", 1.0)
        return super()._free(every)


def test_keys_that_are_the_first_output_hold_their_layer():
    g, _ = cached(CACHED[0])
    outputs = g.model.graph.outputs
    logits = outputs.pop(0)
    outputs.append(logits)
    assert "'present_0' is the output by which models are compared" in layer_branches(Graph(g.model))[0].why


# ---- other architectures ---------------------------------------------------------------------------------------------

# Layers scaled by a constant, lists of tokens, parts in parallel, an encoder that nobody reads any more.
REACHED = {
    ("beit.legacy-eager-14", "layer"): 10,
    ("dinov2.dynamo-sdpa-18-onnxslim", "layer"): 10,
    ("opt.legacy-eager-16", "layer"): 5,
    ("gpt-neox.transformers-sdpa-20", "layer"): 5,
    ("bart.dynamo-sdpa-17", "attention"): 5,
    ("bert.dynamo-sdpa-18", "mlp"): 8,
    ("gemma2.transformers-eager-18", "layer"): 0,  # norms before the addition: nothing there is linear
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), REACHED)
def test_repair_reaches_what_is_added_to_the_stream(name, part):
    a, _ = zoo.kept()[name]
    g = cut_matrix.canonical(name)
    feeds = [matrix.taken(g, zoo.feeds(a, *shape)) for shape in ((2, 12), (3, 17), (4, 20))]
    results = {
        how: PassManager([DropLayers(ratio=0.5, protect=0, part=part, repair=how)]).run(g, feeds, feeds)
        for how in ("none", "least-squares")
    }
    gain = results["least-squares"].report.validation.drift.sqnr - results["none"].report.validation.drift.sqnr
    assert gain >= REACHED[name, part]
    if not REACHED[name, part]:
        noted = results["least-squares"].report.step("drop-layers").noted
        assert f"the gap is not repaired: {dropped_layers.NOTHING}" in {n.what for n in noted}
