"""The values of a graph that are worth comparing with another graph's, in an order that no exporter decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS, LAYER_OPS, LAYOUT_OR_CAST, has_body
from onnxcomp.graph.postorder import postorder
from onnxcomp.graph.values import sole_use

__all__ = ["Landmark", "landmarks"]

FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE))
# What only moves, repeats or describes elements of a value that is a landmark itself.
MOVING = LAYOUT_OR_CAST | {"Expand", "Flatten", "Slice", "Split", "Shape", "Size", "Gather", "Range", "ConstantOfShape"}
WORKING = LAYER_OPS | {"MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul"}
SHAPES = frozenset(("Shape", "Size"))


@dataclass(frozen=True)
class Landmark:
    """A float value: its name, the node that computes it, its layer (-1 outside of layers) and what it is there."""

    value: str
    node: str
    op: str
    layer: int = -1
    role: str = ""
    outputs: tuple[str, ...] = ()
    product: bool = False  # with stored weights

    @property
    def title(self) -> str:
        """Where it is, in words."""
        place = f"layer {self.layer}" if self.layer >= 0 else "outside of layers"
        return f"{place}, {self.role or self.op}"


def landmarks(g: Graph) -> list[Landmark]:
    """Float values that depend on the inputs, from the inputs on, of a graph in the canonical form.

    The order is that of a walk from the outputs back, the longer way first, so that two exports of one model agree.
    """
    g.sort()
    reach, heights, places = _reaching(g), _heights(g), _places(g)
    products = {node for x in blocks.linears(g, tied=True) for node in (x.node, x.add)}
    found, layer = list[Landmark](), -1
    for node in _walked(g, heights):
        index, role = places.get(node, (-1, ""))
        layer = index if index >= 0 else layer
        for v in node.outputs:
            if v in heights and _counts(g, node, v):
                outputs = tuple(sorted(reach.get(v, ())))
                product = node in products or node.op_type.startswith("Conv")
                found.append(Landmark(str(v.name), str(node.name), node.op_type, layer, role, outputs, product))
    return _outside(found)


def _counts(g: Graph, node: ir.Node, v: ir.Value) -> bool:
    """Whether a value says anything of its own: no layout, no product whose bias is still to come."""
    if node.op_type in MOVING and not _is_lookup(g, node):
        return False
    if v.dtype not in FLOATS or (v.shape is not None and len(v.shape) < 2) or not (v.uses() or v.is_graph_output()):
        return False
    after = sole_use(v)
    if after is None or after[0].op_type not in ADDITIONS:
        return True
    others = [x for x in after[0].inputs if x is not v]
    return not all(_is_vector(g, x) for x in others)


def _is_lookup(g: Graph, node: ir.Node) -> bool:
    return node.op_type == "Gather" and g.is_constant(node.inputs[0]) and not g.is_constant(node.inputs[1])


def _is_vector(g: Graph, v: ir.Value | None) -> bool:
    t = g.tensor(v)
    return t is not None and sum(n > 1 for n in t.shape.numpy()) <= 1


def _heights(g: Graph) -> dict[ir.Value, int]:
    """How many of a layer's operators the longest way from an input to a value has, where it depends on contents.

    Others do not count: exporters and passes write more or fewer of them.
    """
    heights: dict[ir.Value, int] = dict.fromkeys(g.model.graph.inputs, 0)
    for v in g.model.graph.initializers.values():
        heights.pop(v, None)
    for node in g.model.graph:
        known = [heights[x] for x in node.inputs if x is not None and x in heights]
        if (known or has_body(node)) and node.op_type not in SHAPES:
            heights.update(dict.fromkeys(node.outputs, (node.op_type in WORKING) + max(known, default=0)))
    return heights


def _walked(g: Graph, heights: Mapping[ir.Value, int]) -> list[ir.Node]:
    """All nodes behind inputs, each after those it reads; of several inputs the one with the longest way first."""

    def read(node: ir.Node) -> list[ir.Value]:  # stable: inputs of one height stay in their order
        return sorted((x for x in node.inputs if x is not None and x in heights), key=lambda x: -heights[x])

    return postorder(g, read)


def _reaching(g: Graph) -> dict[ir.Value, set[str]]:
    """The outputs that each value reaches."""
    reach: dict[ir.Value, set[str]] = {}
    for v in g.model.graph.outputs:
        reach.setdefault(v, set()).add(str(v.name))
    for node in reversed(list(g.model.graph)):
        ends = set[str]().union(*(reach.get(v, ()) for v in node.outputs))
        for x in node.inputs:
            if x is not None and ends:
                reach.setdefault(x, set()).update(ends)
    return reach


def _places(g: Graph) -> dict[ir.Node, tuple[int, str]]:
    """The layer of nodes that blocks know, and what they are in it."""
    places: dict[ir.Node, tuple[int, str]] = {}
    for layer in blocks.layers(g):
        for a in layer.attentions:
            places[a.node] = layer.index, "attention"
            for x, role in zip((a.q, a.k, a.v, a.o), ("query", "key", "value", "attention output"), strict=True):
                _put(places, x, (layer.index, role))
        for m in layer.mlps:
            for y, role in ((m.up, "MLP up"), (m.gate, "MLP gate"), (m.down, "MLP down")):
                if y is not None:
                    _put(places, y, (layer.index, role))
        for node in layer.unknown:
            places.setdefault(node, (layer.index, "attention"))
        for n in layer.norms:
            places.setdefault(n.node, (layer.index, "norm"))
    return places


def _put(places: dict[ir.Node, tuple[int, str]], x: blocks.Linear, place: tuple[int, str]) -> None:
    for node in (x.node, x.add):
        if node is not None:
            places.setdefault(node, place)


def _outside(found: list[Landmark]) -> list[Landmark]:
    """What comes behind the last node that is known to be of a layer is outside of layers, but for its residual."""
    last = max((i for i, x in enumerate(found) if x.role), default=-1)
    return [x if i <= last + 1 else dataclasses.replace(x, layer=-1) for i, x in enumerate(found)]
