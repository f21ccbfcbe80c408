"""`awq`, `outlier-suppression` and `reparametrize`: exact, chosen on rows left out, against float64 and brute force."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.maths.trial_rounding import Trial, TrialRounding
from onnxcomp.methods.quantize import gains
from onnxcomp.passes.awq import POWERS, Awq
from onnxcomp.passes.outlier_suppression import OutlierSuppression
from onnxcomp.passes.reparametrize import Reparametrize
from onnxcomp.runtime.sessions import Session
from tests import tiny, zoo

PASSES = (Awq, OutlierSuppression, Reparametrize)
ARCHITECTURES = ("llama.legacy-sdpa-14", "vit.dynamo-sdpa-18")


def outputs(g, batch):
    with Session(g) as s:
        return list(s.run(batch).values())


def data(g, count=6):
    return as_dataset([Batch(tiny.feeds(g, 3, 9, seed=i)) for i in range(count)], g)


def uneven(g: Graph) -> Graph:
    """The same function with a few channels of every norm's output larger, and shifted where the norm has a bias."""
    places = [p for p in gains.places(g, blocks.linears(g)) if p.fold is not None]
    for seed, place in enumerate(places):
        rng, k = np.random.default_rng(seed), place.readers[0].sizes[0]
        by = np.where(rng.random(k) < 0.1, 1 / 40, 1.0) * np.exp(0.1 * rng.standard_normal(k))
        gains.divide(g, place, gains.tied(place, by))
    g.edits = 0
    return g


@pytest.mark.parametrize("cls", PASSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewrites_are_exact_on_every_kind_of_norm(cls, name):
    a, _ = zoo.kept()[name]
    g = Graph(zoo.load_graph(name))
    canonicalize(g)
    uneven(g)
    calibration = as_dataset([Batch(zoo.feeds(a, 3, 6, padding="right"))], g)
    result = PassManager([cls(min_size=1, least=1e-3)], allow_unchanged=True).run(g, calibration)
    assert result.report.steps[0].changed > 0
    assert result.model.model.graph.num_nodes() <= g.model.graph.num_nodes() + sum(
        x.bias is None for x in blocks.linears(g)
    )
    batch = zoo.feeds(a, 2, 5)
    for want, got in zip(outputs(g, batch), outputs(result.model, batch), strict=True):
        assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("cls", PASSES)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_second_run_finds_nothing_to_do(cls, norm):
    g = uneven(tiny.encoder(norm=norm))
    once = PassManager([cls(min_size=1)], allow_unchanged=True).run(g, data(g))
    again = PassManager([cls(min_size=1)], allow_unchanged=True).run(once.model, data(g)).report.steps[0]
    assert (again.edits, again.changed) == (0, 0)


def test_in_post_norm_models_gains_are_multiplied_only_where_that_is_asked_for():
    g = uneven(tiny.encoder(norm="post"))
    for v in (n.gain for n in blocks.norms(g)):
        g.scale(v, np.where(np.arange(32) < 2, 50.0, 1.0), 0)

    def run(**options):
        result = PassManager([Awq(min_size=1, **options)], allow_unchanged=True).run(g, data(g))
        return result.report.steps[0], len(list(result.model.nodes("Mul")))

    folded, before = run()
    assert "its gains would have to be multiplied at run time" in {d.why for d in folded.declined}
    asked, after = run(multiply=True)
    assert asked.changed > folded.changed
    assert after > before


def layer(shift: bool = False) -> tuple[Graph, np.ndarray]:
    """A norm of 6 channels, two of them large, before one linear; rows that it is fed."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 6]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="layer"), ir_version=10))
    rng = np.random.default_rng(3)
    gain = np.array([1, 30, 1, 1, 12, 1], np.float32)
    bias = np.array([0, 90, 0, 0, -40, 0] if shift else [0] * 6, np.float32)
    y = g.op("LayerNormalization", x, gain, bias, axis=-1, name="norm")
    w = (rng.standard_normal((6, 4)) / gain[:, None]).astype(np.float32)
    y = g.op("Add", g.op("MatMul", y, w, name="linear"), rng.standard_normal(4).astype(np.float32))
    return tiny.finish(g, y, "y", ["rows", 4]), rng.standard_normal((64, 6)).astype(np.float32)


def normalized(rows, gain, bias):
    centred = rows.astype(np.float64) - rows.mean(axis=1, keepdims=True, dtype=np.float64)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * gain + bias


@pytest.mark.parametrize(("cls", "shift"), [(Awq, False), (OutlierSuppression, True), (Reparametrize, True)])
def test_one_layer_against_float64(cls, shift):
    g, rows = layer(shift)
    result = PassManager([cls(min_size=1)]).run(g, as_dataset([Batch({"x": rows})], g)).model
    (norm,), (linear,) = blocks.norms(result), blocks.linears(result)
    gain, bias, w, b = (result.array(v).astype(np.float64) for v in (norm.gain, norm.bias, linear.weight, linear.bias))
    want = outputs(g, {"x": rows})[0]
    np.testing.assert_allclose(normalized(rows, gain, bias) @ w + b, want, rtol=2e-5, atol=2e-5)
    assert np.ptp(np.log(gain)) < np.ptp(np.log(g.array(blocks.norms(g)[0].gain)))
    assert len(list(result.nodes())) == len(list(g.nodes()))


def test_awq_takes_the_best_power_of_all():
    g, rows = layer()
    (norm,), (linear,) = blocks.norms(g), blocks.linears(g)
    x = normalized(rows, g.array(norm.gain), g.array(norm.bias))
    trial = Trial(x, [g.array(linear.weight).astype(np.float64)], TrialRounding(4, 32, 0))
    size = np.abs(trial.seen).mean(axis=0)
    brute = min(trial.error(gain=size**a / np.sqrt((size**a).max() * (size**a).min())) for a in (0.0, *POWERS))
    step = PassManager([Awq(min_size=1)]).run(g, as_dataset([Batch({"x": rows})], g)).report.steps[0]
    share = float(step.noted[0].what.split()[2])
    assert share <= brute / trial.error() * 1.3 + 0.01  # rows of a sample come in another order than these


def test_reparametrized_channels_have_one_range():
    g, rows = layer(shift=True)
    result = PassManager([Reparametrize(min_size=1)]).run(g, as_dataset([Batch({"x": rows})], g)).model
    (norm,) = blocks.norms(result)
    x = normalized(rows, result.array(norm.gain), result.array(norm.bias))
    assert np.ptp(x.max(axis=0)) < 0.35 * x.max()  # ranges are of three quarters of the rows
    assert np.ptp(x.min(axis=0)) < 0.35 * -x.min()


@pytest.mark.parametrize("cls", PASSES)
def test_even_channels_stay_as_they_are(cls):
    g, rows = layer()
    for v, by in (
        (blocks.norms(g)[0].gain, [1, 1 / 30, 1, 1, 1 / 12, 1]),
        (blocks.linears(g)[0].weight, [1, 30, 1, 1, 12, 1]),
    ):
        g.scale(v, np.array(by), 0)
    step = PassManager([cls(min_size=1, least=0.5)], allow_unchanged=True).run(g, as_dataset([Batch({"x": rows})], g))
    assert step.report.steps[0].edits == 0
