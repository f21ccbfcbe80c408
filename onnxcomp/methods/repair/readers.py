"""Readers of a group's axis: the linears whose in-channels it is, their statistics, and closed-form repair.

Layout: `y = x W + b`, `x [R, K]`, `W [K, N]`, `b [N]`; the axis of the group is `K`, each unit has some in-channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group, Slot
from onnxcomp.maths import Array, Float64, solve
from onnxcomp.maths.formats import dequantize
from onnxcomp.stats import Need, Stats, gram, mean, norm2, var

__all__ = [
    "FEEDS_ITSELF",
    "NEEDS",
    "Reader",
    "Repair",
    "dequantized",
    "downstream",
    "inside",
    "numbers",
    "readers_of",
    "repair",
    "replace",
    "shift_bias",
    "silence",
]

Repair = Literal["gauss-newton", "block-tune", "least-squares", "bias", "none"]
NEEDS: dict[str, list[Callable[[str], Need]]] = {
    "gauss-newton": [gram, mean, var],
    "block-tune": [gram, mean, var],
    "least-squares": [gram, mean, var],
    "bias": [mean],
    "none": [],
}
"""By repair, the statistics of each consumer's inputs."""
FEEDS_ITSELF = (
    "its weights are used again on what they gave (shared layers), so they are not refitted, at most the bias"
)


@dataclass(frozen=True)
class Reader:
    """One weight whose rows are an axis of a group, with every linear that reads it (shared layers have several)."""

    slot: Slot
    linears: tuple[Linear, ...]

    @property
    def units(self) -> Array:
        """The unit of every in-channel: `[K]`."""
        return np.asarray(self.slot.units, np.int64)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the values that the weight is multiplied with."""
        return tuple(dict.fromkeys(str(x.source.name) for x in self.linears))

    @property
    def calls(self) -> tuple[tuple[ir.Value | None, ir.Node], ...]:
        """The values that the weight is multiplied with, and the nodes that do so."""
        return tuple((x.source, x.node) for x in self.linears)

    @property
    def feeds_itself(self) -> bool:
        """Whether an input depends on an output: a fit to the inputs as they were would change them."""
        if len(self.calls) < 2:
            return False
        after = downstream(o for _, n in self.calls for o in n.outputs)
        return any(v in after for v, _ in self.calls if v is not None)

    def weight(self, g: Graph) -> Array:
        """The weight as `[K, N]`."""
        a = numbers(g, self.linears[0].weight)
        assert a is not None
        return a.T if self.linears[0].transposed else a

    def kept(self, keep: Array) -> Array:
        """Which in-channels belong to the kept units: bool `[K]`."""
        return self.slot.kept(keep)

    def bias(self, g: Graph) -> Float64 | None:
        """The bias `[N]`, if all its linears have the same one."""
        biases = {x.bias for x in self.linears}
        return None if len(biases) > 1 or None in biases else g.array(biases.pop()).reshape(-1).astype(np.float64)

    def way(self, how: Repair, stats: Stats) -> Repair:
        """The repair that is possible with the statistics that were collected."""
        return "bias" if self.feeds_itself else how

    def put(self, g: Graph, weight: Array) -> None:
        """Store another weight `[K, N]`."""
        replace(g, self, weight)

    def shift(self, g: Graph, by: Float64) -> None:
        """Add `[N]` to the bias of all its linears, creating one where there is none."""
        for linear in self.linears:
            shift_bias(g, linear, by)

    def inside(self, g: Graph, linears: Mapping[str, Linear]) -> Reader:
        """The same reader in a copy of its graph, which has these linears by name."""
        return Reader(self.slot, tuple(linears[x.name] for x in self.linears))

    @property
    def quantized(self) -> Linear | None:
        """The linear whose weight is stored in a low-precision type, if one is."""
        return next((x for x in self.linears if x.quantized), None)

    def gram(self, stats: Stats) -> Float64:
        """`X^T X` over all inputs: `[K, K]`."""
        first, *rest = (np.asarray(stats[gram(s)], np.float64) for s in self.sources)
        return np.asarray(sum(rest, first))  # a single one stays mapped from its file

    def norm2(self, stats: Stats) -> Float64:
        """Euclidean norm of every in-channel over all inputs: `[K]`."""
        return np.asarray(np.sqrt(sum(np.asarray(stats[norm2(s)], np.float64) ** 2 for s in self.sources)))

    def mean(self, stats: Stats) -> Float64:
        """Mean of every in-channel: `[K]`; inputs have equally many rows."""
        return np.asarray(np.mean([stats[mean(s)] for s in self.sources], axis=0), np.float64)

    def var(self, stats: Stats) -> Float64:
        """Variance of every in-channel: `[K]`."""
        means = np.array([stats[mean(s)] for s in self.sources], np.float64)
        return np.asarray(np.mean([stats[var(s)] for s in self.sources], axis=0) + means.var(axis=0), np.float64)

    def rows(self, stats: Stats) -> float:
        """How many rows the Gram matrix is a sum over: its trace over the mean square of a row."""
        square = float((self.var(stats) + self.mean(stats) ** 2).sum())
        return float(np.trace(self.gram(stats))) / square if square > 0 else 1.0


def readers_of(group: Group, linears: Sequence[Linear]) -> tuple[Reader, ...]:
    """The linears that use the group's reading weights, by weight."""
    readers = list[Reader]()
    for slot in group.readers:
        users = [x for x in linears if x.weight.name == slot.value and slot.axis == int(x.transposed)]
        if users:
            readers.append(Reader(slot, tuple(users)))
    return tuple(readers)


