"""Typed views of a canonical graph (attentions, MLPs, layers), computed on demand: an edit makes them invalid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.ends import Embedding, Head, embeddings, head
from onnxcomp.blocks.linears import Index, Linear, NormSite, linears, norms, siblings
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import ADDITIONS, LAYOUT_OR_CAST
from onnxcomp.graph.values import users_of

__all__ = [
    "Attention",
    "Embedding",
    "Head",
    "Layer",
    "Linear",
    "Mlp",
    "NormSite",
    "attentions",
    "embeddings",
    "head",
    "layers",
    "linears",
    "mlps",
    "norms",
    "siblings",
]

QUICK_GELU_TOLERANCE = 1e-3  # relative; half types round the factor 1.702


# ---- attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """One attention with its four projections; `head_dim` is the width of a query head, `mask` the fourth input.

    `past` and `present` are its cached keys and values `[b, kv_heads, t, h]`, as inputs and outputs.
    """

    node: ir.Node
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    mask: ir.Value | None
    rotary: tuple[ir.Node, ...] = ()
    inner_norms: tuple[NormSite, ...] = ()
    past: tuple[ir.Value, ir.Value] | None = None
    present: tuple[ir.Value, ir.Value] | None = None

    @property
    def name(self) -> str:
        """The name of the Attention node."""
        return str(self.node.name)

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Query, key, value and output projections."""
        return (self.q, self.k, self.v, self.o)

    @property
    def is_cross(self) -> bool:
        """Whether keys come from another sequence than queries."""
        return self.q.source is not self.k.source

    @property
    def site(self) -> Site:
        """The place in the graph, projections included."""
        return Site(self.name, (self.name, *(n for x in self.linears for n in x.site.nodes)), "attention")


def attentions(g: Graph) -> list[Attention]:
    """Every Attention in three axes whose four projections are linears, in graph order."""
    index = Index.of(g)
    matches = (_attention(index, node) for node in g.nodes("Attention") if node.domain == "")
    return [a for a in matches if a is not None]


def _attention(index: Index, node: ir.Node) -> Attention | None:
    heads, kv = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    rotary: list[ir.Node] = []
    inner: list[NormSite] = []
    parts = [_projection(index, x, rotary, inner) for x in node.inputs[:3]]
    o = _reader(index, node.outputs[0])
    q, k, v = parts
    if q is None or k is None or v is None or o is None or not heads or not kv:
        return None
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    past = _pair(node.inputs[4:6])
    present = _pair(node.outputs[1:3]) if past is not None else None
    width = q.sizes[1] // heads
    return Attention(node, q, k, v, o, heads, kv, width, mask, tuple(rotary), tuple(inner), past, present)


def _pair(values: Sequence[ir.Value | None]) -> tuple[ir.Value, ir.Value] | None:
    """Keys and values, if there are both."""
    keys, value = (*values, None, None)[:2]
    return (keys, value) if keys is not None and value is not None else None


def _projection(index: Index, v: ir.Value | None, rotary: list[ir.Node], inner: list[NormSite]) -> Linear | None:
    """The linear behind a query, key or value, before rotation, norm and layout operators, which are collected."""
    while v is not None and v not in index.by_output:
        node = v.producer()
        if node is None:
            return None
        if node.op_type == "RotaryEmbedding":
            rotary.append(node)
        elif v in index.norm_by_output:
            inner.append(index.norm_by_output[v])
        elif node.op_type not in LAYOUT_OR_CAST:
            return None
        v = node.inputs[0]
    return index.by_output.get(v) if v is not None else None


def _reader(index: Index, v: ir.Value) -> Linear | None:
    """The only linear that reads a value, directly or through layout operators."""
    while v not in index.by_source:
        users = users_of(v)
        if len(users) != 1 or users[0].op_type not in LAYOUT_OR_CAST:
            return None
        v = users[0].outputs[0]
    return index.by_source[v][0] if len(index.by_source[v]) == 1 else None


# ---- feed-forward ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mlp:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when there is a gate."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: str

    @property
    def name(self) -> str:
        """The name of the down projection's node."""
        return self.down.name

    @property
    def width(self) -> int:
        """Channels between up and down."""
        return self.down.sizes[0]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Up, gate if there is one, down."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)

    @property
    def site(self) -> Site:
        """The place in the graph."""
        return Site(self.name, tuple(n for x in self.linears for n in x.site.nodes), "mlp")


def mlps(g: Graph) -> list[Mlp]:
    """Every feed-forward part whose output is as wide as its input, in graph order."""
    index = Index.of(g)
    matches = (_mlp(g, index, down) for down in index.by_output.values())
    return [m for m in matches if m is not None and m.up.sizes[0] == m.down.sizes[1]]


def _mlp(g: Graph, index: Index, down: Linear) -> Mlp | None:
    plain = _activated(g, index, down.source)
    if plain is not None:
        return Mlp(plain[0], None, down, plain[1])
    node = down.source.producer()
    if node is None or node.op_type != "Mul":
        return None
    for a, b in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        gate = _activated(g, index, a)
        up = index.by_output.get(b) if b is not None else None
        if gate is not None and up is not None and up.source is gate[0].source:
            return Mlp(up, gate[0], down, gate[1])
    return None


