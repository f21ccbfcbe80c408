"""Key-value caches as inputs and outputs of a model: which belong to one attention, and how they go with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks import Attention
from onnxcomp.graph import Graph, interface
from onnxcomp.graph.interface import GONE, gone

__all__ = ["NONE", "Ports", "ports", "take_out"]

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast")
LENGTH = 2  # axis of a cache `[b, kv_heads, t, h]` that grows


@dataclass(frozen=True)
class Ports:
    """Inputs and outputs of the model that are there for one attention, by name; `why` says what holds them.

    `sizes` are nodes that read the shape of such an input, each with another input of the same shape.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sizes: tuple[tuple[str, str], ...] = ()
    why: str = ""

    def __str__(self) -> str:
        """Which of the model's inputs and outputs they are, in words."""
        parts = [("input", self.inputs), ("output", self.outputs)]
        return " and ".join(f"{what}{'s' * (len(n) > 1)} {', '.join(n)}" for what, n in parts if n)


NONE = Ports()


def ports(g: Graph, a: Attention, others: Sequence[Attention], facts: Facts | None = None) -> Ports:
    """The caches of an attention; `others` stay, and may tell the sizes that are read off its own."""
    inputs, sizes = dict[str, None](), dict[str, str]()
    for i, v in enumerate(a.past or ()):
        fed, readers = _fed(v, a.node)
        if fed is None:
            return Ports(why=f"its cache '{v.name}' is computed from more than one input of the model")
        inputs[str(fed.name)] = None
        for user in readers:
            if user.op_type != "Shape" or user.inputs[0] is not fed:
                return Ports(why=f"its cache '{fed.name}' is also read by '{user.name}' ({user.op_type})")
            twin = _twin(facts or Facts(g), a, i, others)
            if twin is None:
                return Ports(why=f"the shape of its cache '{fed.name}' is read, and no other input is known to have it")
            sizes[str(user.name)] = str(twin.name)
    outputs = dict[str, None]()
    for v in a.present or ():
        for x in _onward(v):
            if x.is_graph_output():
                outputs[str(x.name)] = None
            if held := next((u for u, _ in x.uses() if u.op_type not in MOVES), None):
                return Ports(why=f"its cache '{v.name}' is also read by '{held.name}' ({held.op_type})")
    if outputs and (first := _compared(g)) in outputs:
        return Ports(why=f"'{first}' is the output by which models are compared")
    return Ports(tuple(inputs), tuple(outputs), tuple(sizes.items()))


def take_out(g: Graph, found: Ports) -> None:
    """Take ports of an attention that is no longer read off the interface; the others keep names, order and axes."""
    if not found.inputs and not found.outputs:
        return
    for name, twin in found.sizes:
        g.set_input(g.node(name), 0, g.value(twin))
    graph = g.model.graph
    for v in [v for v in graph.outputs if v.name in found.outputs]:
        graph.outputs.remove(v)
    g.sweep()
    axes = _axes(graph.inputs)
    for v in [v for v in graph.inputs if v.name in found.inputs]:
        if not v.uses():
            graph.inputs.remove(v)
    g.edits += 1
    g.interface = interface.interface(graph)
    lost = {*gone(g.model.metadata_props), *found.inputs, *found.outputs, *axes - _axes(graph.inputs)}
    g.model.metadata_props[GONE] = json.dumps(sorted(lost))


def _axes(inputs: Iterable[ir.Value]) -> set[str]:
    """Names of the open axes."""
    return {str(d.value) for v in inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim) and d.value}


def _compared(g: Graph) -> str:
    """The first output that is not of integers."""
    floats = (v for v in g.outputs if v.dtype is None or v.dtype.is_floating_point())
    return str(next(floats, g.outputs[0]).name)


def _fed(v: ir.Value, reader: ir.Node) -> tuple[ir.Value | None, list[ir.Node]]:
    """The model's input behind a cache, past moves, and who else reads it on the way."""
    others: list[ir.Node] = []
    while True:
        others += [u for u, _ in v.uses() if u is not reader]
        if v.is_graph_input():
            return v, list(dict.fromkeys(others))
        node = v.producer()
        if node is None or node.op_type not in MOVES or node.inputs[0] is None:
            return None, []
        v, reader = node.inputs[0], node


def _onward(v: ir.Value) -> Iterator[ir.Value]:
    """A value and what moves make of it."""
    yield v
    for user in dict.fromkeys(u for u, _ in v.uses()):
        if user.op_type in MOVES:
            yield from _onward(user.outputs[0])


def _twin(facts: Facts, a: Attention, which: int, others: Sequence[Attention]) -> ir.Value | None:
    """The cache of another attention that has the same shape: the same sizes, or one mask over equally many keys."""
    assert a.past is not None
    shape = facts.shape(a.past[which])
    for b in others:
        v = b.past[which] if b.past is not None else None
        other = facts.shape(v)
        if v is None or not v.is_graph_input() or shape is None or other is None or not len(shape) == len(other) == 4:
            continue
        differ = [i for i, (x, y) in enumerate(zip(shape, other, strict=True)) if not facts.same(x, y)]
        if not differ or (differ == [LENGTH] and _masked_alike(facts, a, b)):
            return v
    return None


def _masked_alike(facts: Facts, a: Attention, b: Attention) -> bool:
    """Whether two attentions see equally many keys, since they add one mask, and equally many of them are new."""
    mask, new, others = (facts.shape(v) for v in (a.mask, a.node.inputs[1], b.node.inputs[1]))
    if a.mask is not b.mask or not mask or not new or not others or mask[-1] == 1:
        return False
    return facts.same(new[-2], others[-2])
