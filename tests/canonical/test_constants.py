"""Constants and choices known before the model runs, and what they open up for masks."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.canonical import fold
from tests.canonical.test_attention import B, H, N, S, attend, attention_graph, merged, only_attention, qkv, scores
from tests.hand import LOWEST, RNG, f32, graph, i64, ops, raised, same
from tests.tiny import finish


def test_a_resized_position_bias_is_computed_once():
    g = graph(x=["b", 4, 5, 5])
    table = f32(RNG.standard_normal((1, 4, 3, 3)))
    resized = g.op(
        "Resize", table, None, None, i64(1, 4, 5, 5), mode="linear", coordinate_transformation_mode="half_pixel"
    )
    y = g.op("Add", g.value("x"), g.op("Transpose", resized, perm=[0, 1, 3, 2]))
    source, new = raised(g, y, "b", 4, 5, 5)
    assert ops(new) == {"Add": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 4, 5, 5))))


def test_a_turned_weight_is_not_folded():
    """Small models must not differ from large ones, whose tied weights stay one tensor seen through a Transpose."""
    g = graph(x=["b", 8])
    w = g.constant(f32(RNG.standard_normal((6, 8))), "w")
    z = g.op("MatMul", g.value("x"), g.op("Transpose", w, perm=[1, 0]))
    back = g.op("MatMul", z, w)
    _, new = raised(g, back, "b", 8)
    assert ops(new) == {"MatMul": 2, "Transpose": 1}


@pytest.mark.parametrize("op", ["Log", "Exp", "Pow"])
def test_functions_that_round_otherwise_elsewhere_are_left(op):
    assert op not in fold.ARITHMETIC | fold.LOGIC | fold.LAYOUT


def test_a_choice_that_is_always_the_same_goes():
    g = graph(x=["b", 4])
    never = g.op("Greater", f32([1, 2, 3, 4]), f32(9))
    y = g.op("Neg", g.op("Where", never, f32([0, 0, 0, 0]), g.value("x")))
    assert ops(raised(g, y, "b", 4)[1]) == {"Neg": 1}


def test_a_choice_that_also_widens_stays():
    g = graph(x=["b", 1])
    never = g.op("Greater", f32([1, 2, 3, 4]), f32(9))
    y = g.op("Neg", g.op("Where", never, f32([0, 0, 0, 0]), g.value("x")))
    source, new = raised(g, y, "b", 4)
    assert ops(new) != {"Neg": 1}
    same(source, new, x=f32(RNG.standard_normal((2, 1))))


def test_an_empty_pad_goes_and_a_real_one_gives_its_shape():
    g = graph(x=["b", 4, 6])
    none = g.op("Pad", g.value("x"), i64(0, 0, 0, 0, 0, 0))
    y = g.op("Reshape", g.op("Pad", none, i64(0, 1, 0, 0, 1, 0)), i64(0, -1))
    source, new = raised(g, y, "b", 36)
    assert ops(new) == {"Pad": 1, "Reshape": 1}
    assert new.tensor(next(iter(new.nodes("Reshape"))).inputs[1]).numpy().tolist() == [0, 36]
    same(source, new, x=f32(RNG.standard_normal((2, 4, 6))))


# ---- masks -----------------------------------------------------------------------------------------------------------


def guarded(g, bias):
    """The transformers exporter's attention: rows whose mask is the lowest number everywhere are set to zero."""
    out = g.op("MatMul", g.op("Softmax", g.op("Add", scores(g), bias), axis=-1), attended_values(g))
    allowed = g.op("Cast", g.op("Greater", bias, f32(LOWEST)), to=ir.DataType.FLOAT)
    none = g.op("Less", g.op("ReduceSum", allowed, i64(-1), keepdims=1), f32(1))
    return merged(g, g.op("Where", none, f32(0), out))


def attended_values(g):
    return g.op("Transpose", g.op("Reshape", g.value("v"), i64(0, 0, N, H)), perm=[0, 2, 1, 3])


