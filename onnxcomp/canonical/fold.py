"""Constant folding: nodes of small constants, static sizes, and nodes that always return one of their inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.selections import selections
from onnxcomp.canonical.shape_targets import SHAPE_ARITHMETIC
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["fold_constants", "fold_known", "slice_constants"]

MAX_ELEMENTS = 1 << 14  # elements of a constant that is folded: gains, tables and biases, but not weights
# No Log, Exp or Pow: numpy rounds them differently from the runtime, which would move borders of position buckets.
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Cos", "Sin", "Abs", "Min", "Max", "Mod", "Sign"}
LOGIC = {"And", "Or", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "Cast"}
LAYOUT = {"Reshape", "Squeeze", "Unsqueeze", "Concat", "Gather", "Slice", "Transpose", "Resize", "Expand", "Range"}
LAYOUT |= {
    "GatherND",
    "GatherElements",
    "ScatterND",
    "ScatterElements",
    "ConstantOfShape",
    "Tile",
    "Shape",
    "Trilu",
    "OneHot",
}
SUMS = {"ReduceSum", "CumSum"}  # of integers
FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
TYPES = {*FLOATS, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}


def fold_constants(g: Graph) -> None:
    """Evaluate nodes whose inputs are all small constants, such as `1 + gain` or a resized position bias."""
    for node in g.nodes(*ARITHMETIC, *LOGIC, *LAYOUT, *SUMS):
        arrays = _inputs(g, node)
        if arrays is None or node.outputs[0].is_graph_output():
            continue
        try:
            with np.errstate(all="ignore"):
                result = _evaluate(node, arrays, g.opset)
        except Exception as e:  # noqa: BLE001  the evaluator raises anything for inputs an operator does not take
            g.decline(str(node.name), f"is not folded: {type(e).__name__}")
            continue
        if result.size <= MAX_ELEMENTS:
            g.replace(node.outputs[0], g.constant(result, str(node.outputs[0].name)))


def _inputs(g: Graph, node: ir.Node) -> list[Array | None] | None:
    """The constants that a node reads; None unless all are small and of numpy's types."""
    tensors = [g.tensor(x) for x in node.inputs]
    missing = any(t is None and x is not None for t, x in zip(tensors, node.inputs, strict=True))
    known = [t for t in tensors if t is not None]
    if node.domain or missing or not known or any(t.size > MAX_ELEMENTS or t.dtype not in TYPES for t in known):
        return None
    rounded = node.op_type in SUMS and known[0].dtype.is_floating_point()
    if _is_weight(node, known[0]) or rounded or not _elements(node, tensors) <= MAX_ELEMENTS:
        return None
    return [None if t is None else t.numpy() for t in tensors]


def _is_weight(node: ir.Node, t: ir.TensorProtocol) -> bool:
    """A transposed matrix: it is the weight of a linear, and may be an embedding table as well."""
    return node.op_type == "Transpose" and len(t.shape) == 2 and (t.dtype.is_floating_point() or t.dtype.bitwidth <= 8)


def _elements(node: ir.Node, tensors: list[ir.TensorProtocol | None]) -> float:
    """At most so many elements has the result; it is asked before anything is computed."""
    shapes = [tuple(t.shape.numpy()) for t in tensors if t is not None]
    first, size = shapes[0], math.prod(shapes[0])
    if node.op_type == "Range":
        start, limit, step = (float(t.numpy().reshape(-1)[0]) for t in tensors if t is not None)
        return abs(limit - start) / abs(step) if step else math.inf
    if node.op_type in ("Expand", "ConstantOfShape", "Tile"):
        asked = [max(1, int(d)) for d in _last(tensors)]
        if node.op_type != "Expand":
            return math.prod(asked) * (size if node.op_type == "Tile" else 1)
        return _broadcast([first, tuple(asked)])
    if node.op_type == "Resize":
        return math.prod(_last(tensors)) * (1 if len(tensors) == 4 else size)
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0)
        return math.prod(shapes[1]) * (size / max(1, first[axis]) if -len(first) <= axis < len(first) else math.inf)
    if node.op_type == "OneHot":
        return size * float(next(t for t in tensors[1:] if t is not None).numpy().reshape(-1)[0])
    if node.op_type == "GatherND":
        return math.prod(shapes[1][:-1]) * math.prod(first[shapes[1][-1] if shapes[1] else 0 :])
    return _broadcast(shapes) if node.op_type in ARITHMETIC | LOGIC else MAX_ELEMENTS


