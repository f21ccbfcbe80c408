"""Residual branches of attentions and MLPs, so that a layer or a part of it can be removed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks import Attention, Experts, Layer, Linear, Mlp, layers
from onnxcomp.blocks.caches import NO_PORTS, CachePorts, cache_ports
from onnxcomp.blocks.linears import Index
from onnxcomp.blocks.residual import Residual, stream_before
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import ADDITIONS, BRANCH_OPS, LAYOUT_OR_CAST, NORMS
from onnxcomp.graph.values import sole_use, users_of

__all__ = ["Branch", "ResidualSum", "branches", "layer_branches", "residual_add", "residual_sum"]


@dataclass(frozen=True)
class Branch:
    """A residual branch: `exit` is `entry` with the branch's output added (and normalized, in post-norm models).

    `why` is the reason against removal, empty where `entry` may replace `exit`. The `cache_ports` are removed too.
    """

    name: str
    kind: str
    layer: int
    nodes: tuple[str, ...]
    entry: ir.Value | None
    exit: ir.Value | None
    why: str = ""
    cache_ports: tuple[CachePorts, ...] = ()

    @property
    def site(self) -> Site:
        """The place in the graph."""
        return Site(self.name, self.nodes, self.kind)


def branches(g: Graph) -> list[Branch]:
    """The branch of every attention and MLP, in the order of the layers."""
    model_layers, index = layers(g), Index.of(g)
    outs = {_part_output(p) for layer in model_layers for p in _single_parts(layer)}
    caches = _caches(g, model_layers)
    return [_branch(g, index, layer, part, outs, caches) for layer in model_layers for part in _single_parts(layer)]


def _caches(g: Graph, model_layers: Sequence[Layer]) -> dict[str, CachePorts]:
    """The cache ports of each attention; sizes read from them may be read from those of other layers instead."""
    by_layer = [(layer, a) for layer in model_layers for a in layer.attentions]
    if not any(a.past or a.present for _, a in by_layer):
        return {}
    facts = Facts(g)
    return {
        a.name: cache_ports(g, a, [b for other, b in by_layer if other is not layer], facts) for layer, a in by_layer
    }


class ResidualSum(NamedTuple):
    """The stream `end` behind the addition of a linear's output, the other addends, and the output's constant scale."""

    end: ir.Value
    others: tuple[ir.Value, ...]
    scale: ir.Value | None = None


def residual_sum(x: Linear) -> ResidualSum | None:
    """How a linear's output is added to the stream, if it is: possibly scaled, by several sums for parallel parts."""
    scale, end = _scaled(x.output)
    others: list[ir.Value] = []
    while (node := _sole_addition(end)) is not None:
        others += [v for v in node.inputs if v is not None and v is not end]
        end = node.outputs[0]
    return ResidualSum(end, tuple(others), scale) if others else None


