"""Residual branches by structure: an addition of a value to something that is computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS, LAYOUT_OR_CAST, NORMS, TOKEN_SELECTING, is_layout
from onnxcomp.graph.values import users_of

__all__ = ["Residual", "residuals", "stream_before"]

MAX_STEPS = 24  # between two branches of one stream: norms, layout, scalars, windows of an image
BETWEEN = LAYOUT_OR_CAST | TOKEN_SELECTING | set(NORMS) | {"Mul", "Div", "Concat", "Pad", "Split", "Dropout"}
CORES = ("Attention", "Softmax")
POOLING = {"Add", "AveragePool", "MaxPool", "ReduceMax", "ReduceMean"}  # Add of a constant


@dataclass(frozen=True)
class Residual:
    """`end = entry + f(entry)`: the addition, and the nodes of `f`, that is those computed from `entry` on the way.

    Parts that run in parallel on one entry are one branch; `adds` are then several additions, the last one ends it.
    Where a stage of another width begins, the entry is `projected` (and pooled) on its way past the branch.
    """

    entry: ir.Value
    adds: tuple[ir.Node, ...]
    nodes: frozenset[ir.Node]
    projected: bool = False

    @property
    def end(self) -> ir.Value:
        """The stream after the branch."""
        return self.adds[-1].outputs[0]


def residuals(g: Graph) -> list[Residual]:
    """The outermost residual branches that hold one attention at most, in graph order.

    A branch inside another one, such as that of a bottleneck, belongs to it; one round several attentions that have
    branches of their own, such as a connection from the first layer to the last, is none.
    """
    order = {node: i for i, node in enumerate(g.nodes())}
    found: dict[ir.Value, Residual] = {}
    for node in g.nodes(*ADDITIONS):
        branch = _branch(g, node, order, found)
        if branch is not None:
            for add in branch.adds[:-1]:
                found.pop(add.outputs[0], None)
            found[branch.end] = branch
    every = list(found.values())
    wide = {id(b) for b in every if _is_around_several(b, every)}
    kept = [b for b in every if id(b) not in wide]
    return [b for b in kept if not any(set(b.adds) <= c.nodes for c in kept if c is not b)]


def _branch(
    g: Graph, node: ir.Node, order: Mapping[ir.Node, int], found: Mapping[ir.Value, Residual]
) -> Residual | None:
    operands = [v for v in node.inputs if v is not None]
    if node.domain or len(operands) != 2 or operands[0] is operands[1] or any(g.is_constant(v) for v in operands):
        return None
    for stream, other in (operands, operands[::-1]):
        before = found.get(stream)
        if before is not None and users_of(stream) == [node]:  # parallel parts are added one after another
            nodes = _between(before.entry, other, order)
            if nodes:
                return Residual(before.entry, (*before.adds, node), before.nodes | nodes)
        for entry in _unscaled(stream):
            nodes = _between(entry, other, order)
            if nodes:
                return Residual(entry, (node,), frozenset(nodes))
    for shortcut, other in (operands, operands[::-1]):
        projected = _before_projection(shortcut)
        nodes = _between(projected, other, order) if projected is not None else set()
        if projected is not None and any(n.op_type in CORES for n in nodes):
            return Residual(projected, (node,), frozenset(nodes), projected=True)
    return None


def _before_projection(v: ir.Value) -> ir.Value | None:
    """What a linear projects to `v`, with pooling and layout behind it; None for any other value."""
    for _ in range(MAX_STEPS):
        node = v.producer()
        if node is None or node.domain:
            return None
        inputs = [x for x in node.inputs if x is not None and Graph.tensor(x) is None]
        if len(inputs) != 1:
            return None
        if node.op_type in ("MatMul", "Conv"):
            return inputs[0]
        if node.op_type not in LAYOUT_OR_CAST | POOLING:
            return None
        v = inputs[0]
    return None


def _unscaled(v: ir.Value) -> Iterator[ir.Value]:
    """A value, and what it is a rearranged or by a constant scaled form of."""
    while True:
        yield v
        node = v.producer()
        if node is None or node.domain:
            return
        inputs = [x for x in node.inputs if x is not None and Graph.tensor(x) is None]
        scales = node.op_type in ("Mul", "Div") and len(inputs) == 1 and node.inputs[0] is inputs[0]
        if not inputs or not (is_layout(node) or scales):
            return
        v = inputs[0]


def _between(entry: ir.Value, end: ir.Value, order: Mapping[ir.Node, int]) -> set[ir.Node]:
    """The nodes that compute `end` from `entry`; none where it does not depend on it."""
    producer = entry.producer()
    first = -1 if producer is None else order.get(producer, -1)
    behind: set[ir.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in behind and order.get(node, -1) > first:
            behind.add(node)
            pending += [v for v in node.inputs if v is not None]
    made, nodes = {entry}, set()
    for node in sorted(behind, key=lambda n: order[n]):
        if any(v in made for v in node.inputs):
            made.update(node.outputs)
            nodes.add(node)
    return nodes if end in made else set()


def _is_around_several(b: Residual, every: Iterable[Residual]) -> bool:
    inside = [c for c in every if c is not b and set(c.adds) <= b.nodes]
    return sum(any(n.op_type in CORES for n in c.nodes) for c in inside) > 1


def stream_before(v: ir.Value, ends: Mapping[ir.Value, Residual]) -> Residual | None:
    """The branch whose end a value is, directly or through norms, layout and scales."""
    for _ in range(MAX_STEPS):
        if v in ends:
            return ends[v]
        node = v.producer()
        x = None if node is None else next((x for x in node.inputs if x is not None and Graph.tensor(x) is None), None)
        if node is None or node.op_type not in BETWEEN or x is None:
            return None
        v = x
    return None
