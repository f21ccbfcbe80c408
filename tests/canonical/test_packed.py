"""Packed linears on hand-written graphs: however q, k, v (or gate and up) lie in one weight, each gets a linear."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from tests.hand import RNG, f32, graph, i64, ops, raised, same, weight

B, S, C, N, H = 2, 5, 16, 4, 4


def linear(g: Graph, x: ir.Value, width: int, bias: bool = True) -> ir.Value:
    y = g.op("MatMul", x, weight(C, width))
    return g.op("Add", y, f32(RNG.standard_normal(width))) if bias else y


def picked(g: Graph, y: ir.Value, axis: int, index: int, form: str) -> ir.Value:
    """One entry of an axis, the axis dropped."""
    if form == "gather":
        return g.op("Gather", y, np.array(index, np.int64), axis=axis)
    if form == "slice":
        return g.op("Squeeze", g.op("Slice", y, i64(index), i64(index + 1), i64(axis)), i64(axis))
    return g.op("Squeeze", g.op("Gather", y, i64(index - 3), axis=axis), i64(axis))


def attended(g: Graph, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
    """Attention of `[b, n, s, h]` values with an output projection."""
    s = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    y = g.op("MatMul", g.op("Softmax", s, axis=-1), v)
    return linear(g, g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), i64(0, 0, -1)), C)


def turned(g: Graph, x: ir.Value) -> ir.Value:
    return g.op("Transpose", x, perm=[0, 2, 1, 3])


def check(source: Graph, new: Graph, widths: tuple[int, int, int]) -> None:
    found = blocks.attentions(new)
    assert len(found) == 1
    assert tuple(x.sizes[1] for x in (found[0].q, found[0].k, found[0].v)) == widths
    assert len({x.weight for x in found[0].linears}) == 4
    assert set(ops(new)) == {"MatMul", "Add", "Attention"}
    same(source, new, x=f32(RNG.standard_normal((B, S, C))))


@pytest.mark.parametrize("form", ["gather", "slice", "gather a list"])
@pytest.mark.parametrize("order", ["3 n h", "n 3 h", "n h 3"])
def test_three_values_of_one_weight_in_any_order(order, form):
    g = graph(x=["b", "s", C])
    sizes = {"3": 3, "n": N, "h": H}
    y = g.op("Reshape", linear(g, g.value("x"), 3 * N * H), i64(0, 0, *(sizes[a] for a in order.split())))
    axis = 2 + order.split().index("3")
    parts = (turned(g, picked(g, y, axis, i, form)) for i in range(3))
    source, new = raised(g, attended(g, *parts), "b", "s", C)
    check(source, new, (C, C, C))


@pytest.mark.parametrize("split", [True, False])
def test_per_head_interleaved_parts_cut_after_turning(split):
    """`[b, s, n, 3 h]` turned to `[b, n, s, 3 h]` and cut along the width."""
    g = graph(x=["b", "s", C])
    y = turned(g, g.op("Reshape", linear(g, g.value("x"), 3 * N * H), i64(0, 0, N, 3 * H)))
    if split:
        parts = g.op("Split", y, i64(H, H, H), axis=-1, outputs=3).producer().outputs
    else:
        parts = [g.op("Slice", y, i64(i * H), i64((i + 1) * H), i64(3)) for i in range(3)]
    source, new = raised(g, attended(g, *parts), "b", "s", C)
    check(source, new, (C, C, C))


def test_queries_of_a_group_with_their_key_and_value():
    """`[b, s, kv, n / kv + 2, h]`: some queries, one key, one value per group."""
    g, kv = graph(x=["b", "s", C]), 2
    r = N // kv
    y = g.op("Reshape", linear(g, g.value("x"), kv * (r + 2) * H, bias=False), i64(0, 0, kv, r + 2, H))
    q = turned(g, g.op("Reshape", g.op("Slice", y, i64(0), i64(-2), i64(3)), i64(0, 0, N, H)))

    def copies(index):
        wide = g.op("Expand", g.op("Gather", y, i64(index), axis=3), i64(1, 1, 1, r, 1))
        return turned(g, g.op("Reshape", wide, i64(0, 0, N, H)))

    source, new = raised(g, attended(g, q, copies(-2), copies(-1)), "b", "s", C)
    check(source, new, (C, kv * H, kv * H))
    assert blocks.attentions(new)[0].kv_heads == kv


@pytest.mark.parametrize("form", ["split", "slice", "rows"])
def test_gate_and_up_of_one_weight(form):
    g = graph(x=["b", "s", C])
    y = linear(g, g.value("x"), 48)
    if form == "split":
        gate, up = g.op("Split", y, i64(24, 24), axis=-1, outputs=2).producer().outputs
    elif form == "slice":
        gate, up = (g.op("Slice", y, i64(i * 24), i64((i + 1) * 24), i64(-1)) for i in (0, 1))
    else:
        rows = g.op("Reshape", y, i64(0, 0, 2, 24))
        gate, up = (g.op("Gather", rows, np.array(i, np.int64), axis=2) for i in (0, 1))
    act = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    source, new = raised(g, g.op("MatMul", act, weight(24, C)), "b", "s", C)
    found = blocks.mlps(new)
    assert [(m.activation, m.gate is not None, m.width) for m in found] == [("silu", True, 24)]
    assert found[0].up.weight is not found[0].gate.weight
    same(source, new, x=f32(RNG.standard_normal((B, S, C))))


def test_the_halves_of_a_head_are_no_packing():
    """A rotation that is not recognised leaves its linear whole."""
    g = graph(x=["b", "s", C])
    y = g.op("Reshape", linear(g, g.value("x"), C), i64(0, 0, N, H))
    one, two = (g.op("Slice", y, i64(i), i64(i + 2), i64(3)) for i in (0, 2))
    out = g.op("Concat", g.op("Mul", one, f32(2)), g.op("Tanh", two), axis=-1)
    source, new = raised(g, out, "b", "s", N, H)
    assert [x.sizes for x in blocks.linears(new)] == [(C, C)]
    same(source, new, x=f32(RNG.standard_normal((B, S, C))))


def test_parts_that_share_columns_stay_packed():
    g = graph(x=["b", "s", C])
    y = linear(g, g.value("x"), 24)
    one, two = (g.op("Slice", y, i64(i), i64(i + C), i64(-1)) for i in (0, 4))
    source, new = raised(g, g.op("Mul", g.op("Tanh", one), two), "b", "s", C)
    assert [x.sizes for x in blocks.linears(new)] == [(C, 24)]
    same(source, new, x=f32(RNG.standard_normal((B, S, C))))


def test_a_packed_weight_is_not_read():
    """Splitting makes views; the bytes are touched when the model is written or run."""
    reads = []

    def load() -> ir.Tensor:
        reads.append(1)
        return ir.tensor(weight(C, 3 * C))

    g = graph(x=["b", "s", C])
    lazy = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape([C, 3 * C]))
    y = g.op("Reshape", g.op("MatMul", g.value("x"), g.constant(lazy, "w")), i64(0, 0, N, 3 * H))
    parts = g.op("Split", turned(g, y), i64(H, H, H), axis=-1, outputs=3).producer().outputs
    out = attended(g, *parts)
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "s", C])
    g.model.graph.outputs.append(out)
    g.sort()
    g = Graph(g.model)
    canonicalize(g)
    assert len(blocks.attentions(g)) == 1
    assert reads == []
