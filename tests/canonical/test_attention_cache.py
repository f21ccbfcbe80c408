"""Key-value caches on hand-written graphs: past and present become inputs and outputs of the standard operator."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests.hand import RNG, f32, graph, i64, ops, weight

N, H, C = 4, 4, 16
SHAPES = ((2, 5, 0), (1, 1, 7), (3, 2, 4), (2, 1, 0))  # batch, new tokens, tokens in the cache


def cached(kv: int = N, layout: str = "b n t h", mask: str = "bool") -> Graph:
    """One attention with its linears over `[past ++ new]`, and the new caches as outputs."""
    past = ["b", kv, "p", H] if layout == "b n t h" else ["b", "p", kv, H]
    inputs = {"x": ["b", "s", C], "pk": past, "pv": past}
    if mask != "none":
        inputs["seen"] = ["b", 1, "s", "t", *([bool] if mask == "bool" else [])]
    g = graph(**inputs)
    x, split = g.value("x"), {n: i64(0, 0, h, H) for n, h in (("q", N), ("k", kv), ("v", kv))}
    q, k, v = (
        g.op("Reshape", g.op("MatMul", x, weight(C, H * (N if n == "q" else kv))), split[n]) for n in ("q", "k", "v")
    )
    axis = 2 if layout == "b n t h" else 1
    q, k, v = (g.op("Transpose", y, perm=[0, 2, 1, 3]) if axis == 2 or y is q else y for y in (q, k, v))
    k = g.op("Concat", g.value("pk"), k, axis=axis)
    v = g.op("Concat", g.value("pv"), v, axis=axis)
    present = (k, v)
    if axis == 1:
        k, v = (g.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (k, v))
    if kv < N:
        k, v = (copies(g, y, kv) for y in (k, v))
    s = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), f32(H**-0.5))
    if mask == "bool":
        s = g.op("Where", g.value("seen"), s, f32(-np.inf))
    elif mask == "float":
        s = g.op("Add", s, g.value("seen"))
    y = g.op("Transpose", g.op("MatMul", g.op("Softmax", s, axis=-1), v), perm=[0, 2, 1, 3])
    y = g.op("MatMul", g.op("Reshape", y, i64(0, 0, N * H)), weight(N * H, C))
    return finished(g, {"y": (y, ["b", "s", C]), "nk": (present[0], None), "nv": (present[1], None)})


def copies(g: Graph, y: ir.Value, kv: int) -> ir.Value:
    wide = g.op("Expand", g.op("Unsqueeze", y, i64(2)), i64(1, 1, N // kv, 1, 1))
    return g.op("Reshape", wide, i64(0, N, -1, H))


def finished(g: Graph, outputs: dict) -> Graph:
    for name, (v, shape) in outputs.items():
        v.name, v.type = name, ir.TensorType(ir.DataType.FLOAT)
        v.shape = ir.Shape(shape or [None] * 4)
        g.model.graph.outputs.append(v)
    g.sort()
    done = Graph(g.model)
    done.infer_shapes()
    return done


def feeds(kv: int, layout: str, mask: str, b: int, s: int, p: int) -> dict:
    past = (b, kv, p, H) if layout == "b n t h" else (b, p, kv, H)
    made = {"x": f32(RNG.standard_normal((b, s, C)))}
    made |= {n: f32(RNG.standard_normal(past)) for n in ("pk", "pv")}
    if mask == "float":
        made["seen"] = f32(RNG.standard_normal((b, 1, s, p + s)))
    elif mask == "bool":
        made["seen"] = np.tril(np.ones((s, p + s), bool), p)[None, None].repeat(b, 0)
    return made


@pytest.mark.parametrize("mask", ["bool", "float", "none"])
@pytest.mark.parametrize("layout", ["b n t h", "b t n h"])
@pytest.mark.parametrize("kv", [N, 2, 1])
def test_past_and_present_go_through_the_operator(kv, layout, mask):
    source = cached(kv, layout, mask)
    new = source.clone()
    canonicalize(new)
    assert new.declined == []
    assert set(ops(new)) <= {"Attention", "MatMul", "Transpose"}
    assert ops(new)["Transpose"] == (0 if layout == "b n t h" else 4)
    found = blocks.attentions(new)
    assert len(found) == 1
    assert (found[0].heads, found[0].kv_heads) == (N, kv)
    assert found[0].past is not None
    assert found[0].present is not None
    if layout == "b n t h":
        assert [v.name for v in (*found[0].past, *found[0].present)] == ["pk", "pv", "nk", "nv"]
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0
    with Session(source) as a, Session(new) as b:
        for shape in SHAPES:
            x = feeds(kv, layout, mask, *shape)
            before, after = a.run(x), b.run(x)
            for name, want in before.items():
                assert want.shape == after[name].shape
                assert np.max(np.abs(want - after[name])) <= 2e-6 * np.max(np.abs(want))


def test_a_mask_made_from_the_length_of_the_new_keys_makes_no_cycle():
    """Older exporters read the number of keys off the concatenated keys themselves."""
    source = cached(mask="none")
    g = source.clone()
    softmax = next(g.nodes("Softmax"))
    joined = next(n for n in g.nodes("Concat")).outputs[0]
    length = g.op("Squeeze", g.op("Shape", joined, start=2, end=3), i64(0))
    place = g.op("Range", np.array(0, np.int64), length, np.array(1, np.int64))
    bias = g.op("Mul", g.op("Cast", place, to=int(ir.DataType.FLOAT)), f32(-0.1))
    g.set_input(softmax, 0, g.op("Add", softmax.inputs[0], bias))
    g.sort()
    new = g.clone()
    canonicalize(new)
    assert new.declined == []
    assert "Softmax" not in ops(new)
    with Session(g) as a, Session(new) as b:
        for shape in SHAPES:
            x = feeds(N, "b n t h", "none", *shape)
            before, after = a.run(x), b.run(x)
            assert all(np.max(np.abs(before[n] - after[n])) <= 2e-6 * np.max(np.abs(before[n])) for n in before)


def test_keys_joined_with_computed_keys_are_no_cache():
    """Two sequences that attend together: nothing is kept from an earlier call."""
    g = graph(x=["b", "s", C], z=["b", "r", C])
    parts = {n: [g.op("MatMul", g.value(i), weight(C, C)) for i in "xz"] for n in "kv"}
    k, v = (
        g.op("Transpose", g.op("Reshape", g.op("Concat", *parts[n], axis=1), i64(0, 0, N, H)), perm=[0, 2, 1, 3])
        for n in "kv"
    )
    q = g.op("Transpose", g.op("Reshape", g.value("x"), i64(0, 0, N, H)), perm=[0, 2, 1, 3])
    s = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    y = g.op("Transpose", g.op("MatMul", g.op("Softmax", s, axis=-1), v), perm=[0, 2, 1, 3])
    g = finished(g, {"y": (g.op("Reshape", y, i64(0, 0, C)), ["b", "s", C])})
    canonicalize(g)
    assert len(list(g.nodes("Attention"))) == 1
    assert len(next(g.nodes("Attention")).inputs) == 3


def test_a_cache_that_is_not_given_back_stays_a_concatenation():
    """Runtimes take a past only together with both presents."""
    source = cached()
    source.model.graph.outputs.pop()
    source = Graph(source.model)
    new = source.clone()
    canonicalize(new)
    assert new.declined == []
    assert len(next(new.nodes("Attention")).inputs) == 4
    x = feeds(N, "b n t h", "bool", 2, 3, 4)
    with Session(source) as a, Session(new) as b:
        before, after = a.run(x), b.run(x)
    assert all(np.max(np.abs(before[n] - after[n])) <= 2e-6 * np.max(np.abs(before[n])) for n in before)


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("causal", [0, 1])
def test_an_operator_that_has_a_cache_already(axes, causal):
    heads = {"q": N, "k": 2, "v": 2}
    shapes = {n: ["b", "s", h * H] if axes == 3 else ["b", h, "s", H] for n, h in heads.items()}
    g = graph(opset=23, **shapes, pk=["b", 2, "p", H], pv=["b", 2, "p", H])
    attrs = ({"is_causal": 1} if causal else {}) | ({"q_num_heads": N, "kv_num_heads": 2} if axes == 3 else {})
    values = [g.value(n) if n else None for n in ("q", "k", "v", "", "pk", "pv")]
    node = g.op("Attention", *values, outputs=3, **attrs).producer()
    y, nk, nv = node.outputs
    source = finished(
        g, {"y": (y, ["b", "s", N * H] if axes == 3 else ["b", N, "s", H]), "nk": (nk, None), "nv": (nv, None)}
    )
    new = source.clone()
    canonicalize(new)
    assert new.declined == []
    node = next(new.nodes("Attention"))
    assert "is_causal" not in node.attributes
    assert node.attributes["kv_num_heads"].value == 2
    assert [v.name for v in (*node.inputs[4:], *node.outputs[1:])] == ["pk", "pv", "nk", "nv"]
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0
    with Session(source) as a, Session(new) as b:
        for batch, s, p in SHAPES:
            x = {n: (batch, s, h * H) if axes == 3 else (batch, h, s, H) for n, h in heads.items()}
            x |= dict.fromkeys(("pk", "pv"), (batch, 2, p, H))
            x = {n: f32(RNG.standard_normal(shape)) for n, shape in x.items()}
            before, after = a.run(x), b.run(x)
            assert all(np.max(np.abs(before[n] - after[n])) <= 2e-6 * np.max(np.abs(before[n])) for n in before)
