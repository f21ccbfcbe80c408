"""Key-value caches: keys and values that are a graph input followed by what is new, as inputs of the operator."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import MOVES, Trace, trace
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.graph import Graph

__all__ = ["Cache", "Grown", "cache_of", "give_present", "grown"]


@dataclass(frozen=True)
class Grown:
    """`joined` is `past` followed by `new`; `perm` turns each to `[b, kv, t, h]`, `repeat` copies of a head follow."""

    past: ir.Value
    new: ir.Value
    joined: ir.Value
    perm: tuple[int, ...]
    repeat: int
    scale: float


@dataclass(frozen=True)
class Cache:
    """What an Attention in four axes takes as cache, and the new keys and values, as `[b, kv, t, h]`."""

    keys: Grown
    values: Grown
    past: tuple[ir.Value, ir.Value]
    new: tuple[ir.Value, ir.Value]


def grown(f: Facts, v: ir.Value | None) -> Grown | None:
    """The cache and the new part behind keys or values `[b, n, t, h]`, or None."""
    if v is None:
        return None
    for t in trace(f, v, through=(*MOVES, "Expand", "Mul", "Div")):
        node = t.value.producer()
        if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or len(t.axes) != 4:
            continue
        past, new, perm = node.inputs[0], node.inputs[1], _turn(t)
        if past is None or new is None or perm is None or axis_of(node, 4) != perm[2] or not _is_fed(past):
            return None
        repeat = 1
        for a in t.repeated:
            repeat *= a.size if isinstance(a.size, int) else 0
        return Grown(past, new, t.value, perm, repeat, t.scale) if repeat else None
    return None


def _turn(t: Trace) -> tuple[int, ...] | None:
    """Where batch, heads, time and width are, when copies of a head lie side by side."""
    b, n, s, h = t.origin
    kept = tuple(a for a in n if a not in t.repeated)
    if any(a not in n for a in t.repeated) or n[: len(kept)] != kept:
        return None
    places: list[int] = []
    for want in (b, kept, s, h):
        spot = next((i for i, got in enumerate(t.axes) if got == want and i not in places), None)
        if spot is None:
            return None
        places.append(spot)
    return tuple(places)


def _is_fed(v: ir.Value) -> bool:
    """Whether a value is a graph input, perhaps with entries chosen or turned."""
    while not v.is_graph_input():
        node = v.producer()
        if node is None or node.op_type not in (*MOVES, "Slice", "Gather", "Cast") or node.inputs[0] is None:
            return False
        v = node.inputs[0]
    return not v.is_initializer()


def cache_of(g: Graph, f: Facts, node: ir.Node) -> Cache | None:
    """The cache of an Attention in four axes that has none yet; past and new parts are turned to `[b, kv, t, h]`.

    None where not both new caches are read elsewhere: runtimes want all of the operator's cache or nothing.
    """
    keys, values = grown(f, node.inputs[1]), grown(f, node.inputs[2])
    if keys is None or values is None or keys.repeat != values.repeat or values.scale != 1:
        return None
    before = _above(node) | {node}
    for part in (keys, values):
        if not part.joined.is_graph_output() and all(u in before for u, _ in part.joined.uses()):
            return None
    past = (_turned(g, keys.past, keys.perm), _turned(g, values.past, values.perm))
    return Cache(keys, values, past, (_turned(g, keys.new, keys.perm), _turned(g, values.new, values.perm)))


def _turned(g: Graph, v: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    return v if perm == (0, 1, 2, 3) else g.op("Transpose", v, perm=list(perm))


def give_present(g: Graph, node: ir.Node, cache: Cache) -> None:
    """Feed what reads the concatenated keys and values from the outputs of `node`; what leads to it keeps a copy."""
    before = _above(node)
    for part, out in ((cache.keys, node.outputs[1]), (cache.values, node.outputs[2])):
        out.type = part.joined.type
        early = [u for u, _ in part.joined.uses() if u in before]
        if early:
            copy = g.op("Concat", part.past, part.new, axis=part.perm[2], like=part.joined)
            g.replace(part.joined, copy, users=early)
        if list(part.joined.uses()) or part.joined.is_graph_output():
            g.replace(part.joined, _turned(g, out, tuple(part.perm.index(i) for i in range(4))))


def _above(node: ir.Node) -> set[ir.Node]:
    """The nodes that a node depends on."""
    seen: set[ir.Node] = set()
    todo = [node]
    while todo:
        for v in todo.pop().inputs:
            above = v.producer() if v is not None else None
            if above is not None and above not in seen:
                seen.add(above)
                todo.append(above)
    return seen
