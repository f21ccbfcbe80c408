"""Bounds on all elements of a value, whatever its shape: enough to prove that a mask allows everything."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.known import Known, Uniform, cast_type
from onnxcomp.graph.operators import ELEMENT_PRESERVING

__all__ = ["MAX_FLOATS", "uniform", "uniform_of"]

# Elements of a constant that are read to bound them: larger ones are weights, which are not read.
MAX_INTEGERS = 1 << 16
MAX_FLOATS = 1 << 14  # in memory, such as masks that were folded
MAX_MAPPED_FLOATS = 64  # in files, or computed on demand


def uniform_of(t: ir.TensorProtocol) -> Uniform | None:
    """Bounds of a constant of moderate size; of floats only small ones or ones that are already in memory."""
    limit = MAX_FLOATS if isinstance(t, ir.Tensor) else MAX_MAPPED_FLOATS
    limit = limit if t.dtype.is_floating_point() else MAX_INTEGERS
    if t.size == 0 or t.size > limit or t.dtype == ir.DataType.STRING:
        return None
    a = t.numpy().astype(np.float64)
    return None if np.isnan(a).any() else Uniform(float(a.min()), float(a.max()))


def _decided(always: bool, never: bool) -> bool | None:
    return True if always else False if never else None


def _ordered(
    a: Uniform, b: Uniform, op: Callable[[float, float], bool], inverse: Callable[[float, float], bool]
) -> bool | None:
    """Whether `a op b` holds for all elements; None where it may hold for some."""
    always = a.low is not None and b.high is not None and op(a.low, b.high)
    never = a.high is not None and b.low is not None and inverse(a.high, b.low)
    return _decided(always, never)


def _logic(op: str, a: Uniform | None, b: Uniform | None) -> bool | None:
    values = [None if x is None else x.value for x in (a, b)]
    if op == "And":
        return False if 0.0 in values else True if values == [1.0, 1.0] else None
    return True if 1.0 in values else False if values == [0.0, 0.0] else None


def _truth(x: bool | None) -> Uniform | None:
    return None if x is None else Uniform(float(x), float(x))


def uniform(f: Known, node: ir.Node) -> Uniform | None:
    """Bounds of a node's output from those of its inputs; None where none are known."""
    op, inputs = node.op_type, [f.uniform(x) for x in node.inputs]
    if op in ELEMENT_PRESERVING:
        return inputs[0]
    if op == "Cast":
        return _cast(inputs[0], node)
    if op == "Range":
        return _range(inputs)
    if op == "Shape":
        return Uniform(0.0, None)
    if op == "ConstantOfShape":
        value: Any = node.attributes.get("value")
        return Uniform(0.0, 0.0) if value is None else uniform_of(value.as_tensor())
    if op in ("And", "Or"):
        return _truth(_logic(op, inputs[0], inputs[1]))
    if op == "Not":
        return None if inputs[0] is None or inputs[0].value is None else _truth(not inputs[0].value)
    if op == "Where":
        return _where(inputs)
    a, b = (inputs[0], inputs[1]) if len(inputs) == 2 else (None, None)
    return _compared(op, a, b) if a is not None and b is not None else None


def _compared(op: str, a: Uniform, b: Uniform) -> Uniform | None:
    if op == "GreaterOrEqual":
        return _truth(_ordered(a, b, operator.ge, operator.lt))
    if op == "Greater":
        return _truth(_ordered(a, b, operator.gt, operator.le))
    if op == "LessOrEqual":
        return _truth(_ordered(b, a, operator.ge, operator.lt))
    if op == "Less":
        return _truth(_ordered(b, a, operator.gt, operator.le))
    if op == "Equal" and a.value is not None and b.value is not None:
        return _truth(a.value == b.value)
    if op == "Add":
        return Uniform(_plus(a.low, b.low), _plus(a.high, b.high))
    if op == "Sub":
        return Uniform(_plus(a.low, b.high, -1), _plus(a.high, b.low, -1))
    if op == "Max":
        lows = [x for x in (a.low, b.low) if x is not None]
        return Uniform(
            max(lows, default=None), max(a.high, b.high) if a.high is not None and b.high is not None else None
        )
    if op == "Mul" and a.value is not None and b.value is not None:
        return Uniform(a.value * b.value, a.value * b.value)
    return None


def _plus(a: float | None, b: float | None, sign: int = 1) -> float | None:
    return None if a is None or b is None else a + sign * b


def _cast(a: Uniform | None, node: ir.Node) -> Uniform | None:
    if a is None or cast_type(node) != ir.DataType.BOOL:
        return a
    return None if a.value is None else _truth(bool(a.value))


def _range(inputs: list[Uniform | None]) -> Uniform | None:
    start, step = inputs[0], inputs[2]
    if start is None or step is None or step.low is None or step.low <= 0:
        return None
    return Uniform(start.low, None)


def _where(inputs: list[Uniform | None]) -> Uniform | None:
    c, x, y = inputs
    if c is not None and c.value is not None:
        return x if c.value else y
    return x if x is not None and x == y and x.value is not None else None
