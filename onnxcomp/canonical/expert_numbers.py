"""Loops over the experts that are hit: where they run at all every expert is hit, so each turn has a fixed number."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import is_layout

__all__ = ["fix_expert_numbers"]


def fix_expert_numbers(g: Graph, f: Facts) -> None:
    """Replace the parts of `Split(NonZero(x))`, one for each element of `x [n]` that can be true, by their numbers.

    Tracing writes a loop over the experts that some token chose as such a Split, with one part for each expert that the
    example chose. The runtime refuses a Split whose parts are not as many as its rows, so where a graph with parts for
    all experts runs they are 0 to n - 1 in order.
    """
    for node in g.nodes("Split"):
        hits = _hits(f, node)
        if hits is None or any(v.is_graph_output() for v in node.outputs):
            continue
        if _possible(f, hits) == len(node.outputs):
            shape = (1, 1)
            for i, v in enumerate(node.outputs):
                g.replace(v, g.constant(np.full(shape, i, np.int64), str(v.name)))


def _hits(f: Facts, node: ir.Node) -> ir.Value | None:
    """The 1-D `x` where a Split takes the places `NonZero(x)` apart, one by one."""
    shape = f.shape(node.inputs[0])
    sizes = f.content(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.domain or shape is None or len(shape) != 2 or sizes is None or any(s != 1 for s in sizes.reshape(-1)):
        return None
    places, axis = node.inputs[0].producer(), axis_of(node, 2, 0)  # type: ignore[union-attr]
    if places is not None and places.op_type == "Transpose" and places.inputs[0] is not None:
        places, axis = places.inputs[0].producer(), 1 - axis
    x = places.inputs[0] if places is not None and places.op_type == "NonZero" and axis == 1 else None
    return x if x is not None and f.rank(x) == 1 else None


def _possible(f: Facts, x: ir.Value) -> int | None:
    """At most how many elements of a vector are true: its length, or the numbers below the bound of a one-hot code."""
    shape = f.shape(x)
    length = shape[0] if shape is not None else None
    if not isinstance(length, int):
        return None
    node, axis = _one_hot(f, x)
    bound = _bound(f, node.inputs[0]) if node is not None and axis is not None else None
    return min(length, bound) if bound is not None else length


def _one_hot(f: Facts, x: ir.Value) -> tuple[ir.Node | None, int | None]:
    """The OneHot of which `x` says which numbers occur (`sum > 0`), with the axis of the numbers if `x` is along it."""
    node, axis = x.producer(), 0
    while node is not None and node.op_type != "OneHot":
        v = node.inputs[0]
        rank = f.rank(v)
        if v is None or rank is None:
            return None, None
        if node.op_type == "Greater":
            zero = f.content(node.inputs[1])
            if zero is None or any(z != 0 for z in zero.reshape(-1)):
                return None, None
        elif node.op_type == "Transpose":
            axis = node.attributes.get_ints("perm", list(range(rank))[::-1])[axis]
        elif node.op_type in ("ReduceSum", "ReduceMax"):
            gone = f.content(node.inputs[1]) if len(node.inputs) > 1 else None
            if gone is None or node.attributes.get_int("keepdims", 1) != 0:
                return None, None
            dropped = {int(a) % rank for a in gone.reshape(-1)}
            axis = [a for a in range(rank) if a not in dropped][axis]
        elif node.op_type != "Cast":
            return None, None
        node = v.producer()
    if node is None:
        return None, None
    rank = f.rank(node.outputs[0])
    values = f.content(node.inputs[2])
    is_code = values is not None and [float(a) for a in values.reshape(-1)] == [0.0, 1.0]
    return (node, axis) if is_code and rank is not None and axis_of(node, rank, -1) == axis else (None, None)


def _bound(f: Facts, v: ir.Value | None) -> int | None:
    """The number that all elements are below: of what TopK or ArgMax chooses, how many there are to choose from."""
    node = v.producer() if v is not None else None
    while node is not None and is_layout(node) and node.inputs[0] is not None:
        v, node = node.inputs[0], node.inputs[0].producer()
    if node is not None and node.op_type == "Concat":
        bounds = [_bound(f, x) for x in node.inputs]
        return None if None in bounds else max(b for b in bounds if b is not None)
    if node is None or node.op_type not in ("TopK", "ArgMax") or v is not node.outputs[-1]:
        return None
    shape = f.shape(node.inputs[0])
    size = shape[axis_of(node, len(shape), -1 if node.op_type == "TopK" else 0)] if shape is not None else None
    return size if isinstance(size, int) else None
