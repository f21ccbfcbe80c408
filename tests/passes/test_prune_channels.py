"""Channels of convolutional classifiers are cut by the same analysis: equal to the masked model, with planned sizes."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import coupling
from onnxcomp.canonical import canonicalize
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.target import CPU
from tests import cuts, tiny
from tests.hand import f32, graph, weight


def conv(g: Graph, x: ir.Value, name: str, out: int, into: int, size: int = 3, norm: bool = True, **attrs) -> ir.Value:
    """A convolution, and BatchNormalization behind it."""
    rng = np.random.default_rng(len(name))
    y = g.op("Conv", x, g.constant(weight(out, into, size, size), name), pads=[size // 2] * 4, **attrs)
    parts = [f32(rng.uniform(0.5, 1.5, out)), f32(rng.standard_normal(out)), f32(rng.standard_normal(out))]
    return g.op("BatchNormalization", y, *parts, f32(rng.uniform(0.5, 1.5, out))) if norm else y


def cnn(images: int | str = "batch") -> Graph:
    """A stem, an inverted residual block (wide, depthwise, narrow), a dense residual block, pooling, a classifier."""
    g = graph(x=[images, 3, "height", "width"])
    x = g.op("Relu", conv(g, g.inputs[0], "stem", 16, 3, strides=[2, 2]))
    inner = g.op("Relu", conv(g, x, "wide", 32, 16, size=1))
    inner = g.op("Relu", conv(g, inner, "depthwise", 32, 1, group=32))
    x = g.op("Add", x, conv(g, inner, "narrow", 16, 32, size=1))
    inner = g.op("Relu", conv(g, x, "first", 24, 16))
    x = g.op("Relu", g.op("Add", x, conv(g, inner, "second", 16, 24)))
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    y = g.op("Gemm", x, g.constant(weight(10, 16), "head"), f32(np.arange(10)), transB=1)
    return tiny.finish(g, y, "y", [images, 10])


def images(batch: int, size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3, size, size)).astype(np.float32)}


def run(g: Graph, spec: str, data=()):
    return PassManager([parse_pass(spec)]).run(g, data)


def channels(g: Graph) -> dict[str, int]:
    return {str(n.inputs[1].name): g.array(n.inputs[1]).shape[0] for n in g.nodes("Conv")}


@pytest.mark.parametrize("canonical", [False, True])
def test_the_cut_model_equals_the_masked_one_and_is_as_large_as_predicted(canonical):
    g = cnn()
    if canonical:
        canonicalize(g)
    p = catalog.load("prune-channels")(ratio=0.5, score="magnitude", repair="none")
    places = p.places(coupling.Coupling(g))
    assert sorted(len(x.sites) for x in places) == [1, 2, 3]  # first; wide and depthwise; stem, narrow and second
    keeps = p._amounts(g, places, p._candidates(g, places, [p._scores(g, x, None) for x in places], CPU))
    mask = g
    for place, keep in zip(places, keeps, strict=True):
        mask = cuts.masked(mask, place.group, np.setdiff1d(np.arange(place.group.units), keep))
    result = run(g, "prune-channels: {ratio: 0.5, score: magnitude, repair: none}")
    assert result.report.steps[0].changed == result.report.steps[0].eligible == 6
    cuts.assert_same(mask, result.model, images(2), images(3, 12))
    made = [(x.group, keep) for x, keep in zip(places, keeps, strict=True)]
    assert [f(result.model) for f in (parameters, macs)] == [f(g, made) for f in (parameters, macs)]
    assert sorted(channels(result.model).values()) == [8, 8, 8, 8, 16, 16]  # 24 becomes 8: multiples of 8
    assert {n.attributes.get_int("group", 1) for n in result.model.nodes("Conv")} == {1, 16}


def test_the_smallest_channels_go():
    g = cnn()
    for name, axis in (("wide", 0), ("narrow", 1)):
        w = g.array(g.value(name)).copy()
        w[(slice(None),) * axis + (slice(4, 12),)] *= 1e-3
        g.put(g.value(name), w)
    result = run(g, "prune-channels: {ratio: 0.25, score: magnitude, repair: none}").model
    assert channels(result)["wide"] == 24
    assert np.abs(result.array(result.value("wide"))).max(axis=(1, 2, 3)).min() > 1e-2


def test_ablation_finds_the_channels_that_change_nothing():
    g = cnn()
    w = g.array(g.value("second")).copy()
    w[:, ::3] = 0
    g.put(g.value("second"), w)
    skip = [str(n.name) for n in g.nodes("Conv") if n.inputs[1].name != "first"]
    data = as_dataset([images(4, seed=i) for i in range(4)], g)
    spec = {"prune-channels": {"ratio": 1 / 3, "score": "ablation", "repair": "none", "skip": skip}}
    result = PassManager([parse_pass(spec)]).run(g, data).model
    assert channels(result) == channels(g) | {"first": 16}
    cuts.assert_same(g, result, images(2), images(3, 12), tolerance=1e-5)  # fewer channels, other kernels


def test_a_plan_tells_the_sizes_that_come(tmp_path):
    from onnxcomp.engine.compress import compress_each
    from onnxcomp.files import storage

    path = tiny.external(cnn(), tmp_path)
    spec = "prune-channels: {parameters: 0.5, multiple_of: 1, score: magnitude, repair: none}"
    (planned,) = compress_each(path, None, passes=[spec], plan=True).values()
    told = planned.report.plan
    made = run(storage.load(path), spec).model
    assert told.needs_data == ()
    assert told.parameters == (parameters(cnn()), parameters(made))
    assert told.macs == (macs(cnn()), macs(made))
    assert parameters(made) <= 0.51 * parameters(cnn())


def test_what_the_model_gives_out_stays():
    g = graph(x=["batch", 3, 8, 8])
    y = conv(g, g.op("Relu", conv(g, g.inputs[0], "inner", 16, 3)), "last", 4, 16, norm=False)
    g = tiny.finish(g, y, "y", ["batch", 4, 8, 8])
    result = run(g, "prune-channels: {ratio: 0.5, score: magnitude, repair: none}")
    assert channels(result.model) == {"inner": 8, "last": 4}
    [declined] = result.report.steps[0].declined
    assert "model's output 'y'" in declined.why


def test_a_latency_budget_is_refused():
    with pytest.raises(RecipeError, match="prune-channels: option 'latency'"):
        parse_pass("prune-channels: {latency: 0.5}")


def test_a_model_without_convolutions_has_nothing_to_cut():
    with pytest.raises(RecipeError, match="'prune-channels' found nothing to change"):
        run(tiny.encoder(), "prune-channels")