def test_a_guard_on_a_float_bias_goes_with_the_rows_it_is_for():
    g = attention_graph(keep=["b", 1, "s", "s", bool], bias=[1, N, "s", "s"])
    bias = g.op("Where", g.value("keep"), g.value("bias"), f32(LOWEST))
    source, new = raised(g, guarded(g, bias), "b", "s", N * H)
    node = only_attention(new)
    assert node.inputs[3].producer().op_type == "Where"
    keep = RNG.random((B, 1, S, S)) < 0.6
    keep[..., 0] = True
    same(source, new, keep=keep, bias=f32(RNG.standard_normal((1, N, S, S))), **qkv())


def test_a_guard_on_a_float_bias_stays_when_exact_rows_are_asked_for():
    g = attention_graph(keep=["b", 1, "s", "s", bool], bias=[1, N, "s", "s"])
    bias = g.op("Where", g.value("keep"), g.value("bias"), f32(LOWEST))
    source, new = raised(g, guarded(g, bias), "b", "s", N * H, exact_rows=True)
    assert [d.why for d in new.declined] == [
        "attention: rows without visible keys would change, and exact rows are requested"
    ]
    keep = RNG.random((B, 1, S, S)) < 0.3
    keep[:, :, 2] = False
    same(source, new, keep=keep, bias=f32(RNG.standard_normal((1, N, S, S))), **qkv())


def test_a_mask_without_any_effect_does_not_hide_a_bias():
    g = attention_graph(bias=[1, N, "s", "s"])
    everything = g.op("Cast", g.op("Expand", np.array(True), i64(1, 1, 1, 1)), to=ir.DataType.FLOAT)
    s = g.op("Add", scores(g), g.op("Add", g.value("bias"), everything))
    source, new = raised(g, attend(g, s), "b", "s", N * H)
    assert only_attention(new).inputs[3] is new.value("bias")
    same(source, new, bias=f32(RNG.standard_normal((1, N, S, S))), **qkv())


@pytest.mark.parametrize("low", [-np.inf, LOWEST, -1e9])
def test_a_constant_mask_of_zeros_and_fills_is_bool(low):
    g = attention_graph()
    mask = np.where(np.tril(np.ones((S, S))) > 0, 0, low).astype(np.float32)
    for name in ("q", "k", "v"):
        g.value(name).shape = ir.Shape(["b", S, N * H])
    source, new = raised(g, attend(g, g.op("Add", scores(g), mask)), "b", S, N * H)
    given = new.tensor(only_attention(new).inputs[3])
    assert given.dtype == ir.DataType.BOOL
    assert given.numpy().tolist() == np.tril(np.ones((S, S), bool)).tolist()
    same(source, new, **qkv())


def test_a_bias_and_a_mask_are_one_choice_however_they_are_added():
    """`scores + (bias + mask)`, `(scores + bias) + mask` and a ready Where end alike, with no infinity in them."""
    keep, bias = RNG.random((B, 1, S, S)) < 0.6, f32(RNG.standard_normal((1, N, S, S)))
    keep[..., 0] = True
    for order in ("inside", "outside", "chosen"):
        g = attention_graph(keep=["b", 1, "s", "s", bool], bias=[1, N, "s", "s"])
        mask = g.op("Where", g.value("keep"), f32(0), f32(-np.inf))
        if order == "inside":
            s = g.op("Add", scores(g), g.op("Add", mask, g.value("bias")))
        elif order == "outside":
            s = g.op("Add", g.op("Add", scores(g), g.value("bias")), mask)
        else:
            s = g.op("Add", scores(g), g.op("Where", g.value("keep"), g.value("bias"), f32(-1e9)))
        source, new = raised(g, attend(g, s), "b", "s", N * H)
        choice = only_attention(new).inputs[3].producer()
        assert (ops(new), choice.op_type) == ({"Attention": 1, "Where": 1}, "Where")
        assert list(choice.inputs[:2]) == [new.value("keep"), new.value("bias")]
        assert np.isfinite(new.array(choice.inputs[2]))
        same(source, new, keep=keep, bias=bias, **qkv())


