"""Attention on hand-written graphs: masks, scales and heads of every spelling, and the reasons for declining."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny
from tests.hand import LOWEST, RNG, f32, graph, i64, ops, raised, same

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


def bias_inside_cap(g):
    return attend(g, g.op("Mul", g.op("Tanh", g.op("Add", scores(g), f32(RNG.standard_normal((1, N, 1, 1))))), f32(5)))


def computed_scale(g):
    return attend(g, g.op("Mul", scores(g), g.op("ReduceMean", g.value("q"))))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (probabilities_read, "the attention probabilities have other users"),
        (bias_inside_cap, "a mask is added inside the soft-cap"),
        (lambda g: attend(g, scores(g), softmax_axis=2), "the softmax is not over the last axis"),
        (lambda g: g.op("Softmax", g.value("q"), axis=-1), "no product of queries and keys leads to the softmax"),
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


def test_a_computed_factor_of_the_scores_multiplies_the_queries():
    g = attention_graph()
    source, new = raised(g, computed_scale(g), "b", "s", N * H)
    assert new.declined == []
    assert len([*new.nodes("Attention")]) == 1
    same(source, new, **qkv())


def scores_read(g):
    q, k, v, past = (g.value(n) for n in ("q", "k", "v", "past"))
    y = g.op("Attention", q, k, v, None, past, past, q_num_heads=N, kv_num_heads=N, outputs=4)
    return g.op("Add", y, g.op("ReduceMean", y.producer().outputs[3], keepdims=0))


@pytest.mark.parametrize(
    ("make", "keys", "why"),
    [
        (scores_read, "s", "its scores are read or are a model output"),
    ],
)
def test_operators_that_stay_as_they_are(make, keys, why):
    width = N * H
    g = graph(opset=23, q=["b", "s", width], k=["b", keys, width], v=["b", keys, width], past=["b", N, "p", H])
    _, new = raised(g, make(g), "b", "s", width)
    assert [d.why for d in new.declined] == [f"attention: {why}"]


def guarded_graph(fill: float, opset: int) -> Graph:
    """A mask whose empty rows are set to zero behind the product, as transformers' exporter does."""
    g = attention_graph(seen=["b", 1, "s", "s", bool])
    seen, cast = g.value("seen"), {"to": int(ir.DataType.FLOAT)}
    mask = g.op("Mul", g.op("Cast", g.op("Not", seen), **cast), f32(fill))
    empty = g.op("Less", g.op("ReduceSum", g.op("Cast", seen, **cast), i64(-1), keepdims=1), f32(1))
    q, k, v = (heads(g, g.value(n)) for n in "qkv")
    if opset == 23:
        g.model.opset_imports[""] = 23
        context = g.op("Attention", q, k, v, mask, scale=1.0)
    else:
        s = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), mask)
        context = g.op("MatMul", g.op("Softmax", s, axis=-1), v)
    out = merged(g, g.op("Where", empty, f32(0), context))
    return tiny.finish(g, out, "y", ["b", "s", N * H])


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("exact_rows", [True, False])
def test_a_guard_that_repeats_the_mask_goes_and_rows_stay_exact(opset, exact_rows):
    source = guarded_graph(LOWEST, opset)
    new = source.clone()
    canonicalize(new, exact_rows=exact_rows)
    only_attention(new)
    assert "Where" not in ops(new)
    seen = RNG.random((B, 1, S, S)) < 0.5
    seen[0, 0, 2] = False
    same(source, new, **qkv(), seen=seen)
    with Session(new) as s:
        assert not s.run({**qkv(), "seen": seen})["y"][0, 2].any()
