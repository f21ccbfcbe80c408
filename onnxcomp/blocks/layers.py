"""Layers: what the residual stream adds up, grouped so that each layer has its attentions and what follows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcomp.blocks.attentions import Attention, attentions
from onnxcomp.blocks.experts import Experts, experts
from onnxcomp.blocks.linears import Linear, NormSite, norms
from onnxcomp.blocks.mlps import Mlp, mlps
from onnxcomp.blocks.residual import Residual, residuals, stream_before
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS
from onnxcomp.graph.values import users_of

__all__ = ["Layer", "Unit", "layers"]

Part = Attention | Mlp | Experts


@dataclass
class Unit:
    """One residual branch with its parts, or a part that is in none; `unknown` are attentions without projections.

    `follows` is the branch whose end its entry is, None at the start of a stream.
    """

    at: int
    residual: Residual | None
    parts: list[Part] = field(default_factory=list)
    unknown: list[ir.Node] = field(default_factory=list)
    stream: int = 0

    @property
    def attends(self) -> bool:
        """Whether an attention is in it."""
        return bool(self.unknown) or any(isinstance(p, Attention) for p in self.parts)

    @property
    def feeds_forward(self) -> bool:
        """Whether anything else is in it."""
        return not self.attends or any(not isinstance(p, Attention) for p in self.parts)


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attentions (a second one is cross attention), feed-forward parts and norms.

    `unknown` are attentions that are not linked to projections, `units` the residual branches that make it up.
    """

    index: int
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    norms: tuple[NormSite, ...]
    position: str
    experts: tuple[Experts, ...] = ()
    unknown: tuple[ir.Node, ...] = ()
    units: tuple[Unit, ...] = ()

    @property
    def attention(self) -> Attention | None:
        """The first attention."""
        return self.attentions[0] if self.attentions else None

    @property
    def mlp(self) -> Mlp | None:
        """The first feed-forward part."""
        return self.mlps[0] if self.mlps else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of the layer, each once."""
        parts: tuple[Part, ...] = (*self.attentions, *self.mlps, *self.experts)
        return tuple({x.node: x for p in parts for x in p.linears}.values())


def layers(g: Graph) -> list[Layer]:
    """The layers in graph order: for each stream, the branches from one attention to the next."""
    norm_sites = norms(g)
    groups = [group for units in _streams(g) for group in _grouped(units)]
    whole = sorted((u for u in groups if any(x.parts or x.unknown for x in u)), key=lambda u: u[0].at)
    return [_layer(i, group, norm_sites) for i, group in enumerate(whole)]


def _streams(g: Graph) -> list[list[Unit]]:
    """The branches of each residual stream with their parts, in order."""
    order = {node: i for i, node in enumerate(g.nodes())}
    units = _units(g, order)
    ends = {u.residual.end: u.residual for u in units if u.residual is not None}
    streams: list[list[Unit]] = []
    last: dict[ir.Node | None, list[Unit]] = {}
    for unit in units:
        before = stream_before(unit.residual.entry, ends) if unit.residual is not None else None
        stream = last.get(before.adds[-1] if before is not None else None) if before is not None else None
        if unit.residual is None:
            stream = streams[-1] if streams else None
        if stream is None:
            stream = []
            streams.append(stream)
        stream.append(unit)
        if unit.residual is not None:
            last[unit.residual.adds[-1]] = stream
    return streams


def _units(g: Graph, order: Mapping[ir.Node, int]) -> list[Unit]:
    """Residual branches and, one by one, the parts outside of them, in graph order."""
    units = [Unit(order[r.adds[-1]], r) for r in residuals(g)]
    home = {n: u for u in units if u.residual is not None for n in (*u.residual.nodes, *u.residual.adds)}
    routed = experts(g)
    looped = {e.mlp.down.node for x in routed for e in x.loop if e.mlp is not None}
    parts: list[Part] = [*attentions(g), *(m for m in mlps(g) if m.down.node not in looped), *routed]
    linked = {p.node for p in parts if isinstance(p, Attention)}
    for p in parts:
        last = _last_node(p)
        unit = home.get(last)
        if unit is None:
            unit = Unit(order[last], None)
            units.append(unit)
        unit.parts.append(p)
    for node in g.nodes("Attention", "Softmax"):
        if node not in linked and node in home and _is_core(node):
            home[node].unknown.append(node)
    return sorted((u for u in units), key=lambda u: u.at)


def _is_core(node: ir.Node) -> bool:
    """Whether a node is the core of an attention: an operator, or a softmax before a product."""
    return node.op_type == "Attention" or any(u.op_type == "MatMul" for u in users_of(node.outputs[0]))


def _last_node(p: Part) -> ir.Node:
    return p.o.node if isinstance(p, Attention) else p.down.node if isinstance(p, Mlp) else p.choices[-1]


def _grouped(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """The units of each layer: a layer ends before the attention that follows something else.

    Where feed-forward parts come before the first attention as well (as in a Conformer), layers begin that much
    earlier. Without attention every unit is a layer.
    """
    attending = [i for i, u in enumerate(units) if u.attends]
    if not attending:
        yield from ([u] for u in units)
        return
    starts = [i for i in attending if i == attending[0] or units[i - 1].feeds_forward]
    lead = starts[0]
    gaps = [b - max(a for a in attending if a < b) - 1 for b in starts[1:]]
    tail = len(units) - 1 - attending[-1]
    if lead and not (tail + lead == (gaps[0] if gaps else tail + lead) and len(set(gaps)) <= 1):
        yield from ([u] for u in units[:lead])
        lead = 0
    starts = [i - lead for i in starts]
    for a, b in zip(starts, [*starts[1:], len(units)], strict=True):
        yield list(units[a:b])


def _layer(index: int, units: Sequence[Unit], norm_sites: Sequence[NormSite]) -> Layer:
    group = [p for u in units for p in u.parts]
    heads = tuple(p for p in group if isinstance(p, Attention))
    entries, exits = _ends(group, units, norm_sites)
    sums = {out for x in exits for u, _ in x.uses() if u.op_type in ADDITIONS for out in u.outputs}
    sums |= {u.residual.end for u in units if u.residual is not None}
    after = [n for n in norm_sites if n.input in sums]
    before = [n for n in norm_sites if n.output in entries]
    sandwiched = [n for n in norm_sites if n.input in exits]
    is_pre = any(_bypasses(n) for n in before)
    placed = before if is_pre else [n for n in after if n.output in entries or not _bypasses(n)]
    inner = [n for a in heads for n in a.inner_norms]
    position = "pre" if is_pre else "post" if placed else "none"
    return Layer(
        index,
        heads,
        tuple(p for p in group if isinstance(p, Mlp)),
        tuple(n for n in norm_sites if n in placed or n in sandwiched or n in inner),
        "pre and post" if is_pre and sandwiched else position,
        tuple(p for p in group if isinstance(p, Experts)),
        tuple(n for u in units for n in u.unknown),
        tuple(units),
    )


def _ends(
    group: Iterable[Part], units: Iterable[Unit], norm_sites: Iterable[NormSite]
) -> tuple[set[ir.Value], set[ir.Value]]:
    """The values that the parts of a layer read, and those that they add to the residual stream."""
    entries = {_entry(p) for p in group}
    exits = {p.o.output if isinstance(p, Attention) else p.down.output for p in group if not isinstance(p, Experts)}
    streams = {u.residual.entry: u.residual for u in units if u.residual is not None}
    entries |= {n.output for n in norm_sites if n.input in streams and n.node in streams[n.input].nodes}
    return entries, exits


def _entry(p: Part) -> ir.Value:
    return p.q.source if isinstance(p, Attention) else p.up.source if isinstance(p, Mlp) else p.router.source


def _bypasses(norm: NormSite) -> bool:
    """Whether an addition reads the norm's input as well: the residual connection around a pre-norm."""
    return any(u.op_type in ADDITIONS for u, _ in norm.input.uses())