@pytest.mark.parametrize("op", ["Add", "Sub"])
def test_zeros_added_to_scores_go(op):
    g = attention_graph()
    source, new = raised(g, attend(g, g.op(op, scores(g), f32(0))), "b", "s", N * H)
    assert only_attention(new).inputs[3:] == ()
    same(source, new, **qkv())


@pytest.mark.parametrize("packed", ["split", "slices"])
def test_parts_of_a_packed_weight_are_views(packed):
    """torch's MultiheadAttention cuts its weight before the product where queries and keys differ."""
    g = graph(x=["b", "s", 8], z=["b", "t", 8])
    w = g.constant(f32(RNG.standard_normal((24, 8))), "in_proj_weight")
    if packed == "split":
        parts = g.op("Split", w, i64(8, 16), axis=0, outputs=2).producer().outputs
    else:
        parts = [g.op("Slice", w, i64(a), i64(b), i64(0)) for a, b in ((0, 8), (8, 24))]
    q, kv = (g.op("MatMul", g.value(x), g.op("Transpose", p, perm=[1, 0])) for x, p in zip("xz", parts, strict=True))
    y = g.op("MatMul", q, g.op("Transpose", g.op("Slice", kv, i64(0), i64(8), i64(2)), perm=[0, 2, 1]))
    source, new = raised(g, y, "b", "s", "t")
    assert ops(new)["MatMul"] == 3
    assert not set(ops(new)) & {"Split", "Slice"}
    same(source, new, x=f32(RNG.standard_normal((2, 3, 8))), z=f32(RNG.standard_normal((2, 5, 8))))


LARGE = {  # operators of small constants whose result is large: what would be computed is known before it is
    "ConstantOfShape": lambda g: g.op("ConstantOfShape", i64(30000, 30000)),
    "Expand": lambda g: g.op("Expand", f32(np.ones((1, 2000))), i64(2000, 1)),
    "Tile": lambda g: g.op("Tile", f32(np.ones(4000)), i64(100000)),
    "Add": lambda g: g.op("Add", f32(np.ones((4000, 1))), f32(np.ones((1, 4000)))),
    "Gather": lambda g: g.op("Gather", f32(np.ones((2, 8000))), i64(*[0] * 8000)),
    "Resize": lambda g: g.op("Resize", f32(np.ones((1, 1, 9, 9))), None, f32([1, 1, 1e4, 1e4]), mode="nearest"),
    "OneHot": lambda g: g.op("OneHot", i64(*range(1000)), i64(1000), f32([0, 1])),
    "Range": lambda g: g.op("Range", i64(0).reshape(()), i64(1 << 40).reshape(()), i64(1).reshape(())),
}


@pytest.mark.parametrize("op", LARGE)
def test_a_large_result_is_not_computed(op, monkeypatch):
    g = graph(x=["b"])
    small = g.op("ReduceSum", LARGE[op](g), keepdims=0)
    y = g.op("Add", g.value("x"), g.op("Cast", small, to=1))

    def evaluated(node, *args):
        raise AssertionError(f"{node.op_type} was computed")

    monkeypatch.setattr(fold, "_evaluate", evaluated)
    finish(g, y, "y", ["b"])
    fold.fold_constants(g)
    assert op in ops(g)


@pytest.mark.parametrize("sizes", [(2, -1), (-3, 4)])
def test_what_the_evaluator_refuses_stays_as_it_is(sizes):
    g = graph(x=["b"])
    y = g.op("Add", g.value("x"), g.op("ReduceSum", g.op("Expand", f32([1.0]), i64(*sizes)), keepdims=0))
    finish(g, y, "y", ["b"])
    fold.fold_constants(g)
    assert "Expand" in ops(g)
