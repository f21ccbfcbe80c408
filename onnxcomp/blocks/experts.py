"""Mixtures of experts: a router that chooses few of several feed-forward parts for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.blocks.linears import Index, Linear
from onnxcomp.blocks.mlps import Mlp, mlps
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import ADDITIONS, LAYOUT_OR_CAST
from onnxcomp.graph.values import users_of

__all__ = ["Experts", "Selected", "experts", "unseen_experts"]

ROUTER_OPS = LAYOUT_OR_CAST | {"Softmax", "Sigmoid", *ADDITIONS, "Sub", "ReduceMax", "ScatterElements"}
ROUTED = LAYOUT_OR_CAST | {"Flatten"}
ACCUMULATIONS = ("ScatterElements", "ScatterND")
FORMS = "recognised are tables whose rows are gathered by the choice, and loops in which an expert selects its tokens"
STEERED = 256  # nodes after a choice that are searched for what it steers: a sort by expert takes about a hundred
MAX_NODES = 64  # from the selection of an expert's tokens to its results: exporters write about thirty


@dataclass(frozen=True)
class Selected:
    """One expert of a loop: the node that selects its tokens, its part, and the node that adds its results."""

    select: ir.Node
    mlp: Mlp | None
    accumulate: ir.Node | None


@dataclass(frozen=True)
class Experts:
    """`count` feed-forward parts of which `chosen` work for each token, by scores from `router`.

    `choices` find the highest scores: one TopK, or an ArgMax for each that is chosen; `numbers` are the chosen experts.
    Batched: `tables` hold the weights of all experts along their first axis, and the chosen ones are gathered for each
    token. Looped: every expert of `loop` works on the tokens that chose it.
    """

    router: Linear
    choices: tuple[ir.Node, ...]
    numbers: ir.Value
    count: int
    chosen: int
    width: int
    tables: tuple[ir.Value, ...] = ()
    loop: tuple[Selected, ...] = ()
    nodes: frozenset[ir.Node] = frozenset()

    @property
    def name(self) -> str:
        """The name of the router's node."""
        return self.router.name

    @property
    def form(self) -> str:
        """`batched` or `looped`."""
        return "looped" if self.loop else "batched"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The router and, in a loop, the linears of every expert."""
        return (self.router, *(x for e in self.loop if e.mlp is not None for x in e.mlp.linears))

    @property
    def site(self) -> Site:
        """The place in the graph."""
        own = (*(str(c.name) for c in self.choices), *(n for x in self.linears for n in x.site.nodes))
        return Site(self.name, own, "experts")


def experts(g: Graph) -> list[Experts]:
    """Every mixture of experts whose router is a linear, in graph order."""
    index = Index.of(g)
    parts = {n: m for m in mlps(g) for n in (m.up.node, m.down.node)}
    found = (_experts(g, index, *choice, parts) for choice in _choices(g))
    return [e for e in found if e is not None]


def unseen_experts(g: Graph) -> list[tuple[ir.Node, str]]:
    """Choices among a linear's outputs that steer other linears as in a mixture, in no known form; with the reason."""
    index, seen = Index.of(g), {c for e in experts(g) for c in e.choices}
    found: dict[ir.Node, str] = {}
    for choices, _, chosen in _choices(g):
        scores = choices[0].inputs[0]
        router = _router(index, scores)
        if router is None or scores is None or scores.shape is None or seen.intersection(choices) or chosen < 1:
            continue
        last = choices[0].attributes.get_int("axis", -1) in (-1, len(scores.shape) - 1)
        if last and scores.shape[-1] == router.sizes[1] > chosen and (how := _steered(index, choices)):
            found.setdefault(router.node, f"experts: {chosen} of {router.sizes[1]} are chosen, but {how}; {FORMS}")
    return list(found.items())


def _steered(index: Index, choices: tuple[ir.Node, ...]) -> str:
    """What linears have to do with a choice; empty if nothing that was found."""
    linears = {x.node for xs in index.by_source.values() for x in xs}
    pending, reached = [v for c in choices for v in c.outputs], set[ir.Node](choices)
    while pending and len(reached) < STEERED:
        v = pending.pop(0)
        for user in users_of(v):
            if user in linears:
                return "their products are made on rows that are sorted by the choice"
            if user.op_type == "Mul" and any(x is not v and x in index.by_output for x in user.inputs):
                return "every expert works on every token, and the scores weigh all results"
            if user not in reached:
                reached.add(user)
                pending += user.outputs
    return ""


def _choices(g: Graph) -> Iterator[tuple[tuple[ir.Node, ...], ir.Value, int]]:
    """Nodes that choose the highest of some scores, the value with their numbers, and how many there are."""
    for node in g.nodes("TopK", "ArgMax", "Concat"):
        if node.domain:
            continue
        if node.op_type == "TopK":
            k = g.tensor(node.inputs[1])
            if k is not None and k.size == 1:
                yield (node,), node.outputs[1], int(k.numpy().item())
        elif node.op_type == "ArgMax":
            yield (node,), node.outputs[0], 1
        else:
            parts = [x.producer() for x in node.inputs if x is not None]
            if all(p is not None and p.op_type == "ArgMax" for p in parts):
                yield tuple(p for p in parts if p is not None), node.outputs[0], len(parts)