def inside(g: Graph, readers: Iterable[Reader]) -> list[Reader]:
    """The same readers in a copy of their graph, without those of tied tables."""
    linears = {x.name: x for x in blocks.linears(g, tied=True)}
    return [r.inside(g, linears) for r in readers if not r.slot.writes]


def downstream(starts: Iterable[ir.Value]) -> set[ir.Value]:
    """All values that are computed from some, and these."""
    reached, pending = set[ir.Value](), list(starts)
    while pending:
        v = pending.pop()
        if v not in reached:
            reached.add(v)
            pending += [o for u, _ in v.uses() for o in u.outputs]
    return reached


def silence(g: Graph, group: Group, units: Array) -> None:
    """Zero the weights that read some units of a group, which has the effect of removing them."""
    for slot in group.readers:
        v = g.value(slot.value)
        a = g.array(v).copy()
        a[tuple([slice(None)] * slot.axis + [slot.positions(units)])] = 0
        g.put(v, a)


def numbers(g: Graph, v: ir.Value) -> Array | None:
    """A constant as floats, dequantized where it is quantized; None for scales of codes, and for integers."""
    for node, index in v.uses():
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            return None if index else dequantized(g, node)
    a, dtype = g.array(v), v.dtype
    if dtype is ir.DataType.BFLOAT16:  # no type of numpy, exact in float32
        return a.astype(np.float32)
    return a if np.issubdtype(a.dtype, np.floating) else None


def dequantized(g: Graph, node: ir.Node) -> Array:
    """The numbers that a DequantizeLinear of constants makes."""
    codes, scale = (g.array(x) for x in node.inputs[:2])
    zero = g.array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(scale, codes.dtype)
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    return dequantize(codes, scale, zero, axis=axis, block=node.attributes.get_int("block_size", 0))


def repair(g: Graph, reader: Reader, keep: Array, stats: Stats, how: Repair) -> None:
    """Compensate the removed in-channels of one reader, from statistics of its uncut inputs.

    `bias`: the mean output of the removed in-channels, `E[x_removed] W_removed`, is added to the bias, created where
    there is none (FLAP, arXiv 2312.11983, eq. 7). `least-squares`: the kept rows, and the bias if there is one,
    minimise the squared error of the layer's output.
    """
    is_kept = reader.kept(keep)
    kept, removed = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
    if how == "none" or reader.slot.writes:
        return  # a tied table is also looked up by token ids, which a refit would change
    weight, means = reader.weight(g), reader.mean(stats)
    if reader.way(how, stats) == "bias":
        reader.shift(g, means[removed] @ weight[removed].astype(np.float64))
        return
    bias = reader.bias(g)
    matrix = reader.gram(stats)
    if bias is None:
        rows = solve.repair(matrix, weight, kept).weights
    else:
        rows, new = solve.repair_affine(matrix, means, reader.rows(stats), weight, bias, kept)
        reader.shift(g, new - bias)
    fitted = weight.copy()
    fitted[kept] = rows.astype(weight.dtype)
    reader.put(g, fitted)


def replace(g: Graph, reader: Reader, weight: Array, bias: Float64 | None = None) -> None:
    """Store a weight `[K, N]` for the linears of a reader, and a bias `[N]` where one is given and they have one."""
    v = reader.linears[0].weight
    new = np.ascontiguousarray(weight.T) if reader.linears[0].transposed else weight
    g.put(v, new.astype(v.dtype.numpy()) if v.dtype is ir.DataType.BFLOAT16 else new)
    for linear in reader.linears:
        if bias is not None and linear.bias is not None:
            old = g.array(linear.bias)
            g.put(linear.bias, bias.reshape(old.shape).astype(old.dtype), users=[linear.add or linear.node])


def shift_bias(g: Graph, linear: Linear, by: Float64) -> None:
    """Add a row to the bias of one linear."""
    if linear.bias is None:
        dtype = g.array(linear.weight).dtype if linear.output.dtype is None else linear.output.dtype.numpy()
        g.replace(linear.output, g.op("Add", linear.output, by.astype(dtype), like=linear.output))
        return
    old = g.array(linear.bias)
    new = (old.astype(np.float64) + by.reshape(old.shape)).astype(old.dtype)
    g.put(linear.bias, new, users=[linear.add or linear.node])