def _last(tensors: list[ir.TensorProtocol | None]) -> list[float]:
    """The elements of the last tensor: what a result's shape is made of."""
    last = next(t for t in reversed(tensors) if t is not None)
    return [float(x) for x in last.numpy().reshape(-1)]


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> float:
    axes = itertools.zip_longest(*(reversed(s) for s in shapes), fillvalue=1)
    return math.prod(max(sizes) for sizes in axes)


def _evaluate(node: ir.Node, arrays: list[Array | None], opset: int) -> Array:
    """The node's output by ONNX's reference evaluator."""
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    inputs = {k: ir.Value(name=k, type=ir.TensorType(ir.DataType.from_numpy(a.dtype))) for k, a in feeds.items()}
    args = [inputs.get(f"x{i}") for i in range(len(arrays))]
    single = ir.node(node.op_type, args, {k: a.value for k, a in node.attributes.items()})
    single.outputs[0].name = "y"
    graph = ir.Graph([*inputs.values()], single.outputs, nodes=[single], opset_imports={"": opset}, name="fold")
    results: Any = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=10))).run(None, feeds)
    return np.asarray(results[0])


def slice_constants(g: Graph, f: Facts) -> None:
    """Replace static selections of a weight by lazy constants, such as the queries' rows of a packed projection."""
    for node in g.nodes("Split", "Slice", "Gather"):
        tensor = g.tensor(node.inputs[0])
        if tensor is None or tensor.dtype not in FLOATS:
            continue
        for part in selections(f, node) or ():
            index = part.keep[0] if part.squeezed else _as_index(part.keep)
            if not part.out.is_graph_output() and list(part.out.uses()):
                g.replace(part.out, g.constant(_slice_of(tensor, part.axis, index), str(part.out.name)))


def _as_index(keep: tuple[int, ...]) -> slice | list[int]:
    """A slice where the positions are contiguous, else their list."""
    contiguous = bool(keep) and keep == tuple(range(keep[0], keep[0] + len(keep)))
    return slice(keep[0], keep[0] + len(keep)) if contiguous else list(keep)


def _slice_of(tensor: ir.TensorProtocol, axis: int, index: int | slice | list[int]) -> ir.LazyTensor:
    where = (slice(None),) * axis + (index,)
    shape = list(tensor.shape.numpy())
    if isinstance(index, int):
        shape.pop(axis)
    else:
        shape[axis] = index.stop - index.start if isinstance(index, slice) else len(index)
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy()[where]), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape(shape),
    )


def fold_known(g: Graph, f: Facts) -> None:
    """Fold static sizes, a Where with a known condition, and pads and additions of zero."""
    for node in g.nodes(*SHAPE_ARITHMETIC):
        _fold_size(g, f, node)
    for node in g.nodes("Where", "Pad", "Add", "Sub"):
        x, y = _sole_input(f, node) if node.domain == "" else None, node.outputs[0]
        a, b = f.shape(x), f.shape(y)
        if x is not None and a is not None and a == b and (not y.is_graph_output() or x.producer() is not None):
            g.replace(y, x)


def _fold_size(g: Graph, f: Facts, node: ir.Node) -> None:
    """Fold shape arithmetic over static axes."""
    v, c = node.outputs[0], f.content(node.outputs[0])
    if (
        node.domain
        or c is None
        or v.is_graph_output()
        or not list(v.uses())
        or v.dtype not in (None, ir.DataType.INT64)
    ):
        return
    if all(type(x) is int for x in c.reshape(-1)) and c.size:
        g.replace(v, g.constant(c.astype(np.int64), str(v.name)))


def _sole_input(f: Facts, node: ir.Node) -> ir.Value | None:
    """The input that the output always equals, or None."""
    if node.op_type == "Pad":
        pads = f.content(node.inputs[1])
        return node.inputs[0] if pads is not None and all(n == 0 for n in pads.reshape(-1)) else None
    if node.op_type in ("Add", "Sub"):
        order = ((0, 1), (1, 0)) if node.op_type == "Add" else ((0, 1),)
        return next((node.inputs[i] for i, j in order if f.scalar(node.inputs[j]) == 0), None)
    condition = f.uniform(node.inputs[0])
    return None if condition is None or condition.value is None else node.inputs[1 if condition.value else 2]
