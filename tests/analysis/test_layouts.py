"""Shapes, contents and axis groups as properties: whatever is proved must be what the runtime computes."""

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Dim, Equalities, add, divide, floor, multiply, named, product, subtract
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny
from tests.hand import RNG, f32, graph, ops, raised, same, weight

NAMES = {"b": 3, "s": 5, "t": 7}
sizes = st.builds(
    lambda factor, names: product([factor, *(named(n) for n in names)]),
    st.integers(1, 6),
    st.lists(st.sampled_from(sorted(NAMES)), max_size=3),
)


def number(d) -> int:
    return d if isinstance(d, int) else d.factor * math.prod(NAMES[n] for n in d.names)


@given(sizes, sizes)
def test_sizes_multiply_and_divide_like_numbers(a, b):
    assert number(multiply(a, b)) == number(a) * number(b)
    assert divide(multiply(a, b), b) == a
    quotient = divide(a, b)
    assert quotient is None or number(quotient) * number(b) == number(a)


@given(sizes, sizes)
def test_sums_cancel_and_unlike_ones_are_unknowns(a, b):
    assert subtract(a, a) == 0
    assert add(a, 0) == a
    both = add(a, b)
    if isinstance(a, int) == isinstance(b, int) and getattr(a, "names", ()) == getattr(b, "names", ()):
        assert number(both) == number(a) + number(b)
    else:
        assert isinstance(both, Dim)
        assert both.names[0] not in NAMES
    assert floor(multiply(a, b), b) == a


def test_equalities_prefer_names_of_inputs():
    equal = Equalities(["b"])
    equal.assume(named("x"), named("b"))
    equal.assume(named("y"), named("x"))
    equal.assume(3, named("z"))
    assert equal.plain(multiply(2, named("y"))) == multiply(2, named("b"))
    assert equal.match((named("x"), 4), (named("y"), 4))
    assert not equal.same(named("z"), 3)


# ---- chains of layout moves ------------------------------------------------------------------------------------------

SHAPE = (2, 3, 4, 6)


@st.composite
def moves(draw):
    """A chain of Transpose, Reshape, Unsqueeze and Squeeze, as (operator, argument)."""
    shape, chain = list(SHAPE), []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["Transpose", "Reshape", "Unsqueeze", "Squeeze"]))
        if kind == "Transpose":
            perm = draw(st.permutations(range(len(shape))))
            shape = [shape[p] for p in perm]
            chain.append((kind, list(perm)))
        elif kind == "Unsqueeze" and len(shape) < 6:
            axis = draw(st.integers(0, len(shape)))
            shape.insert(axis, 1)
            chain.append((kind, axis))
        elif kind == "Squeeze" and 1 in shape:
            axis = shape.index(1)
            shape.pop(axis)
            chain.append((kind, axis))
        elif kind == "Reshape" and len(shape) > 1:
            i = draw(st.integers(0, len(shape) - 2))
            total = shape[i] * shape[i + 1]
            first = draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
            new = [total] if draw(st.booleans()) else [first, total // first]
            shape = shape[:i] + new + shape[i + 2 :]
            chain.append((kind, list(shape)))
    return chain


def build(chain, dynamic: bool) -> Graph:
    dims = ["batch", *SHAPE[1:]] if dynamic else SHAPE
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="moves"), ir_version=10))
    y, shape = g.op("Relu", x), list(SHAPE)
    for kind, argument in chain:
        if kind == "Transpose":
            y = g.op(kind, y, perm=argument)
            shape = [shape[p] for p in argument]
        elif kind == "Reshape":
            y = g.op(kind, y, np.array(argument, np.int64))
            shape = list(argument)
        else:
            y = g.op(kind, y, np.array([argument], np.int64))
            shape = (
                [*shape[:argument], 1, *shape[argument:]]
                if kind == "Unsqueeze"
                else shape[:argument] + shape[argument + 1 :]
            )
    return tiny.finish(g, g.op("Neg", y), "y", [None] * len(shape) if dynamic else shape)


@settings(max_examples=60, deadline=None)
@given(moves(), st.booleans())
def test_collapsed_chains_compute_the_same(chain, dynamic):
    source = build(chain, dynamic)
    new = source.clone()
    canonicalize(new)
    assert new.model.graph.num_nodes() <= source.model.graph.num_nodes()
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with Session(source) as a, Session(new) as b:
        np.testing.assert_array_equal(a.run({"x": x})["y"], b.run({"x": x})["y"])


