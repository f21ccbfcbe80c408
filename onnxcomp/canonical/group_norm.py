"""GroupNormalization as InstanceNormalization, gain and bias: the form that exports to older operator sets have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.graph import Graph

__all__ = ["decompose_group_norms"]


def decompose_group_norms(g: Graph, f: Facts) -> None:
    """Rewrite every GroupNormalization with constant gain `[C]` and bias `[C]` of an input `[N, C, ...]`."""
    for node in g.nodes("GroupNormalization"):
        shape = f.shape(node.inputs[0])
        constant = all(g.is_constant(v) for v in node.inputs[1:3])
        if node.domain == "" and shape is not None and len(shape) > 2 and isinstance(shape[1], int) and constant:
            _decompose(g, node, shape[1], len(shape))


def _decompose(g: Graph, node: ir.Node, channels: int, rank: int) -> None:
    x, gain, bias = node.inputs[:3]
    assert x is not None
    groups = node.attributes.get_int("num_groups", 1)
    dtype = x.dtype or ir.DataType.FLOAT
    one, zero = (np.full(groups, value, dtype.numpy()) for value in (1, 0))
    needs_reshape = groups != channels or rank > 3
    inner = g.op("Reshape", x, np.array([0, groups, -1], np.int64)) if needs_reshape else x
    norm = g.op("InstanceNormalization", inner, one, zero, epsilon=node.attributes.get_float("epsilon", 1e-5))
    if needs_reshape:
        norm = g.op("Reshape", norm, g.op("Shape", x))
    per_channel = (channels, *[1] * (rank - 2))
    scaled = g.op("Mul", norm, np.asarray(g.array(gain)).reshape(per_channel))
    g.replace(
        node.outputs[0], g.op("Add", scaled, np.asarray(g.array(bias)).reshape(per_channel), like=node.outputs[0])
    )
