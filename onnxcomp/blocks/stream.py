"""Residual streams: the values that additions pass from norm to norm, with their readers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks.linears import Index, NormSite
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS, TOKEN_SELECTING
from onnxcomp.graph.values import users_of

__all__ = ["Stream", "basis_values", "stream_operands", "streams"]


@dataclass
class Stream:
    """One residual stream of width `width`: `values` in graph order, each a sum, a selection of another, or the first.

    `norms` read it; `why` is the reason why its basis cannot be changed, empty if it can.
    """

    width: int
    values: list[ir.Value] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    why: str = ""

    @property
    def kind(self) -> str:
        """`layer` or `rms`, the kind of all its norms."""
        return self.norms[0].kind

    def other_readers(self, v: ir.Value) -> list[ir.Node]:
        """Readers of a value that are neither norms nor part of the stream."""
        stream_nodes = {x.producer() for x in self.values} | {n.node for n in self.norms}
        return [u for u in users_of(v) if u not in stream_nodes]


def basis_values(s: Stream) -> dict[ir.Value, ir.Value]:
    """For every value of a stream the norm input whose basis it has: the next one, at the end the previous one."""
    norm_inputs = {n.input for n in s.norms}
    members = set(s.values)
    basis: dict[ir.Value, ir.Value] = {v: v for v in norm_inputs}
    for v in reversed(s.values):
        later = (o for u, _ in v.uses() for o in u.outputs if o in members and o in basis)
        if v not in basis and (next_basis := next(later, None)) is not None:
            basis[v] = basis[next_basis]
    for v in s.values:
        if v not in basis:
            node = v.producer()
            earlier = [basis[x] for x in (node.inputs if node is not None else ()) if x in basis]
            basis[v] = earlier[0] if earlier else s.norms[0].input
    return basis


def streams(g: Graph) -> list[Stream]:
    """Every residual stream that a norm reads, in graph order; that of a norm inside a branch has a reason in `why`."""
    index, facts = Index.of(g), Facts(g)
    place = {v: i for i, node in enumerate(g.nodes()) for v in node.outputs}
    stream_of: dict[ir.Value, set[ir.Value]] = {}
    norms = [n for n in index.norm_by_output.values() if _last_axis(n, facts)]
    for norm in norms:
        members = set(_members(norm.input, index, facts))
        for other in [s for s in stream_of.values() if s & members]:
            members |= other
        stream_of.update(dict.fromkeys(members, members))
    by_members: dict[int, Stream] = {}
    for norm in norms:
        members = stream_of[norm.input]
        if id(members) not in by_members:
            values = sorted(members, key=lambda v: place.get(v, -1))
            by_members[id(members)] = Stream(norm.gain.shape.numpy()[-1] if norm.gain.shape else 0, values)
        by_members[id(members)].norms.append(norm)
    for s in by_members.values():
        s.why = _refusal(s, index, facts)
    return list(by_members.values())


def _last_axis(norm: NormSite, facts: Facts) -> bool:
    axis, shape = norm.node.attributes.get_int("axis", -1), facts.shape(norm.input)
    has_one_output = len(norm.node.outputs) == 1 or not any(list(o.uses()) for o in norm.node.outputs[1:])
    return has_one_output and (axis == -1 or (shape is not None and axis == len(shape) - 1))


def _members(start: ir.Value, index: Index, facts: Facts) -> Iterator[ir.Value]:
    """The values of the stream of a norm's input: sums, and operands of these that are sums or inputs of norms."""
    norm_inputs = {n.input for n in index.norm_by_output.values()}
    pending, visited = [start], {start}
    while pending:
        v = pending.pop()
        yield v
        for x in stream_operands(v, index, facts):
            is_branch = x in index.by_output or x in index.norm_by_output or not stream_operands(x, index, facts)
            if x not in visited and (x in norm_inputs or not is_branch):
                visited.add(x)
                pending.append(x)


def stream_operands(v: ir.Value, index: Index, facts: Facts) -> list[ir.Value]:
    """The operands of a sum, or the value that tokens are selected from; none where a stream starts."""
    node = v.producer()
    if node is None or v in index.by_output or node.op_type not in (*ADDITIONS, *TOKEN_SELECTING):
        return []
    if node.op_type in ADDITIONS:
        return [x for x in node.inputs if x is not None]
    x, shape = node.inputs[0], facts.shape(node.inputs[0]) if node.inputs[0] is not None else None
    if x is None or Graph.tensor(x) is not None or not shape or not isinstance(shape[-1], int):
        return []
    after = facts.shape(v)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    is_same = after is not None and after[-1] == shape[-1] and (node.op_type != "Gather" or axis < len(shape) - 1)
    return [x] if is_same else []


def _refusal(s: Stream, index: Index, facts: Facts) -> str:
    sums = [
        v for v in s.values if (p := v.producer()) is not None and p.op_type in ADDITIONS and v not in index.by_output
    ]
    parts = [x for v in sums for x in stream_operands(v, index, facts)]
    if not {n.input for n in s.norms}.intersection(parts):  # no addition reads the input of a norm
        if any(x in index.norm_by_output and len({u for u, _ in x.uses()}) > 1 for x in parts):
            return "post-norm: the norm lies inside the residual stream, so no rotation passes through it"
        return "no residual stream leads to it"
    widths = {n.gain.shape.numpy()[-1] if n.gain.shape else 0 for n in s.norms}
    if len({n.kind for n in s.norms}) > 1 or len(widths) > 1:
        return "norms of different kinds or widths read its stream"
    if mismatch := next((x for x in parts if not (shape := facts.shape(x)) or shape[-1] != s.width), None):
        return f"'{mismatch.name}' is added to the stream but is not known to have its {s.width} channels"
    if s.kind == "layer" and (
        unnormalized := next((v for v in s.values if s.other_readers(v) or v.is_graph_output()), None)
    ):
        return f"'{unnormalized.name}' is read without a norm, so its mean cannot be folded away"
    return ""
