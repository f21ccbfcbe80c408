"""Heads merged with an axis of unknown length: they are followed until they are split again, or left as they are."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import coupling
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from tests import cuts, tiny
from tests.hand import f32, graph, i64, weight

HEADS, DEPTH, LENGTH = 3, 4, 5
MERGED = i64(-1, LENGTH, DEPTH)


def by_head(g: Graph, name: str, perm=(0, 2, 1, 3), x: ir.Value | None = None) -> ir.Value:
    """`[batch, heads, length, depth]` of a linear, or in another order."""
    y = g.op("MatMul", g.inputs[0] if x is None else x, g.constant(weight(8, HEADS * DEPTH), name))
    return g.op("Transpose", g.op("Reshape", y, i64(0, 0, HEADS, DEPTH)), perm=list(perm))


def batch(g: Graph) -> ir.Value:
    return g.op("Shape", g.inputs[0], start=0, end=1)


def merged_size(g: Graph) -> ir.Value:
    """Heads times batch, with the number of heads as a constant."""
    return g.op("Mul", batch(g), i64(HEADS))


def scores(g: Graph, perm=(0, 2, 1, 3)) -> ir.Value:
    """`[heads * batch, length, length]`."""
    q, k = (g.op("Reshape", by_head(g, n, perm), MERGED) for n in ("q", "k"))
    return g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1]))


def model(inner, target=None, perm=(0, 2, 1, 3)) -> Graph:
    """Scores of merged heads, `inner(g, scores)`, split again (to a constant target, or `target(g)`), times values."""
    g = graph(23, x=["batch", LENGTH, 8], extra=["n", LENGTH, LENGTH])
    s = inner(g, scores(g, perm))
    s = g.op("Reshape", s, i64(-1, HEADS, LENGTH, LENGTH) if target is None else target(g))
    y = g.op("Transpose", g.op("MatMul", g.op("Softmax", s), by_head(g, "v")), perm=[0, 2, 1, 3])
    y = g.op("MatMul", g.op("Reshape", y, i64(0, 0, -1)), g.constant(weight(HEADS * DEPTH, 8), "o"))
    return finished(g, y)


def finished(g: Graph, y: ir.Value) -> Graph:
    g = tiny.finish(g, y, "y", ["batch", LENGTH, 8])
    if not g.inputs[1].uses():
        g.model.graph.inputs.pop()
        g = Graph(g.model)
    g.infer_shapes()
    return g


def picked(size):
    """Every score from a place that one table, expanded to `size(g, scores)` rows, names."""

    def op(g: Graph, s: ir.Value) -> ir.Value:
        table = np.random.default_rng(0).integers(0, LENGTH, (1, LENGTH, LENGTH))
        to = g.op("Concat", size(g, s), i64(LENGTH), i64(LENGTH), axis=0)
        return g.op("GatherElements", s, g.op("Expand", table, to), axis=-1)

    return op


def guarded(g: Graph, s: ir.Value) -> ir.Value:
    """An Expand as the legacy exporter writes it: -1 in the target would mean the length as it is."""
    to = g.op("Concat", g.op("Gather", g.op("Shape", s), i64(0)), i64(LENGTH), i64(1), axis=0)
    to = g.op("Where", g.op("Equal", to, i64(-1, -1, -1)), i64(1, 1, 1), to)
    return g.op("Add", s, g.op("Expand", f32([[[0.5]]]), to))


def tiled(g: Graph, s: ir.Value) -> ir.Value:
    """Scores against positions: a table of its own for each head, once for every element of the batch."""
    table = g.op("Reshape", by_head(g, "p", (0, 2, 1, 3), g.constant(weight(1, LENGTH, 8), "rows")), i64(HEADS, 5, 4))
    many = g.op("Tile", table, g.op("Concat", batch(g), i64(1, 1), axis=0))
    q = g.op("Reshape", by_head(g, "r"), MERGED)
    return g.op("Add", g.op("Mul", s, f32(0.5)), g.op("MatMul", q, g.op("Transpose", many, perm=[0, 2, 1])))


FOLLOWED = {
    "nothing": lambda g, s: s,
    "softmax and arithmetic": lambda g, s: g.op("Mul", g.op("Softmax", g.op("Neg", s)), s),
    "a mask of one row": lambda g, s: g.op("Where", np.tri(LENGTH, dtype=bool)[None], s, f32(-1e4)),
    "picked, rows computed from batch": picked(lambda g, _: merged_size(g)),
    "picked, rows read from the scores": picked(lambda g, s: g.op("Shape", s, start=0, end=1)),
    "a guarded target": guarded,
    "tiled": tiled,
    "merged with more": lambda g, s: g.op("Reshape", g.op("Tanh", g.op("Reshape", s, i64(-1, 5))), i64(-1, 5, 5)),
}
SPLIT = {
    "constant": None,
    "computed": lambda g: g.op("Concat", batch(g), i64(HEADS, LENGTH, LENGTH), axis=0),
    "rest": lambda g: g.op("Concat", batch(g), i64(-1, LENGTH, LENGTH), axis=0),
}


def feeds(n: int) -> dict[str, np.ndarray]:
    return {"x": f32(np.random.default_rng(n).standard_normal((n, LENGTH, 8)))}


@pytest.mark.parametrize("target", SPLIT)
@pytest.mark.parametrize("name", FOLLOWED)
def test_merged_heads_are_cut_as_masked(name, target):
    g = model(FOLLOWED[name], SPLIT[target])
    group = coupling.couple(g, "q", 1, block=DEPTH)
    assert group.units == HEADS
    assert {s.value for s in group.slots} >= {"q", "k", "v", "o"}
    done = cuts.check(g, group, [1], feeds(2), feeds(3), feeds(1))
    assert sum(v.const_value.size for v in done.model.graph.initializers.values()) < sum(
        v.const_value.size for v in g.model.graph.initializers.values()
    )


@pytest.mark.parametrize("size", ["of the batch", "of the scores"])
def test_two_layers_that_share_what_an_expand_repeats_are_cut_apart(size):
    """The rows are as many as heads of both; cut in one, they are made again for that one."""
    g = graph(23, x=["batch", LENGTH, 8], extra=["n"])
    first, second = scores(g), scores(g)
    op = picked(lambda g, s: merged_size(g) if size == "of the batch" else g.op("Shape", s, start=0, end=1))
    one = op(g, first)
    two = g.op("GatherElements", second, one.producer().inputs[1], axis=-1)
    heads = [g.op("Softmax", g.op("Reshape", s, i64(-1, HEADS, LENGTH, LENGTH))) for s in (one, two)]
    parts = [g.op("Transpose", g.op("MatMul", p, by_head(g, "v")), perm=[0, 2, 1, 3]) for p in heads]
    parts = [g.op("MatMul", g.op("Reshape", p, i64(0, 0, -1)), g.constant(weight(12, 8), "o")) for p in parts]
    g = finished(g, g.op("Add", *parts))
    names = [str(n.inputs[1].name) for n in g.nodes("MatMul") if str(n.inputs[1].name).startswith("q")]
    if size == "of the scores":
        return declined(g, "produces another value of that size")
    groups = [coupling.couple(g, n, 1, block=DEPTH) for n in names]
    assert not {s.value for s in groups[0].slots} & {s.value for s in groups[1].slots}
    assert [len(group.entries[-1].users) for group in groups] == [1, 1]
    mask, done = g, g
    for group, gone in zip(groups, ([1], [0, 2]), strict=True):
        cuts.check(g, group, gone, feeds(2), feeds(3))
        mask, done = cuts.masked(mask, group, gone), cuts.cut(done, group, gone)
    cuts.assert_same(mask, done, feeds(2), feeds(3))
    done.sweep()
    assert len(list(done.nodes("Expand"))) == 2
    with pytest.raises(ModelError, match="compute the group again"):
        done.take(groups[0], np.array([0]))
    return None


def test_channels_within_merged_heads_go_too():
    """`[batch, heads * depth]` in one axis with batch: each of its positions is a unit."""
    g = graph(23, x=["batch", LENGTH, 8], extra=["n"])
    y = g.op("Transpose", g.op("MatMul", g.inputs[0], g.constant(weight(8, 12), "up")), perm=[0, 2, 1])
    y = g.op("Softmax", g.op("Reshape", y, i64(-1, LENGTH)))
    y = g.op("Transpose", g.op("Reshape", y, i64(-1, 12, LENGTH)), perm=[0, 2, 1])
    g = finished(g, g.op("MatMul", y, g.constant(weight(12, 8), "down")))
    group = coupling.couple(g, "up", 1)
    assert group.units == 12
    cuts.check(g, group, [0, 3, 11], feeds(2), feeds(3))


def outside(g: Graph, s: ir.Value) -> ir.Value:
    return g.op("Add", s, g.inputs[1])


def counted(g: Graph, s: ir.Value) -> ir.Value:
    return g.op("Div", s, g.op("Cast", g.op("Shape", s, start=0, end=1), to=1))


def as_large(g: Graph, s: ir.Value) -> ir.Value:
    return g.op("Add", s, g.op("ReduceSum", g.op("Expand", f32([[[0.5]]]), g.op("Shape", s))))


def first(g: Graph, s: ir.Value) -> ir.Value:
    return g.op("Add", s, g.op("Gather", s, i64(0), axis=0))


DECLINED = {
    "another value, maybe as long": (outside, "may or may not be broadcast"),
    "its size is computed with": (counted, "computes with its size"),
    "another value as large": (as_large, "produces another value of that size"),
    "one row": (first, "works along axis 0"),
    "a mean of heads": (lambda g, s: g.op("Sub", s, g.op("ReduceMean", s, i64(0))), "reduces that axis"),
    "running sums": (lambda g, s: g.op("CumSum", s, np.array(0, np.int64)), "works along that axis"),
}


def declined(g: Graph, why: str) -> None:
    before = ir.to_proto(g.model).SerializeToString(deterministic=True)
    with pytest.raises(ModelError, match=why) as e:
        coupling.couple(g, "q", 1, block=DEPTH)
    assert "by way of MatMul > Reshape" in str(e.value)
    assert ir.to_proto(g.model).SerializeToString(deterministic=True) == before
    assert g.edits == 0


@pytest.mark.parametrize("name", DECLINED)
def test_what_merged_heads_cannot_pass_is_declined_with_the_way_there(name):
    op, why = DECLINED[name]
    declined(model(op), why)


def test_heads_outside_the_batch_are_not_followed():
    """`[heads, batch]` in one axis: a head is at `head * batch + b`, so nothing repeats."""
    declined(model(lambda g, s: s, perm=(2, 0, 1, 3)), "merges it with another axis")


def test_a_split_in_another_order_is_not_followed():
    g = model(lambda g, s: s, lambda g: g.op("Concat", i64(HEADS), batch(g), i64(LENGTH, LENGTH), axis=0))
    declined(g, "merges it with another axis")
