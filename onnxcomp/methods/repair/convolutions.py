"""Repair of convolutions that read cut channels, as linears of their patches, from moments of these.

A convolution is `y = P W + b`: a row of `P [rows, K]` is the patch under the kernel at one position, `K` = in-channels
times kernel positions, channel by channel; a row of `y [rows, N]` is all out-channels there. So the normal equations
are those of a linear, and a probed copy of the graph computes the patches as extra values.
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
from onnxcomp.machine import MEMORY, size_text
from onnxcomp.maths import Array, Float64, affine
from onnxcomp.maths.affine import Means
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.readers import Reader, Repair, inside, repair
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, Stats, cross_gram, gram, mean, norm2, var

__all__ = ["Patches", "affordable", "collect", "patches_of", "probed", "refit_each", "refit_in_order"]

OPS = ("Conv", "ConvTranspose")
TOO_LARGE = "only its bias was repaired: the Gram matrix of its patches does not fit into the memory budget"
# Pull of a refitted kernel towards the kernel as it is, relative to the mean of the patches' squares. Ten times that of
# linears: neighbouring patches overlap, so that there is less information in the data than it has rows.
KERNEL_DAMP = 1e-2
GRAM_SHARE = 8  # one Gram matrix of patches may take 1 / 8 of the memory budget: its solver makes several copies


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
        """Kernel positions: how many inputs of one channel a patch has."""
        shape = self.nodes[0].inputs[1].shape  # type: ignore[union-attr]
        assert shape is not None
        return math.prod(shape.numpy()[2:])

    @property
    def units(self) -> Array:
        """The unit of every patch channel: `[K]`."""
        return np.repeat(super().units, self.places)

    @property
    def calls(self) -> tuple[tuple[ir.Value | None, ir.Node], ...]:
        """The convolutions with their inputs."""
        return tuple((n.inputs[0], n) for n in self.nodes)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the patches, one value for each convolution, in a probed graph."""
        return tuple(_patches_name(n) for n in self.nodes)

    @property
    def quantized(self) -> Linear | None:
        """None: `patches_of` refuses quantized kernels."""
        return None

    def weight(self, g: Graph) -> Array:
        """The kernel as `[K, N]`."""
        a = g.array(self.nodes[0].inputs[1])
        if _in_channels_first(self.nodes[0]):
            return np.ascontiguousarray(np.moveaxis(a, 1, -1)).reshape(-1, a.shape[1])
        return a.reshape(a.shape[0], -1).T

    def kept(self, keep: Array) -> Array:
        """Which patch channels stay with some units: bool `[K]`."""
        return np.repeat(super().kept(keep), self.places)

    def bias(self, g: Graph) -> Float64 | None:
        """The bias `[N]`, zeros where there is none; None if its convolutions have different ones."""
        biases = [_bias(g, n) for n in self.nodes]
        return biases[0] if all(np.array_equal(b, biases[0]) for b in biases) else None

    def put(self, g: Graph, weight: Array) -> None:
        """Store another kernel, given as `[K, N]`."""
        v = self.nodes[0].inputs[1]
        assert v is not None
        a = g.array(v)
        if _in_channels_first(self.nodes[0]):
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
        """`bias` where there was no memory for a Gram matrix."""
        collected = set(stats)
        return super().way(how, stats) if all(gram(s) in collected for s in self.sources) else "bias"


def patches_of(g: Graph, group: Group) -> tuple[Patches, ...]:
    """The convolutions that use the group's reading kernels; raises `ModelError` for one in a low-precision type.

    Grouped and depthwise ones have none: their channels read only their own group, so others cannot compensate.
    """
    patches = list[Patches]()
    convolutions = [n for n in g.nodes(*OPS) if n.domain == "" and n.attributes.get_int("group", 1) == 1]
    for slot in group.readers:
        users = [
            n
            for n in convolutions
            if slot.axis == int(not _in_channels_first(n)) and slot.value in _constants(n.inputs[1])
        ]
        if odd := next((n for n in users if not all(g.is_constant(x) for x in n.inputs[1:] if x is not None)), None):
            raise ModelError(
                f"convolution '{odd.name}' is quantized, or its bias is computed, and scores and repair from data need "
                "float numbers: cut the model before quantizing it, or say score: magnitude and repair: none"
            )
        if users:
            patches.append(Patches(slot, (), tuple(users)))
    return tuple(patches)


def _constants(v: ir.Value | None) -> tuple[str, ...]:
    """Names of the value and of the integer codes it is dequantized from, if it is."""
    node = v.producer() if v is not None else None
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return tuple(str(x.name) for x in (v, codes) if x is not None)


def _in_channels_first(node: ir.Node) -> bool:
    """Whether the kernel is stored with its in-channels first."""
    return node.op_type == "ConvTranspose"


def _bias(g: Graph, node: ir.Node) -> Float64:
    """The bias `[N]`, zeros where there is none."""
    stored = node.inputs[2] if len(node.inputs) > 2 else None
    if stored is not None:
        return g.array(stored).astype(np.float64)
    return np.zeros(g.array(node.inputs[1]).shape[int(_in_channels_first(node))])