def _scaled(v: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """The constant factor and the product, where that is a value's only use; else None and the value."""
    use = sole_use(v)
    if use is None or use[0].op_type != "Mul":
        return None, v
    node, _ = use
    scale = next((x for x in node.inputs if x is not v), None)
    return (scale, node.outputs[0]) if Graph.tensor(scale) is not None else (None, v)


def residual_add(x: Linear) -> ir.Node | None:
    """The addition of two computed values, such as the residual one, that is the only use of a linear's output."""
    return _sole_addition(x.output)


def _sole_addition(v: ir.Value) -> ir.Node | None:
    use = sole_use(v)
    if use is None or use[0].op_type not in ADDITIONS or len(use[0].inputs) != 2:
        return None
    node, _ = use
    return node if all(v is not None and Graph.tensor(v) is None for v in node.inputs) else None


def layer_branches(g: Graph) -> list[Branch]:
    """One branch for each layer, not removable where it is not what a residual stream adds up from one value on."""
    model_layers, index, facts = layers(g), Index.of(g), Facts(g)
    caches = _caches(g, model_layers)
    ends = {u.residual.end: u.residual for layer in model_layers for u in layer.units if u.residual is not None}
    entries = {id(before): u for layer in model_layers if (u := layer.units[0].residual) is not None
               and (before := stream_before(u.entry, ends)) is not None}  # fmt: skip
    exits = {layer.index: _exit(layer, entries) for layer in model_layers}
    with_norm = any(v is not None and v in index.norm_by_output for v in exits.values())
    return [_layer_branch(layer, exits[layer.index], with_norm, index, facts, caches) for layer in model_layers]


def _exit(layer: Layer, entries: Mapping[int, Residual]) -> ir.Value | None:
    """The entry of the next layer, where only norms and layout lie between; None where there is none."""
    last = layer.units[-1].residual
    following = entries.get(id(last)) if last is not None else None
    v = following.entry if following is not None else None
    while last is not None and v is not None and v is not last.end:
        node = v.producer()
        if node is None or node.op_type not in (*NORMS, *LAYOUT_OR_CAST):
            return None
        v = node.inputs[0]
    return following.entry if following is not None else None


def _layer_branch(
    layer: Layer, end: ir.Value | None, with_norm: bool, index: Index, facts: Facts, caches: Mapping[str, CachePorts]
) -> Branch:
    first, last = layer.units[0].residual, layer.units[-1].residual
    name = f"{_first_name(layer)} (layer {layer.index})"
    parts = [residual for u in layer.units if (residual := u.residual) is not None]
    nodes = [str(n.name) for r in parts for n in (*_in_order(r), *r.adds)]
    nodes += [n for p in _layer_parts(layer) for n in p.site.nodes]
    ports = tuple(caches[a.name] for a in layer.attentions if caches.get(a.name, NO_PORTS) != NO_PORTS)
    why = next((p.why for p in ports if p.why), "")
    if len(parts) < len(layer.units):
        why = "its output is not simply added to the residual stream"
    elif any(r.projected for r in parts):
        why = "the residual stream is projected to another width beside it"
    elif not all(stream_before(b.entry, {a.end: a}) for a, b in itertools.pairwise(parts)):
        why = "its parts do not follow each other on one stream"
    elif any(len(n.inputs) > 4 or len(n.outputs) > 1 for n in layer.unknown):
        why = "the cache of an attention that was not recognised cannot be removed"
    entry = first.entry if first is not None else None
    if end is None and last is not None:
        norm = _norm_after(index, last.end) if with_norm or layer.position == "post" else None
        end = norm.outputs[0] if norm is not None else _with_shape_of(facts, entry, last.end)
    if not why and (end is None or facts.rank(end) != facts.rank(entry) or facts.shape(end) != facts.shape(entry)):
        why = "its input and its output have different shapes"
    if last is not None and end is not None and end is not last.end:
        nodes += [str(u.name) for u in users_of(last.end) if end in u.outputs]
    return Branch(name, "layer", layer.index, tuple(dict.fromkeys(nodes)), entry, end, why, ports)


def _in_order(r: Residual) -> list[ir.Node]:
    return sorted(r.nodes, key=lambda n: str(n.name))


def _first_name(layer: Layer) -> str:
    """The name of a layer's first part."""
    parts = _layer_parts(layer)
    return parts[0].name if parts else str(layer.unknown[0].name)


def _with_shape_of(facts: Facts, entry: ir.Value | None, end: ir.Value | None) -> ir.Value | None:
    """The end of a layer in the shape of its entry: behind a Reshape where the last part works on a list of tokens."""
    if end is None or facts.rank(end) == facts.rank(entry):
        return end
    users = users_of(end)
    after = users[0].outputs[0] if len(users) == 1 and users[0].op_type == "Reshape" else None
    return after if after is not None and facts.shape(after) == facts.shape(entry) else None


PARALLEL = "it runs in parallel with another part of the layer"


def _layer_parts(layer: Layer) -> list[Attention | Mlp | Experts]:
    return [*layer.attentions, *layer.mlps, *layer.experts]


def _single_parts(layer: Layer) -> list[Attention | Mlp]:
    """The parts of a layer that can be dropped by themselves."""
    return [*layer.attentions, *layer.mlps]


def _part_output(part: Attention | Mlp) -> ir.Value:
    return part.o.output if isinstance(part, Attention) else part.down.output


def _branch(
    g: Graph,
    index: Index,
    layer: Layer,
    part: Attention | Mlp,
    outs: Collection[ir.Value],
    caches: Mapping[str, CachePorts],
) -> Branch:
    kind = "attention" if isinstance(part, Attention) else "mlp"
    cache = caches.get(part.name, NO_PORTS) if isinstance(part, Attention) else NO_PORTS
    addition = _find_residual_add(g, _part_output(part), outs)
    if addition is None:
        why = "its output is not simply added to the residual stream"
        return Branch(part.name, kind, layer.index, part.site.nodes, None, None, why)
    add, entry, parallel = addition
    end = add.outputs[0]
    norm = _norm_after(index, end) if layer.position == "post" else None
    end = norm.outputs[0] if norm is not None else end
    nodes = (*part.site.nodes, str(add.name), *([str(norm.name)] if norm is not None else []))
    why = cache.why or (PARALLEL if parallel else "")
    return Branch(part.name, kind, layer.index, nodes, entry, end, why, (cache,) if cache != NO_PORTS else ())


def _find_residual_add(g: Graph, v: ir.Value, outs: Collection[ir.Value]) -> tuple[ir.Node, ir.Value, bool] | None:
    """The residual addition, the stream before it, and whether another part's output was added to the branch first.

    On the way the branch may be scaled, normalized and rearranged (windows of an image are merged again).
    """
    parallel, branch_values = False, {v}
    pending = users_of(v)
    while pending:
        node = next((n for n in pending if not _other_operands(g, n, branch_values)), pending[0])
        operands = _other_operands(g, node, branch_values)
        if operands:
            if len(pending) > 1 or len(operands) > 1 or node.op_type not in ADDITIONS:
                return None
            if operands[0] not in outs:
                return node, operands[0], parallel
            parallel = True
        elif node.op_type not in BRANCH_OPS or any(o.is_graph_output() for o in node.outputs):
            return None
        branch_values.update(node.outputs)
        pending = [
            n for n in dict.fromkeys([*pending, *(u for o in node.outputs for u in users_of(o))]) if n is not node
        ]
    return None


def _other_operands(g: Graph, node: ir.Node, branch_values: Collection[ir.Value]) -> list[ir.Value]:
    """The computed float operands of a node that are not of the branch."""
    operands = (x for x in node.inputs if x is not None and x not in branch_values and not g.is_constant(x))
    return [x for x in operands if x.dtype is None or x.dtype.is_floating_point()]


def _norm_after(index: Index, v: ir.Value) -> ir.Node | None:
    """The norm that is the only user of a sum, as in post-norm models."""
    users = users_of(v)
    norm = next((n.node for n in index.norm_by_output.values() if n.input is v), None)
    return norm if len(users) == 1 and users[0] is norm and not v.is_graph_output() else None
