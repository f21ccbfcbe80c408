"""Batch normalization of a linear's output, which is a scale and a shift per channel, becomes part of the linear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.graph import Graph
from onnxcomp.graph.values import has_one_use

__all__ = ["fold_batch_norms"]


def fold_batch_norms(g: Graph, f: Facts) -> None:
    """Fold each BatchNormalization of a `[tokens, channels]` product with a constant weight into weight and bias."""
    for node in g.nodes("BatchNormalization"):
        if node.domain or len(node.outputs) > 1 or node.attributes.get_int("training_mode", 0) == 1:
            continue
        product = _product(g, f, node)
        if product is None or not all(g.is_constant(v) for v in node.inputs[1:5]):
            continue
        gain, shift, mean, variance = (g.array(v).astype(np.float64) for v in node.inputs[1:5])
        weight = g.array(product.inputs[1])
        scale = gain / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        scaled = g.op("MatMul", product.inputs[0], (weight * scale).astype(weight.dtype))
        y = g.op("Add", scaled, (shift - mean * scale).astype(weight.dtype), like=product.outputs[0])
        g.replace(product.outputs[0], y)
        folded = node.inputs[0]  # that sum, or its leading axes merged
        if folded is not None:
            g.replace(node.outputs[0], folded)


def _product(g: Graph, f: Facts, node: ir.Node) -> ir.Node | None:
    """The linear whose output is normalized, directly or after its leading axes were merged."""
    v, shape = node.inputs[0], f.shape(node.inputs[0])
    if v is None or shape is None or len(shape) != 2:
        return None
    producer = v.producer()
    if producer is not None and producer.op_type in ("Reshape", "Flatten") and has_one_use(v):
        v = producer.inputs[0]
        before = f.shape(v)
        if before is None or before[-1] != shape[-1]:
            return None
        producer = v.producer() if v is not None else None
    tensor = g.tensor(producer.inputs[1]) if producer is not None and producer.op_type == "MatMul" else None
    if v is None or tensor is None or len(tensor.shape) != 2 or tensor.dtype.bitwidth < 16 or not has_one_use(v):
        return None
    return producer
