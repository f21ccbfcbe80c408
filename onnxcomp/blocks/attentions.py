"""Attentions with their four projections, and why others have none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.blocks.linears import Index, Linear, NormSite
from onnxcomp.canonical.sinks import has_sink
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import ADDITIONS, LAYOUT_OR_CAST, NORMS, is_layout
from onnxcomp.graph.values import users_of

__all__ = ["Attention", "attentions", "unlinked"]

# Element by element or within a head, between a projection and the attention: rotations, clips, norms, scales, gates.
INNER_OPS = {"Abs", "Add", "BatchNormalization", "Clip", "Concat", "Cos", "Div", "Expand", "Gather", "HardSwish", "Max"}
INNER_OPS |= {
    "Mul",
    "Neg",
    "Pad",
    "Pow",
    "ReduceL2",
    "ReduceMax",
    "ReduceSum",
    "Relu",
    "RotaryEmbedding",
    "Sigmoid",
    "Sin",
    "Slice",
}
INNER_OPS |= {"Split", "Sqrt", "Sub", "Where", *LAYOUT_OR_CAST, *NORMS}
ACTIVATIONS = LAYOUT_OR_CAST | {"Clip", "HardSwish", "Relu", "Sigmoid"}
MAX_INNER = 64  # nodes between a projection and the attention: a rotation spelled out has about ten, per head more
NO_PROJECTION = "no linear that nothing else follows makes its"


@dataclass(frozen=True)
class Attention:
    """One attention with its four projections; `head_dim` is the width of a query head, `mask` the fourth input.

    `past` and `present` are its cached keys and values `[b, kv_heads, t, h]`, as inputs and outputs. `inner` are nodes
    between projections and attention that are no layout, rotation or norm, such as clips and a gate on the output.
    With `is_cross` keys come from another sequence than queries; with `has_sink` the last key and value are zeros, and
    the mask's last column is a bias of each head (`canonical/sinks.py`).
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
    inner: tuple[ir.Node, ...] = ()
    is_cross: bool = False

    @property
    def has_sink(self) -> bool:
        """Whether its probabilities leave a share to no key."""
        return has_sink(self.node)

    @property
    def name(self) -> str:
        """The name of the Attention node."""
        return str(self.node.name)

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Query, key, value and output projections."""
        return (self.q, self.k, self.v, self.o)

    @property
    def site(self) -> Site:
        """The place in the graph, projections included."""
        return Site(self.name, (self.name, *(n for x in self.linears for n in x.site.nodes)), "attention")


def attentions(g: Graph) -> list[Attention]:
    """Every Attention in three axes whose four projections are linears, in graph order."""
    index = Index.of(g)
    matches = (_attention(index, node) for node in g.nodes("Attention") if node.domain == "")
    return [a for a in matches if isinstance(a, Attention)]


def unlinked(g: Graph) -> list[tuple[ir.Node, str]]:
    """Every Attention without its four projections, with the reason."""
    index = Index.of(g)
    matches = ((node, _attention(index, node)) for node in g.nodes("Attention") if node.domain == "")
    return [(node, why) for node, why in matches if isinstance(why, str)]


def _attention(index: Index, node: ir.Node) -> Attention | str:
    """The attention of a node, or why it is not linked to its projections."""
    heads, kv = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    if not heads or not kv:
        return "it has four axes, since its heads could not be merged"
    between: dict[ir.Node, None] = {}
    parts = [_projection(index, x, between) for x in node.inputs[:3]]
    o = _reader(index, node.outputs[0], between)
    q, k, v = parts
    if q is None or k is None or v is None:
        names = [n for n, x in zip(("queries", "keys", "values"), parts, strict=True) if x is None]
        return f"{NO_PROJECTION} {' and '.join(names)}"
    if o is None:
        return "its output is not read by one linear alone"
    if len({x.node for x in (q, k, v)}) < len({id(x) for x in node.inputs[:3]}):
        return "one linear makes several of its queries, keys and values, and could not be split"
    if q.sizes[1] % heads or k.sizes[1] % kv or v.sizes[1] % kv or q.sizes[1] // heads != k.sizes[1] // kv:
        return "the widths of its projections are not those of its heads"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    past = _pair(node.inputs[4:6])
    present = _pair(node.outputs[1:3]) if past is not None else None
    rotary = tuple(n for n in between if n.op_type == "RotaryEmbedding")
    norms = tuple(index.norm_by_output[n.outputs[0]] for n in between if n.outputs[0] in index.norm_by_output)
    simple = {*rotary, *(n.node for n in norms)}
    inner = tuple(n for n in between if n not in simple and not is_layout(n))
    crosses = q.source is not k.source and not (_derived(index, k, q) or _derived(index, q, k))
    return Attention(
        node, q, k, v, o, heads, kv, q.sizes[1] // heads, mask, rotary, norms, past, present, inner, crosses
    )


def _derived(index: Index, x: Linear, base: Linear) -> bool:
    """Whether one linear reads what another one reads after norms, convolutions or pooling, as for shorter keys."""
    norm = index.norm_by_output.get(base.source)
    bases = {base.source, *([norm.input] if norm is not None else [])}
    pending, visited = [x.source], set[ir.Value]()
    while pending and len(visited) < MAX_INNER:
        v = pending.pop()
        if v in bases:
            return True
        node = v.producer()
        if v in visited or v in index.by_output or node is None or node.op_type in ("Attention", *ADDITIONS):
            continue
        visited.add(v)
        pending += [y for y in node.inputs if y is not None]
    return False


def _pair(values: Sequence[ir.Value | None]) -> tuple[ir.Value, ir.Value] | None:
    """Keys and values, if there are both."""
    keys, value = (*values, None, None)[:2]
    return (keys, value) if keys is not None and value is not None else None


def _projection(index: Index, v: ir.Value | None, between: dict[ir.Node, None]) -> Linear | None:
    """The only linear that a query, key or value is computed from; the nodes on the way are collected.

    Other operands, such as the tables of a rotation, must not depend on a linear.
    """
    found: dict[ir.Value, None] = {}
    on_way: dict[ir.Node, None] = {}
    if v is None or not _collect(index, v, found, on_way) or len(found) != 1:
        return None
    between.update(on_way)
    return index.by_output[next(iter(found))]


def _collect(index: Index, v: ir.Value, found: dict[ir.Value, None], on_way: dict[ir.Node, None]) -> bool:
    """Collect the linears behind a value; False where something else computes it from the model's activations."""
    pending = [v]
    while pending:
        x = pending.pop()
        if x in index.by_output:
            found[x] = None
            continue
        node = x.producer()
        if node is None or node in on_way or x not in index.after_linears or node.op_type == "Shape":
            continue
        if node.op_type not in INNER_OPS or node.domain or len(on_way) >= MAX_INNER:
            return False
        on_way[node] = None
        pending += [y for y in node.inputs if y is not None]
    return True


