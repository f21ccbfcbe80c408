"""Convolutions that read cut channels, as linears of their patches: probes that show the patches, closed-form repair.

A convolution is `y = P W + b`: a row of `P` `[rows, K]` is what the kernel sees at one place, `K` in-channels times the
places of the kernel, channel by channel; a row of `y` is all out-channels there. So moments of patches say all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Linear
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array, Float64, affine
from onnxcomp.maths.affine import Means
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.readers import Reader, Repair, inside, repair
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, Stats, cross_gram, gram, mean, norm2, var

__all__ = ["Patches", "affordable", "collect", "each_alone", "in_order", "patches_of", "probed"]

OPS = ("Conv", "ConvTranspose")
TOO_LARGE = "only its bias was repaired: the Gram matrix of its patches does not fit into the memory budget"
# Pull towards the weights as they are: neighbouring patches are alike, so that data says less than its rows.
DAMP = 1e-2
SHARE = 8  # of the memory budget: what one Gram matrix of patches may take


@dataclass(frozen=True)
class Patches(Reader):
    """One kernel whose in-channels are an axis of a group, with every convolution that uses it."""

    nodes: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        """The name of its first convolution."""
        return str(self.nodes[0].name)

    @property
    def places(self) -> int:
        """How many inputs of one channel the kernel sees at once."""
        shape = self.nodes[0].inputs[1].shape  # type: ignore[union-attr]
        assert shape is not None
        return math.prod(shape.numpy()[2:])

    @property
    def units(self) -> Array:
        """The unit of every patch channel: `[K]`."""
        return np.repeat(super().units, self.places)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the patches in a probed graph."""
        return tuple(_seen(n) for n in self.nodes)

    @property
    def quantized(self) -> Linear | None:
        """None: `patches_of` refuses quantized kernels."""
        return None

    def weight(self, g: Graph) -> Array:
        """The kernel as `[K, N]`."""
        a = g.array(self.nodes[0].inputs[1])
        if _turned(self.nodes[0]):
            return np.ascontiguousarray(np.moveaxis(a, 1, -1)).reshape(-1, a.shape[1])
        return a.reshape(a.shape[0], -1).T

    def kept(self, keep: Array) -> Array:
        """Which patch channels stay with some units: bool `[K]`."""
        return np.repeat(super().kept(keep), self.places)

    def bias(self, g: Graph) -> Float64 | None:
        """The bias `[N]`, zeros where there is none; None if its convolutions have different ones."""
        found = [_bias(g, n) for n in self.nodes]
        return found[0] if all(np.array_equal(b, found[0]) for b in found) else None

    def put(self, g: Graph, weight: Array) -> None:
        """Store another kernel, given as `[K, N]`."""
        v = self.nodes[0].inputs[1]
        assert v is not None
        a = g.array(v)
        if _turned(self.nodes[0]):
            new = np.moveaxis(weight.reshape(a.shape[0], *a.shape[2:], a.shape[1]), -1, 1)
        else:
            new = weight.T.reshape(a.shape)
        g.put(v, np.ascontiguousarray(new, a.dtype))

    def shift(self, g: Graph, by: Float64) -> None:
        """Add `[N]` to the bias of all its convolutions, made where there is none."""
        for node in self.nodes:
            _shift(g, node, by)

    def inside(self, g: Graph, linears: Mapping[str, Linear]) -> Patches:
        """The same reader in a copy of its graph."""
        nodes = {n.name: n for n in g.nodes(*OPS)}
        return Patches(self.slot, (), tuple(nodes[n.name] for n in self.nodes))

    def way(self, how: Repair, stats: Stats) -> Repair:
        """`bias` where there was no room for a Gram matrix."""
        held = set(stats)
        return how if all(gram(s) in held for s in self.sources) else "bias"


def patches_of(g: Graph, group: Group) -> tuple[Patches, ...]:
    """The convolutions behind the group's reading constants; raises `ModelError` for one in a low-precision type.

    Each channel of a depthwise one reads only itself, so no other can make up for it; groups go as a whole.
    """
    found = []
    convolutions = [n for n in g.nodes(*OPS) if n.domain == "" and n.attributes.get_int("group", 1) == 1]
    for slot in group.readers:
        own = [n for n in convolutions if slot.axis == int(not _turned(n)) and slot.value in _constants(n.inputs[1])]
        if odd := next((n for n in own if not all(g.is_constant(x) for x in n.inputs[1:] if x is not None)), None):
            raise ModelError(
                f"convolution '{odd.name}' is quantized, or its bias is computed, and scores and repair from data need "
                "float numbers: cut the model before quantizing it, or say score: magnitude and repair: none"
            )
        if own:
            found.append(Patches(slot, (), tuple(own)))
    return tuple(found)


def _constants(v: ir.Value | None) -> tuple[str, ...]:
    """Names of the value and of the codes it is made of, if it is."""
    node = v.producer() if v is not None else None
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return tuple(str(x.name) for x in (v, codes) if x is not None)


