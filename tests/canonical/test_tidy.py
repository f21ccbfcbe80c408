"""One spelling for arithmetic that exporters and tools write in several, and factors that a tool moved into weights."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.analysis.sizes import add, floor, named, subtract
from onnxcomp.graph import CONTRIB
from tests.hand import RNG, f32, graph, i64, ops, raised, same, weight


def test_a_quotient_by_a_number_is_a_product():
    g = graph(x=["b", 8])
    source, new = raised(g, g.op("Tanh", g.op("Div", g.value("x"), f32(30))), "b", 8)
    assert ops(new) == {"Mul": 1, "Tanh": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 8)) * 40))


@pytest.mark.parametrize("after", ["Floor", "Round", "Cast"])
def test_a_quotient_that_is_rounded_stays(after):
    """Multiplying by the reciprocal may fall on the other side of an integer."""
    g = graph(x=["b", 8])
    z = g.op(after, g.op("Div", g.value("x"), f32(3)), **({"to": 7} if after == "Cast" else {}))
    y = g.op("Cast", z, to=1) if after == "Cast" else z
    source, new = raised(g, y, "b", 8)
    assert (ops(new)["Div"], ops(new)["Mul"]) == (1, 0)
    same(source, new, tolerance=0, x=f32(RNG.integers(-9, 9, (2, 8)) * 3))


def test_a_quotient_of_positions_stays():
    g = graph(x=["b", "s"])
    place = g.op("Range", np.array(0), g.op("Squeeze", g.op("Shape", g.value("x"), start=1), i64(0)), np.array(1))
    bucket = g.op("Cast", g.op("Log", g.op("Div", g.op("Cast", place, to=1), f32(3))), to=7)
    _, new = raised(g, g.op("Add", g.value("x"), g.op("Cast", bucket, to=1)), "b", "s")
    assert (ops(new)["Div"], ops(new)["Mul"]) == (1, 0)


@pytest.mark.parametrize("turned", [False, True])
def test_two_bounds_are_a_clip(turned):
    g = graph(x=["b", 8], h=["b", 8])
    high = g.op("ReduceMax", g.value("h"), keepdims=0)
    low = g.op("Neg", high)
    above = g.op("Max", *((low, g.value("x")) if turned else (g.value("x"), low)))
    source, new = raised(g, g.op("Min", *((high, above) if turned else (above, high))), "b", 8)
    assert (ops(new)["Clip"], ops(new)["Min"], ops(new)["Max"]) == (1, 0, 0)
    feeds = {"x": f32(RNG.standard_normal((3, 8)) * 4), "h": f32(np.abs(RNG.standard_normal((3, 8))))}
    same(source, new, tolerance=0, **feeds)


def test_bounds_of_several_numbers_stay():
    g = graph(x=["b", 8])
    _, new = raised(g, g.op("Min", g.op("Max", g.value("x"), weight(8)), f32(1)), "b", 8)
    assert (ops(new)["Clip"], ops(new)["Min"], ops(new)["Max"]) == (0, 1, 1)


def test_a_cast_to_the_type_of_another_value_is_a_cast():
    g = graph(x=["b", 8], h=["b", 8])
    whole = g.op("Cast", g.value("h"), to=7)
    source, new = raised(g, g.op("Mul", g.value("x"), g.op("CastLike", whole, g.value("x"))), "b", 8)
    assert ops(new) == {"Cast": 2, "Mul": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 8))), h=f32(RNG.standard_normal((2, 8)) * 9))


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_half_of_a_gelu_in_the_weights_behind_comes_back(op):
    """onnxsim multiplies the 0.5 of a spelled-out GELU into the convolution behind it."""
    g = graph(x=["b", 4, 8])
    x = g.value("x")
    twice = g.op("Mul", x, g.op("Add", g.op("Erf", g.op("Div", x, f32(2**0.5))), f32(1)))
    w = weight(6, 4, 3) if op == "Conv" else weight(8, 6)
    source, new = raised(g, g.op(op, twice, w), "b", 6 if op == "Conv" else 4, 6)
    assert ops(new) == {"Gelu": 1, op: 1}
    same(source, new, x=f32(RNG.standard_normal((2, 4, 8))))


def test_a_factor_of_an_activation_that_others_read_stays_beside_it():
    g = graph(x=["b", 8])
    x = g.value("x")
    twice = g.op("Mul", x, g.op("Add", g.op("Erf", g.op("Div", x, f32(2**0.5))), f32(1)))
    source, new = raised(g, g.op("Add", g.op("MatMul", twice, weight(8, 8)), twice), "b", 8)
    assert ops(new) == {"Gelu": 1, "Mul": 1, "MatMul": 1, "Add": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 8))))


@pytest.mark.parametrize("bias", [False, True])
def test_the_number_of_a_fused_product_stands_where_no_bias_is_parted_from_its_linear(bias):
    g = graph(x=["b", 8])
    y = g.op("FusedMatMul", g.value("x"), weight(8, 6), domain=CONTRIB, alpha=0.3)
    source, new = raised(g, g.op("Add", y, weight(6)) if bias else g.op("Tanh", y), "b", 6)
    assert [n.op_type for n in new.nodes()] == (["Mul", "MatMul", "Add"] if bias else ["MatMul", "Mul", "Tanh"])
    same(source, new, x=f32(RNG.standard_normal((2, 8))))


def test_parts_of_a_packed_weight_in_bf16():
    g = graph(x=["b", 8])
    w = g.constant(weight(8, 6).astype(ir.DataType.BFLOAT16.numpy()), "w")
    a, b = (lambda v: (v, v.producer().outputs[1]))(g.op("Split", w, i64(2, 4), outputs=2, axis=1))
    x = g.op("Cast", g.value("x"), to=16)
    y = g.op("Concat", g.op("MatMul", x, a), g.op("MatMul", x, b), axis=-1)
    _, new = raised(g, g.op("Cast", y, to=1), "b", 6)
    assert ops(new)["Split"] == 0


# ---- names of sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", range(-9, 10))
def test_a_floor_with_an_offset_is_what_it_is_in_numbers(divisor, offset):
    for n in range(20):
        made = floor(add(named("n"), offset), divisor)
        text = str(made)
        assert eval(text, {"n": n}) == (n + offset) // divisor


def test_equal_lengths_of_convolutions_have_one_name():
    """`((n // 4) - 5) // 2 + 1` as exporters compute it, `((n - 4) // 4 - 2) // 2` as the rule of Conv says."""
    n = named("n")
    one = add(floor(subtract(floor(n, 4), 5), 2), 1)
    assert one == floor(add(floor(subtract(n, 4), 4), -2), 2)
    assert subtract(add(n, 3), 3) == n


@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_of_turned_heads_goes_above_the_turn(wide):
    """Norms of queries and keys behind the heads' Transpose, in a wider type or not, leave no Transpose (Gemma 3)."""
    g = graph(opset=23, x=["b", "s", 16])
    x = g.op("Reshape", g.op("Cast", g.value("x"), to=10) if wide else g.value("x"), i64(0, 0, 4, 4))
    turned = g.op("Transpose", x, perm=[0, 2, 1, 3])
    y = g.op("Cast", turned, to=1) if wide else turned
    y = g.op("RMSNormalization", y, f32([1, 2, 3, 4]), axis=-1, epsilon=1e-6)
    y = g.op("Cast", y, to=10) if wide else y
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), i64(0, 0, 16))
    source, new = raised(g, g.op("Cast", y, to=1) if wide else y, "b", "s", 16)
    assert (ops(new)["Transpose"], ops(new)["RMSNormalization"]) == (0, 1)
    same(source, new, 1e-3 if wide else 2e-6, x=f32(RNG.standard_normal((2, 3, 16))))


def test_a_norm_over_a_turned_axis_stays():
    g = graph(opset=23, x=["b", "s", 4])
    turned = g.op("Transpose", g.value("x"), perm=[0, 2, 1])
    y = g.op("RMSNormalization", turned, g.op("ReduceMean", turned, i64(0, 1), keepdims=0), axis=-1)
    _, new = raised(g, y, "b", 4, "s")
    assert next(n.op_type for n in new.nodes()) == "Transpose"
