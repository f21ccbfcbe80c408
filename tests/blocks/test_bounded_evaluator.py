"""The evaluator that masks are probed with computes small results as ONNX does, and refuses huge ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnxcomp.blocks.bounded_evaluator import BOUNDED_OPS
from onnxcomp.maths import Array

BODIES = {
    "Expand": "ones = ConstantOfShape <value = float[1] {1.0}> (one) y = Expand (ones, n)",
    "ConstantOfShape": "y = ConstantOfShape <value = float[1] {2.0}> (n)",
    "Range": "first = ReduceMin <keepdims = 0> (n) r = Range (zero, first, unit) y = Cast <to = 1> (r)",
    "Tile": "ones = ConstantOfShape <value = float[1] {3.0}> (n_one) y = Tile (ones, n)",
}


def run(op: str, sizes: list[int], new_ops: list[type[OpRun]] | None) -> Array:
    text = f"""<ir_version: 10, opset_import: ["": 18]> g (int64[2] n) => (float[a, b] y)
    <int64[1] one = {{1}}, int64[2] n_one = {{1, 2}}, int64 zero = {{0}}, int64 unit = {{1}}> {{ {BODIES[op]} }}"""
    model = onnx.parser.parse_model(text)
    (y,) = ReferenceEvaluator(model, new_ops=new_ops).run(None, {"n": np.array(sizes)})
    return np.asarray(y)


@pytest.mark.parametrize("op", BODIES)
def test_results_of_usual_size_are_those_of_the_evaluator(op: str) -> None:
    np.testing.assert_array_equal(run(op, [3, 5], BOUNDED_OPS), run(op, [3, 5], None))


@pytest.mark.parametrize("op", BODIES)
@pytest.mark.parametrize("sizes", [[1 << 31, 1 << 31], [1 << 62, 1 << 62], [4097, 4097]])
def test_huge_results_are_refused_before_they_are_made(op: str, sizes: list[int]) -> None:
    if op == "Range" and sizes[0] < 1 << 24:
        assert run(op, sizes, BOUNDED_OPS).shape == (4097,)
        return
    with pytest.raises(ValueError, match=r"elements|too large"):
        run(op, sizes, BOUNDED_OPS)
