"""ONNX's reference evaluator, which refuses to write out by the billion what the content of a tensor asks for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_constant_of_shape, op_expand, op_range, op_tile

from onnxcomp.maths import Array

__all__ = ["BOUNDED_OPS"]

MAX_ELEMENTS = 1 << 24  # elements of one result: a square of 4,096 tokens; the evaluator computes a billion in minutes


def _check(elements: float) -> None:
    if not elements <= MAX_ELEMENTS:  # no number is refused as well
        raise ValueError(f"a result would have {elements:g} elements")


class Expand(op_expand.Expand):
    """Expand whose asked shape is bounded."""

    def _run(self, data: Array, shape: Array) -> Any:
        _check(math.prod(map(float, np.broadcast_shapes(data.shape, tuple(shape.tolist())))))
        return super()._run(data, shape)  # type: ignore[no-untyped-call]


class ConstantOfShape(op_constant_of_shape.ConstantOfShape):
    """ConstantOfShape whose shape is bounded."""

    def _run(self, data: Array, value: Any = None) -> Any:
        _check(math.prod(float(d) for d in data.reshape(-1)))
        return super()._run(data, value)


class Range(op_range.Range):
    """Range whose number of steps is bounded."""

    def _run(self, starts: Array, ends: Array, steps: Array, stash_type: int | None = None) -> Any:
        step = float(steps.item())
        _check(abs(float(ends.item()) - float(starts.item())) / abs(step) if step else math.inf)
        return super()._run(starts, ends, steps, stash_type)  # type: ignore[no-untyped-call]


class Tile(op_tile.Tile):
    """Tile whose repeats are bounded."""

    def _run(self, x: Array, repeats: Array) -> Any:
        _check(math.prod(float(d) for d in repeats.reshape(-1)) * x.size)
        return super()._run(x, repeats)  # type: ignore[no-untyped-call]


BOUNDED_OPS: list[type[OpRun]] = [Expand, ConstantOfShape, Range, Tile]
