"""Shapes and types of values, as far as ONNX's own inference can tell them."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

__all__ = ["infer_shapes"]


def infer_shapes(model: ir.Model) -> None:
    """Record what ONNX's shape inference can tell; best effort, never fatal, weights are not read."""
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.CRITICAL)
    outputs = [(v, v.type, v.shape) for v in model.graph.outputs]
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        log.setLevel(level)
    for v, kind, shape in outputs:
        v.type = kind or v.type
        v.shape = shape if shape is not None else v.shape
