"""Key-value caches: a graph input concatenated with new keys or values becomes the operator's past input."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import Trace, trace
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OPS

__all__ = ["Cache", "CacheConcat", "cache_of", "find_cache_concat", "give_present"]


@dataclass(frozen=True)
class CacheConcat:
    """`joined` is `past` and `new` concatenated; `perm` transposes each to `[b, kv, t, h]`, copied `repeat` times."""

    past: ir.Value
    new: ir.Value
    joined: ir.Value
    perm: tuple[int, ...]
    repeat: int
    scale: float


@dataclass(frozen=True)
class Cache:
    """Past and new keys and values of an Attention in four axes, as `[b, kv, t, h]`."""

    keys: CacheConcat
    values: CacheConcat
    past: tuple[ir.Value, ir.Value]
    new: tuple[ir.Value, ir.Value]


def find_cache_concat(f: Facts, v: ir.Value | None) -> CacheConcat | None:
    """The concatenation of past and new behind keys or values `[b, n, t, h]`, or None."""
    if v is None:
        return None
    for t in trace(f, v, through=(*LAYOUT_OPS, "Expand", "Mul", "Div")):
        node = t.value.producer()
        if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or len(t.axes) != 4:
            continue
        past, new, perm = node.inputs[0], node.inputs[1], _axes_in_order(t)
        if past is None or new is None or perm is None or axis_of(node, 4) != perm[2] or not _is_fed(past):
            return None
        repeat = 1
        for a in t.repeated:
            repeat *= a.size if isinstance(a.size, int) else 0
        return CacheConcat(past, new, t.value, perm, repeat, t.scale) if repeat else None
    return None


def _axes_in_order(t: Trace) -> tuple[int, ...] | None:
    """The axes of batch, heads, time and width, where the copies of a head are adjacent."""
    b, n, s, h = t.origin
    head_axes = tuple(a for a in n if a not in t.repeated)
    if any(a not in n for a in t.repeated) or n[: len(head_axes)] != head_axes:
        return None
    places: list[int] = []
    for group in (b, head_axes, s, h):
        place = next((i for i, axes in enumerate(t.axes) if axes == group and i not in places), None)
        if place is None:
            return None
        places.append(place)
    return tuple(places)


def _is_fed(v: ir.Value) -> bool:
    """Whether a value is a graph input, possibly sliced, cast or in another layout."""
    while not v.is_graph_input():
        node = v.producer()
        if node is None or node.op_type not in (*LAYOUT_OPS, "Slice", "Gather", "Cast") or node.inputs[0] is None:
            return False
        v = node.inputs[0]
    return not v.is_initializer()


def cache_of(g: Graph, f: Facts, node: ir.Node) -> Cache | None:
    """The cache of an Attention in four axes without past inputs; its parts are transposed to `[b, kv, t, h]`.

    None unless both concatenations have other users: runtimes take either all of the operator's cache or none.
    """
    keys, values = find_cache_concat(f, node.inputs[1]), find_cache_concat(f, node.inputs[2])
    if keys is None or values is None or keys.repeat != values.repeat or values.scale != 1:
        return None
    upstream = _upstream(node) | {node}
    for part in (keys, values):
        if not part.joined.is_graph_output() and all(u in upstream for u, _ in part.joined.uses()):
            return None
    past = (_transposed(g, keys.past, keys.perm), _transposed(g, values.past, values.perm))
    return Cache(keys, values, past, (_transposed(g, keys.new, keys.perm), _transposed(g, values.new, values.perm)))


def _transposed(g: Graph, v: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    return v if perm == (0, 1, 2, 3) else g.op("Transpose", v, perm=list(perm))


def give_present(g: Graph, node: ir.Node, cache: Cache) -> None:
    """Let users of the concatenated keys and values read the outputs of `node`; users upstream of it read a copy."""
    upstream = _upstream(node)
    for part, out in ((cache.keys, node.outputs[1]), (cache.values, node.outputs[2])):
        out.type = part.joined.type
        upstream_users = [u for u, _ in part.joined.uses() if u in upstream]
        if upstream_users:
            copy = g.op("Concat", part.past, part.new, axis=part.perm[2], like=part.joined)
            g.replace(part.joined, copy, users=upstream_users)
        if list(part.joined.uses()) or part.joined.is_graph_output():
            g.replace(part.joined, _transposed(g, out, tuple(part.perm.index(i) for i in range(4))))


def _upstream(node: ir.Node) -> set[ir.Node]:
    """All nodes that a node depends on."""
    visited: set[ir.Node] = set()
    pending = [node]
    while pending:
        for v in pending.pop().inputs:
            producer = v.producer() if v is not None else None
            if producer is not None and producer not in visited:
                visited.add(producer)
                pending.append(producer)
    return visited