@settings(max_examples=40, deadline=None)
@given(moves(), st.booleans())
def test_proved_shapes_are_the_runtimes(chain, dynamic):
    g = build(chain, dynamic)
    f = Facts(g)
    shape = f.shape(g.outputs[0])
    assert shape is not None
    x = np.zeros(SHAPE, np.float32)
    with Session(g) as s:
        real = s.run({"x": x})["y"].shape
    known = {"batch": SHAPE[0]}
    for want, got in zip(real, shape, strict=True):
        if isinstance(got, int):
            assert got == want
        elif all(n in known for n in got.names):
            assert got.factor * math.prod(known[n] for n in got.names) == want


def test_run_time_scale_of_old_exporters_is_a_number():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 64]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="scale"), ir_version=10))
    last = g.op("Slice", g.op("Shape", x), np.array([-1]), np.array([2**63 - 1]))
    root = g.op("Sqrt", g.op("Cast", last, to=1))
    scale = g.op("Sqrt", g.op("Div", np.array([1.0], np.float32), root))
    assert Facts(g).scalar(scale) == pytest.approx(64**-0.25)


def test_shape_reads_of_activations_are_rerooted_on_inputs():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 8]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="read"), ir_version=10))
    y = g.op("Relu", x)
    sizes = g.op("Shape", g.op("Transpose", y, perm=[1, 0, 2]))
    turned = g.op("Concat", g.op("Slice", sizes, np.array([0]), np.array([2])), np.array([2, 4]), axis=0)
    out = g.op("Expand", g.op("Neg", np.ones((1, 1, 2, 4), np.float32)), turned)
    g = tiny.finish(g, g.op("Add", out, g.op("ReduceMax", y)), "y", ["s", "b", 2, 4])
    canonicalize(g)
    assert all(n.inputs[0] is g.inputs[0] for n in g.nodes("Shape"))
    with Session(g) as s:
        assert s.run({"x": np.zeros((3, 5, 8), np.float32)})["y"].shape == (5, 3, 2, 4)


def test_local_functions_are_inlined():
    x, a = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 4])) for n in "xa")
    inner = ir.node("Sigmoid", [a])
    body = ir.Graph([a], inner.outputs, nodes=[inner], opset_imports={"": 20}, name="body")
    call = ir.node("Gate", [x], domain="mine")
    call.outputs[0].name = "y"
    outer = ir.Graph([x], [], nodes=[call], opset_imports={"": 20, "mine": 1}, name="outer")
    function = ir.Function("mine", "Gate", graph=body, attributes=[])
    g = tiny.finish(Graph(ir.Model(outer, ir_version=10, functions=[function])), call.outputs[0], "y", ["b", 4])
    canonicalize(g)
    assert [n.op_type for n in g.nodes()] == ["Sigmoid"]
    assert not g.model.functions


def test_axes_broadcast_together_are_equal_in_proofs_only():
    """Two inputs name their batch differently; one of them may be 1 when the model runs."""
    x, p = (
        ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([d, "s", 8]))
        for n, d in (("x", "s72"), ("p", "s43"))
    )
    g = Graph(ir.Model(ir.Graph([x, p], [], nodes=[], opset_imports={"": 23}, name="two"), ir_version=10))
    y = g.op("Add", x, p)
    zeros = g.op("ConstantOfShape", g.op("Concat", g.op("Shape", y, start=0, end=2), np.array([1, 1]), axis=0))
    split = g.op("Reshape", y, g.op("Concat", g.op("Shape", y, start=0, end=2), np.array([2, 4]), axis=0))
    source = tiny.finish(g, g.op("Add", split, zeros), "y", [None] * 4)
    f = Facts(source)
    first = f.shape(source.node("Add").outputs[0])[0]
    assert f.same(first, named("s72"))
    assert f.same(first, named("s43"))
    assert not f.rooted(first)
    new = source.clone()
    canonicalize(new)
    feeds = {"x": np.ones((1, 5, 8), np.float32), "p": np.ones((3, 5, 8), np.float32)}
    with Session(source) as a, Session(new) as b:
        np.testing.assert_array_equal(a.run(feeds)["y"], b.run(feeds)["y"])


def test_linears_move_above_a_swap_of_batch_and_sequence():
    """torch's MultiheadAttention works sequence first: its projections go where the stream is."""
    g = graph(x=["b", "s", 8])
    first = g.op("Transpose", g.value("x"), perm=[1, 0, 2])
    y = g.op("Add", g.op("MatMul", first, weight(8, 6)), f32(RNG.standard_normal(6)))
    source, new = raised(g, g.op("Transpose", y, perm=[1, 0, 2]), "b", "s", 6)
    assert ops(new) == {"MatMul": 1, "Add": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 5, 8))))
