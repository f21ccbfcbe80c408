"""`drop-layers` against the same model with the parts masked, and against block influence computed by hand."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.branches import branches, whole_layers
from onnxcomp.data import load_data
from onnxcomp.errors import RecipeError
from onnxcomp.manager import PassManager
from onnxcomp.passes.drop_layers import DropLayers
from onnxcomp.runtime import Session
from tests import tiny

LAYERS = 5


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
    model, step = dropped(g, ratio=0.4, part=part)
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
    found = whole_layers(g)
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
    for b in whole_layers(g)[1:-1]:
        without = g.clone()
        one = next(x for x in whole_layers(without) if x.name == b.name)
        without.replace(one.exit, one.entry)
        errors = [np.sum((run(without, x.feeds) - run(g, x.feeds)).astype(np.float64) ** 2) for x in data(g)]
        losses[b.name] = sum(errors)
    _, step = dropped(g, ratio=0.2, score="ablation")
    assert {b.name for b in whole_layers(g)} - {d.site for d in step.declined} == {min(losses, key=losses.get)}


def test_the_ends_stay_and_a_cache_is_declined():
    g = tiny.encoder(layers=2, norm="pre")
    with pytest.raises(RecipeError, match="at each end"):
        dropped(g, ratio=0.9)
    model, step = dropped(g, ratio=0.5, protect=0)
    assert step.changed == 1
    assert len(blocks.layers(model)) == 1


def test_all_of_a_share_rounds_down():
    with pytest.raises(RecipeError, match="less than one of 5"):
        dropped(pre(), ratio=0.1)