def _turned(node: ir.Node) -> bool:
    """Whether the kernel has its in-channels first."""
    return node.op_type == "ConvTranspose"


def _bias(g: Graph, node: ir.Node) -> Float64:
    held = node.inputs[2] if len(node.inputs) > 2 else None
    if held is not None:
        return g.array(held).astype(np.float64)
    return np.zeros(g.array(node.inputs[1]).shape[int(_turned(node))])


def _shift(g: Graph, node: ir.Node, by: Float64) -> None:
    """Add `[N]` to the bias of one convolution."""
    new = (_bias(g, node) + by).astype(g.array(node.inputs[1]).dtype)
    held = node.inputs[2] if len(node.inputs) > 2 else None
    if held is not None:
        g.put(held, new, users=[node])
    elif new.any():
        g.set_input(node, 2, g.constant(new, f"{node.name}_bias"))


# ---- probes ------------------------------------------------------------------------------------------------------


def _seen(node: ir.Node) -> str:
    """The name of the patches of a convolution in a probed graph: `[batch, ..., K]`."""
    return f"{node.outputs[0].name}:patches"


def _made(node: ir.Node) -> str:
    """The name of its output there: `[batch, ..., N]`."""
    return f"{node.outputs[0].name}:rows"


def probed(g: Graph, patches: Iterable[str] = (), rows: Iterable[str] = ()) -> Graph:
    """A copy that also computes, channels last, what convolutions see and what they give, by their outputs."""
    probe, seen, made = g.clone(), set(patches), set(rows)
    for node in probe.nodes(*OPS):
        kernel, out = probe.tensor(node.inputs[1]), node.outputs[0]
        if kernel is None:
            continue
        last = [0, *range(2, len(kernel.shape.numpy())), 1]
        if out.name in made:
            probe.op("Transpose", out, perm=last).name = _made(node)
        if out.name in seen:
            probe.op("Transpose", _patches(probe, node), perm=last).name = _seen(node)
    return probe


def _patches(g: Graph, node: ir.Node) -> ir.Value:
    """What the kernel sees: a convolution of each channel with every kernel that is one at one place."""
    kernel = g.array(node.inputs[1])
    channels, places = kernel.shape[int(not _turned(node))], kernel.shape[2:]
    one = np.eye(math.prod(places), dtype=kernel.dtype).reshape(-1, *places)
    every = np.broadcast_to(one, (channels, *one.shape))
    ones = np.ascontiguousarray(every) if _turned(node) else every.reshape(-1, 1, *places)
    attrs = {k: a.value for k, a in node.attributes.items()} | {"group": channels}
    return g.op(node.op_type, node.inputs[0], ones, **attrs)


def collect(g: Graph, env: Env, needs: Sequence[Need], scorer: str = "") -> Stats:
    """What is asked of patches and other values; Gram matrices that would be too large are left out.

    Raises `RecipeError` for these where a pass of the name `scorer` cannot do without.
    """
    widths = {_seen(n): _width(g, n) for n in g.nodes(*OPS)}
    large = [n for n in needs if n.stat.kind == "gram" and not affordable(widths.get(n.value, 0), env)]
    if large and scorer:
        value, width = large[0].value, widths[large[0].value]
        raise RecipeError(
            f"{scorer}: score energy needs the Gram matrix of {width} patch channels of '{value.partition(':')[0]}', "
            f"{width * width * 8 >> 20} MiB, and the copies of its solver: say score: wanda, or --memory more"
        )
    asked = {n.value for n in needs}
    outputs = [str(n.outputs[0].name) for n in g.nodes(*OPS) if _seen(n) in asked]
    return env.collect(probed(g, outputs), [n for n in needs if n not in large])


def _width(g: Graph, node: ir.Node) -> int:
    """Patch channels of a convolution that is not in groups; 0 where its kernel is computed."""
    t = g.tensor(node.inputs[1])
    return 0 if t is None else math.prod(t.shape.numpy()) // t.shape.numpy()[int(_turned(node))]


def affordable(width: int, env: Env) -> bool:
    """Whether a Gram matrix of so many patch channels fits into the budget, with the copies its solver makes."""
    return width * width * 8 <= (env.memory or MEMORY) // SHARE


# ---- repair ------------------------------------------------------------------------------------------------------

Cut = Sequence[tuple[Group, Array, Sequence[Reader]]]  # groups that were cut, what was kept, what reads them


def each_alone(g: Graph, uncut: Graph, env: Env, cut: Cut, how: Repair) -> None:
    """Repair the convolutions that read the cut axes, each for itself, on moments of the graph before the cut."""
    before, left = uncut.clone(), _left(cut)
    for _, keep, read in cut:
        for reader in (r for r in read if isinstance(r, Patches)):
            was = reader.inside(before, {})
            repair(before, was, keep, env.stats, how)
            if was.way(how, env.stats) != how:
                g.note(reader.name, TOO_LARGE)
            columns = left.get(str(reader.nodes[0].outputs[0].name), slice(None))
            reader.put(g, was.weight(before)[was.kept(keep)][:, columns])
            for node, old in zip(reader.nodes, was.nodes, strict=True):
                _shift(g, node, _bias(before, old)[columns] - _bias(g, node))


