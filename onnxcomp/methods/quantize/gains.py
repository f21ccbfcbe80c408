"""Gains of the channels of a value that linears read: divided out where it is made, multiplied into what reads it.

Exact. A gain is folded into the norm, linear, gated product, attention or constant factor that makes the value where
nothing else reads that; elsewhere the linears read the value times a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.blocks.linears import Index
from onnxcomp.graph import Graph
from onnxcomp.graph.values import users_of
from onnxcomp.maths import Array, Float64
from onnxcomp.methods.repair.readers import shift_bias

__all__ = ["Place", "divide", "places", "subtract", "tied", "unfit"]


@dataclass(frozen=True)
class Place:
    """A value `[..., K]`, the linears that read it, and the way a divisor of its channels goes.

    `fold` divides the value itself, for which channels of one of the `units` `[K]` need the same divisor; without it
    the value is multiplied by a constant on its way to the linears. `added`, a node and the index of its input, is
    where a constant row is added last, which takes a shift.
    """

    source: ir.Value
    readers: tuple[Linear, ...]
    fold: Callable[[Graph, Float64], None] | None = None
    units: Array | None = None
    added: tuple[ir.Node, int] | None = None


def places(g: Graph, chosen: Iterable[Linear]) -> list[Place]:
    """The inputs of the chosen linears, in the order of the graph."""
    index, attentions = Index.of(g), {a.node.outputs[0]: a for a in blocks.attentions(g)}
    return [_place(g, index, attentions, group) for group in blocks.siblings(chosen)]


def unfit(place: Place) -> str:
    """Why the channels of a value take no gains, empty if they do."""
    for x in place.readers:
        if x.transposed or len(list(x.weight.uses())) > 1:
            return "its weights are shared, so their rows cannot be scaled for one place"
    return ""


def divide(g: Graph, place: Place, by: Float64) -> None:
    """Divide the channels of a value by `[K]`, and multiply the rows of its readers' weights."""
    if place.fold is not None:
        place.fold(g, 1 / by)
    else:
        v, dtype = place.source, place.source.dtype.numpy() if place.source.dtype else np.dtype(np.float32)
        scaled = g.op("Mul", v, (1 / by).astype(dtype), name=f"{v.name}_smoothed", like=v)
        g.replace(v, scaled, users=[x.node for x in place.readers])
    for x in place.readers:
        g.scale(x.weight, by, 0, users=[x.node])


def tied(place: Place, by: Float64) -> Float64:
    """A divisor `[K]` made equal for channels of one unit: their geometric mean."""
    if place.units is None:
        return by
    counts = np.maximum(np.bincount(place.units), 1)
    return np.asarray(np.exp((np.bincount(place.units, np.log(by)) / counts)[place.units]))


def subtract(g: Graph, place: Place, by: Float64) -> None:
    """Subtract `[K]` from the value where a constant is `added`, and give the readers' biases what is missing."""
    assert place.added is not None
    for x in place.readers:
        shift_bias(g, x, by @ g.array(x.weight).astype(np.float64))
    _add(g, *place.added, -by)


def _add(g: Graph, node: ir.Node, index: int, row: Float64) -> None:
    """Add a row to a constant for one of its readers, rounding once."""
    v = node.inputs[index]
    assert v is not None
    a = g.array(v)
    g.put(v, (a.astype(np.float64) + row.reshape([*[1] * (a.ndim - 1), -1])).astype(a.dtype), users=[node])


def _place(g: Graph, index: Index, attentions: dict[ir.Value, blocks.Attention], group: Sequence[Linear]) -> Place:
    v, readers = group[0].source, tuple(group)
    if v.is_graph_output() or any(
        n not in [x.node for x in readers] and not _beside(g, n, v, group) for n in users_of(v)
    ):
        return Place(v, readers)
    if (a := attentions.get(v)) is not None:
        return _through_attention(a, readers)
    fold = _fold(g, index, v)
    return Place(v, readers, fold, None, _added(index, v) if fold is not None else None)


def _added(index: Index, v: ir.Value) -> tuple[ir.Node, int] | None:
    """Where a norm or a linear that makes a value adds a constant row."""
    norm, linear = index.norm_by_output.get(v), index.by_output.get(v)
    if norm is not None:
        return (norm.node, 2) if norm.bias is not None else None
    if linear is None or linear.bias is None:
        return None
    node = linear.add or linear.node
    return node, list(node.inputs).index(linear.bias)


def _beside(g: Graph, node: ir.Node, v: ir.Value, group: Sequence[Linear]) -> bool:
    """Whether a node picks channels alone that the linears do not multiply by anything, which get no gain."""
    if node.op_type != "Gather" or node.inputs[0] is not v or node.attributes.get_int("axis", 0) not in (-1, _last(v)):
        return False
    picked = g.tensor(node.inputs[1])
    return picked is not None and not any(g.array(x.weight)[picked.numpy()].any() for x in group)


def _last(v: ir.Value) -> int:
    return len(v.shape) - 1 if v.shape is not None else -1


def _fold(g: Graph, index: Index, v: ir.Value) -> Callable[[Graph, Float64], None] | None:
    """How the channels of a value are multiplied where it is made, None where that is not exact."""
    node, norm = v.producer(), index.norm_by_output.get(v)
    if norm is not None:
        parts = [c for c in (norm.gain, norm.bias) if c is not None]
        return _scaling([(c, norm.node) for c in parts]) if _fits(g, v, parts) else None
    if v in index.by_output:
        return _into(index.by_output[v])
    if node is None or node.op_type not in ("Mul", "Relu"):
        return None
    for x in node.inputs if node.op_type == "Mul" else node.inputs[:1]:
        if x is None:
            continue
        if g.is_constant(x) and _fits(g, v, [x]):
            return _scaling([(x, node)])
        linear = index.by_output.get(x)
        if linear is not None and users_of(x) == [node] and not x.is_graph_output() and (fold := _into(linear)):
            return fold
    return None


def _fits(g: Graph, v: ir.Value, parts: Sequence[ir.Value]) -> bool:
    """Whether constants have an element for each channel of a value, and one row."""
    width = v.shape[-1] if v.shape is not None else None
    return all(g.array(c).size == width == g.array(c).shape[-1] for c in parts)


def _scaling(parts: Sequence[tuple[ir.Value, ir.Node]]) -> Callable[[Graph, Float64], None]:
    def fold(g: Graph, by: Float64) -> None:
        for v, node in parts:
            g.scale(v, by, -1, users=[node])

    return fold


def _into(x: Linear) -> Callable[[Graph, Float64], None] | None:
    """The columns of a linear's weight and its bias."""
    if x.quantized or x.transposed or len(list(x.weight.uses())) > 1:
        return None
    bias = [] if x.bias is None else [(x.bias, x.add or x.node)]
    return _scaling([(x.weight, x.node), *bias])


def _through_attention(a: blocks.Attention, readers: tuple[Linear, ...]) -> Place:
    """Values are averaged over tokens, channel by channel: a gain of the output is one of the value projection."""
    v, source = a.v.output, readers[0].source
    fold = _into(a.v)
    if a.node.inputs[2] is not v or users_of(v) != [a.node] or v.is_graph_output() or a.present or fold is None:
        return Place(source, readers)
    width = a.v.sizes[1] // a.kv_heads
    query_head, channel = np.divmod(np.arange(a.heads * width), width)
    units = query_head // (a.heads // a.kv_heads) * width + channel

    def through(g: Graph, by: Float64) -> None:
        of_values = np.empty(a.v.sizes[1])
        of_values[units] = by
        fold(g, of_values)

    return Place(source, readers, through, units)
