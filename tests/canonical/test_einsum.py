"""Einsum and GroupNormalization are spelled in operators that everything knows, with equal outputs."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny

SIZES = dict(zip("bhijdnqk", (2, 3, 5, 4, 6, 3, 5, 4), strict=True))


def graph(**shapes: list) -> Graph:
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in shapes.items()
    ]
    return Graph(ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="g"), ir_version=10))


def run(g: Graph, feeds: dict) -> np.ndarray:
    with Session(g) as s:
        return next(iter(s.run(feeds).values()))


@pytest.mark.parametrize(
    ("equation", "spelled"),
    [
        ("b h i d, b h j d -> b h i j", True),
        ("bhij,bhjd->bhid", True),
        ("bqnh,bknh->bnqk", True),
        ("bnqk,bknh->bqnh", True),
        ("bid,dj->bij", True),
        ("bid,jd->bji", True),
        ("id,d->i", False),
        ("bid,bjd->ij", False),
        ("bid,bid->bd", False),
        ("b...d,bjd->b...j", False),
    ],
)
def test_products_are_matmuls_and_others_stay(equation, spelled):
    parts = equation.replace(" ", "").partition("->")[0].split(",")
    shapes = [[SIZES[x] for x in p.replace("...", "hi")] for p in parts]
    g = graph(
        a=["batch" if p.startswith("b") else s for p, s in [(parts[0], shapes[0][0])]] + shapes[0][1:], b=shapes[1]
    )
    out = g.op("Einsum", *g.inputs, equation=equation)
    rank = len(equation.replace(" ", "").partition("->")[2].replace("...", "hi"))
    g = tiny.finish(g, out, "y", [f"d{i}" for i in range(rank)])
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip("ab", shapes, strict=True)}
    canonicalize(g)
    assert [n.op_type for n in g.nodes("Einsum")] == ([] if spelled else ["Einsum"])
    want = np.einsum(equation, *(feeds[n].astype(np.float64) for n in "ab"))
    np.testing.assert_allclose(run(g, feeds), want, rtol=1e-5, atol=1e-5)
    again = g.clone()
    canonicalize(again)
    assert again.edits == 0


@pytest.mark.parametrize("heads_last", [False, True])
def test_attention_written_with_einsum_is_raised(heads_last):
    rng = np.random.default_rng(0)
    g = graph(x=["batch", "sequence", 8])
    x = g.inputs[0]

    def weight() -> ir.Value:
        return g.constant((rng.standard_normal((8, 8)) / 3).astype(np.float32))

    q, k, v = (g.op("Reshape", g.op("MatMul", x, weight()), np.array([0, 0, 2, 4], np.int64)) for _ in range(3))
    if heads_last:
        scores = g.op("Einsum", q, k, equation="bqnh,bknh->bnqk")
    else:
        q, k, v = (g.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))
        scores = g.op("Einsum", q, k, equation="b h i d, b h j d -> b h i j")
    p = g.op("Softmax", g.op("Mul", scores, np.array(0.5, np.float32)), axis=-1)
    if heads_last:
        y = g.op("Einsum", p, v, equation="bnqk,bknh->bqnh")
    else:
        y = g.op("Transpose", g.op("Einsum", p, v, equation="b h i j, b h j d -> b h i d"), perm=[0, 2, 1, 3])
    flat = g.op("Reshape", y, np.array([0, 0, 8], np.int64))
    g = tiny.finish(g, g.op("MatMul", flat, weight()), "y", ["batch", "sequence", 8])
    feeds = {"x": rng.standard_normal((2, 5, 8)).astype(np.float32)}
    want = run(g, feeds)
    canonicalize(g)
    assert g.declined == []
    assert [(a.heads, a.head_dim) for a in blocks.attentions(g)] == [(2, 4)]
    assert not list(g.nodes("Transpose", "Einsum"))
    np.testing.assert_allclose(run(g, feeds), want, atol=2e-6)


@pytest.mark.parametrize(("groups", "rank"), [(6, 3), (3, 3), (6, 4), (2, 4), (1, 3)])
def test_group_norm_is_an_instance_norm_with_gain_and_bias(groups, rank):
    rng = np.random.default_rng(0)
    g = graph(x=["batch", 6, 10, 4][:rank])
    g.model.graph.opset_imports[""] = 21
    gain, bias = (rng.standard_normal(6).astype(np.float32) for _ in range(2))
    y = g.op("GroupNormalization", g.inputs[0], gain, bias, num_groups=groups, epsilon=1e-3)
    g = tiny.finish(g, y, "y", ["batch", 6, 10, 4][:rank])
    x = rng.standard_normal((2, 6, 10, 4)[:rank]).astype(np.float32)
    canonicalize(g)
    assert [n.op_type for n in g.nodes("InstanceNormalization", "GroupNormalization")] == ["InstanceNormalization"]
    wide = x.astype(np.float64).reshape(2, groups, -1)
    normed = (wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + 1e-3)
    shape = (6, *[1] * (rank - 2))
    want = normed.reshape(x.shape) * gain.reshape(shape) + bias.reshape(shape)
    np.testing.assert_allclose(run(g, {"x": x}), want, atol=1e-5)
