"""The owner of a model: what counts as an edit, what is refused, what `take` cuts."""

import ml_dtypes
import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp import blocks
from onnxcomp.errors import ModelError, NotConstant
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import AttrSlot, Entries, Group, Size, Slot, layout
from onnxcomp.runtime.sessions import Session
from tests import tiny


def weight(g: Graph) -> ir.Value:
    return blocks.linears(g)[0].weight


def test_equal_content_is_no_edit_and_new_content_is_one():
    g = tiny.linear()
    w = weight(g)
    g.put(w, g.array(w).copy())
    assert g.edits == 0
    g.put(w, g.array(w) + 1)
    assert g.edits == 1
    assert blocks.linears(g)[0].name in g.touched


def test_clone_shares_tensors_and_is_independent():
    g = tiny.linear()
    twin = g.clone()
    assert twin.tensor(weight(twin)) is g.tensor(weight(g))
    before = g.array(weight(g)).copy()
    twin.put(weight(twin), before * 2)
    np.testing.assert_array_equal(g.array(weight(g)), before)


def test_put_for_some_users_leaves_the_others():
    g = tiny.decoder(layers=1, tied=True)
    table = next(v for v in g.model.graph.initializers.values() if "words" in v.name)
    gather = next(n for n, _ in table.uses() if n.op_type == "Gather")
    old = g.array(table).copy()
    new = g.put(table, old + 1, users=[gather])
    assert new is not table
    np.testing.assert_array_equal(g.array(table), old)
    np.testing.assert_array_equal(g.array(gather.inputs[0]), old + 1)


def test_put_and_array_of_computed_values_are_refused():
    g = tiny.linear()
    with pytest.raises(NotConstant, match="'x'"):
        g.array(g.inputs[0])
    with pytest.raises(NotConstant, match="'y'"):
        g.put(g.outputs[0], np.zeros(1, np.float32))


@given(st.integers(0, 1), st.lists(st.floats(0.125, 10, width=32), min_size=8, max_size=8))
def test_scale_is_a_product_along_one_axis(axis, by):
    g = tiny.linear(8, 8)
    w = g.array(weight(g)).astype(np.float64)
    g.scale(weight(g), np.array(by), axis)
    want = w * np.array(by)[:, None] if axis == 0 else w * np.array(by)
    np.testing.assert_allclose(g.array(weight(g)), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, np.float16])
def test_low_precision_constants_keep_their_type(dtype):
    g = tiny.linear()
    v = g.constant(np.arange(6).astype(dtype).reshape(2, 3))
    assert g.array(v).dtype == dtype
    assert v.shape == ir.Shape([2, 3])


def test_replacing_an_output_keeps_the_public_name():
    g = tiny.linear()
    y = g.outputs[0]
    g.replace(y, g.op("Neg", y.producer().inputs[0], like=y))
    g.sweep()
    g.verify()
    assert [v.name for v in g.outputs] == ["y"]


def test_output_replaced_by_an_input_goes_through_identity():
    g = tiny.linear(8, 8)
    g.replace(g.outputs[0], g.inputs[0])
    g.sweep()
    g.verify()
    x = np.ones((1, 2, 8), np.float32)
    with Session(g) as s:
        np.testing.assert_array_equal(s.run({"x": x})["y"], x)


def test_set_attr_counts_only_differences():
    g = tiny.encoder()
    norm = next(g.nodes("LayerNormalization"))
    g.set_attr(norm, epsilon=norm.attributes.get_float("epsilon"))
    assert g.edits == 0
    g.set_attr(norm, epsilon=0.5)
    g.set_attr(norm, epsilon=None)
    assert g.edits == 2
    assert "epsilon" not in norm.attributes


@pytest.mark.parametrize("damage", ["dangling", "name", "interface", "schema", "cycle"])
def test_verify_finds_damage(damage):
    g = tiny.linear()
    node = next(g.nodes("MatMul"))
    match damage:
        case "dangling":
            node.replace_input_with(0, ir.Value(name="nowhere"))
        case "name":
            node.outputs[0].name = "x"
        case "interface":
            g.outputs[0].name = "z"
        case "cycle":
            node.replace_input_with(0, g.outputs[0])
        case "schema":
            node.op_type = "Softmax"
    with pytest.raises(ModelError):
        g.verify()


def test_dynamic_axis_may_not_become_static():
    g = tiny.linear()
    g.outputs[0].shape = ir.Shape([1, 1, 6])
    with pytest.raises(ModelError, match="outputs changed"):
        g.verify()


