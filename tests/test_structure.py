"""Recognition on hand-written graphs: spellings no exporter of ours uses, near misses, and reasons for declining."""

import math
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.graph import Graph
from onnxcomp.runtime import Session
from onnxcomp.structure import canonicalize
from tests import tiny

RNG = np.random.default_rng(0)
LOWEST = float(np.finfo(np.float32).min)


def f32(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def i64(*xs: int) -> np.ndarray:
    return np.array(xs, np.int64)


def weight(*shape: int) -> np.ndarray:
    return f32(RNG.standard_normal(shape) / math.sqrt(shape[0]))


def graph(opset: int = 18, **inputs) -> Graph:
    """An empty graph with float inputs of the given shapes; a shape ending in `bool` makes a bool input."""
    values = []
    for name, shape in inputs.items():
        kind = ir.DataType.BOOL if shape[-1] is bool else ir.DataType.FLOAT
        dims = [d for d in shape if d is not bool]
        values.append(ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims)))
    return Graph(ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": opset}, name="hand"), ir_version=10))


def raised(g: Graph, out: ir.Value, *shape, **options) -> tuple[Graph, Graph]:
    """The finished graph and its canonical form."""
    source = tiny.finish(g, out, "y", list(shape))
    new = source.clone()
    canonicalize(new, **options)
    again = new.clone()
    canonicalize(again, **options)
    assert again.edits == 0
    return source, new


def same(source: Graph, new: Graph, tolerance: float = 2e-6, **feeds) -> None:
    with Session(source) as a, Session(new) as b:
        x, y = a.run(feeds)["y"], b.run(feeds)["y"]
    assert x.shape == y.shape
    assert np.max(np.abs(x - y)) <= tolerance * np.max(np.abs(x))


def ops(g: Graph) -> Counter:
    return Counter(n.op_type for n in g.nodes())


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
    assert {d.why for d in g.declined} == {"attention: rows that see no key would change (asked for exact rows)"}
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


# ---- attention -------------------------------------------------------------------------------------------------------

B, N, S, H = 2, 4, 6, 8


def heads(g, x, perm=(0, 2, 1, 3)):
    return g.op("Transpose", g.op("Reshape", x, i64(0, 0, N, H)), perm=list(perm))


def merged(g, x):
    return g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), i64(0, 0, N * H))


def scores(g, names=("q", "k")):
    q, k = (g.value(n) for n in names)
    return g.op("MatMul", heads(g, q), heads(g, k, (0, 2, 3, 1)))


def attention_graph(**extra) -> Graph:
    return graph(q=["b", "s", N * H], k=["b", "s", N * H], v=["b", "s", N * H], **extra)


def attend(g, s, softmax_axis=-1):
    return merged(g, g.op("MatMul", g.op("Softmax", s, axis=softmax_axis), heads(g, g.value("v"))))


def qkv() -> dict:
    return {n: f32(RNG.standard_normal((B, S, N * H))) for n in "qkv"}


def only_attention(new: Graph) -> ir.Node:
    assert new.declined == []
    nodes = list(new.nodes("Attention"))
    assert len(nodes) == 1
    assert not set(ops(new)) & {"Softmax", "MatMul", "Reshape", "Transpose"}
    return nodes[0]


def test_scale_is_collected_from_everywhere():
    g = attention_graph()
    q = g.op("Mul", g.value("q"), f32(0.5))
    s = g.op("MatMul", heads(g, q), g.op("Div", heads(g, g.value("k"), (0, 2, 3, 1)), f32(2)))
    source, new = raised(g, attend(g, g.op("Mul", s, f32(0.7))), "b", "s", N * H)
    assert only_attention(new).attributes["scale"].value == pytest.approx(0.5 / 2 * 0.7)
    same(source, new, **qkv())


@pytest.mark.parametrize("spelling", ["where", "masked fill", "added", "multiplied", "one minus"])
@pytest.mark.parametrize("rows", [S, 1])
def test_masks_of_every_spelling_become_bool(spelling, rows):
    g = attention_graph(seen=["b", 1, "s" if rows > 1 else 1, "s", bool])
    s, seen = g.op("Mul", scores(g), f32(H**-0.5)), g.value("seen")
    cast = {"to": int(ir.DataType.FLOAT)}
    if spelling == "where":
        s = g.op("Where", seen, s, f32(-np.inf))
    elif spelling == "masked fill":
        s = g.op("Where", g.op("Not", seen), f32(-1e9), s)
    elif spelling == "added":
        s = g.op("Add", g.op("Where", seen, f32(0), f32(LOWEST)), s)
    elif spelling == "multiplied":
        s = g.op("Add", s, g.op("Mul", g.op("Cast", g.op("Not", seen), **cast), f32(-1e4)))
    else:
        s = g.op("Add", s, g.op("Mul", g.op("Sub", f32(1), g.op("Cast", seen, **cast)), f32(LOWEST)))
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    node = only_attention(new)
    assert ("Expand" in ops(new)) == (rows == 1)
    assert set(ops(new)) <= {"Attention", "Expand", "Shape", "Concat"}
    assert node.inputs[3] is new.value("seen") or rows == 1
    seen = RNG.random((B, 1, rows, S)) < 0.6
    seen[..., 0] = True
    same(source, new, **qkv(), seen=seen)