def _experts(
    g: Graph,
    index: Index,
    choices: tuple[ir.Node, ...],
    numbers: ir.Value,
    chosen: int,
    parts: dict[ir.Node, Mlp],
) -> Experts | None:
    routers = [_router(index, c.inputs[0]) for c in choices]
    router = routers[0]
    if router is None or any(r is None or r.node is not router.node for r in routers):
        return None
    count = router.sizes[1]
    routed = [u for v in _routed(numbers) for u in users_of(v)]
    tables = [u for u in routed if _is_table(g, u, count)]
    widths = [w for u in tables if len(u.inputs[0].shape or ()) == 3 and (w := _width(u))]  # type: ignore[union-attr]
    if widths:
        width = widths[-1]
        values = tuple(u.inputs[0] for u in tables if u.inputs[0] is not None)
        return Experts(router, choices, numbers, count, chosen, width, values, nodes=frozenset(tables))
    loop = [_selected(s, parts) for s in _selections(g, routed, count)]
    inner = {e.mlp.width for e in loop if e.mlp is not None}
    if len(loop) != count or not inner:
        return None
    nodes = frozenset(e.select for e in loop)
    return Experts(router, choices, numbers, count, chosen, max(inner), loop=tuple(loop), nodes=nodes)


def _router(index: Index, v: ir.Value | None) -> Linear | None:
    """The linear that makes a router's scores, before softmax or sigmoid and a correction per expert."""
    while v is not None and v not in index.by_output:
        node = v.producer()
        if node is None or node.op_type not in ROUTER_OPS:
            return None
        v = next((x for x in node.inputs if x is not None and x in index.after_linears), None)
    return index.by_output.get(v) if v is not None else None


def _routed(v: ir.Value) -> Iterator[ir.Value]:
    """The chosen experts' numbers in every layout."""
    yield v
    for user in users_of(v):
        if user.op_type in ROUTED and user.inputs[0] is v:
            yield from _routed(user.outputs[0])


def _is_table(g: Graph, node: ir.Node, count: int) -> bool:
    """Whether a node gathers rows of a constant by the numbers of experts."""
    if node.op_type not in ("Gather", "GatherND") or node.attributes.get_int("axis", 0) != 0:
        return False
    table = g.tensor(node.inputs[0])
    return table is not None and len(table.shape) > 1 and table.shape[0] == count


def _width(gather: ir.Node) -> int:
    """The width of the experts, by the product that reads the gathered weights of the last linear; 0 if unknown."""
    for v in _routed(gather.outputs[0]):
        for user in users_of(v):
            if user.op_type == "MatMul" and gather.inputs[0] is not None and gather.inputs[0].shape is not None:
                sizes, transposed = gather.inputs[0].shape.numpy(), _is_transposed(v, gather)
                is_first = user.inputs[0] is v
                return int(sizes[2] if is_first != transposed else sizes[1])
    return 0


def _is_transposed(v: ir.Value, gather: ir.Node) -> bool:
    """Whether an odd number of Transposes stands between gathered weights and `v`."""
    odd, node = False, v.producer()
    while node is not None and node is not gather and node.inputs[0] is not None:
        odd ^= node.op_type == "Transpose"
        node = node.inputs[0].producer()
    return odd


# ---- loops -----------------------------------------------------------------------------------------------------------


def _selections(g: Graph, routed: list[ir.Node], count: int) -> list[ir.Node]:
    """The nodes that select the tokens of one expert each: of a one-hot matrix, or by comparison with a number."""
    masks = [u for u in routed if u.op_type in ("OneHot", "Equal")]
    numbers = {u: g.tensor(x) for u in masks for x in u.inputs if u.op_type == "Equal" and g.tensor(x) is not None}
    single = [u for u, t in numbers.items() if t is not None and t.size == 1]
    if single:
        return single if len(single) == count else []
    picks = [u for m in masks for v in _one_hots(m.outputs[0]) for u in users_of(v) if u.op_type == "Gather"]
    return [u for u in picks if (t := g.tensor(u.inputs[1])) is not None and t.size == 1]


def _one_hots(v: ir.Value) -> Iterator[ir.Value]:
    """A one-hot matrix in every layout."""
    yield v
    for user in users_of(v):
        if user.op_type in ROUTED:
            yield from _one_hots(user.outputs[0])


def _selected(select: ir.Node, parts: dict[ir.Node, Mlp]) -> Selected:
    """The expert behind a selection of its tokens, as far as the node that adds its results."""
    mlp, accumulate = None, None
    pending, visited = list(select.outputs), set[ir.Node]()
    while pending and len(visited) < MAX_NODES:
        for user in users_of(pending.pop(0)):
            if user in visited:
                continue
            visited.add(user)
            mlp = mlp or parts.get(user)
            if user.op_type in ACCUMULATIONS:
                accumulate = user
            else:
                pending += user.outputs
    return Selected(select, mlp, accumulate)
