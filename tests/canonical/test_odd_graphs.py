"""Graphs that are no transformers, contents against the runtime, rotary embeddings written by hand."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import canonicalize, sites
from onnxcomp.engine.compress import optimize
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny

HEAD = '<ir_version: 8, opset_import: ["":{opset}, "com.microsoft":1]> odd '


def parse(text: str, opset: int = 18) -> Graph:
    """A graph from ONNX's text form; values declared but not made become random constants."""
    model = onnx.parser.parse_model(HEAD.format(opset=opset) + text)
    rng = np.random.default_rng(0)
    for info in list(model.graph.value_info):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), info.name)
        )
        model.graph.value_info.remove(info)
    return Graph(ir.serde.deserialize_model(model))


ODD = {
    "convolution and branches": (
        "(float[N,3,8,8] x, bool c) => (float[N,4] y) <float[4,3,3,3] w, float[4,4] k> {"
        "a=Conv(x,w) b=GlobalAveragePool(a) d=Flatten(b) e=Gemm(d,k) y=If(c)<"
        "then_branch=p() => (float[N,4] t) {t=Relu(e)}, else_branch=q() => (float[N,4] u) {u=Softmax<axis=-1>(e)}>}",
        ["Conv", "GlobalAveragePool", "Flatten", "MatMul", "If"],
    ),
    "softmax of a vector": (
        "(float[1] x, float[M] v) => (float[M] y) {a=Softmax<axis=-1>(v) y=Div(a,x)}",
        ["Softmax", "Div"],
    ),
    "strings": ("(string[N] x) => (int64[K] y) {a=StringNormalizer(x) y=Shape(a)}", ["StringNormalizer", "Shape"]),
    "no elements": (
        "(float[N,0] x) => (float[N,0] y) {t=Constant<value=int64[2] {0,0}>() y=Reshape<allowzero=1>(x,t)}",
        ["Reshape"],
    ),
    "one value, three outputs": (
        "(float[a,b] x) => (float y, float[a,b] z, float[b,a] w)"
        "{z=Identity(x) q=Identity(x) w=Transpose<perm=[1,0]>(q) y=ReduceMean<keepdims=0>(z)}",
        ["Identity", "ReduceMean", "Transpose"],
    ),
    "contrib operator": (
        "(float[N,8,8] x) => (float[N,8,8] y) {z=Relu(x) y=com.microsoft.Inverse(z)}",
        ["Relu", "Inverse"],
    ),
    "recurrent": (
        "(float[T,N,8] x) => (float[T,d,N,4] y) <float[1,16,8] w, float[1,16,4] r> {y,h,c=LSTM<hidden_size=4>(x,w,r)}",
        ["LSTM"],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_transformer_stays_as_it_is(name):
    text, expected = ODD[name]
    g = parse(text)
    eligible = list(sites(g))
    canonicalize(g)
    assert [n.op_type for n in g.nodes()] == expected
    settled = g.touched | {d.site for d in g.declined}
    assert all(s.name in settled or settled.intersection(s.nodes) for s in eligible)
    edits = g.edits
    canonicalize(g)
    assert g.edits == edits
    assert describe(g)["layers"] == 0


def test_old_operator_set_with_constant_nodes():
    g = parse(
        "(float[N,S,8] x) => (float[N,S,8] y) {m=ReduceMean<axes=[-1],keepdims=1>(x) d=Sub(x,m)"
        "two=Constant<value=float {2.0}>() p=Pow(d,two) v=ReduceMean<axes=[-1],keepdims=1>(p)"
        "e=Constant<value=float {0.00001}>() ve=Add(v,e) r=Sqrt(ve) y=Div(d,r)}",
        opset=13,
    )
    source = g.clone()
    canonicalize(g)
    assert [n.op_type for n in g.nodes()] == ["LayerNormalization"]
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    with Session(source) as a, Session(g) as b:
        np.testing.assert_allclose(a.run({"x": x})["y"], b.run({"x": x})["y"], rtol=1e-5, atol=1e-6)


# ---- contents --------------------------------------------------------------------------------------------------------

INTEGERS = {
    "sum": "y=Add(s,k)",
    "difference": "y=Sub(s,k)",
    "product": "y=Mul(s,k)",
    "quotient": "m=Neg(s) y=Div(m,k)",
    "remainder": "y=Mod(s,k)",
    "extremes": "a=Min(s,k) b=Max(s,k) y=Concat<axis=0>(a,b)",
    "comparisons": "a=Equal(s,k) b=Greater(s,k) c=Not(a) d=And(b,c) e=Or(d,a) f=Less(s,k) y=Where(e,s,k)",
    "orders": "a=GreaterOrEqual(s,k) b=LessOrEqual(s,k) c=And(a,b) y=Cast<to=7>(c)",
    "gathered": "i=Constant<value=int64[2] {-1,0}>() y=Gather<axis=0>(s,i)",
    "sliced": "i=Constant<value=int64[1] {-2}>() j=Constant<value=int64[1] {9223372036854775807}>() y=Slice(s,i,j)",
    "reversed": "i=Constant<value=int64[1] {-1}>() j=Constant<value=int64[1] {-9223372036854775808}>()"
    "z=Constant<value=int64[1] {0}>() y=Slice(s,i,j,z,i)",
    "reshaped": "t=Constant<value=int64[2] {-1,1}>() a=Reshape(s,t) b=Transpose<perm=[1,0]>(a) y=Squeeze(b,o)"
    "o=Constant<value=int64[1] {0}>()",
    "expanded": "o=Constant<value=int64[1] {0}>() a=Unsqueeze(s,o) t=Constant<value=int64[2] {2,1}>() y=Expand(a,t)",
    "filled": "y=ConstantOfShape<value=int64[1] {7}>(k)",
    "range": "o=Constant<value=int64 {1}>() z=Constant<value=int64 {0}>() n=Size(x) y=Range(z,n,o)",
    "products": "a=ReduceProd<keepdims=1>(s) y=Identity(a)",
    "scalar product": "y=ReduceProd<keepdims=0>(s)",
}
FLOATS = {
    "root of a root": "a=Cast<to=1>(s) b=Sqrt(a) y=Reciprocal(b)",
    "ceiling": "a=Cast<to=1>(s) p=Constant<value=float {0.4}>() b=Mul(a,p) y=Ceil(b)",
    "power": "a=Cast<to=1>(s) p=Constant<value=float {0.5}>() b=Pow(a,p) c=Neg(b) d=Abs(c) y=Floor(d)",
    "arithmetic": "a=Cast<to=1>(s) p=Constant<value=float {0.5}>() b=Mul(a,p) c=Sub(b,p) d=Add(c,a) y=Div(d,b)",
}


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_contents_are_what_the_runtime_computes(name):
    body = INTEGERS.get(name) or FLOATS[name]
    kind = "int64" if name in INTEGERS else "float"
    g = parse(f"(float[2,3,4] x) => ({kind}[n] y) {{ s=Shape(x) k=Constant<value=int64[3] {{2,2,5}}>() {body} }}")
    g.sort()
    content = Facts(g).content(g.outputs[0])
    assert content is not None
    g.model.graph.outputs[0].shape = None if content.ndim != 1 else ir.Shape(["n"])
    with Session(Graph(g.model)) as s:
        real = s.run({"x": np.zeros((2, 3, 4), np.float32)})["y"]
    np.testing.assert_allclose(content.astype(np.float64), real, rtol=1e-6)


# ---- rotary ----------------------------------------------------------------------------------------------------------

N, H = 2, 8


def rotary_graph(*, heads_axis: int = 1, table: str = "computed", turn: str = "slices", order: int = 1) -> Graph:
    """`x cos + turned(x) sin` on `[b, n, s, h]` or `[b, s, n, h]`; tables computed or read from a constant."""
    dims = ["b", N, "s", H] if heads_axis == 1 else ["b", "s", N, H]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="rotary"), ir_version=10))
    at = 3 - heads_axis
    size = g.op("Squeeze", g.op("Shape", x, start=at, end=at + 1), np.array([0]))
    place = g.op("Range", np.array(0), size, np.array(1))
    step = (10.0 ** -np.arange(H // 2)).astype(np.float32)
    if table == "computed":
        angle = g.op("Mul", g.op("Unsqueeze", g.op("Cast", place, to=1), np.array([1])), step[None])
        both = g.op("Concat", angle, angle, axis=-1)
        cos, sin = (g.op(op, both) for op in ("Cos", "Sin"))
    else:
        every = np.outer(np.arange(32), step)
        both = np.concatenate([every, every if table == "cached" else every + 1], 1).astype(np.float32)
        cos, sin = (g.op("Gather", f(both), place) for f in (np.cos, np.sin))
    if heads_axis == 2:
        cos, sin = (g.op("Unsqueeze", t, np.array([1])) for t in (cos, sin))
    if turn == "slices":
        low = g.op("Slice", x, np.array([0]), np.array([H // 2]), np.array([-1]))
        high = g.op("Slice", x, np.array([H // 2]), np.array([2**63 - 1]), np.array([-1]))
    else:
        low = g.op("Split", x, np.array([H // 2, H // 2]), axis=-1, outputs=2)
        high = low.producer().outputs[1]
    turned = g.op("Concat", *[g.op("Neg", high), low][::order], axis=-1)
    out = g.op("Add", g.op("Mul", turned, sin), g.op("Mul", cos, x))
    return tiny.finish(g, out, "y", dims)


@pytest.mark.parametrize("heads_axis", [1, 2])
@pytest.mark.parametrize("table", ["computed", "cached"])
@pytest.mark.parametrize("turn", ["slices", "split"])
def test_rotary_is_recognised_however_spelled(heads_axis, table, turn):
    source = rotary_graph(heads_axis=heads_axis, table=table, turn=turn)
    g = source.clone()
    canonicalize(g)
    (node,) = g.nodes("RotaryEmbedding")
    assert node.attributes["num_heads"].value == N
    assert g.declined == []
    assert not {n.op_type for n in g.nodes()} & {"Neg", "Split", "Mul" if table == "cached" else "Slice"}
    x = np.random.default_rng(0).standard_normal((3, N, 5, H) if heads_axis == 1 else (3, 5, N, H)).astype(np.float32)
    with Session(source) as a, Session(g) as b:
        np.testing.assert_allclose(a.run({"x": x})["y"], b.run({"x": x})["y"], rtol=1e-5, atol=1e-6)
    again = g.clone()
    canonicalize(again)
    assert again.edits == 0


def test_turning_the_other_way_is_no_rotary():
    g = rotary_graph(order=-1)
    canonicalize(g)
    assert not list(g.nodes("RotaryEmbedding"))


def test_tables_of_unequal_halves_are_declined():
    g = rotary_graph(table="unequal")
    canonicalize(g)
    assert [d.why for d in g.declined] == ["rotary: the cosine and sine tables do not consist of two equal halves"]


def test_a_float_next_to_an_integer_is_not_rounded():
    """Single precision may fall on the other side, so nothing is claimed."""
    g = parse(
        "(float[3] x) => (float[1] y) {s=Shape(x) a=Cast<to=1>(s) p=Constant<value=float {0.3333333}>()"
        "b=Mul(a,p) y=Ceil(b)}"
    )
    assert Facts(g).content(g.outputs[0]).tolist() == [None]


def test_an_operator_without_a_new_kernel_is_refused_with_the_way_out(tmp_path):
    text = "(float[N,8] x) => (float[N,8] y) <float[8,8] w> {h=MatMul(x,w) r=RandomUniformLike(h) y=Mul(h,r)}"
    source = storage.save(parse(text, 17), tmp_path / "source")
    with pytest.raises(ModelError, match=r"RandomUniformLike.*opset= 21 writes older operators"):
        optimize(source, tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()
    optimize(source, tmp_path / "out", measure=False, opset=21)
    assert (tmp_path / "out").exists()
