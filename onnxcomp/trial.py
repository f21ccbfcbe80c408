"""Whether quantizing pays: linears of one input as two small models, float and on integers, to be timed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Linear
from onnxcomp.forms import KINDS, Context, default, legal
from onnxcomp.graph import Graph
from onnxcomp.target import Target

__all__ = ["SLOWER", "TICK", "models"]

SLOWER = 1.05  # a group is left in float where integers take longer by this factor,
TICK = 20e-6  # and by more than the noise of one session call, seconds


def models(group: Sequence[Linear], target: Target) -> dict[str, Graph]:
    """`float` and `int8`: the linears behind an input `x` `[batch, rows, K]`, integers in the form of the table.

    Weights are made up: the time of a dense product does not depend on them.
    """
    return {"float": _model(group, target, integers=False), "int8": _model(group, target, integers=True)}


def _model(group: Sequence[Linear], target: Target, *, integers: bool) -> Graph:
    fan_in = group[0].sizes[0]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "rows", fan_in]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="trial")
    g = Graph(ir.Model(graph, ir_version=10))
    source = _through_codes(g, x) if integers else x
    for i, linear in enumerate(group):
        width = linear.sizes[1]
        y = g.op("MatMul", source, _weight(g, fan_in, width, integers=integers))
        y.type, y.shape = x.type, ir.Shape(["batch", "rows", width])
        if linear.bias is not None:
            y = g.op("Add", y, np.full(width, 0.1, np.float32), like=y)
        y.name = f"y{i}"
        graph.outputs.append(y)
    graph.sort()
    done = Graph(g.model)
    if integers:
        _in_form(done, target)
    return done


def _through_codes(g: Graph, x: ir.Value) -> ir.Value:
    scale, zero = np.array(0.03, np.float32), np.array(128, np.uint8)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero, like=x)


def _weight(g: Graph, fan_in: int, width: int, *, integers: bool) -> ir.Value:
    if not integers:
        return g.constant(np.full((fan_in, width), 0.01, np.float32), "weight")
    codes, scale = np.full((fan_in, width), 3, np.int8), np.full(width, 0.01, np.float32)
    w = g.op("DequantizeLinear", codes, scale, axis=1)
    w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([fan_in, width])
    return w


def _in_form(g: Graph, target: Target) -> None:
    """Write the quantized products as lowering does without measuring."""
    kind, ctx = KINDS["quantized"], Context(g, target)
    for spot in kind.find(g):
        name = default(ctx, kind.name, legal(ctx, spot, standard=False, approximate=False))
        kind.form(name).rewrite(ctx, spot)
    g.model.graph.sort()
    g.sweep()
