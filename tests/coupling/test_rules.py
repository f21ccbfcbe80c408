"""One rule of the coupling analysis at a time, on graphs written by hand: cut equals masked, or declined, untouched."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcomp import coupling
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from tests import cuts, tiny
from tests.hand import f32, graph, i64, weight


def content(g: Graph) -> bytes:
    return ir.to_proto(g.model).SerializeToString(deterministic=True)


def named(g: Graph, name: str, *shape: int) -> ir.Value:
    return g.constant(weight(*shape), name)


def conv(g: Graph, x: ir.Value, name: str, out: int, into: int, size: int = 3, **attrs) -> ir.Value:
    w, b = named(g, name, out, into, size, size), named(g, f"{name}.bias", out)
    return g.op("Conv", x, w, b, pads=[size // 2] * 4, **attrs)


def batch_norm(g: Graph, x: ir.Value, n: int) -> ir.Value:
    rng = np.random.default_rng(n)
    parts = [f32(rng.uniform(0.5, 1.5, n)), f32(rng.standard_normal(n))]
    return g.op("BatchNormalization", x, *parts, f32(rng.standard_normal(n)), f32(rng.uniform(0.5, 1.5, n)))


def finished(g: Graph, y: ir.Value, *shape) -> Graph:
    done = tiny.finish(g, y, "y", list(shape))
    done.infer_shapes()
    return done


def feeds(g: Graph) -> dict[str, np.ndarray]:
    return tiny.feeds(g, 3)


def cnn() -> Graph:
    """Conv, BN, ReLU, a residual, a depthwise and a grouped convolution, pooling, Flatten, Gemm."""
    g = graph(x=["batch", 1, 8, 8])
    x = g.op("Relu", batch_norm(g, conv(g, g.inputs[0], "stem", 8, 1), 8))
    inner = g.op("Relu", batch_norm(g, conv(g, x, "wide", 12, 8), 12))
    inner = g.op("Clip", conv(g, inner, "depthwise", 12, 1, group=12), f32(0), f32(6))
    x = g.op("Add", x, conv(g, inner, "narrow", 8, 12, size=1))
    x = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g.op("Relu", conv(g, conv(g, x, "mix", 12, 8), "grouped", 6, 4, group=3))
    x = g.op("Flatten", x)
    return finished(g, g.op("Gemm", x, named(g, "head", 6 * 16, 5), named(g, "head.bias", 5)), "batch", 5)


@pytest.mark.parametrize(
    ("name", "axis", "units"),
    [("stem", 0, 8), ("narrow", 0, 8), ("wide", 0, 12), ("depthwise", 0, 12), ("mix", 0, 3), ("grouped", 0, 3)],
)
def test_channels_of_a_convolutional_classifier(name, axis, units):
    g = cnn()
    group = coupling.couple(g, name, axis)
    assert group.units == units
    done = cuts.check(g, group, [units - 2], feeds(g))
    counts = {str(n.inputs[1].name): n.attributes.get_int("group", 1) for n in done.nodes("Conv")}
    assert counts["depthwise"] == (11 if name in ("wide", "depthwise") else 12)
    assert counts["grouped"] == (2 if name in ("mix", "grouped") else 3)


def test_what_padding_adds_cannot_be_cut():
    g = between(lambda g, v: g.op("Pad", v, i64(0, 0, 2, 0, 0, 1), f32(1)), 12, 15)
    group = coupling.couple(g, "down", 0)
    assert group.readers[0].units == (-1, -1, *range(12), -1)
    cuts.check(g, group, [0, 5, 11], feeds(g))


def test_a_residual_couples_all_that_write_to_it():
    group = coupling.couple(cnn(), "stem", 0)
    assert {s.value for s in group.slots if s.writes} >= {"stem", "stem.bias", "narrow", "narrow.bias"}
    assert {s.value for s in group.slots if s.reads} == {"wide", "mix"}


def test_what_is_the_models_output_is_not_cut():
    g = cnn()
    before = content(g)
    with pytest.raises(ModelError, match=r"axis 1 of the model's output 'y'"):
        coupling.couple(g, "head", 1)
    assert content(g) == before


# ---- one operator each: x [b, 4, 8] ▸ linear of width 12 ▸ the operator ▸ linear -------------------------------------


def between(op, width: int = 12, read: int = 12, rank: int = 3) -> Graph:
    """A linear, `op(g, value)`, and a linear that reads `read` channels."""
    g = graph(23, x=["batch", 4, 8])
    y = op(g, g.op("MatMul", g.inputs[0], named(g, "up", 8, width)))
    return finished(g, g.op("MatMul", y, named(g, "down", read, 3)), *["batch", *[None] * (rank - 2), 3])


def reshape(*target: int):
    return lambda g, v: g.op("Reshape", v, i64(*target))


def both(first, second):
    return lambda g, v: second(g, first(g, v))


def shape_of(g: Graph, v: ir.Value, *rest: int) -> ir.Value:
    """`Concat(Shape(v)[:2], rest)`, computed when the model runs."""
    front = g.op("Slice", g.op("Shape", v), i64(0), i64(2))
    return g.op("Concat", front, i64(*rest), axis=0)


def split(lengths):
    def op(g: Graph, v: ir.Value) -> ir.Value:
        made = g.op("Split", v, i64(*lengths), axis=-1, outputs=len(lengths))
        parts = list(made.producer().outputs)
        return g.op("Mul", parts[0], g.op("Sigmoid", parts[1]))

    return op


def halves(g: Graph, v: ir.Value) -> ir.Value:
    a, b = g.op("Split", v, axis=-1, num_outputs=2, outputs=2).producer().outputs
    return g.op("Mul", a, g.op("Tanh", b))


def slices(g: Graph, v: ir.Value) -> ir.Value:
    a = g.op("Slice", v, i64(0), i64(6), i64(2))
    b = g.op("Slice", v, i64(-6), i64(2**62), i64(-1))
    return g.op("Add", a, b)


def gated(g: Graph, v: ir.Value) -> ir.Value:
    other = g.op("MatMul", g.inputs[0], named(g, "gate", 8, 12))
    return g.op("Mul", v, g.op("Sigmoid", g.op("Add", other, named(g, "gate.bias", 12))))


def joined(g: Graph, v: ir.Value) -> ir.Value:
    return g.op("Concat", g.op("MatMul", g.inputs[0], named(g, "beside", 8, 4)), v, axis=-1)


def group_norm(g: Graph, v: ir.Value) -> ir.Value:
    y = g.op("GroupNormalization", g.op("Transpose", v, perm=[0, 2, 1]), weight(12), weight(12), num_groups=4)
    return g.op("Transpose", y, perm=[0, 2, 1])


def expanded(g: Graph, v: ir.Value) -> ir.Value:
    ones = g.op("Expand", f32([[[0.5]]]), g.op("Shape", v))
    return g.op("Mul", v, g.op("Add", ones, named(g, "shift", 12)))


def there_and_back(g: Graph, v: ir.Value) -> ir.Value:
    return g.op("Transpose", g.op("Tanh", g.op("Transpose", v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])


def affine(g: Graph, v: ir.Value) -> ir.Value:
    return g.op("Mul", g.op("Add", v, named(g, "b", 12)), named(g, "s", 1, 1, 12))


OPERATORS = {
    "activation": (lambda g, v: g.op("Gelu", v), 12, 12, 12),
    "bias and scale": (
        lambda g, v: g.op("Mul", g.op("Add", v, named(g, "b", 12)), named(g, "s", 1, 1, 12)),
        12,
        12,
        12,
    ),
    "gate": (gated, 12, 12, 12),
    "rms norm": (lambda g, v: g.op("RMSNormalization", v, f32(np.linspace(1, 2, 12)), epsilon=0.05), 12, 12, 12),
    "reshape to heads and back": (both(reshape(0, 0, 3, 4), reshape(0, 0, 12)), 12, 12, 3),
    "reshape with open axis": (both(reshape(-1, 4, 3, 4), reshape(0, 0, -1)), 12, 12, 3),
    "heads through transposes": (
        lambda g, v: g.op("Reshape", there_and_back(g, g.op("Reshape", v, i64(0, 0, 3, 4))), i64(0, 4, 12)),
        12,
        12,
        3,
    ),
    "computed target": (
        lambda g, v: g.op("Reshape", g.op("Reshape", v, shape_of(g, v, 3, 4)), shape_of(g, v, 12)),
        12,
        12,
        3,
    ),
    "target from the cut axis": (
        lambda g, v: g.op("Reshape", g.op("Unsqueeze", v, i64(2)), g.op("Shape", v)),
        12,
        12,
        12,
    ),
    "expand to the shape of a cut value": (expanded, 12, 12, 12),
    "split in two": (split((6, 6)), 12, 6, 6),
    "split into equal parts": (halves, 12, 6, 6),
    "slices of both halves": (slices, 12, 6, 6),
    "beside others": (joined, 12, 16, 12),
    "gather in another order": (lambda g, v: g.op("Gather", v, i64(*range(11, -1, -1)), axis=2), 12, 12, 12),
    "gather some": (lambda g, v: g.op("Gather", v, i64(1, 3, 5, 7), axis=2), 12, 4, 4),
    "gather another axis": (lambda g, v: g.op("Gather", v, np.array(1, np.int64), axis=1), 12, 12, 12),
    "unsqueeze and squeeze": (
        lambda g, v: g.op("Squeeze", g.op("Unsqueeze", v, i64(0, 3)), i64(0, 3)),
        12,
        12,
        12,
    ),
    "pad": (lambda g, v: g.op("Pad", v, i64(0, 0, 2, 0, 0, 1), f32(0)), 12, 15, 12),
    "tile": (lambda g, v: g.op("Tile", v, i64(1, 1, 2)), 12, 24, 12),
    "softmax along another axis": (lambda g, v: g.op("Softmax", v, axis=1), 12, 12, 12),
    "mean over another axis": (lambda g, v: g.op("ReduceMean", v, i64(1), keepdims=0), 12, 12, 12),
    "group norm": (group_norm, 12, 12, 4),
    "einsum": (lambda g, v: g.op("Einsum", v, named(g, "e", 12, 12), equation="bsd,de->bse"), 12, 12, 12),
    "clip": (lambda g, v: g.op("Clip", v, f32(-0.5), f32(0.5)), 12, 12, 12),
    "where": (lambda g, v: g.op("Where", g.op("Greater", v, f32(0)), v, named(g, "low", 12)), 12, 12, 12),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_cut_passes_through(name):
    op, width, read, units = OPERATORS[name]
    rank = 2 if name in ("gather another axis", "mean over another axis") else 3
    g = between(op, width, read, rank)
    group = coupling.couple(g, "up", 1)
    if name == "gather some":
        group = coupling.couple(g, "down", 0)
    assert group.units == units
    cuts.check(g, group, [0, units - 1] if units > 3 else [1], feeds(g))


BLOCKED = {
    "layer norm": (lambda g, v: g.op("LayerNormalization", v, weight(12), weight(12)), "takes mean and variance"),
    "softmax": (lambda g, v: g.op("Softmax", v, axis=-1), "works along that axis"),
    "no rule": (lambda g, v: g.op("DepthToSpace", g.op("Unsqueeze", v, i64(3)), blocksize=1), "has no rule"),
    "size is computed with": (
        lambda g, v: g.op("Div", v, g.op("Cast", g.op("Gather", g.op("Shape", v), i64(2)), to=1)),
        "computes with its size",
    ),
    "flattened with another cut axis": (
        lambda g, v: g.op("Reshape", g.op("Add", v, g.op("Transpose", v, perm=[0, 2, 1])), i64(0, 144)),
        "merges it with another axis",
    ),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_cannot_follow_is_declined_with_the_way_there(name):
    op, why = BLOCKED[name]
    if name == "flattened with another cut axis":
        g = graph(23, x=["batch", 12, 8])
        g = finished(g, op(g, g.op("MatMul", g.inputs[0], named(g, "up", 8, 12))), "batch", 144)
    else:
        g = graph(23, x=["batch", 4, 8])
        g = finished(g, op(g, g.op("MatMul", g.inputs[0], named(g, "up", 8, 12))), "batch", None, None)
        g.outputs[0].shape = None
    before = content(g)
    with pytest.raises(ModelError, match=why) as e:
        coupling.couple(g, "up", 1)
    assert "by way of MatMul" in str(e.value)
    assert content(g) == before
    assert g.edits == 0


def test_a_cache_shrinks_with_its_heads():
    g = graph(23, x=["batch", "sequence", 8], past_k=["batch", 2, "past", 4], past_v=["batch", 2, "past", 4])
    x, past_k, past_v = g.inputs
    q, k, v = (g.op("MatMul", x, named(g, n, 8, w)) for n, w in (("q", 16), ("k", 8), ("v", 8)))
    y = g.op("Attention", q, k, v, None, past_k, past_v, q_num_heads=4, kv_num_heads=2, outputs=3)
    present = y.producer().outputs[1:]
    out = g.op("MatMul", y, named(g, "o", 16, 8))
    g = finished(g, out, "batch", "sequence", 8)
    for i, p in enumerate(present):
        p.name = f"present_{i}"
        p.shape, p.type = ir.Shape(["batch", 2, "total", 4]), ir.TensorType(ir.DataType.FLOAT)
        g.model.graph.outputs.append(p)
    g = Graph(g.model)
    attention = next(iter(g.nodes("Attention")))
    with pytest.raises(ModelError, match=r"of the model's input 'past_k'|of the model's output 'present"):
        coupling.Coupling(g).heads(attention)
    group = coupling.Coupling(g).heads(attention, io=True)
    assert {(s.value, s.axis) for s in group.io} == {(n, 1) for n in ("past_k", "past_v", "present_0", "present_1")}
    done = cuts.cut(g, group, [0])
    assert done.inputs[1].shape[1] == 1
    rng = np.random.default_rng(0)
    full = {
        v.name: f32(rng.standard_normal(s)) for v, s in zip(g.inputs, [(2, 3, 8), *[(2, 2, 5, 4)] * 2], strict=True)
    }
    less = full | {n: full[n][:, 1:] for n in ("past_k", "past_v")}
    want, got = cuts.run(cuts.masked(g, group, [0]), full), cuts.run(done, less)
    np.testing.assert_allclose(got["y"], want["y"], atol=1e-6)
    np.testing.assert_allclose(got["present_0"], want["present_0"][:, 1:], atol=1e-6)
    queries = coupling.Coupling(g).heads(attention, whole=False)
    assert not queries.io
    cuts.check(g, queries, [0, 3], full)


# ---- random graphs ---------------------------------------------------------------------------------------------------

UNARY = ("Relu", "Gelu", "Tanh", "Sigmoid", "bias", "scale", "rms", "softmax-1", "heads", "slice", "gather", "pad")
MERGED = ("merged", "merged halves", "merged tiles")


@st.composite
def random_graph(draw) -> Graph:
    """Values `[b, 4, width]` combined at random; every width is a multiple of four."""
    g = graph(23, x=["batch", 4, 8])
    values: list[tuple[ir.Value, int]] = [(g.inputs[0], 8)]
    for i in range(draw(st.integers(2, 9))):
        v, n = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(("linear", "linear", "add", "mul", "concat", "split", *UNARY, *MERGED)))
        same = [w for w, m in values if m == n]
        if kind == "linear":
            m = draw(st.sampled_from((4, 8, 12)))
            values.append((g.op("MatMul", v, named(g, f"w{i}", n, m)), m))
        elif kind in ("add", "mul"):
            values.append((g.op(kind.title(), v, draw(st.sampled_from(same))), n))
        elif kind == "concat":
            w, m = draw(st.sampled_from(values))
            values.append((g.op("Concat", v, w, axis=-1), n + m))
        elif kind == "split":
            parts = g.op("Split", v, i64(n // 4, n - n // 4), axis=-1, outputs=2).producer().outputs
            k = draw(st.integers(0, 1))
            values.append((g.op("Tile", parts[k], i64(1, 1, 4)), (n // 4, n - n // 4)[k] * 4))
        else:
            values.append(unary(g, v, n, kind))
    total = [g.op("MatMul", v, named(g, f"end{i}", n, 3)) for i, (v, n) in enumerate(values[-3:])]
    return finished(g, g.op("Sum", *total) if len(total) > 1 else total[0], "batch", 4, 3)


def merged(g: Graph, v: ir.Value, n: int, kind: str) -> ir.Value:
    """Channels in one axis with the batch, in one step or in two, or beside a table that is repeated for the batch."""
    y = g.op("Reshape", g.op("Transpose", v, perm=[0, 2, 1]), i64(-1, 4))
    if kind == "merged halves":
        y = g.op("Softmax", g.op("Reshape", y, i64(-1, n // 2, 4)), axis=-1)
    elif kind == "merged tiles":
        table = g.op("MatMul", named(g, "table", n, 6), named(g, "turned", 6, 4))
        batch = g.op("Shape", g.inputs[0], start=0, end=1)
        y = g.op("Add", y, g.op("Tile", table, g.op("Concat", batch, i64(1), axis=0)))
    return g.op("Transpose", g.op("Reshape", g.op("Tanh", y), i64(-1, n, 4)), perm=[0, 2, 1])


def unary(g: Graph, v: ir.Value, n: int, kind: str) -> tuple[ir.Value, int]:
    match kind:
        case "bias":
            return g.op("Add", v, named(g, "bias", n)), n
        case "scale":
            return g.op("Mul", v, named(g, "scale", n)), n
        case "rms":
            return g.op("RMSNormalization", v, named(g, "gain", n), epsilon=0.01), n
        case "softmax-1":
            return g.op("Softmax", v, axis=1), n
        case "heads":
            y = g.op("Transpose", g.op("Reshape", v, i64(0, 0, 4, n // 4)), perm=[0, 2, 1, 3])
            return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), i64(0, 0, n)), n
        case "merged" | "merged halves" | "merged tiles":
            return merged(g, v, n, kind), n
        case "slice":
            return g.op("Tile", g.op("Slice", v, i64(n // 2), i64(n), i64(2)), i64(1, 1, 2)), n
        case "gather":
            return g.op("Gather", v, np.arange(n - 1, -1, -1), axis=2), n
        case "pad":
            return g.op("Slice", g.op("Pad", v, i64(0, 0, 1, 0, 0, 3), f32(0)), i64(0), i64(n), i64(2)), n
    return g.op(kind, v), n


@given(random_graph(), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_graphs_are_cut_as_masked_or_left_alone(g, data):
    before = content(g)
    weights = sorted(str(v.name) for v in g.model.graph.initializers.values() if len(v.shape or ()) == 2)
    name, axis = data.draw(st.sampled_from(weights)), data.draw(st.integers(0, 1))
    try:
        group = coupling.couple(g, name, axis)
    except ModelError:
        assert content(g) == before
        return
    gone = data.draw(st.lists(st.integers(0, group.units - 1), min_size=1, max_size=group.units - 1, unique=True))
    done = cuts.cut(g, group, sorted(gone))
    mask = cuts.masked(g, group, sorted(gone))
    cuts.assert_same(mask, done, feeds(g), tolerance=1e-5)
