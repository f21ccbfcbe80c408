"""Gains of the channels of a value that linears read: divided out where it is made, multiplied into what reads it.

Exact. A gain is folded into the norm, linear, gated product, attention or constant factor that makes the value where
nothing else reads that; elsewhere the linears read the value times a constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.blocks.linears import Index
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS
from onnxcomp.graph.values import users_of
from onnxcomp.maths import Array, Float64
from onnxcomp.methods.quantize import linears
from onnxcomp.methods.repair.readers import shift_bias

__all__ = ["Fold", "Place", "divide", "places", "subtract", "tied", "unfit"]

Fold = Callable[[Graph, Float64], None]  # multiplies the channels of a value `[K]` where it is made


@dataclass(frozen=True)
class Place:
    """A value `[..., K]`, the linears that read it, and the way a divisor of its channels goes.

    `fold` divides the value itself, for which channels of one of the `units` `[K]` need the same divisor; without it
    the value is multiplied by a constant on its way to the linears. `added`, a node and the index of its input, is
    where a constant row is added last, which takes a shift. Channels that something else picks from the value alone
    (`picked`) stay as they are.
    """

    source: ir.Value
    readers: tuple[Linear, ...]
    fold: Fold | None = None
    units: Array | None = None
    added: tuple[ir.Node, int] | None = None
    picked: tuple[int, ...] = ()

    def keep(self, by: Float64, neutral: float) -> Float64:
        """A divisor or a shift `[K]` that is neutral at the picked channels and those of their units."""
        units = np.arange(len(by)) if self.units is None else self.units
        return np.where(np.isin(units, units[list(self.picked)]), neutral, by)


def places(g: Graph, chosen: Iterable[Linear]) -> list[Place]:
    """The inputs of the chosen linears, in the order of the graph."""
    index = Index.of(g)
    return [_place(g, index, group) for group in blocks.siblings(chosen)]


def unfit(place: Place) -> str:
    """Why the channels of a value take no gains, empty if they do."""
    for x in place.readers:
        if x.transposed or len(list(x.weight.uses())) > 1:
            return "its weights are shared, so their rows cannot be scaled for one place"
    return ""


def divide(g: Graph, place: Place, by: Float64) -> None:
    """Divide the channels of a value by `[K]`, and multiply the rows of its readers' weights."""
    by = place.keep(by, 1.0)
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
    by = place.keep(by, 0.0)
    for x in place.readers:
        shift_bias(g, x, by @ g.array(x.weight).astype(np.float64))
    _add(g, *place.added, -by)


def _add(g: Graph, node: ir.Node, index: int, row: Float64) -> None:
    """Add a row to a constant for one of its readers, rounding once."""
    v = node.inputs[index]
    assert v is not None
    a = g.array(v)
    g.put(v, (a.astype(np.float64) + row.reshape([*[1] * (a.ndim - 1), -1])).astype(a.dtype), users=[node])


def _place(g: Graph, index: Index, group: Sequence[Linear]) -> Place:
    v, readers = group[0].source, tuple(group)
    inside = {x.node for x in readers}
    others = [linears.picked_channels(g, n) for n in users_of(v) if n not in inside]
    if v.is_graph_output() or any(channels is None for channels in others):
        return Place(v, readers)
    picked = tuple(int(c) for channels in others if channels is not None for c in channels)
    node = v.producer()
    if node is not None and node.op_type == "Attention" and v is node.outputs[0]:
        return dataclasses.replace(_through_attention(index, node, readers), picked=picked)
    fold = _fold(g, index, v)
    return Place(v, readers, fold, None, _added(index, v) if fold is not None else None, picked)


def _added(index: Index, v: ir.Value) -> tuple[ir.Node, int] | None:
    """Where a norm or a linear that makes a value adds a constant row."""
    norm, linear = index.norm_by_output.get(v), index.by_output.get(v)
    if norm is not None:
        return (norm.node, 2) if norm.bias is not None else None
    if linear is None or linear.bias is None:
        return None
    node = linear.add or linear.node
    return node, list(node.inputs).index(linear.bias)


def _fold(g: Graph, index: Index, v: ir.Value) -> Fold | None:
    """How the channels of a value are multiplied where it is made, None where that is not exact."""
    node, norm = v.producer(), index.norm_by_output.get(v)
    if norm is not None:
        parts = [c for c in (norm.gain, norm.bias) if c is not None]
        return _scaling([(c, norm.node) for c in parts]) if _fits(g, v, parts) else None
    if node is None or node.op_type not in ("Mul", "Relu"):
        return _into(index, v)
    for x in node.inputs if node.op_type == "Mul" else node.inputs[:1]:
        if x is not None and g.is_constant(x) and _fits(g, v, [x]):
            return _scaling([(x, node)])
        if x is not None and _read_by(x) == [node] and (fold := _into(index, x)):
            return fold
    return None


def _read_by(v: ir.Value) -> list[ir.Node] | None:
    return None if v.is_graph_output() else users_of(v)


def _fits(g: Graph, v: ir.Value, parts: Sequence[ir.Value]) -> bool:
    """Whether constants have an element for each channel of a value, and one row."""
    width = v.shape[-1] if v.shape is not None else None
    return all(g.array(c).size == width == g.array(c).shape[-1] for c in parts)


def _scaling(parts: Sequence[tuple[ir.Value, ir.Node]]) -> Fold:
    def fold(g: Graph, by: Float64) -> None:
        for v, node in parts:
            g.scale(v, by, -1, users=[node])

    return fold


def _into(index: Index, v: ir.Value) -> Fold | None:
    """The columns of the weight and the bias of the linear that makes a value, or of the two whose sum it is."""
    node, made = v.producer(), [v]
    if v not in index.by_output and node is not None and node.op_type in ADDITIONS:
        made = [x for x in node.inputs if x is not None and _read_by(x) == [node]]
    parts = list[tuple[ir.Value, ir.Node]]()
    for x in (index.by_output.get(y) for y in made):
        if x is None or x.quantized or x.transposed or len(list(x.weight.uses())) > 1:
            return None
        parts += [(x.weight, x.node), *([] if x.bias is None else [(x.bias, x.add or x.node)])]
    whole = made == [v] or (node is not None and len(made) == len(node.inputs))
    return _scaling(parts) if parts and whole else None


def _through_attention(index: Index, node: ir.Node, readers: tuple[Linear, ...]) -> Place:
    """Values are averaged over tokens, channel by channel: a gain of the output is one of the value projection."""
    source, values = readers[0].source, node.inputs[2]
    heads, kv_heads = (node.attributes.get_int(f"{x}_num_heads", 0) for x in ("q", "kv"))
    cached = any(v is not None for v in node.inputs[4:6]) or any(_used(v) for v in node.outputs[1:3])
    fold = None if values is None or _read_by(values) != [node] or cached else _into(index, values)
    if fold is None or not heads or not kv_heads or values is None or values.shape is None:
        return Place(source, readers)
    wide = readers[0].sizes[0] // heads
    query_head, channel = np.divmod(np.arange(heads * wide), wide)
    units = query_head // (heads // kv_heads) * wide + channel

    def through(g: Graph, by: Float64) -> None:
        of_values = np.empty(kv_heads * wide)
        of_values[units] = by
        fold(g, of_values)

    return Place(source, readers, through, units)


def _used(v: ir.Value) -> bool:
    return v.is_graph_output() or bool(users_of(v))