@dataclass(frozen=True)
class _Uncut:
    """What convolutions gave before the cut: probed graphs, and which out-channels are left of each."""

    original: Graph
    before: Graph
    left: Mapping[str, Array]

    def of(self, node: ir.Node) -> Graph:
        """The original where it has the same convolution as the graph before the cut, else the latter."""
        there, here = (_kernel(x, node) for x in (self.original, self.before))
        return self.original if there == here else self.before


def _kernel(g: Graph, node: ir.Node) -> tuple[object, ...] | None:
    """What decides the shape of a convolution's output, by the name of that."""
    found = next((n for n in g.nodes(node.op_type) if n.outputs[0].name == node.outputs[0].name), None)
    t = None if found is None else g.tensor(found.inputs[1])
    if found is None or t is None:
        return None
    return tuple(t.shape.numpy()), sorted((k, repr(a.value)) for k, a in found.attributes.items())


def in_order(g: Graph, uncut: Graph, env: Env, cut: Cut) -> None:
    """Fit what reads the cut axes, in topological order, each on the graph as it is by then (`repairs.in_order`).

    A convolution's target is its own output in the uncut model, on the out-channels that are left. Law: no squared
    error on the calibration data is larger than without repair, as the inputs are then.
    """
    g.model.graph.sort()
    order = {n.name: i for i, n in enumerate(g.nodes())}
    found = inside(g, (r for *_, read in cut for r in read))
    outputs = [str(n.outputs[0].name) for r in found if isinstance(r, Patches) for n in r.nodes]
    there = _Uncut(probed(env.original, rows=outputs), probed(uncut, rows=outputs), _left(cut))
    for reader in sorted(found, key=lambda r: min(order[n] for n in _nodes(r))):
        if isinstance(reader, Patches):
            _fit(g, there, env, reader)
        else:
            sequential.in_order(g, uncut, env, [reader])


def _left(cut: Cut) -> dict[str, Array]:
    """Which out-channels are left of what a cut made narrower: bool, by the name of the value."""
    return {s.value: s.kept(keep) for group, keep, _ in cut for s in group.computed if s.axis == 1}


def _nodes(reader: Reader) -> list[str]:
    return [str(n.name) for n in reader.nodes] if isinstance(reader, Patches) else [x.name for x in reader.linears]


def _fit(g: Graph, there: _Uncut, env: Env, reader: Patches) -> None:
    """Fit one kernel and its bias; only the bias where the Gram matrix would be too large."""
    weight, bias = reader.weight(g), reader.bias(g)
    if bias is None or not affordable(len(weight), env):
        g.note(reader.name, TOO_LARGE)
        for node in reader.nodes:
            _level(g, there, env, node)
        return
    found = [_moments(g, there, env, n) for n in reader.nodes]
    squares, cross, x, y, rows = (sum(part[1:], start=part[0]) for part in zip(*found, strict=True))
    fitted, new = affine.linear(squares, cross, weight, DAMP, Means(x / rows, y / rows, rows))
    assert new is not None
    reader.put(g, fitted)
    reader.shift(g, new - bias)


def _moments(g: Graph, there: _Uncut, env: Env, node: ir.Node) -> tuple[Float64, Float64, Float64, Float64, float]:
    """Gram matrix of the patches, their products with the target, sums of both, and how many rows these are over."""
    seen, made = _seen(node), _made(node)
    needs: dict[str, Need] = {"gram": gram(seen), "cross": cross_gram(seen, made, other_of="original")}
    needs |= {"mean": mean(seen), "var": var(seen), "norm": norm2(seen), "y": mean(made, of="original")}
    stats = env.collect(probed(g, [str(node.outputs[0].name)]), needs.values(), there.of(node))
    got = {k: np.asarray(stats[n], np.float64) for k, n in needs.items()}
    left = there.left.get(str(node.outputs[0].name), slice(None))
    rows = affine.count(got["norm"], got["mean"], got["var"]) or 1.0  # patches that are all zero say nothing of it
    return got["gram"], got["cross"][:, left], rows * got["mean"], rows * got["y"][left], rows


def _level(g: Graph, there: _Uncut, env: Env, node: ir.Node) -> None:
    """Give the output of one convolution the mean it had."""
    made = _made(node)
    needs = mean(made), mean(made, of="original")
    stats = env.collect(probed(g, rows=[str(node.outputs[0].name)]), needs, there.of(node))
    now, then = (np.asarray(stats[n], np.float64) for n in needs)
    _shift(g, node, then[there.left.get(str(node.outputs[0].name), slice(None))] - now)
