"""Models that are in half precision already: sessions feed and fetch them, and every kind of pass goes through."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe, parse_pass
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.methods.repair import readers
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.passes.half import Half
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU
from tests.hand import ops

HALVES = {np.float16: ir.DataType.FLOAT16, ml_dtypes.bfloat16: ir.DataType.BFLOAT16}


def mlp(dtype: type) -> Graph:
    """`y = x w v` with inputs, weights and outputs of one type."""
    kind, rng = ir.TensorType(HALVES[dtype]), np.random.default_rng(0)
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["b", 64]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="half"), ir_version=10))
    w, v = (g.constant((rng.standard_normal((64, 64)) / 8).astype(dtype), name) for name in "wv")
    y = g.op("MatMul", g.op("MatMul", x, w), v)
    y.name, y.type, y.shape = "y", kind, ir.Shape(["b", 64])
    g.model.graph.outputs.append(y)
    g.infer_shapes()
    return Graph(g.model)


def feeds(dtype: type) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((5, 64)).astype(dtype)}


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_session_takes_and_gives_half_precision(dtype: type) -> None:
    with Session(mlp(dtype)) as session:
        y = session.run(feeds(dtype))["y"]
    g = mlp(dtype)
    w, v = (g.array(g.value(name)).astype(np.float64) for name in "wv")
    expected = feeds(dtype)["x"].astype(np.float64) @ w @ v
    assert y.dtype == np.dtype(dtype)
    assert decibels(expected, y) > 40


@pytest.mark.parametrize("dtype", HALVES)
def test_dynamic_quantization_of_a_half_model_keeps_its_interface(dtype: type) -> None:
    source = mlp(dtype)
    result = PassManager([Canonicalize(), DynamicQuant(min_size=1)]).run(source).model
    assert ops(result)["MatMulInteger"] == 2
    assert result.interface == source.interface
    with Session(source) as a, Session(result) as b:
        assert decibels(a.run(feeds(dtype))["y"], b.run(feeds(dtype))["y"]) > 30


@pytest.mark.parametrize("dtype", HALVES)
def test_a_weight_is_read_and_stored_in_its_type(dtype: type) -> None:
    g = mlp(dtype)
    a = readers.numbers(g, g.value("w"))
    assert a is not None
    assert np.issubdtype(a.dtype, np.floating)


@pytest.mark.parametrize("preset", ["fp16", "bf16"])
def test_a_half_model_is_only_optimized_by_presets_of_half_precision(preset: str) -> None:
    assert Recipe.preset(preset).allow_unchanged


def test_what_is_another_half_type_already_is_said_to_stay() -> None:
    batches = [feeds(ml_dtypes.bfloat16)] * 5
    result = PassManager([Canonicalize(), Half()], allow_unchanged=True).run(mlp(ml_dtypes.bfloat16), batches, batches)
    [note] = result.report.step("half").noted
    assert note.what == "2 stayed bfloat16: only float32 is made fp16 (export --dtype fp32)"


def tied(dtype: type) -> Graph:
    """Rows of a table, through a linear, to a head that shares the table."""
    rng = np.random.default_rng(0)
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", 6]))
    g = Graph(ir.Model(ir.Graph([ids], [], nodes=[], opset_imports={"": 23}, name="tied"), ir_version=10))
    table = g.constant(rng.standard_normal((50, 64)).astype(dtype), "table")
    w = g.constant((rng.standard_normal((64, 64)) / 8).astype(dtype), "w")
    y = g.op("MatMul", g.op("MatMul", g.op("Gather", table, ids), w), g.op("Transpose", table, perm=[1, 0]))
    y.name, y.type, y.shape = "y", ir.TensorType(HALVES[dtype]), ir.Shape(["b", 6, 50])
    g.model.graph.outputs.append(y)
    g.infer_shapes()
    return Graph(g.model)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("preset", ["int8-small", "int4", "int4-fast"])
def test_a_tied_head_of_a_half_model_shares_its_codes(dtype: type, preset: str, tmp_path: Path) -> None:
    g = tied(dtype)
    batches = [{"ids": np.random.default_rng(i).integers(0, 50, (3, 6))} for i in range(6)]
    passes = [
        parse_pass(f"{p.name}: {json.dumps({**p.options, 'min_size': 1})}")
        if "quant" in p.name or p.name == "qdq"
        else p
        for p in Recipe.preset(preset).passes
    ]
    result = PassManager(passes, target=CPU).run(g, batches, batches)
    path = storage.save(result.model, tmp_path / "out")
    assert integer_check(path).ok
    tables = [
        v for v in result.model.model.graph.initializers.values() if 50 in tuple(v.shape) and 64 in tuple(v.shape)
    ]
    assert [v.dtype for v in tables] in ([ir.DataType.INT8], [ir.DataType.UINT8])
    assert result.report.validation.values()["sqnr"] > 12


@pytest.mark.parametrize("dtype", HALVES)
def test_int8_pairs_of_a_half_model_run_as_integer_products(dtype: type) -> None:
    source = mlp(dtype)
    batches = [feeds(dtype)] * 5
    passes = [Canonicalize(), Qdq(min_size=1), Lower()]
    result = PassManager(passes, target=CPU).run(source, batches, batches).model
    assert integer_check(result).ok
    weights = [v.const_value for v in result.model.graph.initializers.values()]
    assert sum(t.dtype is ir.DataType.INT8 and t.size == 64 * 64 for t in weights if t is not None) == 2
    assert result.interface == source.interface
    with Session(source) as a, Session(result) as b:
        assert decibels(a.run(feeds(dtype))["y"], b.run(feeds(dtype))["y"]) > 25