def _activated(g: Graph, index: Index, v: ir.Value | None) -> tuple[Linear, str] | None:
    """The linear whose activated output `v` is, and the activation's name."""
    node = v.producer() if v is not None else None
    if node is None:
        return None
    x, kind = node.inputs[0], node.op_type.lower()
    if node.op_type == "Gelu":
        kind = "gelu-tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu"
    elif node.op_type == "Mul":
        self_gated = _gated_by_itself(g, node)
        if self_gated is None:
            return None
        x, kind = self_gated
    elif node.op_type not in ("Relu", "Tanh", "Sigmoid", "Elu", "LeakyRelu", "HardSwish", "Softplus", "Mish", "Selu"):
        return None
    return (index.by_output[x], kind) if x in index.by_output else None


def _gated_by_itself(g: Graph, node: ir.Node) -> tuple[ir.Value, str] | None:
    """`x` and the name where a product is `x * Sigmoid(x)`, `x * Sigmoid(1.702 x)` or `Relu(x) ** 2`."""
    for x, gate in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        inner = gate.producer() if gate is not None else None
        if x is None or inner is None:
            continue
        if inner.op_type == "Relu" and x is gate and inner.inputs[0] is not None:
            return inner.inputs[0], "relu2"
        if inner.op_type == "Sigmoid" and inner.inputs[0] is x:
            return x, "silu"
        scaled = inner.inputs[0].producer() if inner.op_type == "Sigmoid" and inner.inputs[0] is not None else None
        if scaled is not None and scaled.op_type == "Mul" and x in scaled.inputs:
            number = g.tensor(scaled.inputs[1 - list(scaled.inputs).index(x)])
            if (
                number is not None
                and number.size == 1
                and np.isclose(float(number.numpy().item()), 1.702, rtol=QUICK_GELU_TOLERANCE)
            ):
                return x, "quick-gelu"
    return None


# ---- layers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attentions (a second one is cross attention), feed-forward part and norms."""

    index: int
    attentions: tuple[Attention, ...]
    mlp: Mlp | None
    norms: tuple[NormSite, ...]
    position: str

    @property
    def attention(self) -> Attention | None:
        """The first attention."""
        return self.attentions[0] if self.attentions else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of the layer."""
        projections = tuple(x for a in self.attentions for x in a.linears)
        return projections + (self.mlp.linears if self.mlp is not None else ())


def layers(g: Graph) -> list[Layer]:
    """The layers in graph order: attentions, the feed-forward part that follows them, and the norms around them."""
    norm_sites = norms(g)
    parts = _in_order(g, [*attentions(g), *mlps(g)], {n.output: n.input for n in norm_sites})
    groups: list[list[Attention | Mlp]] = []
    for part in parts:
        is_complete = bool(groups) and any(isinstance(p, Mlp) for p in groups[-1])
        if not groups or is_complete:
            groups.append([])
        groups[-1].append(part)
    return [_layer(i, group, norm_sites) for i, group in enumerate(groups)]


def _in_order(
    g: Graph, parts: Sequence[Attention | Mlp], norm_inputs: Mapping[ir.Value, ir.Value]
) -> list[Attention | Mlp]:
    """Parts in graph order; parallel ones (readers of one value of the stream) are adjacent, attention first."""
    node_order = {node: i for i, node in enumerate(g.nodes())}

    def stream(p: Attention | Mlp) -> ir.Value:
        entry = p.q.source if isinstance(p, Attention) else p.up.source
        return norm_inputs.get(entry, entry)

    def at(p: Attention | Mlp) -> int:
        return node_order[p.o.node if isinstance(p, Attention) else p.down.node]

    first: dict[ir.Value, int] = {}
    for p in parts:
        first[stream(p)] = min(at(p), first.get(stream(p), at(p)))
    return sorted(parts, key=lambda p: (first[stream(p)], isinstance(p, Mlp), at(p)))


def _layer(index: int, group: Sequence[Attention | Mlp], norm_sites: Sequence[NormSite]) -> Layer:
    heads = tuple(p for p in group if isinstance(p, Attention))
    mlp = next((p for p in group if isinstance(p, Mlp)), None)
    entries, exits = _ends(group)
    residuals = {out for x in exits for u, _ in x.uses() if u.op_type in ADDITIONS for out in u.outputs}
    after = [n for n in norm_sites if n.input in residuals]
    before = [n for n in norm_sites if n.output in entries]
    sandwiched = [n for n in norm_sites if n.input in exits]
    is_pre = any(_bypasses(n) for n in before)
    placed = before if is_pre else [n for n in after if n.output in entries or not _bypasses(n)]
    inner = [n for a in heads for n in a.inner_norms]
    layer_norms = [n for n in norm_sites if n in placed or n in sandwiched or n in inner]
    position = "pre" if is_pre else "post" if placed else "none"
    return Layer(index, heads, mlp, tuple(layer_norms), "pre and post" if is_pre and sandwiched else position)


def _ends(group: Sequence[Attention | Mlp]) -> tuple[set[ir.Value], set[ir.Value]]:
    """The values that the parts of a layer read, and those that they add to the residual stream."""
    entries = {p.q.source if isinstance(p, Attention) else p.up.source for p in group}
    exits = {p.o.output if isinstance(p, Attention) else p.down.output for p in group}
    return entries, exits


def _bypasses(norm: NormSite) -> bool:
    """Whether an addition reads the norm's input as well: the residual connection around a pre-norm."""
    return any(u.op_type in ADDITIONS for u, _ in norm.input.uses())