def group() -> Group:
    return Group(
        4,
        (Slot("a", 1, layout(4, 2)), Slot("b", 0, layout(4, offset=8, stride=2, length=16))),
        (Entries("node", 1, (Size(1, layout(4, 2)),)),),
        (AttrSlot("node", "heads", layout(4)),),
    )


def cut_model() -> Graph:
    a, b = np.arange(24, dtype=np.float32).reshape(3, 8), np.arange(16, dtype=np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 8]))
    values = {
        k: ir.Value(name=k, const_value=ir.tensor(v, name=k))
        for k, v in {"a": a, "b": b, "n": np.array([0, 8])}.items()
    }
    node = ir.node("Reshape", [x, values["n"]], {}, name="node")
    node.attributes["heads"] = ir.AttrInt64("heads", 4)
    model = ir.Model(
        ir.Graph([x], list(node.outputs), nodes=[node], initializers=list(values.values()), opset_imports={"": 23}),
        ir_version=10,
    )
    return Graph(model)


def test_take_cuts_every_slot_size_and_attribute():
    g = cut_model()
    a, b = g.array(g.value("a")).copy(), g.array(g.value("b")).copy()
    g.take(group(), np.array([0, 2]))
    np.testing.assert_array_equal(g.array(g.value("a")), a[:, [0, 1, 4, 5]])
    np.testing.assert_array_equal(g.array(g.value("b")), np.delete(b, [10, 14]))
    assert g.array(g.value("n")).tolist() == [0, 4]
    assert g.node("node").attributes.get_int("heads") == 2


def test_taking_all_units_is_no_edit():
    g = cut_model()
    g.take(group(), np.arange(4))
    assert g.edits == 0


@pytest.mark.parametrize("keep", [[], [1, 1], [2, 1], [-1], [4]])
def test_take_refuses_bad_units(keep):
    g = cut_model()
    with pytest.raises(ModelError, match="keep must be"):
        g.take(group(), np.array(keep, int))
    assert g.edits == 0


def test_take_that_does_not_fit_edits_nothing():
    g = cut_model()
    wrong = Group(4, (Slot("a", 1, layout(4, 2)), Slot("b", 0, layout(4, 9))))
    with pytest.raises(ModelError, match="'b'"):
        g.take(wrong, np.array([0]))
    assert g.edits == 0


def test_what_only_a_removed_branch_used_is_removed_too():
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[4, 4] y, bool flag) => (float[4, 4] z)
    <float[1] w = {2}, float[1] kept = {3}> {
        unused = If (flag) <
            then_branch = a () => (float[4, 4] p) { t = Identity (w) p = Mul (y, t) },
            else_branch = b () => (float[4, 4] q) {
                q = If (flag) <
                    then_branch = c () => (float[4, 4] u) { u = Mul (y, w) },
                    else_branch = d () => (float[4, 4] v) { v = Identity (y) }
                >
            }
        >
        z = If (flag) <
            then_branch = e () => (float[4, 4] r) { r = Mul (y, kept) },
            else_branch = f () => (float[4, 4] s) { s = Identity (y) }
        >
    }"""
    g = Graph(ir.from_proto(onnx.parser.parse_model(text)))
    assert g.sweep() == 1
    assert list(g.model.graph.initializers) == ["kept"]


def test_nbytes_counts_shared_tensors_once():
    g = tiny.linear(8, 8, bias=False)
    before = g.nbytes
    g.constant(g.tensor(weight(g)), "again")
    assert g.nbytes == before


@pytest.mark.parametrize(
    ("size", "followed"), [(300, True), ((1 << 24) + 1, False), (1 << 40, False), ((1 << 63) - 1, False)]
)
def test_a_range_of_a_huge_size_is_not_written_out(monkeypatch: pytest.MonkeyPatch, size: int, followed: bool) -> None:
    """ONNX's inference keeps every element of a Range whose size it follows: a small file took all memory."""
    text = f"""<ir_version: 10, opset_import: ["": 18]> g (float[{size}] x) => (int64[m] y)
    <int64 zero = {{0}}, int64 one = {{1}}> {{
        count = Size (x)
        y = Range (zero, count, one)
    }}"""
    asked = []

    def infer(proto: onnx.ModelProto, *, data_prop: bool, **_: object) -> onnx.ModelProto:
        asked.append(data_prop)
        return proto

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", infer)
    Graph(ir.from_proto(onnx.parser.parse_model(text))).infer_shapes()
    assert asked == [followed]
