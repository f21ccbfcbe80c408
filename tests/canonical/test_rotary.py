"""Rotary embeddings on hand-written graphs: pairs of both kinds, tables of every making, parts of a head."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.graph import Graph
from tests.hand import RNG, f32, graph, i64, ops, raised, same

B, S, N, H = 2, 5, 4, 8


def angles(width: int) -> np.ndarray:
    return f32(np.outer(np.arange(S), 100.0 ** -np.linspace(0, 1, width // 2)))


def doubled(g: Graph, half: ir.Value, interleaved: bool, making: str) -> ir.Value:
    """`[.., w / 2]` to `[.., w]` with every entry twice."""
    last = -1 if interleaved else -2
    if making == "concat" and not interleaved:
        return g.op("Concat", half, half, axis=-1)
    wide = g.op("Unsqueeze", half, i64(last))
    if making in ("stack", "concat"):
        wide = g.op("Concat", wide, wide, axis=last)
    elif making == "expand":
        wide = g.op("Expand", wide, i64(1, 1, 2) if interleaved else i64(1, 2, 1))
    elif making == "tile":
        wide = g.op("Tile", wide, i64(1, 1, 2) if interleaved else i64(1, 2, 1))
    return g.op("Reshape", wide, i64(0, -1))


def halves(g: Graph, x: ir.Value, width: int, interleaved: bool) -> list[ir.Value]:
    if interleaved:
        return [g.op("Slice", x, i64(i), i64(2**40), i64(3), i64(2)) for i in (0, 1)]
    return list(g.op("Split", x, i64(width // 2, width // 2), axis=3, outputs=2).producer().outputs)


def joined(g: Graph, a: ir.Value, b: ir.Value, width: int, interleaved: bool) -> ir.Value:
    if not interleaved:
        return g.op("Concat", a, b, axis=-1)
    stacked = g.op("Concat", g.op("Unsqueeze", a, i64(-1)), g.op("Unsqueeze", b, i64(-1)), axis=-1)
    return g.op("Reshape", stacked, i64(0, 0, 0, width))


def rotated(g: Graph, x: ir.Value, tables: tuple, width: int, interleaved: bool, crossed: bool) -> ir.Value:
    cos, sin = tables
    one, two = halves(g, x, width, interleaved)
    if crossed:
        a = g.op("Sub", g.op("Mul", one, cos), g.op("Mul", two, sin))
        b = g.op("Add", g.op("Mul", two, cos), g.op("Mul", one, sin))
        return joined(g, a, b, width, interleaved)
    turned = joined(g, g.op("Neg", two), one, width, interleaved)
    return g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin))


def heads(g: Graph, x: ir.Value) -> ir.Value:
    return g.op("Transpose", g.op("Reshape", x, i64(0, 0, N, H)), perm=[0, 2, 1, 3])


def only_rotary(new: Graph) -> dict:
    assert new.declined == []
    nodes = list(new.nodes("RotaryEmbedding"))
    assert len(nodes) == 1
    assert not set(ops(new)) & {"Neg", "Sub", "Split", "Tanh"}
    assert len(nodes[0].inputs[0].shape or (0, 0, 0)) == 3
    return {k: a.value for k, a in nodes[0].attributes.items()}


def ended(g: Graph, y: ir.Value) -> tuple[Graph, Graph]:
    out = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), i64(0, 0, N * H))
    return raised(g, out, "b", S, N * H)


@pytest.mark.parametrize("making", ["concat", "stack", "expand", "tile"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_with_every_entry_twice(interleaved, making):
    g = graph(x=["b", S, N * H], a=[S, H // 2])
    full = doubled(g, g.value("a"), interleaved, making)
    tables = (g.op("Mul", g.op("Cos", full), f32(1.3)), g.op("Mul", g.op("Sin", full), f32(1.3)))
    y = rotated(g, heads(g, g.value("x")), tables, H, interleaved, crossed=False)
    source, new = ended(g, y)
    assert only_rotary(new).get("interleaved", 0) == interleaved
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))), a=angles(H))


@pytest.mark.parametrize("interleaved", [False, True])
def test_halves_turned_against_each_other(interleaved):
    g = graph(x=["b", S, N * H], a=[1, 1, S, H // 2])
    tables = (g.op("Cos", g.value("a")), g.op("Sin", g.value("a")))
    source, new = ended(g, rotated(g, heads(g, g.value("x")), tables, H, interleaved, crossed=True))
    assert only_rotary(new).get("interleaved", 0) == interleaved
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))), a=angles(H)[None, None])


@pytest.mark.parametrize("interleaved", [False, True])
def test_constant_tables(interleaved):
    g = graph(x=["b", S, N * H])
    full = np.repeat(angles(H), 2, -1) if interleaved else np.tile(angles(H), 2)
    tables = (f32(np.cos(full)), f32(np.sin(full)))
    source, new = ended(g, rotated(g, heads(g, g.value("x")), tables, H, interleaved, crossed=False))
    only_rotary(new)
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))))


@pytest.mark.parametrize("rows_first", [False, True])
def test_cached_tables_gathered_by_positions(rows_first):
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", S]))
    g = graph(x=["b", S, N * H])
    g.model.graph.inputs.append(ids)
    g = Graph(g.model)
    full = np.tile(angles(H), 2)
    tables = [g.op("Gather", f32(t), ids, axis=0) for t in (np.cos(full), np.sin(full))]
    tables = [g.op("Unsqueeze", t, i64(2 if rows_first else 1)) for t in tables]
    x = g.op("Reshape", g.value("x"), i64(0, 0, N, H)) if rows_first else heads(g, g.value("x"))
    y = rotated(g, x, tuple(tables), H, interleaved=False, crossed=False)
    out = g.op("Reshape", y if rows_first else g.op("Transpose", y, perm=[0, 2, 1, 3]), i64(0, 0, N * H))
    source, new = raised(g, out, "b", S, N * H)
    only_rotary(new)
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))), ids=RNG.integers(0, S, (B, S)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 4])
def test_part_of_a_head(width, interleaved):
    g = graph(x=["b", S, N * H], a=[S, width // 2])
    full = doubled(g, g.value("a"), interleaved, "stack")
    x = heads(g, g.value("x"))
    first = g.op("Slice", x, i64(0), i64(width), i64(-1))
    rest = g.op("Slice", x, i64(width), i64(2**40), i64(-1))
    turned = rotated(g, first, (g.op("Cos", full), g.op("Sin", full)), width, interleaved, crossed=False)
    source, new = ended(g, g.op("Concat", turned, rest, axis=-1))
    attrs = only_rotary(new)
    assert attrs["rotary_embedding_dim"] == width
    assert attrs.get("interleaved", 0) == (interleaved and width > 2)
    assert "Concat" not in ops(new) or "Expand" in ops(new)
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))), a=angles(width))


def test_heads_are_turned_before_they_are_copied():
    """Keys copied to all query heads first and rotated then: the operator rotates each key head once."""
    g, kv = graph(x=["b", S, 2 * H], a=[S, H // 2]), 2
    full = doubled(g, g.value("a"), False, "concat")
    one = g.op(
        "Unsqueeze", g.op("Transpose", g.op("Reshape", g.value("x"), i64(0, 0, kv, H)), perm=[0, 2, 1, 3]), i64(2)
    )
    x = g.op("Reshape", g.op("Expand", one, i64(1, 1, N // kv, 1, 1)), i64(0, N, -1, H))
    y = rotated(g, x, (g.op("Cos", full), g.op("Sin", full)), H, interleaved=False, crossed=False)
    source, new = ended(g, y)
    assert only_rotary(new)["num_heads"] == kv
    same(source, new, x=f32(RNG.standard_normal((B, S, kv * H))), a=angles(H))


def test_tables_that_differ_between_the_halves_are_declined():
    g = graph(x=["b", S, N * H], a=[S, H])
    tables = (g.op("Cos", g.value("a")), g.op("Sin", g.value("a")))
    source, new = ended(g, rotated(g, heads(g, g.value("x")), tables, H, interleaved=False, crossed=False))
    assert "RotaryEmbedding" not in ops(new)
    assert [d.why for d in new.declined] == ["rotary: the cosine and sine tables do not consist of two equal halves"]
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))), a=f32(RNG.standard_normal((S, H))))


@pytest.mark.parametrize("shared", [False, True])
def test_a_scale_before_the_rotation_belongs_to_the_operator(shared):
    """ESM scales queries before it turns them; where others read the turned queries, the factor stays."""
    g = graph(23, x=["b", S, N * H])
    x, cos, sin = g.value("x"), f32(np.cos(angles(H)))[None], f32(np.sin(angles(H)))[None]
    wide = i64(B, S, H // 2)
    tables = [g.op("Expand", t, wide) for t in (cos, sin)]
    q = g.op("RotaryEmbedding", g.op("Mul", x, f32(0.25)), *tables, num_heads=N)
    k = g.op("RotaryEmbedding", x, *tables, num_heads=N)
    y = g.op("Attention", q, k, x, q_num_heads=N, kv_num_heads=N, scale=0.5)
    source, new = raised(g, g.op("Add", y, q) if shared else y, "b", S, N * H)
    scale = next(new.nodes("Attention")).attributes.get_float("scale")
    assert (ops(new)["Mul"], scale) == ((1, 0.5) if shared else (0, 0.125))
    same(source, new, x=f32(RNG.standard_normal((B, S, N * H))))
