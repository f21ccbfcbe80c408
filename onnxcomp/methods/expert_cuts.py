"""Removing experts of a mixture: the columns of its router, their rows of the tables, or their turns in the loop."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Experts
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OR_CAST, is_layout
from onnxcomp.graph.values import sole_use, users_of
from onnxcomp.maths import Array

__all__ = ["refusal", "remove"]

# What may be computed from the scores of a router; all of it has as many channels as there are experts.
ELEMENTWISE = {"Abs", "Add", "Div", "Greater", "Max", "Mul", "Sub", "Where"}
ENDS = {"ArgMax", "GatherElements", "ReduceMax", "TopK"}  # of them only the highest scores or the chosen ones go on
SCORES = LAYOUT_OR_CAST | ELEMENTWISE | ENDS | {"ScatterElements", "Sigmoid", "Softmax"}


def refusal(g: Graph, e: Experts) -> str:
    """Why no expert of a mixture can be removed, empty if one can."""
    if e.router.quantized or any(not g.is_constant(v) for v in e.tables):
        return "its router is quantized; prune experts before quantizing"
    if len(e.router.weight.uses()) > 1 or any(len(v.uses()) > 1 for v in e.tables):
        return "its weights are shared with another layer"
    for v in _scores(e):
        if v.is_graph_output():
            return f"the scores of its router are the model's output '{v.name}'"
        if other := next((u for u in users_of(v) if u.op_type not in SCORES), None):
            return f"the scores of its router are also read by '{other.name}' ({other.op_type})"
    if unknown := next((s for s in e.loop if s.accumulate is None), None):
        return f"the results that '{unknown.select.name}' selects are not added by a scatter"
    return ""


def _scores(e: Experts) -> Iterator[ir.Value]:
    """Every value that has a channel for each expert: from the router's output to the choice."""
    pending, visited = [e.router.output], set[ir.Value]()
    while pending:
        v = pending.pop()
        if v in visited:
            continue
        visited.add(v)
        yield v
        for user in users_of(v):
            if user.op_type in SCORES - ENDS:
                pending += user.outputs


def remove(g: Graph, e: Experts, keep: Array) -> None:
    """Keep the experts of these numbers, in order: the others cannot be chosen any more."""
    for v in list(_scores(e)):
        node = v.producer()
        if node is not None and v is not e.router.output:
            _shrink(g, e, node, keep)
    axis = 0 if e.router.transposed else 1
    g.put(e.router.weight, np.take(g.array(e.router.weight), keep, axis=axis))
    if e.router.bias is not None:
        g.put(e.router.bias, np.take(g.array(e.router.bias), keep, axis=-1))
    for table in e.tables:
        g.put(table, np.take(g.array(table), keep, axis=0))
    if e.loop:
        _shorten(g, e, keep)
    g.forget_shapes()
    g.sweep()


def _shrink(g: Graph, e: Experts, node: ir.Node, keep: Array) -> None:
    """Constants along the experts' axis: a correction that is added to the scores, the target of a Reshape."""
    for i, v in enumerate(node.inputs):
        tensor = g.tensor(v)
        if v is None or tensor is None or not tensor.size:
            continue
        a = g.array(v)
        if node.op_type == "Reshape" and a[-1] == e.count:
            g.set_input(node, i, g.constant(np.append(a[:-1], keep.size).astype(a.dtype)))
        elif node.op_type in ELEMENTWISE and a.ndim and a.shape[-1] == e.count:
            g.set_input(node, i, g.constant(np.take(a, keep, axis=-1), str(v.name)))


def _shorten(g: Graph, e: Experts, keep: Array) -> None:
    """Take experts out of a loop: nothing of them is added, and the others get new numbers."""
    number = {int(old): new for new, old in enumerate(keep)}
    order = sorted(e.loop, key=lambda s: _number(g, s.select)[1])
    for s in order:
        place, old = _number(g, s.select)
        if old not in number:
            assert s.accumulate is not None
            _skip(g, s.accumulate)
        else:
            a = g.array(s.select.inputs[place])
            g.set_input(s.select, place, g.constant(np.full(a.shape, number[old], a.dtype)))
    for mask in set(_masks(e)):
        _narrow(g, e, mask, keep.size)


def _number(g: Graph, select: ir.Node) -> tuple[int, int]:
    """Which input of a selection holds the expert's number, and that number."""
    i, v = next((i, v) for i, v in enumerate(select.inputs) if g.is_constant(v))
    return i, int(g.array(v).item())


def _skip(g: Graph, accumulate: ir.Node) -> None:
    """Leave out what a scatter adds: to the sum so far, or to zeros that are added to it."""
    data, out = accumulate.inputs[0], accumulate.outputs[0]
    if data is None:
        return
    zeros, use = data.producer(), sole_use(out)
    if zeros is not None and zeros.op_type == "ConstantOfShape" and use is not None and use[0].op_type == "Add":
        before = use[0].inputs[1 - use[1]]
        if before is not None:
            g.replace(use[0].outputs[0], before)
            return
    g.replace(out, data)


def _masks(e: Experts) -> Iterator[ir.Node]:
    """The nodes that make one-hot matrices of the chosen numbers."""
    pending = [e.numbers]
    while pending:
        for user in users_of(pending.pop()):
            if user.op_type in ("OneHot", "Equal") and user not in {s.select for s in e.loop}:
                yield user
            elif is_layout(user):
                pending += user.outputs


def _narrow(g: Graph, e: Experts, mask: ir.Node, count: int) -> None:
    """A one-hot matrix of fewer experts: its depth, or the numbers that the chosen ones are compared with."""
    for i, v in enumerate(mask.inputs):
        tensor = g.tensor(v)
        if v is None or tensor is None:
            continue
        a = g.array(v)
        if mask.op_type == "OneHot" and i == 1 and a.size == 1:
            g.set_input(mask, i, g.constant(np.full(a.shape, count, a.dtype)))
        elif mask.op_type == "Equal" and a.size == e.count:
            numbers = np.arange(count, dtype=a.dtype)
            g.set_input(mask, i, g.constant(numbers.reshape([-1 if d == e.count else d for d in a.shape])))
