"""Key-value caches as inputs and outputs of a model: those of one attention, and how to remove them with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks import Attention
from onnxcomp.graph import Graph, interface
from onnxcomp.graph.interface import REMOVED_PORTS, removed_ports
from onnxcomp.graph.operators import is_layout
from onnxcomp.graph.values import users_of

__all__ = ["NO_PORTS", "CachePorts", "cache_ports", "remove_ports"]

LENGTH = 2  # the axis of a cache `[b, kv_heads, t, h]` that grows with each token


@dataclass(frozen=True)
class CachePorts:
    """The model's inputs and outputs for the cache of one attention, by name; `why` is the reason why they must stay.

    `sizes` are nodes that read the shape of such an input, each with a replacement input of the same shape.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sizes: tuple[tuple[str, str], ...] = ()
    why: str = ""

    def __str__(self) -> str:
        """The inputs and outputs as text."""
        parts = [("input", self.inputs), ("output", self.outputs)]
        return " and ".join(f"{what}{'s' * (len(n) > 1)} {', '.join(n)}" for what, n in parts if n)


NO_PORTS = CachePorts()


def cache_ports(g: Graph, a: Attention, others: Sequence[Attention], facts: Facts | None = None) -> CachePorts:
    """The cache ports of an attention; sizes read from them may be read from the caches of `others` instead."""
    inputs, sizes = dict[str, None](), dict[str, str]()
    for i, v in enumerate(a.past or ()):
        source, readers = _graph_input_behind(v, a.node)
        if source is None:
            return CachePorts(why=f"its cache '{v.name}' is computed from more than one input of the model")
        inputs[str(source.name)] = None
        for user in readers:
            if user.op_type != "Shape" or user.inputs[0] is not source:
                return CachePorts(why=f"its cache '{source.name}' is also read by '{user.name}' ({user.op_type})")
            twin = _same_shaped_cache(facts or Facts(g), a, i, others)
            if twin is None:
                return CachePorts(
                    why=f"the shape of its cache '{source.name}' is read, and no other input is known to have it"
                )
            sizes[str(user.name)] = str(twin.name)
    outputs = dict[str, None]()
    for v in a.present or ():
        for x in _rearranged_values(v):
            if x.is_graph_output():
                outputs[str(x.name)] = None
            if consumer := next((u for u, _ in x.uses() if not is_layout(u)), None):
                return CachePorts(why=f"its cache '{v.name}' is also read by '{consumer.name}' ({consumer.op_type})")
    if outputs and (compared := _compared_output(g)) in outputs:
        return CachePorts(why=f"'{compared}' is the output by which models are compared")
    return CachePorts(tuple(inputs), tuple(outputs), tuple(sizes.items()))


def remove_ports(g: Graph, removed: CachePorts) -> None:
    """Remove the ports of an unused attention from the interface; the other ports keep names, order and axes."""
    if not removed.inputs and not removed.outputs:
        return
    for name, twin in removed.sizes:
        g.set_input(g.node(name), 0, g.value(twin))
    graph = g.model.graph
    for v in [v for v in graph.outputs if v.name in removed.outputs]:
        graph.outputs.remove(v)
    g.sweep()
    axes = _axes(graph.inputs)
    for v in [v for v in graph.inputs if v.name in removed.inputs]:
        if not v.uses():
            graph.inputs.remove(v)
    g.edits += 1
    g.interface = interface.interface(graph)
    names = {*removed_ports(g.model.metadata_props), *removed.inputs, *removed.outputs, *axes - _axes(graph.inputs)}
    g.model.metadata_props[REMOVED_PORTS] = json.dumps(sorted(names))


def _axes(inputs: Iterable[ir.Value]) -> set[str]:
    """Names of the symbolic axes."""
    return {str(d.value) for v in inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim) and d.value}


def _compared_output(g: Graph) -> str:
    """The first output that is not of integers."""
    floats = (v for v in g.outputs if v.dtype is None or v.dtype.is_floating_point())
    return str(next(floats, g.outputs[0]).name)


def _graph_input_behind(v: ir.Value, reader: ir.Node) -> tuple[ir.Value | None, list[ir.Node]]:
    """The graph input behind a cache, before layout operators, and its other readers."""
    other_readers: list[ir.Node] = []
    while True:
        other_readers += [u for u, _ in v.uses() if u is not reader]
        if v.is_graph_input():
            return v, list(dict.fromkeys(other_readers))
        node = v.producer()
        if node is None or not is_layout(node) or node.inputs[0] is None:
            return None, []
        v, reader = node.inputs[0], node


def _rearranged_values(v: ir.Value) -> Iterator[ir.Value]:
    """A value and all that layout operators produce from it."""
    yield v
    for user in users_of(v):
        if is_layout(user):
            yield from _rearranged_values(user.outputs[0])


def _same_shaped_cache(facts: Facts, a: Attention, which: int, others: Sequence[Attention]) -> ir.Value | None:
    """Another attention's cache of the same shape: of equal sizes, or of equally many keys under the same mask."""
    assert a.past is not None
    shape = facts.shape(a.past[which])
    for b in others:
        v = b.past[which] if b.past is not None else None
        other = facts.shape(v)
        if v is None or not v.is_graph_input() or shape is None or other is None or not len(shape) == len(other) == 4:
            continue
        differing = [i for i, (x, y) in enumerate(zip(shape, other, strict=True)) if not facts.same(x, y)]
        if not differing or (differing == [LENGTH] and _masked_alike(facts, a, b)):
            return v
    return None


def _masked_alike(facts: Facts, a: Attention, b: Attention) -> bool:
    """Whether two attentions have equally many keys, since they share a mask, and equally many new ones."""
    mask, new, others = (facts.shape(v) for v in (a.mask, a.node.inputs[1], b.node.inputs[1]))
    if a.mask is not b.mask or not mask or not new or not others or mask[-1] == 1:
        return False
    return facts.same(new[-2], others[-2])
