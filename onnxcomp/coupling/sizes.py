"""Parameters and multiply-accumulates of a model after planned cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.graph.operators import WEIGHT_PRODUCTS
from onnxcomp.maths import Array

__all__ = ["macs", "parameters"]

INTEGER_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")  # their weight is input 1
Cuts = Iterable[tuple[Group, Sequence[int] | Array]]


def parameters(g: Graph, cuts: Cuts = (), *, codes: bool = False) -> int:
    """Elements of all floating-point constants after the cuts; constants that a cut copies count again.

    With `codes`, matrices of integers of at most 8 bits count too: they are what a quantizer made of weights.
    """
    shapes, copies = _shapes(g, cuts)
    count_by_tensor = {}
    for v in g.model.graph.initializers.values():
        if (
            v.const_value is not None
            and v.dtype is not None
            and (v.dtype.is_floating_point() or (codes and _is_code(v)))
        ):
            count_by_tensor[id(v.const_value)] = int(
                np.prod(shapes.get(str(v.name), list(v.const_value.shape.numpy())))
            )
    return sum(count_by_tensor.values()) + copies


def macs(g: Graph, cuts: Cuts = (), *, codes: bool = False) -> int:
    """Multiply-accumulates of products with constants, per token (or pixel of a convolution's output), after cuts.

    With `codes`, products of integers, as quantizers write them, count too.
    """
    shapes, _ = _shapes(g, cuts)
    total = 0
    for node in g.nodes(*WEIGHT_PRODUCTS, *(INTEGER_PRODUCTS if codes else ())):
        w = node.inputs[1]
        producer = w.producer() if w is not None else None
        if producer is not None and producer.op_type in ("Transpose", "DequantizeLinear"):
            w = producer.inputs[0]
        t = g.tensor(w)
        if t is not None and w is not None:
            total += int(np.prod(shapes.get(str(w.name), list(t.shape.numpy()))))
    return total


def _is_code(v: ir.Value) -> bool:
    """Whether a constant is a matrix of integers of at most 8 bits."""
    t = v.const_value
    return t is not None and t.dtype.is_integer() and t.dtype.bitwidth <= 8 and len(t.shape) >= 2


def _shapes(g: Graph, cuts: Cuts) -> tuple[dict[str, list[int]], int]:
    """Shapes of the constants that are cut, and the number of elements that copies of shared ones add."""
    shapes: dict[str, list[int]] = {}
    copies = 0
    users = {str(v.name): {str(u.name) for u, _ in v.uses()} for v in g.model.graph.initializers.values()}
    initializers = g.model.graph.initializers
    for group, keep in cuts:
        kept = np.asarray(keep)
        if kept.size == group.units:
            continue
        for slot in group.slots:
            t = initializers[slot.value].const_value if slot.value in initializers else None
            if t is None:
                continue
            n = int(slot.kept(kept).sum())
            if slot.users and set(slot.users) < users[slot.value]:
                floating = initializers[slot.value].dtype
                copies += n if floating is not None and floating.is_floating_point() else 0
                users[slot.value] -= set(slot.users)
                continue
            shapes.setdefault(slot.value, list(t.shape.numpy()))[slot.axis] = n
    return shapes, copies