def _reader(index: Index, v: ir.Value, between: dict[ir.Node, None]) -> Linear | None:
    """The only linear that reads a value: directly, or through layout, a norm or element by element, gated or not."""
    for _ in range(MAX_INNER):
        if v in index.by_source:
            return index.by_source[v][0] if len(index.by_source[v]) == 1 and len(users_of(v)) == 1 else None
        after = _only_result(index, v)
        if after is None:
            return None
        node, v = after
        between[node] = None
    return None


def _only_result(index: Index, v: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The one node through which everything that is computed from a value goes, and its result."""
    users = users_of(v)
    if len(users) == 2 and {u.op_type for u in users} == {"Mul", "Sigmoid"}:  # x * sigmoid(x)
        mul = next(u for u in users if u.op_type == "Mul")
        return (mul, mul.outputs[0]) if users_of(next(u for u in users if u is not mul).outputs[0]) == [mul] else None
    if len(users) != 1 or v.is_graph_output() or not _keeps_heads(index, users[0], v):
        return None
    return users[0], users[0].outputs[0]


def _keeps_heads(index: Index, node: ir.Node, v: ir.Value) -> bool:
    """Whether a node only rearranges, normalizes, activates or gates the attention's output."""
    if (
        node.op_type in LAYOUT_OR_CAST | {"Clip", "HardSwish", "Relu", "Sigmoid"}
        or node.outputs[0] in index.norm_by_output
    ):
        return node.inputs[0] is v
    if node.op_type == "Slice":  # of tokens: blocks of a sequence that was padded
        axes = Graph.tensor(node.inputs[3]) if len(node.inputs) > 3 else None
        return node.inputs[0] is v and axes is not None and axes.numpy().reshape(-1).tolist() == [1]
    if node.op_type not in ("Mul", "Div") or node.inputs[0] is node.inputs[1]:
        return False
    other = node.inputs[1 - list(node.inputs).index(v)]
    return other is not None and _is_gate(index, other)


def _is_gate(index: Index, v: ir.Value) -> bool:
    """Whether a factor is constant, or a sigmoid of a projection of the layer's input."""
    if Graph.tensor(v) is not None:
        return True
    return any(n.op_type in ("Sigmoid", "HardSigmoid", "Softplus", "Tanh") for n in _steps_back(v))


def _steps_back(v: ir.Value) -> Iterator[ir.Node]:
    """Producers through layout operators, and the first other one."""
    while (node := v.producer()) is not None:
        yield node
        if not is_layout(node) or node.inputs[0] is None:
            return
        v = node.inputs[0]
