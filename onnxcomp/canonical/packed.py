"""Packed linears (q|k|v, gate|up) split: each part becomes a linear over a lazy selection of the weight's columns.

A part is what a Split, Slice or Gather selects from the output, after any Reshape and Transpose: `q|k|v`, `q|k|v per
head` and `queries of a group, key, value` are all selections along one axis group of the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import Axis, Trace, target_of, trace
from onnxcomp.analysis.selections import Selection, selections
from onnxcomp.analysis.sizes import Shape, Size, is_static, product
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OPS, PROJECTION_TO_ATTENTION
from onnxcomp.graph.values import sole_use, users_of
from onnxcomp.maths import Array

__all__ = ["split_packed"]

MAX_DEPTH = 16  # nodes between a packed linear and the Attention that reads a part of it


@dataclass(frozen=True)
class Packed:
    """A product with a constant `[K, N]` weight and its bias, if any; `y` is the result."""

    product: ir.Node
    bias: ir.Value | None
    y: ir.Value
    width: int


@dataclass(frozen=True)
class Plan:
    """How a selection follows from a linear over some columns: Reshape, Transpose, Reshape; None skips a step."""

    selection: Selection
    columns: Array
    split: list[int] | None
    perm: list[int] | None
    joined: list[int] | None


def split_packed(g: Graph, f: Facts) -> None:
    """Split each packed linear whose output is only read by static selections."""
    for node in g.nodes("MatMul"):
        packed = _packed(g, node)
        plans = _plans(f, packed) if packed is not None else None
        if packed is not None and plans:
            for plan in plans:
                _unpack(g, packed, plan)


def _packed(g: Graph, product: ir.Node) -> Packed | None:
    weight = g.tensor(product.inputs[1])
    if product.domain or weight is None or len(weight.shape) != 2 or weight.dtype.bitwidth < 8:
        return None
    y, bias, width = product.outputs[0], None, weight.shape.numpy()[1]
    use = sole_use(y)
    if use is not None and use[0].op_type == "Add":
        add, index = use
        bias = add.inputs[1 - index]
        row = g.tensor(bias)
        if row is None or tuple(row.shape.numpy()) != (width,):
            return None
        y = add.outputs[0]
    return Packed(product, bias, y, width)


def _readers(v: ir.Value) -> Iterator[ir.Node | None]:
    """Nodes that read a value, directly or through layout operators; None for a graph output."""
    if v.is_graph_output():
        yield None
    for user in users_of(v):
        if user.op_type in LAYOUT_OPS and user.domain == "":
            yield from _readers(user.outputs[0])
        else:
            yield user


def _plans(f: Facts, packed: Packed) -> list[Plan] | None:
    """One plan for each part; None unless all readers are static selections of disjoint columns."""
    parts: list[Selection] = []
    for node in _readers(packed.y):
        node_selections = selections(f, node) if node is not None else None
        if node_selections is None:
            return None
        parts += node_selections
    parts = [p for p in parts if list(p.out.uses()) or p.out.is_graph_output()]
    plans = [_plan(f, packed, p) for p in parts]
    valid = [p for p in plans if p is not None]
    columns = np.concatenate([p.columns for p in valid]) if valid else np.zeros(0, np.int64)
    if len(valid) < len(plans) or len(set(columns.tolist())) < columns.size:
        return None
    return valid


def _plan(f: Facts, packed: Packed, part: Selection) -> Plan | None:
    source, shape = part.node.inputs[0], f.shape(part.out)
    t = None if source is None else next((t for t in trace(f, source) if t.value is packed.y), None)
    if t is None or shape is None or 0 in shape or not part.keep:
        return None
    last, group = t.axes[-1], t.origin[part.axis]
    position = next((i for i in range(len(last)) if last[i : i + len(group)] == group), None)
    if not group or position is None or not is_static(a.size for a in last):
        return None
    if position and not (_feeds_attention_only(part.out) or _gates_attention(part.out)):
        return None  # an inner part of a head's width, such as the halves of a rotation, is no packing
    selected, group_axis = Axis(len(part.keep)), Axis(product(a.size for a in group))
    split_axes = (*last[:position], group_axis, *last[position + len(group) :])
    column_numbers = np.arange(packed.width).reshape(np.array([a.size for a in split_axes], np.int64))
    columns: Array = np.take(column_numbers, part.keep, axis=position).reshape(-1)
    units = [*(a for lead in t.axes[:-1] for a in lead), *(selected if a is group_axis else a for a in split_axes)]
    order = [
        selected if i == part.axis else a
        for i, origin_group in enumerate(t.origin)
        for a in (origin_group[:1] if i == part.axis else origin_group)
    ]
    if part.squeezed:  # the selected axis is not in the result
        units, order = ([a for a in axes if a is not selected] for axes in (units, order))
    return _layout_steps(f, packed, part, Steps(units, order, columns, t, shape))


@dataclass(frozen=True)
class Steps:
    """The axes of the new linear's output, their order in the selection, their trace, and the selection's shape."""

    units: list[Axis]
    order: list[Axis]
    columns: Array
    trace: Trace
    shape: Shape


def _layout_steps(f: Facts, packed: Packed, part: Selection, s: Steps) -> Plan | None:
    """Reshape, Transpose and Reshape from the new output to the selection; None if a target has two unknown sizes."""
    output_shape: Shape = (*(f.shape(packed.y) or ())[:-1], int(s.columns.size))
    split_sizes: tuple[Size, ...] = tuple(a.size for a in s.units)
    transposed_sizes: tuple[Size, ...] = tuple(a.size for a in s.order)
    if len(s.units) != len(s.order) or set(s.units) != set(s.order):
        return None
    perm = [s.units.index(a) for a in s.order]
    if perm == list(range(len(perm))):
        joined = None if output_shape == s.shape else target_of(f, output_shape, s.shape)
        fits = output_shape == s.shape or joined is not None
        return Plan(part, s.columns, None, None, joined) if fits else None
    split, joined = target_of(f, output_shape, split_sizes), target_of(f, transposed_sizes, s.shape)
    if split is None or joined is None:
        return None
    return Plan(part, s.columns, split, perm, None if transposed_sizes == s.shape else joined)


def _feeds_attention_only(v: ir.Value, depth: int = MAX_DEPTH) -> bool:
    """Whether only Attention reads a value, directly or through rotation, norm and layout."""
    users = users_of(v)
    if not users or depth == 0:
        return False
    return all(
        u.op_type == "Attention"
        or (u.op_type in PROJECTION_TO_ATTENTION and _feeds_attention_only(u.outputs[0], depth - 1))
        for u in users
    )


def _gates_attention(v: ir.Value) -> bool:
    """Whether only a sigmoid reads a value, and its result is only multiplied with the output of an Attention."""
    gate = False
    while (use := sole_use(v)) is not None:
        node = use[0]
        if node.op_type == "Mul" and gate:
            return _is_attention_output(node.inputs[1 - use[1]])
        if node.op_type != "Sigmoid" and node.op_type not in LAYOUT_OPS:
            return False
        gate |= node.op_type == "Sigmoid"
        v = node.outputs[0]
    return False


def _is_attention_output(v: ir.Value | None) -> bool:
    while v is not None and (node := v.producer()) is not None:
        if node.op_type == "Attention":
            return True
        if node.op_type not in LAYOUT_OPS:
            return False
        v = node.inputs[0]
    return False


def _unpack(g: Graph, packed: Packed, plan: Plan) -> None:
    y = g.op("MatMul", packed.product.inputs[0], _select_columns(g, packed.product.inputs[1], plan.columns))
    if packed.bias is not None:
        y = g.op("Add", y, _select_columns(g, packed.bias, plan.columns))
    for op, target in (("Reshape", plan.split), ("Transpose", plan.perm), ("Reshape", plan.joined)):
        if target is not None and op == "Transpose":
            y = g.op(op, y, perm=target)
        elif target is not None:
            y = g.op(op, y, np.array(target, np.int64))
    y.type = plan.selection.out.type
    g.replace(plan.selection.out, y)


def _select_columns(g: Graph, v: ir.Value | None, columns: Array) -> ir.Value:
    """Last-axis positions of a constant as a lazy constant; contiguous ones are sliced, not gathered."""
    tensor = g.tensor(v)
    assert tensor is not None  # checked by _packed
    contiguous = bool(np.all(np.diff(columns) == 1))
    index = slice(int(columns[0]), int(columns[-1]) + 1) if contiguous else columns
    selected = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy()[..., index]), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape([*tensor.shape.numpy()[:-1], int(columns.size)]),
    )
    return g.constant(selected, str(v.name if v is not None else "part"))
