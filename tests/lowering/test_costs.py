"""Costs of equivalent forms: counted operations, the target's table, and times remembered by structure."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering import costs
from onnxcomp.target import CPU, CPU_VNNI
from tests import tiny

SHAPE = {"x": (2, 5, 8)}


def quantized(seed: int = 0) -> Graph:
    """The linear of `tiny.linear` with input and weight through Q/DQ."""
    g = tiny.linear(bias=False, seed=seed)
    product = next(g.nodes("MatMul"))
    zero = np.array(128, np.uint8)
    scale = np.array(0.05, np.float32)
    q = g.op("QuantizeLinear", product.inputs[0], scale, zero)
    w = np.random.default_rng(seed).integers(-90, 90, (8, 6)).astype(np.int8)
    g.set_input(product, 0, g.op("DequantizeLinear", q, scale, zero))
    g.set_input(product, 1, g.op("DequantizeLinear", w, np.full(6, 0.01, np.float32), np.zeros(6, np.int8), axis=1))
    g.sweep()
    g.sort()
    return Graph(g.model)


def dynamic() -> Graph:
    """The same product as one operator of the runtime, then a float one on its result."""
    g = tiny.linear(bias=False)
    product = next(g.nodes("MatMul"))
    w, scale, zero = np.ones((8, 6), np.int8), np.full(6, 0.01, np.float32), np.zeros(6, np.int8)
    made = g.op("DynamicQuantizeMatMul", product.inputs[0], w, scale, zero, domain=CONTRIB)
    g.replace(product.outputs[0], g.op("MatMul", made, np.ones((6, 6), np.float32)))
    g.sweep()
    g.sort()
    return Graph(g.model)


def test_operations_of_a_linear_are_two_per_multiply_add() -> None:
    assert costs.operations(tiny.linear(), SHAPE) == {"fp32": 2 * 10 * 8 * 6}


def test_quantized_products_are_counted_as_integer_ones() -> None:
    assert costs.operations(quantized(), SHAPE) == {"int8": 2 * 10 * 8 * 6}


def test_shapes_go_on_behind_operators_that_onnx_does_not_know() -> None:
    found = costs.operations(dynamic(), SHAPE)
    assert found == {"int8-dynamic": 2 * 10 * 8 * 6, "fp32": 2 * 10 * 6 * 6}


def test_attention_counts_both_products() -> None:
    g = tiny.decoder(layers=1, hidden=32, heads=4, kv_heads=2, ffn=64, vocabulary=50)
    b, s, h = 2, 7, 32
    found = costs.operations(g, {"input_ids": (b, s), "attention_mask": (b, s)})
    linears = h * h * 2 + h * 16 * 2 + 3 * h * 64 + h * 50
    assert found["fp32"] == 2 * b * s * linears + 2 * 2 * b * s * s * h


def test_operations_leave_the_graph_as_it_was() -> None:
    g = tiny.linear()
    before = g.inputs[0].shape
    costs.operations(g, SHAPE)
    assert g.inputs[0].shape == before
    assert g.edits == 0


def test_table_prefers_the_integer_form_and_says_where_it_is_from() -> None:
    plain, fast = costs.costs({"float": tiny.linear(bias=False), "int8": quantized()}, SHAPE, CPU_VNNI, measure=False)
    assert (plain.form, fast.form) == ("float", "int8")
    assert plain.seconds == pytest.approx(960 / 230e9)
    assert fast.seconds == pytest.approx(960 / 700e9)
    assert {plain.source, fast.source} == {"table"}
    assert plain.nbytes == 8 * 6 * 4
    assert fast.nbytes == 8 * 6 + 6 * 4 + 6 + 2 * (4 + 1)


def test_table_without_a_rate_gives_no_seconds() -> None:
    target = dataclasses.replace(CPU, gflops={"int8": 1.0})
    assert costs.costs({"a": tiny.linear()}, SHAPE, target, measure=False)[0].seconds is None


def test_a_target_that_is_elsewhere_is_never_timed_here() -> None:
    assert costs.costs({"a": tiny.linear()}, SHAPE, CPU_VNNI)[0].source == "table"


def test_measured_forms_take_turns_and_are_remembered_by_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    costs.forget()
    order: list[int] = []

    def fake(g: Graph, *_: object) -> float:
        order.append(g.nbytes)
        return g.nbytes * 1e-6

    monkeypatch.setattr(costs, "_median", fake)
    a, b = tiny.linear(bias=False), tiny.linear(bias=True)
    found = costs.costs({"a": a, "b": b}, SHAPE)
    assert [c.seconds for c in found] == [a.nbytes * 1e-6, b.nbytes * 1e-6]
    assert [c.source for c in found] == ["measured", "measured"]
    assert order == [a.nbytes, b.nbytes, b.nbytes, a.nbytes, a.nbytes, b.nbytes, b.nbytes, a.nbytes, a.nbytes, b.nbytes]
    again = costs.costs({"same": tiny.linear(bias=False, seed=7)}, SHAPE)
    assert len(order) == 10
    assert again[0].seconds == found[0].seconds
    costs.costs({"longer": a}, {"x": (2, 6, 8)})
    assert len(order) == 15
    costs.forget()


def test_forms_that_are_far_apart_take_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fast": iter([1.0, 1.1, 0.9, 1.0, 1.0]), "slow": iter([2.0, 1.5, 1.9, 1.6, 1.7])}
    order: list[str] = []

    def fake(g: Graph, *_: object) -> float:
        name = "fast" if next(iter(g.nodes("Add")), None) is None else "slow"
        order.append(name)
        return next(seconds[name])

    monkeypatch.setattr(costs, "_median", fake)
    forms = {"fast": tiny.linear(bias=False), "slow": tiny.linear(bias=True)}
    assert [c.seconds for c in costs.costs(forms, SHAPE, known={})] == [1.0, 1.9]
    assert len(order) == 2 * costs.FEW
    seconds = {"fast": iter([1.0, 1.1, 0.9, 1.0, 1.0]), "slow": iter([2.0, 1.3, 1.9, 1.6, 1.7])}
    costs.costs(forms, SHAPE, known={})
    assert len(order) == 2 * costs.FEW + 2 * costs.ROUNDS


def test_a_real_measurement_gives_seconds() -> None:
    costs.forget()
    found = costs.costs({"float": tiny.linear(), "int8": quantized()}, SHAPE)
    assert all(c.seconds is not None and c.seconds > 0 for c in found)
    costs.forget()


def test_a_form_that_fails_is_named() -> None:
    g = tiny.linear(bias=False)
    product = next(g.nodes("MatMul"))
    g.set_input(product, 1, g.constant(np.ones((9, 6), np.float32)))
    with pytest.raises(ModelError, match="form 'broken'"):
        costs.costs({"broken": g}, SHAPE)


def test_an_open_input_without_a_shape_is_named() -> None:
    with pytest.raises(DataError, match="'x'"):
        costs.costs({"a": tiny.linear()}, {}, measure=False)


def test_fixed_inputs_need_no_shape() -> None:
    g = tiny.linear()
    g.inputs[0].shape = ir.Shape([2, 5, 8])
    assert costs.operations(g, {}) == {"fp32": 960}