def _shift(g: Graph, node: ir.Node, by: Float64) -> None:
    """Add `[N]` to the bias of one convolution."""
    new = (_bias(g, node) + by).astype(g.array(node.inputs[1]).dtype)
    stored = node.inputs[2] if len(node.inputs) > 2 else None
    if stored is not None:
        g.put(stored, new, users=[node])
    elif new.any():
        g.set_input(node, 2, g.constant(new, f"{node.name}_bias"))


# ---- probes ------------------------------------------------------------------------------------------------------


def _patches_name(node: ir.Node) -> str:
    """The name of the patches of a convolution in a probed graph: `[batch, ..., K]`."""
    return f"{node.outputs[0].name}:patches"


def _rows_name(node: ir.Node) -> str:
    """The name of its output with channels last there: `[batch, ..., N]`."""
    return f"{node.outputs[0].name}:rows"


def probed(g: Graph, patches: Iterable[str] = (), rows: Iterable[str] = ()) -> Graph:
    """A copy that also computes, channels last, the patches and the outputs of convolutions with these outputs."""
    probe, with_patches, with_rows = g.clone(), set(patches), set(rows)
    for node in probe.nodes(*OPS):
        kernel, out = probe.tensor(node.inputs[1]), node.outputs[0]
        if kernel is None:
            continue
        last = [0, *range(2, len(kernel.shape.numpy())), 1]
        if out.name in with_rows:
            probe.op("Transpose", out, perm=last).name = _rows_name(node)
        if out.name in with_patches:
            probe.op("Transpose", _patches(probe, node), perm=last).name = _patches_name(node)
    return probe


def _patches(g: Graph, node: ir.Node) -> ir.Value:
    """The patches: a depthwise convolution of each channel with every kernel that is one at one position."""
    kernel = g.array(node.inputs[1])
    channels, positions = kernel.shape[int(not _in_channels_first(node))], kernel.shape[2:]
    one_hot = np.eye(math.prod(positions), dtype=kernel.dtype).reshape(-1, *positions)  # [positions, *positions]
    of_channels = np.broadcast_to(one_hot, (channels, *one_hot.shape))
    ones = np.ascontiguousarray(of_channels) if _in_channels_first(node) else of_channels.reshape(-1, 1, *positions)
    attrs = {k: a.value for k, a in node.attributes.items()} | {"group": channels}
    return g.op(node.op_type, node.inputs[0], ones, **attrs)


def collect(g: Graph, env: Env, needs: Sequence[Need], scorer: str = "") -> Stats:
    """Statistics of patches and other values, without Gram matrices that are too large for the memory budget.

    Raises `RecipeError` for these where the score of a pass of the name `scorer` needs them.
    """
    widths = {_patches_name(n): _width(g, n) for n in g.nodes(*OPS)}
    large = [n for n in needs if n.stat.kind == "gram" and not affordable(widths.get(n.value, 0), env)]
    if large and scorer:
        value, width = large[0].value, widths[large[0].value]
        raise RecipeError(
            f"{scorer}: score energy needs the Gram matrix of {width} patch channels of '{value.partition(':')[0]}', "
            f"{size_text(width * width * 8)}, and the copies of its solver: say score: wanda, or --memory more"
        )
    asked = {n.value for n in needs}
    outputs = [str(n.outputs[0].name) for n in g.nodes(*OPS) if _patches_name(n) in asked]
    return env.collect(probed(g, outputs), [n for n in needs if n not in large])


def _width(g: Graph, node: ir.Node) -> int:
    """Patch channels of a convolution that is not in groups; 0 where its kernel is computed."""
    t = g.tensor(node.inputs[1])
    return 0 if t is None else math.prod(t.shape.numpy()) // t.shape.numpy()[int(_in_channels_first(node))]


def affordable(width: int, env: Env) -> bool:
    """Whether a Gram matrix of so many patch channels fits into the memory budget, with the copies its solver makes."""
    return width * width * 8 <= (env.memory or MEMORY) // GRAM_SHARE


# ---- repair ------------------------------------------------------------------------------------------------------

Cut = Sequence[tuple[Group, Array, Sequence[Reader]]]  # groups that were cut, the kept units, the consumers


def refit_each(g: Graph, uncut: Graph, env: Env, cut: Cut, how: Repair) -> None:
    """Repair the convolutions that read the cut axes, each on its own, from moments of the graph before the cut."""
    before, kept_channels = uncut.clone(), _kept_channels(cut)
    for _, keep, read in cut:
        for reader in (r for r in read if isinstance(r, Patches)):
            old = reader.inside(before, {})
            repair(before, old, keep, env.stats, how)
            if old.way(how, env.stats) != how:
                g.note(reader.name, TOO_LARGE)
            columns = kept_channels.get(str(reader.nodes[0].outputs[0].name), slice(None))
            reader.put(g, old.weight(before)[old.kept(keep)][:, columns])
            for node, repaired in zip(reader.nodes, old.nodes, strict=True):
                _shift(g, node, _bias(before, repaired)[columns] - _bias(g, node))


