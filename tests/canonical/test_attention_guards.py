"""Guards that an optimizer moved behind the Transpose of the heads are found again."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand import RNG, f32, graph, i64, ops, raised, same


def guarded(order, shape=("b", "s", 4, 8)):
    """Attention whose rows without a key are set to 0 after its heads were turned and, through two axes, regrouped."""
    g = graph(q=("b", 4, "s", 8), k=("b", 4, "s", 8), v=("b", 4, "s", 8), m=("b", 1, "s", "s", bool))
    q, k, v, m = g.inputs
    scores = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), f32(8**-0.5))
    p = g.op("Softmax", g.op("Where", m, scores, f32(-np.inf)), axis=-1)
    p = g.op("Where", g.op("IsNaN", p), f32(0), p)
    y = g.op("Transpose", g.op("MatMul", p, v), perm=[0, 2, 1, 3])
    y = g.op("Reshape", g.op("Reshape", y, i64(0, 0, 32)), i64(0, 0, 4, 8))
    none = g.op("Less", g.op("ReduceSum", g.op("Cast", m, to=1), i64(3), keepdims=1), f32(1))
    rows = g.op("Transpose", none, perm=order)
    return raised(g, g.op("Where", rows, f32(0), y), *shape)


def test_a_guard_behind_a_turn_and_two_reshapes():
    source, new = guarded([0, 2, 1, 3])
    assert ops(new)["Attention"] == 1
    assert ops(new)["Where"] == ops(new)["ReduceSum"] == 0
    mask = RNG.random((2, 1, 5, 5)) > 0.6
    mask[0, 0, 2] = False
    same(source, new, **{n: f32(RNG.standard_normal((2, 4, 5, 8))) for n in "qkv"}, m=mask)


@pytest.mark.parametrize("order", [[0, 1, 2, 3]])
def test_a_guard_over_other_axes_stays(order):
    g = graph(q=(3, 3, 3, 8), k=(3, 3, 3, 8), v=(3, 3, 3, 8), c=(3, 1, 3, 1, bool))
    q, k, v, c = g.inputs
    y = g.op("MatMul", g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1), v)
    turned = g.op("Transpose", y, perm=[0, 2, 1, 3])
    out = g.op("Where", g.op("Transpose", c, perm=order), f32(0), turned)
    source, new = raised(g, out, 3, 3, 3, 8)
    assert ops(new)["Where"] == 1
    feeds = {n: f32(RNG.standard_normal((3, 3, 3, 8))) for n in "qkv"}
    same(source, new, **feeds, c=RNG.random((3, 1, 3, 1)) > 0.5)


@pytest.mark.parametrize("past", [False, True])
def test_a_scale_before_a_fused_attention_belongs_to_it(past):
    cache = {"past": ("b", 4, "p", 8)} if past else {}
    g = graph(opset=23, q=("b", "s", 32), k=("b", "s", 32), v=("b", "s", 32), **cache)
    q, k, v, *rest = g.inputs
    parts = [g.op("Mul", q, f32(0.25)), g.op("Mul", f32(3), k), v]
    y = g.op(
        "Attention", *parts, None, *rest, *rest, q_num_heads=4, kv_num_heads=4, scale=0.5, outputs=3 if past else 1
    )
    source, new = raised(g, y, "b", "s", 32)
    assert ops(new)["Mul"] == (1 if past else 0)
    if not past:  # the runtime's kernel wants the present keys read where past ones are given
        same(source, new, **{n: f32(RNG.standard_normal((2, 5, 32))) for n in "qkv"})


@pytest.mark.parametrize("wide", [ir.DataType.FLOAT, ir.DataType.DOUBLE])
def test_rows_counted_in_a_wider_type_guard_as_well(wide):
    """Exporters compare a half-precision bias with its fill in float32; widening changes no number."""
    g = graph(q=("b", 4, "s", 8), k=("b", 4, "s", 8), v=("b", 4, "s", 8), m=("b", 1, "s", "s", bool))
    q, k, v, m = g.inputs
    low = np.array(-65504, np.float16)
    bias = g.op("Where", m, np.zeros((1, 1, 1, 1), np.float16), low)
    scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), g.op("Cast", bias, to=1))
    y = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
    seen = g.op("Greater", g.op("Cast", bias, to=wide.value), low.astype(wide.numpy()))
    none = g.op("Less", g.op("ReduceSum", g.op("Cast", seen, to=1), i64(3), keepdims=1), f32(1))
    source, new = raised(g, g.op("Where", none, f32(0), y), "b", 4, "s", 8)
    assert (ops(new)["Attention"], ops(new)["Where"], ops(new)["ReduceSum"]) == (1, 0, 0)
    mask = RNG.random((2, 1, 5, 5)) > 0.6
    mask[0, 0, 2] = False
    same(source, new, **{n: f32(RNG.standard_normal((2, 4, 5, 8))) for n in "qkv"}, m=mask)
