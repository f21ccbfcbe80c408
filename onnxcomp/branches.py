"""What attentions and MLPs add to the residual stream, so that a layer or one of its parts can be left out."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.blocks import Attention, Layer, Mlp, layers
from onnxcomp.graph import Graph, Site
from onnxcomp.structure.views import Index

__all__ = ["Branch", "branches", "whole_layers"]


@dataclass(frozen=True)
class Branch:
    """A stretch of the stream: `exit` is `entry` with something added (and normalized again, where norms come last).

    `why` says what forbids leaving it out; it is empty where `exit` may be replaced by `entry`.
    """

    name: str
    kind: str
    layer: int
    nodes: tuple[str, ...]
    entry: ir.Value | None
    exit: ir.Value | None
    why: str = ""

    @property
    def site(self) -> Site:
        """The place in the graph."""
        return Site(self.name, self.nodes, self.kind)


def branches(g: Graph) -> list[Branch]:
    """The branch of every attention and MLP, in the order of the layers."""
    found, index = layers(g), Index.of(g)
    outs = {_out(p) for layer in found for p in _parts(layer)}
    return [_branch(g, index, layer, part, outs) for layer in found for part in _parts(layer)]


def whole_layers(g: Graph) -> list[Branch]:
    """All parts of a layer as one stretch; blocked where they do not follow each other on one stream."""
    groups: dict[int, list[Branch]] = {}
    for b in branches(g):
        groups.setdefault(b.layer, []).append(b)
    return [_whole(group) for group in groups.values()]


def _whole(group: list[Branch]) -> Branch:
    first, last = group[0], group[-1]
    nodes = tuple(dict.fromkeys(n for b in group for n in b.nodes))
    stream = all(b.exit is c.entry for b, c in itertools.pairwise(group))
    parallel = all((b.entry, b.exit) == (first.entry, first.exit) for b in group)
    blocked = next((b.why for b in group if b.why and not (parallel and b.why == PARALLEL)), "")
    if not blocked and not stream and not parallel:
        blocked = "its parts do not follow each other on one stream"
    return Branch(f"{first.name} (layer {first.layer})", "layer", first.layer, nodes, first.entry, last.exit, blocked)


PARALLEL = "it runs in parallel with another part of the layer"
KEPT = "its keys and values are outputs of the model"


def _parts(layer: Layer) -> list[Attention | Mlp]:
    return [*layer.attentions, *([layer.mlp] if layer.mlp is not None else [])]


def _out(part: Attention | Mlp) -> ir.Value:
    return part.o.output if isinstance(part, Attention) else part.down.output


def _branch(g: Graph, index: Index, layer: Layer, part: Attention | Mlp, outs: Collection[ir.Value]) -> Branch:
    kind = "attention" if isinstance(part, Attention) else "mlp"
    kept = isinstance(part, Attention) and part.present is not None
    found = _climb(g, _out(part), outs)
    if found is None:
        why = "what it makes is not simply added to the stream"
        return Branch(part.name, kind, layer.index, part.site.nodes, None, None, why)
    add, entry, parallel = found
    end = add.outputs[0]
    norm = _norm_after(index, end) if layer.position == "post" else None
    end = norm.outputs[0] if norm is not None else end
    nodes = (*part.site.nodes, str(add.name), *([str(norm.name)] if norm is not None else []))
    why = KEPT if kept else PARALLEL if parallel else ""
    return Branch(part.name, kind, layer.index, nodes, entry, end, why)


def _climb(g: Graph, v: ir.Value, outs: Collection[ir.Value]) -> tuple[ir.Node, ir.Value, bool] | None:
    """The addition to the stream, the stream before it, and whether another part was added to the branch first."""
    parallel = False
    passed = ("Mul", "Cast", "Identity", "LayerNormalization", "RMSNormalization")
    while not v.is_graph_output():
        users = list(dict.fromkeys(u for u, _ in v.uses()))
        if len(users) != 1:
            return None
        node, others = users[0], [x for x in users[0].inputs if x is not v]
        if node.op_type in ("Add", "Sum") and len(node.inputs) == 2 and len(others) == 1 and others[0] is not None:
            if others[0] not in outs and not g.is_constant(others[0]):
                return node, others[0], parallel
            parallel = parallel or others[0] in outs
        elif node.op_type not in passed or not all(x is None or g.is_constant(x) for x in others):
            return None
        v = node.outputs[0]
    return None


def _norm_after(index: Index, v: ir.Value) -> ir.Node | None:
    """The norm that alone reads the sum, in models that normalize after adding."""
    users = list(dict.fromkeys(u for u, _ in v.uses()))
    found = next((n.node for n in index.norm.values() if n.input is v), None)
    return found if len(users) == 1 and users[0] is found and not v.is_graph_output() else None