@dataclass(frozen=True)
class _Uncut:
    """The outputs of convolutions before the cut: probed graphs, and which out-channels of each were kept."""

    original: Graph
    before: Graph
    kept: Mapping[str, Array]

    def of(self, node: ir.Node) -> Graph:
        """The original where it has the same convolution as the graph before the cut, else the latter."""
        there, here = (_kernel(x, node) for x in (self.original, self.before))
        return self.original if there == here else self.before


def _kernel(g: Graph, node: ir.Node) -> tuple[object, ...] | None:
    """Kernel shape and attributes of the convolution with the same output name, None where there is none."""
    same = next((n for n in g.nodes(node.op_type) if n.outputs[0].name == node.outputs[0].name), None)
    t = None if same is None else g.tensor(same.inputs[1])
    if same is None or t is None:
        return None
    return tuple(t.shape.numpy()), sorted((k, repr(a.value)) for k, a in same.attributes.items())


def refit_in_order(g: Graph, uncut: Graph, env: Env, cut: Cut) -> None:
    """Refit the readers of the cut axes in topological order, each on the graph repaired so far (`repair.sequential`).

    A convolution's target is its own output in the uncut model, on the kept out-channels. Law: no squared error on the
    calibration data is larger than without repair, given the same inputs.
    """
    g.sort()
    order = {n.name: i for i, n in enumerate(g.nodes())}
    readers = [r for r in inside(g, (r for *_, consumers in cut for r in consumers)) if not r.feeds_itself]
    outputs = [str(n.outputs[0].name) for r in readers if isinstance(r, Patches) for n in r.nodes]
    there = _Uncut(probed(env.original, rows=outputs), probed(uncut, rows=outputs), _kept_channels(cut))
    for reader in sorted(readers, key=lambda r: min(order[n] for n in _nodes(r))):
        if isinstance(reader, Patches):
            _fit(g, there, env, reader)
        else:
            sequential.refit_in_order(g, uncut, env, [reader])


def _kept_channels(cut: Cut) -> dict[str, Array]:
    """Which out-channels were kept of the values that a cut made narrower: bool, by the name of the value."""
    return {s.value: s.kept(keep) for group, keep, _ in cut for s in group.computed if s.axis == 1}


def _nodes(reader: Reader) -> list[str]:
    return [str(n.name) for n in reader.nodes] if isinstance(reader, Patches) else [x.name for x in reader.linears]


def _fit(g: Graph, there: _Uncut, env: Env, reader: Patches) -> None:
    """Refit one kernel and its bias; only the bias where the Gram matrix would be too large."""
    weight, bias = reader.weight(g), reader.bias(g)
    if bias is None or not affordable(len(weight), env):
        g.note(reader.name, TOO_LARGE)
        for node in reader.nodes:
            _level(g, there, env, node)
        return
    calls = [_moments(g, there, env, n) for n in reader.nodes]
    squares, cross, x, y, rows = (sum(part[1:], start=part[0]) for part in zip(*calls, strict=True))
    fitted, new = affine.linear(squares, cross, weight, KERNEL_DAMP, Means(x / rows, y / rows, rows))
    assert new is not None
    reader.put(g, fitted)
    reader.shift(g, new - bias)


def _moments(g: Graph, there: _Uncut, env: Env, node: ir.Node) -> tuple[Float64, Float64, Float64, Float64, float]:
    """Patches `P` and target `Y`: `P^T P` `[K, K]`, `P^T Y` `[K, N]`, sums `[K]` and `[N]`, and the number of rows."""
    patches, rows_name = _patches_name(node), _rows_name(node)
    needs: dict[str, Need] = {"gram": gram(patches), "cross": cross_gram(patches, rows_name, other_of="original")}
    needs |= {"mean": mean(patches), "var": var(patches), "norm": norm2(patches), "y": mean(rows_name, of="original")}
    stats = env.collect(probed(g, [str(node.outputs[0].name)]), needs.values(), there.of(node))
    values = {k: np.asarray(stats[n], np.float64) for k, n in needs.items()}
    kept = there.kept.get(str(node.outputs[0].name), slice(None))
    rows = (
        affine.count(values["norm"], values["mean"], values["var"]) or 1.0
    )  # of patches that are all zero it is unknown
    return values["gram"], values["cross"][:, kept], rows * values["mean"], rows * values["y"][kept], rows


def _level(g: Graph, there: _Uncut, env: Env, node: ir.Node) -> None:
    """Correct the bias of one convolution so that its output has the mean it had before the cut."""
    rows_name = _rows_name(node)
    needs = mean(rows_name), mean(rows_name, of="original")
    stats = env.collect(probed(g, rows=[str(node.outputs[0].name)]), needs, there.of(node))
    now, then = (np.asarray(stats[n], np.float64) for n in needs)
    _shift(g, node, then[there.kept.get(str(node.outputs[0].name), slice(None))] - now)
