"""Recognition on hand-written graphs: spellings no exporter of ours uses, near misses, and reasons for declining."""

import math
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny
from tests.hand import RNG, f32, graph, i64, ops, raised, same, weight

# ---- tiny models in the exporter's spelling --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny.encoder, {}),
        (tiny.encoder, {"norm": "pre", "bias": False, "classes": 3}),
        (tiny.encoder, {"batch": 2, "sequence": 7}),
        (tiny.encoder, {"opset": 20}),
        (tiny.decoder, {}),
        (tiny.decoder, {"kv_heads": 1}),
        (tiny.decoder, {"kv_heads": 4, "norm": "post", "bias": True}),
        (tiny.decoder, {"tied": True}),
        (tiny.decoder, {"batch": 1, "sequence": 7}),
    ],
)
def test_spelled_model_becomes_the_canonical_one(make, options):
    spelled = make(spelled="dynamo", **options)
    canonical = make(spelled="canonical", **{k: v for k, v in options.items() if k != "opset"})
    source = spelled.clone()
    canonicalize(spelled)
    assert spelled.declined == []
    side = {"Expand", "Concat", "Cos", "Sin"}  # a static batch needs no widening
    core = [Counter({k: n for k, n in ops(g).items() if k not in side}) for g in (spelled, canonical)]
    assert core[0] == core[1] or "batch" in options
    x = tiny.feeds(canonical, 1 if options.get("batch") == 1 else 2, 7, padding="right")
    with Session(source) as a, Session(spelled) as b:
        want, got = next(iter(a.run(x).values())), next(iter(b.run(x).values()))
    assert np.max(np.abs(want - got)) <= 2e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("make", [tiny.encoder, tiny.decoder])
def test_canonical_model_is_a_fixed_point(make):
    g = make()
    canonicalize(g)
    assert (g.edits, g.declined) == (0, [])


def test_exact_rows_leaves_finite_masks_spelled_out():
    source, g = tiny.decoder(spelled="dynamo"), tiny.decoder(spelled="dynamo")
    canonicalize(g, exact_rows=True)
    assert ops(g)["Softmax"] == 2
    assert {d.why for d in g.declined} == {
        "attention: rows without visible keys would change, and exact rows are requested"
    }
    x = tiny.feeds(g, 3, 7, padding="left")
    with Session(source) as a, Session(g) as b:
        np.testing.assert_allclose(b.run(x)["logits"], a.run(x)["logits"], rtol=1e-4, atol=1e-5)


def test_weights_are_not_read(tmp_path, monkeypatch):
    path = tiny.external(tiny.decoder(spelled="dynamo", hidden=64, ffn=96, bias=True), tmp_path)
    g = Graph(ir.load(path))
    read = []
    original = ir.ExternalTensor.numpy

    def numpy(self):
        read.append(self.size)
        return original(self)

    monkeypatch.setattr(ir.ExternalTensor, "numpy", numpy)
    canonicalize(g)
    assert g.declined == []
    assert max(read, default=0) <= 96  # biases and gains at most


# ---- activations -----------------------------------------------------------------------------------------------------

SQRT2 = math.sqrt(2)


def gelu_divided(g, x):
    return g.op("Mul", g.op("Mul", x, f32(0.5)), g.op("Add", g.op("Erf", g.op("Div", x, f32(SQRT2))), f32(1)))


def gelu_scaled(g, x):
    return g.op("Mul", g.op("Mul", x, g.op("Add", f32(1), g.op("Erf", g.op("Mul", x, f32(1 / SQRT2))))), f32(0.5))


def gelu_tanh_cubed(g, x):
    inner = g.op("Add", x, g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), f32(0.044715)))
    return g.op("Mul", g.op("Mul", x, f32(0.5)), g.op("Add", g.op("Tanh", g.op("Mul", inner, f32(0.7978846))), f32(1)))


def gelu_tanh_factored(g, x):
    square = g.op("Add", g.op("Mul", g.op("Pow", x, f32(2)), f32(0.044715)), f32(1))
    inner = g.op("Mul", g.op("Mul", x, f32(0.7978845608)), square)
    return g.op("Mul", x, g.op("Add", g.op("Mul", g.op("Tanh", inner), f32(0.5)), f32(0.5)))


def silu_by_exp(g, x):
    return g.op("Mul", g.op("Sigmoid", x), x)


def quick_gelu(g, x):
    return g.op("Mul", x, g.op("Sigmoid", g.op("Div", x, f32(1 / 1.702))))


@pytest.mark.parametrize(
    ("spell", "expected"),
    [
        (gelu_divided, {"Gelu": 1}),
        (gelu_scaled, {"Gelu": 1}),
        (gelu_tanh_cubed, {"Gelu": 1}),
        (gelu_tanh_factored, {"Gelu": 1}),
        (silu_by_exp, {"Sigmoid": 1, "Mul": 1}),
        (quick_gelu, {"Sigmoid": 1, "Mul": 2}),
    ],
)
def test_activation_is_recognised_however_spelled(spell, expected):
    g = graph(x=["b", 16])
    source, new = raised(g, spell(g, g.inputs[0]), "b", 16)
    assert ops(new) == expected
    same(source, new, x=f32(3 * RNG.standard_normal((40, 16))))


