"""Convolutions as linears of their patches: the probes are right, and so is the closed-form repair behind a cut."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.coupling import Coupling
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.compress import compress_each
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Slot, layout
from onnxcomp.methods.repair import convolutions
from onnxcomp.methods.repair.convolutions import Patches, probed
from onnxcomp.runtime.sessions import Session
from onnxcomp.runtime.sub_models import segment
from tests import cuts, tiny
from tests.hand import f32, graph

OPTIONS = {"ratio": 0.3, "multiple_of": 1, "score": "magnitude"}


def images(batch: int, seed: int, size: int = 12) -> dict[str, np.ndarray]:
    """Smooth images with a little noise: neighbours say much of each other, as in photographs."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((batch, 3, size // 3, size // 3))
    return {"x": f32(np.kron(coarse, np.ones((3, 3))) + 0.1 * rng.standard_normal((batch, 3, size, size)))}


def conv(g: Graph, x: ir.Value, name: str, out: int, into: int, size: int = 3, bias: bool = True, **attrs) -> ir.Value:
    rng = np.random.default_rng(sum(name.encode()))
    kernel = f32(rng.standard_normal((out, into, size, size)) * np.sqrt(2 / (into * size * size)))
    given = g.constant(f32(rng.standard_normal(out) / 4), f"{name}_bias") if bias else None
    return g.op(
        "Conv", x, g.constant(kernel, f"{name}_kernel"), given, name=name, **({"pads": [size // 2] * 4} | attrs)
    )


def cnn(bias: bool = True) -> Graph:
    """Strides, dilations, automatic pads, a residual, a depthwise and a grouped convolution, norms, a classifier."""
    g = graph(x=["batch", 3, 12, 12])
    x = g.op("Relu", conv(g, g.inputs[0], "stem", 24, 3, bias=bias))
    wide = g.op("Relu", conv(g, x, "wide", 32, 24, 1, bias))
    deep = g.op("Relu", conv(g, wide, "depthwise", 32, 1, bias=bias, group=32))
    x = g.op("Relu", g.op("Add", x, conv(g, deep, "narrow", 24, 32, 1, bias)))
    inner = conv(g, x, "first", 24, 24, bias=bias, strides=[2, 2], dilations=[2, 2], pads=[2, 2, 1, 1])
    parts = [f32(np.linspace(a, b, 24)) for a, b in ((0.7, 1.3), (-0.2, 0.2), (-0.1, 0.1), (0.5, 1.5))]
    inner = g.op("Relu", g.op("BatchNormalization", inner, *parts))
    inner = g.op("Relu", conv(g, inner, "grouped", 24, 3, bias=bias, group=8))
    x = g.op("Relu", conv(g, inner, "last", 24, 24, bias=bias, pads=None, auto_pad="SAME_UPPER"))
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    rng = np.random.default_rng(1)
    y = g.op("Gemm", x, g.constant(f32(rng.standard_normal((10, 24)) / 4), "head"), f32(np.arange(10) / 10), transB=1)
    return tiny.finish(g, y, "y", ["batch", 10])


def run(g: Graph, count: int = 8, **options):
    data = as_dataset([images(8, i) for i in range(count)], g)
    return PassManager([catalog.load("prune-channels")(**{**OPTIONS, **options})]).run(g, data)


def apart(a: Graph, b: Graph, seeds=range(100, 104)) -> float:
    """Distance of the outputs of two models, relative to those of the first."""
    pairs = [tuple(cuts.run(m, images(8, s))["y"] for m in (a, b)) for s in seeds]
    x, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return float(np.linalg.norm(x - y) / np.linalg.norm(x))


def values(g: Graph, feeds: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    with Session(segment(g, {}, names)) as s:
        made = s.run(feeds)
    return [made[n].astype(np.float64) for n in names]


# ---- probes ----------------------------------------------------------------------------------------------------------

SPATIAL = {
    "plain": {"kernel": (3, 3)},
    "pads": {"kernel": (3, 2), "pads": [0, 1, 2, 1]},
    "strides": {"kernel": (3, 3), "strides": [2, 3], "pads": [1, 1, 1, 1]},
    "dilations": {"kernel": (2, 3), "dilations": [3, 2]},
    "same": {"kernel": (3, 4), "auto_pad": "SAME_LOWER", "strides": [2, 1]},
    "one": {"kernel": (1, 1), "kernel_shape": [1, 1]},
    "line": {"kernel": (3,), "strides": [2]},
    "solid": {"kernel": (2, 1, 3)},
    "turned": {"kernel": (3, 2), "op": "ConvTranspose", "strides": [2, 1], "output_padding": [1, 0], "pads": [1] * 4},
    "turned-dilated": {"kernel": (3, 3), "op": "ConvTranspose", "dilations": [2, 1]},
}  # fmt: skip


@pytest.mark.parametrize("kind", SPATIAL)
def test_patches_times_the_kernel_are_the_output(kind):
    attrs = dict(SPATIAL[kind])
    op, kernel = attrs.pop("op", "Conv"), attrs.pop("kernel")
    rng = np.random.default_rng(0)
    g = graph(x=["batch", 4, *(["size"] * len(kernel))])
    shape = (4, 5, *kernel) if op == "ConvTranspose" else (5, 4, *kernel)
    y = g.op(op, g.inputs[0], g.constant(f32(rng.standard_normal(shape)), "w"), f32(rng.standard_normal(5)), **attrs)
    g = tiny.finish(g, y, "y", ["batch", 5, *(["other"] * len(kernel))])
    node = next(g.nodes(op))
    reader = Patches(Slot("w", int(op == "Conv"), layout(4), reads=True), (), (node,))
    feeds = {"x": f32(rng.standard_normal((2, 4, *([9] * len(kernel)))))}
    [seen, made] = values(probed(g, ["y"], ["y"]), feeds, *reader.sources, "y:rows")
    assert seen.shape[-1] == 4 * np.prod(kernel) == len(reader.units)
    np.testing.assert_allclose(seen @ reader.weight(g) + reader.bias(g), made, atol=1e-5)
    before = g.edits
    reader.put(g, reader.weight(g))
    assert g.edits == before
    reader.put(g, 2 * reader.weight(g))
    [doubled] = values(probed(g, (), ["y"]), feeds, "y:rows")
    np.testing.assert_allclose(doubled - reader.bias(g), 2 * (made - reader.bias(g)), atol=1e-5)


# ---- laws of repair --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 1 << 16])
@pytest.mark.parametrize("bias", [True, False])
def test_no_convolution_gets_worse_on_the_calibration_data(bias, memory, monkeypatch):
    """Each is compared, right before and right after it is fitted, with what it gave in the uncut model."""
    g, fit, told = cnn(bias), convolutions._fit, []
    feeds = {"x": np.concatenate([images(8, i)["x"] for i in range(8)])}

    def checked(cut, there, env, reader):
        out = str(reader.nodes[0].outputs[0].name)
        [want] = values(probed(g, (), [out]), feeds, f"{out}:rows")
        want = want[..., there.kept.get(out, slice(None))]
        before = np.square(values(probed(cut, (), [out]), feeds, f"{out}:rows")[0] - want).sum()
        fit(cut, there, env, reader)
        after = np.square(values(probed(cut, (), [out]), feeds, f"{out}:rows")[0] - want).sum()
        told.append((reader.name, before, after))

    monkeypatch.setattr(convolutions, "_fit", checked)
    data = as_dataset([images(8, i) for i in range(8)], g)
    result = PassManager([catalog.load("prune-channels")(**OPTIONS)], memory=memory).run(g, data)
    assert [name for name, *_ in told] == ["wide", "narrow", "first", "last"]
    assert all(after <= before * (1 + 1e-6) for _, before, after in told)
    assert sum(after < 0.8 * before for _, before, after in told) >= 3
    noted = [n.site for n in result.report.steps[0].noted if n.what == convolutions.TOO_LARGE]
    assert noted == (["first", "last"] if memory else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, True),
        ({}, False),
        ({"sequential": False}, True),
        ({"score": "energy", "ranking": "layer"}, False),
        ({"score": "energy"}, True),
        ({"ranking": "sensitivity"}, False),
    ],
)
def test_held_out_error_is_at_most_half_of_that_without_repair(options, bias):
    g = cnn(bias)
    plain = apart(g, run(g, **options | {"repair": "none"}).model)
    fitted = apart(g, run(g, **options).model)
    assert fitted < 0.5 * plain


def test_energy_over_all_layers_is_nearer_than_magnitudes_in_each():
    g = cnn()
    assert apart(g, run(g, score="energy").model) < apart(g, run(g).model)


def test_the_bias_takes_the_mean_of_what_is_cut():
    g = cnn()
    plain, by_bias, fitted = (apart(g, run(g, repair=r).model) for r in ("none", "bias", "least-squares"))
    assert fitted < by_bias < plain


@pytest.mark.parametrize("sequential", [True, False])
def test_channels_that_others_repeat_are_made_up_for(sequential):
    """Half of the channels are sums of two others, so that what reads them loses nothing; `energy` knows which."""
    g = graph(x=["batch", 3, 12, 12])
    x = conv(g, g.inputs[0], "stem", 16, 3)
    mix = np.vstack([np.eye(8), np.eye(8) + np.roll(np.eye(8), 1, axis=1)])
    for name in ("stem_kernel", "stem_bias"):
        v = g.value(name)
        g.put(v, f32(np.tensordot(mix, g.array(v)[:8], axes=1)))
    x = g.op("Flatten", g.op("GlobalAveragePool", g.op("Relu", conv(g, x, "last", 12, 16, strides=[2, 1]))))
    g = tiny.finish(g, g.op("MatMul", x, f32(np.eye(12)[:, :10]), name="head"), "y", ["batch", 10])
    options = {"ratio": 0.5, "skip": ["last"], "score": "energy", "ranking": "layer", "sequential": sequential}
    assert apart(g, run(g, **options | {"repair": "none"}).model) > 0.3
    result = run(g, **options).model
    assert result.array(result.value("last_kernel")).shape == (12, 8, 3, 3)
    assert apart(g, result) < (0.05 if sequential else 2e-5)  # in order it is pulled to the weights as they are


def test_what_is_declined_is_not_repaired():
    g = cnn()
    manager = PassManager([catalog.load("prune-channels")(**OPTIONS, skip=("*",))], allow_unchanged=True)
    result = manager.run(g, as_dataset([images(8, 0)], g))
    assert result.report.steps[0].edits == 0
    assert ir.to_proto(result.model.model).graph == ir.to_proto(g.model).graph


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_an_energy_that_does_not_fit_into_memory_is_refused():
    g = cnn()
    manager = PassManager([catalog.load("prune-channels")(**OPTIONS | {"score": "energy"})], memory=1 << 16)
    with pytest.raises(RecipeError, match=r"score energy needs the Gram matrix of 216 patch channels of .* wanda"):
        manager.run(g, as_dataset([images(8, 0)], g))


def test_a_quantized_kernel_is_declined_unless_nothing_is_repaired():
    g = graph(x=["batch", 3, 12, 12])
    x = g.op("Relu", conv(g, g.inputs[0], "first", 16, 3))
    codes = np.random.default_rng(0).integers(-9, 9, (4, 16, 3, 3)).astype(np.int8)
    kernel = g.op("DequantizeLinear", g.constant(codes, "codes"), f32(0.1), np.zeros((), np.int8))
    g = tiny.finish(g, g.op("Conv", x, kernel, pads=[1] * 4, name="second"), "y", ["batch", 4, 12, 12])
    c = Coupling(g)
    assert not catalog.load("prune-channels")(**OPTIONS).places(c)
    assert "'second' is quantized" in c.g.declined[0].why
    assert run(g, repair="none").report.steps[0].changed == 1


def test_a_plan_needs_no_data_and_tells_the_widths(tmp_path):
    g = cnn()
    path = tiny.external(g, tmp_path)
    (planned,) = compress_each(path, None, passes=[{"prune-channels": OPTIONS}], plan=True).values()
    assert planned.report.plan.parameters[1] == sum(
        v.const_value.size for v in run(g).model.model.graph.initializers.values() if v.name != "sizes"
    )
