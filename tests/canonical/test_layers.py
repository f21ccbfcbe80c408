"""Layers whose attention and feed-forward part read one stream side by side, and norms that share their statistics."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.blocks.branches import layer_branches
from onnxcomp.graph import Graph
from tests.hand import RNG, f32, graph, i64, ops, raised, same, weight

B, S, C, N = 2, 5, 16, 4


def norm(g: Graph, x: ir.Value) -> ir.Value:
    gain, bias = f32(1 + 0.1 * RNG.standard_normal(C)), f32(0.1 * RNG.standard_normal(C))
    return g.op("LayerNormalization", x, gain, bias, axis=-1)


def attention(g: Graph, x: ir.Value) -> ir.Value:
    q, k, v = (
        g.op("Transpose", g.op("Reshape", g.op("MatMul", x, weight(C, C)), i64(0, 0, N, C // N)), perm=[0, 2, 1, 3])
        for _ in range(3)
    )
    p = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = g.op("Reshape", g.op("Transpose", g.op("MatMul", p, v), perm=[0, 2, 1, 3]), i64(0, 0, C))
    return g.op("MatMul", y, weight(C, C))


def mlp(g: Graph, x: ir.Value, squared: bool = False) -> ir.Value:
    y = g.op("Relu", g.op("MatMul", x, weight(C, 24)))
    return g.op("MatMul", g.op("Pow", y, f32(2)) if squared else y, weight(24, C))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("first", ["mlp", "attention"])
def test_parallel_parts_are_one_layer_whichever_is_written_first(first, shared):
    g = graph(x=["b", "s", C])
    x = g.value("x")
    for _ in range(3):
        one = norm(g, x)
        two = one if shared else norm(g, x)
        if first == "mlp":
            b = mlp(g, one)
            a = attention(g, two)
        else:
            a = attention(g, two)
            b = mlp(g, one)
        x = g.op("Add", x, g.op("Add", a, b))
    source, new = raised(g, norm(g, x), "b", "s", C)
    found = blocks.layers(new)
    assert [(len(x.attentions), x.mlp is not None, len(x.norms)) for x in found] == [(1, True, 1 if shared else 2)] * 3
    assert {x.position for x in found} == {"pre"}
    same(source, new, x=f32(RNG.standard_normal((B, S, C))))


def test_sandwiched_parts_and_sequential_ones_keep_their_order():
    g = graph(x=["b", "s", C])
    x = g.value("x")
    for _ in range(2):
        x = g.op("Add", x, norm(g, attention(g, norm(g, x))))
        x = g.op("Add", x, norm(g, mlp(g, norm(g, x), squared=True)))
    source, new = raised(g, norm(g, x), "b", "s", C)
    found = blocks.layers(new)
    assert [(len(x.attentions), x.mlp.activation, len(x.norms)) for x in found] == [(1, "relu2", 4)] * 2
    assert {x.position for x in found} == {"pre and post"}
    same(source, new, x=f32(RNG.standard_normal((B, S, C))))


def test_a_stage_whose_shortcut_is_a_projection_is_a_layer_that_cannot_be_left_out():
    """Hiera: the first layer of a stage projects its normalized input and adds the attention to that."""
    g = graph(x=["b", "s", C])
    x = g.value("x")
    for stage in range(2):
        normed = norm(g, x)
        shortcut = g.op("Add", g.op("MatMul", normed, weight(C, C)), f32(RNG.standard_normal(C))) if stage else x
        x = g.op("Add", shortcut, attention(g, normed))
        x = g.op("Add", x, mlp(g, norm(g, x)))
    _, new = raised(g, x, "b", "s", C)
    assert [(len(x.attentions), len(x.mlps), x.position) for x in blocks.layers(new)] == [(1, 1, "pre")] * 2
    assert [b.why for b in layer_branches(new)] == ["", "the residual stream is projected to another width beside it"]


@pytest.mark.parametrize("centred", [True, False])
def test_norms_of_one_value_that_share_their_statistics(centred):
    """Optimizers compute the mean and the deviation once where two norms read the same value."""
    g = graph(x=["b", "s", C])
    x = g.value("x")
    c = g.op("Sub", x, g.op("ReduceMean", x, i64(-1))) if centred else x
    root = g.op("Sqrt", g.op("Add", g.op("ReduceMean", g.op("Mul", c, c), i64(-1)), f32(1e-5)))
    y = g.op("Div", c, root)
    ends = []
    for _ in range(2):
        end = g.op("Mul", y, f32(1 + RNG.standard_normal(C)))
        ends.append(g.op("Add", end, f32(RNG.standard_normal(C))) if centred else end)
    source, new = raised(g, g.op("Sub", g.op("Tanh", ends[0]), ends[1]), "b", "s", C)
    assert ops(new)["LayerNormalization" if centred else "RMSNormalization"] == 2
    assert len(blocks.norms(new)) == 2
    assert "Sqrt" not in ops(new)
    same(source, new, x=f32(np.abs(RNG.standard_normal((B, S, C)))))