def test_position_bias_stays_a_float():
    g = attention_graph(bias=[1, N, "s", "s"])
    source, new = raised(g, attend(g, g.op("Add", scores(g), g.value("bias"))), "b", "s", N * H)
    assert only_attention(new).inputs[3] is new.value("bias")
    same(source, new, **qkv(), bias=f32(RNG.standard_normal((1, N, S, S))))


def test_bias_and_mask_are_one_float_mask():
    g = attention_graph(bias=[1, N, "s", "s"], seen=["b", 1, "s", "s", bool])
    s = g.op("Where", g.value("seen"), g.op("Add", scores(g), g.value("bias")), f32(-np.inf))
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    only_attention(new)
    seen = RNG.random((B, 1, S, S)) < 0.6
    seen[..., 0] = True
    same(source, new, **qkv(), bias=f32(RNG.standard_normal((1, N, S, S))), seen=seen)


def test_soft_cap():
    g = attention_graph()
    s = g.op("Mul", g.op("Tanh", g.op("Div", g.op("Mul", scores(g), f32(0.3)), f32(5))), f32(5))
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    node = only_attention(new)
    assert (node.attributes["softcap"].value, node.attributes["scale"].value) == (5, pytest.approx(0.3))
    same(source, new, **qkv())


def grouped_graph(order: str) -> tuple[Graph, ir.Value]:
    """Two KV heads copied to four, each next to its copy (`n r`) or all heads in a row (`r n`)."""
    kv = N // 2
    g = graph(q=["b", "s", N * H], k=["b", "s", kv * H], v=["b", "s", kv * H])

    def copies(x):
        y = g.op("Transpose", g.op("Reshape", x, i64(0, 0, kv, H)), perm=[0, 2, 1, 3])
        at, shape = (2, (1, 1, 2, 1, 1)) if order == "n r" else (1, (1, 2, 1, 1, 1))
        wide = g.op("Expand", g.op("Unsqueeze", y, i64(at)), i64(*shape))
        return g.op("Reshape", wide, i64(0, N, -1, H))

    k, v = copies(g.value("k")), copies(g.value("v"))
    s = g.op("MatMul", heads(g, g.value("q")), g.op("Transpose", k, perm=[0, 1, 3, 2]))
    return g, merged(g, g.op("MatMul", g.op("Softmax", s, axis=-1), v))


@pytest.mark.parametrize(("order", "kv_heads"), [("n r", 2), ("r n", 4)])
def test_grouped_heads_are_unexpanded_only_in_the_operators_order(order, kv_heads):
    g, out = grouped_graph(order)
    source, new = raised(g, out, "b", "s", N * H)
    node = next(new.nodes("Attention"))
    assert node.attributes["kv_num_heads"].value == kv_heads
    feeds = {n: f32(RNG.standard_normal((B, S, (N if n == "q" else N // 2) * H))) for n in "qkv"}
    same(source, new, **feeds)


def test_one_key_head_by_broadcasting():
    g = graph(q=["b", "s", N * H], k=["b", "s", H], v=["b", "s", H])
    k = g.op("Unsqueeze", g.value("k"), i64(1))
    v = g.op("Unsqueeze", g.value("v"), i64(1))
    s = g.op("MatMul", heads(g, g.value("q")), g.op("Transpose", k, perm=[0, 1, 3, 2]))
    source, new = raised(g, merged(g, g.op("MatMul", g.op("Softmax", s, axis=-1), v)), "b", "s", N * H)
    assert only_attention(new).attributes["kv_num_heads"].value == 1
    feeds = {n: f32(RNG.standard_normal((B, S, (N if n == "q" else 1) * H))) for n in "qkv"}
    same(source, new, **feeds)


def test_causal_flag_becomes_a_mask():
    g = graph(opset=23, q=["b", "s", N * H], k=["b", "s", N * H], v=["b", "s", N * H])
    q, k, v = (g.value(n) for n in "qkv")
    y = g.op("Attention", q, k, v, q_num_heads=N, kv_num_heads=N, is_causal=1)
    source, new = raised(g, y, "b", "s", N * H)
    node = only_attention(new)
    assert "is_causal" not in node.attributes
    assert node.attributes["scale"].value == pytest.approx(H**-0.5)
    same(source, new, **qkv())


def probabilities_read(g):
    p = g.op("Softmax", scores(g), axis=-1)
    context = merged(g, g.op("MatMul", p, heads(g, g.value("v"))))
    return g.op("Add", context, g.op("ReduceMean", p, i64(1, 2, 3), keepdims=0))


def scaled_after_bias(g):
    return attend(g, g.op("Mul", g.op("Add", scores(g), f32(RNG.standard_normal((1, N, 1, 1)))), f32(0.5)))


def computed_scale(g):
    return attend(g, g.op("Mul", scores(g), g.op("ReduceMean", g.value("q"))))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (probabilities_read, "the attention probabilities are read elsewhere"),
        (scaled_after_bias, "the scale is applied after a position bias"),
        (computed_scale, "the scores are scaled by something computed"),
        (lambda g: attend(g, scores(g), softmax_axis=2), "the softmax is not over the last axis"),
        (lambda g: g.op("Softmax", g.value("q"), axis=-1), "no product of queries and keys above the softmax"),
    ],
)
def test_reasons_for_declining(make, why):
    g = attention_graph()
    y = make(g)
    source, new = raised(g, y, "b", "s", N * H if make is not probabilities_read else None)
    assert [d.why for d in new.declined] == [f"attention: {why}"]
    assert "Attention" not in ops(new)
    if make is not probabilities_read:
        same(source, new, **qkv())