@pytest.mark.parametrize("constant", [0.05, 0.0440, 0.04472 * 1.01])
def test_near_miss_of_an_activation_is_left_alone(constant):
    g = graph(x=["b", 16])
    x = g.inputs[0]
    inner = g.op("Add", x, g.op("Mul", g.op("Pow", x, f32(3)), f32(constant)))
    y = g.op("Mul", g.op("Mul", x, f32(0.5)), g.op("Add", g.op("Tanh", g.op("Mul", inner, f32(0.7978846))), f32(1)))
    _, new = raised(g, y, "b", 16)
    assert "Gelu" not in ops(new)
    assert ops(new)["Tanh"] == 1


# ---- norms -----------------------------------------------------------------------------------------------------------


def mean(g, x):
    return g.op("ReduceMean", x, i64(-1), keepdims=1)


def rms_reciprocal(g, x):
    return g.op("Mul", x, g.op("Reciprocal", g.op("Sqrt", g.op("Add", mean(g, g.op("Pow", x, f32(2))), f32(1e-6)))))


def rms_divided(g, x):
    return g.op("Div", x, g.op("Sqrt", g.op("Add", f32(1e-6), mean(g, g.op("Mul", x, x)))))


def rms_power(g, x):
    return g.op("Mul", g.op("Pow", g.op("Add", mean(g, g.op("Pow", x, f32(2))), f32(1e-6)), f32(-0.5)), x)


def rms_one_over(g, x):
    root = g.op("Sqrt", g.op("Add", mean(g, g.op("Pow", x, f32(2))), f32(1e-6)))
    return g.op("Mul", x, g.op("Div", f32(1), root))


@pytest.mark.parametrize("spell", [rms_reciprocal, rms_divided, rms_power, rms_one_over])
@pytest.mark.parametrize("gain", ["none", "row", "one plus", "three axes"])
def test_rms_norm_is_recognised_however_spelled(spell, gain):
    g = graph(x=["b", "s", 16])
    y = spell(g, g.inputs[0])
    if gain == "one plus":
        y = g.op("Mul", y, g.op("Add", weight(16), f32(1)))
    elif gain != "none":
        y = g.op("Mul", weight(16) if gain == "row" else weight(1, 1, 16), y)
    source, new = raised(g, y, "b", "s", 16)
    assert ops(new) == {"RMSNormalization": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 5, 16))))


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_from_primitives(affine):
    g = graph(x=["b", "s", 16])
    x = g.inputs[0]
    centred = g.op("Sub", x, mean(g, x))
    y = rms_divided(g, centred)
    if affine:
        y = g.op("Add", g.op("Mul", y, weight(16)), weight(16))
    source, new = raised(g, y, "b", "s", 16)
    assert ops(new) == {"LayerNormalization": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 5, 16)) + 1))


def test_norm_over_another_axis_is_declined():
    g = graph(x=["b", 8, 16])
    x = g.inputs[0]
    square = g.op("ReduceMean", g.op("Pow", x, f32(2)), i64(1), keepdims=1)
    _, new = raised(g, g.op("Div", x, g.op("Sqrt", g.op("Add", square, f32(1e-6)))), "b", 8, 16)
    assert [d.why for d in new.declined] == ["norm: the mean is not over the last axis alone"]


# ---- linears ---------------------------------------------------------------------------------------------------------


def test_gemm_on_folded_axes_becomes_a_plain_product():
    g = graph(x=["b", "s", 8])
    x = g.inputs[0]
    sizes = g.op("Concat", g.op("Shape", x, start=0, end=2), i64(12), axis=0)
    y = g.op("Gemm", g.op("Reshape", x, i64(-1, 8)), weight(12, 8), weight(12), transB=1)
    y = g.op("Relu", g.op("Reshape", y, sizes))
    source, new = raised(g, y, "b", "s", 12)
    assert ops(new) == {"MatMul": 1, "Add": 1, "Relu": 1}
    assert blocks.linears(new)[0].sizes == (8, 12)
    same(source, new, x=f32(RNG.standard_normal((2, 3, 8))))


def test_scaled_gemm_is_declined():
    g = graph(x=["b", 8])
    source, new = raised(g, g.op("Gemm", g.inputs[0], weight(8, 4), weight(4), alpha=0.5), "b", 4)
    assert [d.why for d in new.declined] == ["linear: Gemm with alpha or beta other than 1"]
    same(source, new, x=f32(RNG.standard_normal((2, 8))))


def test_packed_linear_is_split_over_slices_of_one_weight():
    g = graph(x=["b", "s", 8])
    y = g.op("Add", g.op("MatMul", g.inputs[0], weight(8, 24)), weight(24))
    a = g.op("Split", y, i64(4, 20), axis=-1, outputs=2)
    b = a.producer().outputs[1]
    out = g.op("Concat", g.op("Relu", b), g.op("Relu", a), axis=-1)
    source, new = raised(g, out, "b", "s", 24)
    assert sorted(x.sizes for x in blocks.linears(new)) == [(8, 4), (8, 20)]
    assert "Split" not in ops(new)
    same(source, new, x=f32(RNG.standard_normal((2, 3, 8))))
