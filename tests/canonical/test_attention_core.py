"""Cores of attention on hand-written graphs: heads folded into the batch, groups, biases, soft-caps, casts."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.blocks.mask_names import Mask, name_masks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from tests import tiny
from tests.canonical.test_attention import (
    B,
    H,
    N,
    S,
    attend,
    attention_graph,
    heads,
    merged,
    only_attention,
    qkv,
    scores,
)
from tests.hand import LOWEST, RNG, f32, graph, i64, ops, raised, same


def bias(*shape: int) -> np.ndarray:
    return f32(RNG.standard_normal(shape))


# ---- scale, bias, soft-cap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["Mul", "Div"])
def test_a_scale_after_the_bias_goes_into_both(operator):
    g = attention_graph(bias=[1, N, "s", "s"])
    s = g.op(operator, g.op("Add", g.op("Mul", scores(g), f32(0.7)), g.value("bias")), f32(3))
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    node = next(new.nodes("Attention"))
    assert new.declined == []
    assert node.attributes["scale"].value == pytest.approx(0.7 * 3 if operator == "Mul" else 0.7 / 3)
    same(source, new, **qkv(), bias=bias(1, N, S, S))


def test_a_scale_after_the_mask_leaves_the_mask_alone():
    g = attention_graph(seen=["b", 1, "s", "s", bool])
    s = g.op("Mul", g.op("Where", g.value("seen"), scores(g), f32(-1e9)), f32(0.25))
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    assert only_attention(new).inputs[3] is new.value("seen")
    seen = RNG.random((B, 1, S, S)) < 0.6
    seen[..., 0] = True
    same(source, new, **qkv(), seen=seen)


def test_a_negative_scale_of_masked_scores_is_declined():
    g = attention_graph(seen=["b", 1, "s", "s", bool])
    s = g.op("Mul", g.op("Where", g.value("seen"), scores(g), f32(-1e9)), f32(-0.25))
    _, new = raised(g, attend(g, s), "b", "s", N * H)
    assert [d.why for d in new.declined] == ["attention: the scale of masked scores is not positive"]


@pytest.mark.parametrize(
    "spelling", ["cap tanh(s/cap)", "tanh without a factor", "scaled twice", "factor over two products"]
)
def test_a_soft_cap_in_any_order(spelling):
    g = attention_graph()
    s = scores(g)
    if spelling == "cap tanh(s/cap)":
        y, cap, scale = g.op("Mul", g.op("Tanh", g.op("Div", s, f32(5))), f32(5)), 5, 1
    elif spelling == "tanh without a factor":
        y, cap, scale = g.op("Tanh", g.op("Mul", s, f32(0.3))), 1, 0.3
    elif spelling == "scaled twice":
        inner = g.op("Mul", g.op("Mul", s, f32(0.3)), f32(0.2))
        y, cap, scale = g.op("Mul", f32(5), g.op("Tanh", inner)), 5, 0.3
    else:
        y = g.op("Mul", g.op("Mul", g.op("Tanh", g.op("Div", s, f32(4))), f32(2)), f32(3))
        cap, scale = 6, 1.5
    source, new = raised(g, attend(g, y), "b", "s", N * H)
    node = only_attention(new)
    assert node.attributes["softcap"].value == pytest.approx(cap)
    assert node.attributes["scale"].value == pytest.approx(scale)
    same(source, new, **qkv())


def test_split_square_roots_are_one_scale():
    g = attention_graph()
    root = g.op("Sqrt", g.op("Div", f32(1), g.op("Sqrt", g.op("Cast", i64(H), to=int(ir.DataType.FLOAT)))))
    q = g.op("Mul", heads(g, g.value("q")), root)
    k = g.op("Mul", heads(g, g.value("k"), (0, 2, 3, 1)), root)
    source, new = raised(g, attend(g, g.op("MatMul", q, k)), "b", "s", N * H)
    assert only_attention(new).attributes["scale"].value == pytest.approx(H**-0.5)
    same(source, new, **qkv())


# ---- three and five axes ---------------------------------------------------------------------------------------------


def folded(g: Graph, x: ir.Value, order: str) -> ir.Value:
    """`[b * n, s, h]` of `[b, s, n * h]` (batch first) or of `[s, b, n * h]` (as torch.nn.MultiheadAttention does)."""
    if order == "batch first":
        return g.op("Reshape", heads(g, x), i64(-1, S, H))
    return g.op("Transpose", g.op("Reshape", x, i64(0, B * N, H)), perm=[1, 0, 2])


def attend_folded(g: Graph, order: str, change=lambda s: s) -> ir.Value:
    q, k, v = (folded(g, g.value(n), order) for n in "qkv")
    s = change(g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1])))
    y = g.op("MatMul", g.op("Softmax", s, axis=-1), v)
    if order == "batch first":
        return merged(g, g.op("Reshape", y, i64(-1, N, S, H)))
    return g.op("Reshape", g.op("Transpose", y, perm=[1, 0, 2]), i64(S, -1, N * H))


def test_heads_folded_into_the_batch():
    g = graph(**{n: ["b", S, N * H] for n in "qkv"})
    source, new = raised(g, attend_folded(g, "batch first"), "b", S, N * H)
    only_attention(new)
    same(source, new, **qkv())


def test_heads_folded_into_the_batch_with_the_sequence_first():
    g = graph(**{n: [S, B, N * H] for n in "qkv"})
    source, new = raised(g, attend_folded(g, "sequence first"), S, B, N * H)
    assert new.declined == []
    assert set(ops(new)) == {"Attention", "Transpose"}
    same(source, new, **{n: bias(S, B, N * H) for n in "qkv"})


@pytest.mark.parametrize("shape", [(1, S, S), (B * N, 1, S), (B * N, S, S)])
def test_a_bias_on_folded_heads_is_unfolded(shape):
    """baddbmm: `beta * alibi + alpha * q @ k`."""
    g = graph(**{n: [B, S, N * H] for n in "qkv"}, bias=list(shape))

    def change(s):
        return g.op("Add", g.op("Mul", g.value("bias"), f32(0.5)), g.op("Mul", s, f32(0.25)))

    source, new = raised(g, attend_folded(g, "batch first", change), B, S, N * H)
    node = next(new.nodes("Attention"))
    assert new.declined == []
    assert node.attributes["scale"].value == pytest.approx(0.25)
    same(source, new, **qkv(), bias=bias(*shape))


def test_folded_heads_that_cannot_be_told_from_the_batch_are_declined():
    g = graph(q=["m", "s", H], k=["m", "s", H], v=["m", "s", H])
    s = g.op("MatMul", g.value("q"), g.op("Transpose", g.value("k"), perm=[0, 2, 1]))
    y = g.op("MatMul", g.op("Softmax", s, axis=-1), g.value("v"))
    _, new = raised(g, y, "m", "s", H)
    assert [d.why for d in new.declined] == ["attention: batch and heads of the first axis cannot be separated"]


@pytest.mark.parametrize("masked", [False, True])
def test_groups_of_heads_as_an_axis_of_their_own(masked):
    """`[b, kv, group, s, h]` queries meet `[b, kv, 1, h, t]` keys."""
    kv, r = 2, N // 2
    g = graph(q=["b", S, N * H], k=["b", S, kv * H], v=["b", S, kv * H], seen=["b", 1, 1, S, S, bool])
    q = g.op("Transpose", g.op("Reshape", g.value("q"), i64(0, 0, kv, r, H)), perm=[0, 2, 3, 1, 4])
    k, v = (g.op("Reshape", g.value(n), i64(0, 0, kv, 1, H)) for n in "kv")
    s = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 3, 4, 1]))
    if masked:
        s = g.op("Where", g.value("seen"), s, f32(-np.inf))
    y = g.op("MatMul", g.op("Softmax", s, axis=-1), g.op("Transpose", v, perm=[0, 2, 3, 1, 4]))
    out = g.op("Reshape", g.op("Transpose", y, perm=[0, 3, 1, 2, 4]), i64(0, 0, N * H))
    source, new = raised(g, out, "b", S, N * H)
    node = next(new.nodes("Attention"))
    assert new.declined == []
    assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (N, kv)
    assert set(ops(new)) <= {"Attention", "Reshape"}
    feeds = {n: bias(B, S, (N if n == "q" else kv) * H) for n in "qkv"}
    seen = RNG.random((B, 1, 1, S, S)) < 0.6
    seen[..., 0] = True
    same(source, new, **feeds, seen=seen)


# ---- types -----------------------------------------------------------------------------------------------------------


def half_graph(back: bool) -> Graph:
    """fp16 products around a softmax in fp32; `back` casts the probabilities to fp16 again."""
    values = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["b", "s", N * H])) for n in "qkv"
    ]
    g = Graph(ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 23}, name="half"), ir_version=10))
    s = g.op("Mul", scores(g), np.array(H**-0.5, np.float16))
    p = g.op("Softmax", g.op("Cast", s, to=int(ir.DataType.FLOAT)), axis=-1)
    if back:
        v = heads(g, g.value("v"))
        y = merged(g, g.op("MatMul", g.op("Cast", p, to=int(ir.DataType.FLOAT16)), v))
        return tiny.finish(g, g.op("Cast", y, to=int(ir.DataType.FLOAT)), "y", ["b", "s", N * H])
    v = g.op("Cast", heads(g, g.value("v")), to=int(ir.DataType.FLOAT))
    return tiny.finish(g, merged(g, g.op("MatMul", p, v)), "y", ["b", "s", N * H])


def test_a_softmax_in_fp32_between_fp16_products_keeps_its_precision():
    g = half_graph(back=True)
    new = g.clone()
    canonicalize(new)
    node = next(new.nodes("Attention"))
    assert new.declined == []
    assert set(ops(new)) == {"Attention", "Cast"}
    assert node.attributes["softmax_precision"].value == int(ir.DataType.FLOAT)
    same(g, new, 2e-3, **{n: x.astype(np.float16) for n, x in qkv().items()})


def test_values_in_another_type_than_the_queries_are_declined():
    g = half_graph(back=False)
    canonicalize(g)
    assert [d.why for d in g.declined] == ["attention: the scores are cast to another type and not back"]


@pytest.mark.parametrize("spelling", ["added", "subtracted"])
def test_scores_times_a_table_of_0_and_1_with_a_fill_where_it_is_0(spelling):
    """`w * b - 1e4 * (1 - b)`, b a slice of a triangular table of numbers, as in the first GPT."""
    source, new = _tabled(spelling)
    assert (ops(new)["Attention"], ops(new)["Softmax"], new.declined) == (1, 0, [])
    same(source, new, **{n: f32(RNG.standard_normal((2, 4, 5, 8))) for n in "qkv"})


def test_scores_times_a_table_that_no_mask_repeats_are_declined():
    _, new = _tabled("other")
    assert ops(new)["Attention"] == 0
    assert "scaled by a computed value" in new.declined[0].why


def _tabled(spelling):
    g = graph(q=("b", 4, "s", 8), k=("b", 4, "s", 8), v=("b", 4, "s", 8))
    q, k, v = g.inputs
    w = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), f32(8**-0.5))
    size = g.op("Shape", q, start=2, end=3)
    table = np.tril(np.ones((1, 1, 9, 9), np.float32))
    ends = g.op("Concat", size, size, axis=0)
    b = g.op("Slice", table, i64(0, 0), ends, i64(2, 3))
    other = g.op("Slice", np.triu(table), i64(0, 0), ends, i64(2, 3))
    fill = f32(-1e4 if spelling != "subtracted" else 1e4)
    hidden = g.op("Mul", fill, g.op("Sub", f32(1), other if spelling == "other" else b))
    w = g.op("Sub" if spelling == "subtracted" else "Add", g.op("Mul", w, b), hidden)
    return raised(g, g.op("MatMul", g.op("Softmax", w, axis=-1), v), "b", 4, "s", 8)


def test_a_computed_bias_that_is_subtracted_is_a_bias():
    """`scores - 1e6 * (1 - mask)` with a mask of numbers that nothing proves to be 0 or 1 (Funnel)."""
    g = graph(q=("b", 4, "s", 8), k=("b", 4, "s", 8), v=("b", 4, "s", 8), m=("b", 1, 1, "s"))
    q, k, v, m = g.inputs
    w = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), f32(0.5))
    w = g.op("Sub", w, g.op("Mul", f32(1e6), g.op("Sub", f32(1), m)))
    source, new = raised(g, g.op("MatMul", g.op("Softmax", w, axis=-1), v), "b", 4, "s", 8)
    assert (ops(new)["Attention"], ops(new)["Softmax"], new.declined) == (1, 0, [])
    mask = f32(np.arange(5) < [[3], [5]])[:, None, None, :]
    same(source, new, **{n: f32(RNG.standard_normal((2, 4, 5, 8))) for n in "qkv"}, m=mask)


# ---- masks that are computed from the layer's input, or expanded to the scores ---------------------------------------


def test_a_gated_bias_of_folded_heads_at_a_length_that_no_input_has():
    """WavLM: `gate(x) * bias` is made with an axis of heads, which is then merged into the batch."""
    g = graph(x=["b", "s", N * H])
    x = g.op("Slice", g.value("x"), i64(0), i64(-1), i64(1))
    batch, length = (g.op("Shape", x, start=i, end=i + 1) for i in (0, 1))
    rows = g.op("Mul", batch, i64(N))
    q, k, v = (g.op("Mul", x, bias(N * H)) for _ in range(3))

    def fold(y):
        columns = g.op("Transpose", y, perm=[1, 0, 2])
        split = g.op("Reshape", columns, g.op("Concat", length, rows, i64(H), axis=0))
        return g.op("Transpose", split, perm=[1, 0, 2])

    gate = g.op("Sigmoid", g.op("ReduceSum", heads(g, x), i64(-1), keepdims=1))
    position = g.op("Range", np.array(0), g.op("Squeeze", length, i64(0)), np.array(1))
    distance = g.op("Sub", g.op("Unsqueeze", position, i64(0)), g.op("Unsqueeze", position, i64(1)))
    slopes = g.op("Mul", g.op("Cast", distance, to=int(ir.DataType.FLOAT)), bias(1, N, 1, 1))
    tiled = g.op("Tile", slopes, g.op("Concat", batch, i64(1, 1, 1), axis=0))
    parts = [g.op("Reshape", gate, g.op("Concat", rows, i64(-1, 1), axis=0))]
    parts += [g.op("Reshape", tiled, g.op("Concat", rows, length, length, axis=0))]
    s = g.op("Add", g.op("MatMul", fold(q), g.op("Transpose", fold(k), perm=[0, 2, 1])), g.op("Mul", *parts))
    y = g.op("Transpose", g.op("MatMul", g.op("Softmax", s, axis=-1), fold(v)), perm=[1, 0, 2])
    joined = g.op("Reshape", y, g.op("Concat", length, batch, i64(N * H), axis=0))
    source, new = raised(g, g.op("Transpose", joined, perm=[1, 0, 2]), "b", None, N * H)
    assert new.declined == []
    assert (ops(new)["Attention"], ops(new)["Softmax"]) == (1, 0)
    same(source, new, x=bias(B, S + 1, N * H))


def test_a_mask_expanded_to_the_shape_of_the_scores():
    """XLM: what makes the mask reads the last `s` of `s` tokens and the shape of the scores."""
    g = attention_graph(seen=["b", "s", int])
    length = g.op("Squeeze", g.op("Shape", g.value("seen"), start=1, end=2), i64(0))
    last = g.op("Slice", g.value("seen"), g.op("Unsqueeze", g.op("Neg", length), i64(0)), i64(1 << 62), i64(1))
    s = scores(g)
    hidden = g.op("Unsqueeze", g.op("Equal", last, np.array(0)), i64(1, 2))
    s = g.op("Where", g.op("Expand", hidden, g.op("Shape", s)), f32(-1e9), s)
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    assert new.declined == []
    assert not set(ops(new)) & {"Softmax", "Slice", "Neg"}
    seen = (RNG.random((B, S)) < 0.6).astype(np.int64)
    seen[:, 0] = 1
    same(source, new, **qkv(), seen=seen)


def test_a_bias_that_is_the_end_of_a_table():
    """MPT: the last `t` of 40 entries, counted from the shape of the keys; with a causal mask it is a decoder."""
    g = attention_graph()
    k = heads(g, g.value("k"))
    length = g.op("Squeeze", g.op("Shape", k, start=2, end=3), i64(0))
    start = g.op("Unsqueeze", g.op("Sub", np.array(40), length), i64(0))
    slopes = np.arange(-39, 1).reshape(1, 1, 40) * 2.0 ** -np.arange(1, N + 1).reshape(N, 1, 1)
    s = g.op("Add", scores(g), g.op("Slice", f32(slopes), start, i64(1 << 62), i64(2)))
    position = g.op("Range", np.array(0), length, np.array(1))
    later = g.op("Less", g.op("Unsqueeze", position, i64(1)), g.op("Unsqueeze", position, i64(0)))
    source, new = raised(g, attend(g, g.op("Where", later, f32(LOWEST), s)), "b", "s", N * H)
    (node,) = new.nodes("Attention")
    assert new.declined == []
    assert name_masks(new, [node.inputs[3]])[node.inputs[3]] == Mask("causal", "alibi")
    same(source, new, **qkv())


def test_blocks_of_a_sequence_that_is_padded_to_whole_ones():
    """LongT5: tokens are padded to blocks of four, by an amount that no analysis knows, and attend inside of these."""
    g = attention_graph(seen=["b", "s", bool])
    length = g.op("Shape", g.value("seen"), start=1, end=2)
    missing = g.op("Mod", g.op("Neg", length), i64(4))

    def blocks(x, width, *tail):
        pads = g.op("Concat", i64(0, 0), i64(*[0] * (width - 1)), missing, i64(*[0] * (width - 2)), axis=0)
        padded = g.op("Pad", x, pads, np.array(False) if width == 2 else f32(0))
        batch, total = (g.op("Shape", padded, start=i, end=i + 1) for i in (0, 1))
        return g.op("Reshape", padded, g.op("Concat", batch, g.op("Div", total, i64(4)), i64(4, *tail), axis=0))

    q, k, v = (blocks(g.op("Reshape", g.value(n), i64(0, 0, N, H)), 4, N, H) for n in "qkv")
    s = g.op("Einsum", q, k, equation="...qhd,...khd->...hqk")
    seen = g.op("Unsqueeze", blocks(g.value("seen"), 2), i64(2, 3))
    s = g.op("Add", s, g.op("Add", bias(1, 1, N, 4, 4), g.op("Where", seen, f32(0), f32(-1e10))))
    y = g.op("Einsum", g.op("Softmax", s, axis=-1), v, equation="...hqk,...khd->...qhd")
    whole = g.op("Reshape", y, g.op("Concat", g.op("Shape", y, start=0, end=1), i64(-1, N * H), axis=0))
    source, new = raised(g, g.op("Slice", whole, i64(0), length, i64(1)), "b", "s", N * H)
    assert new.declined == []
    assert (ops(new)["Attention"], ops(new)["Softmax"], ops(new)["Einsum"]) == (1, 0, 0)
    rows = RNG.random((B, S)) < 0.7
    rows[:, ::4] = True
    same(source, new, **qkv(), seen=rows)
