"""What each linear loses in the model's outputs by each way to round its weight, measured one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, Float64, affine, formats
from onnxcomp.methods.quantize.static_sites import Ranges, as_integers, ranges
from onnxcomp.methods.quantize.weight_rounding import Method
from onnxcomp.pipeline import Edit, Env
from onnxcomp.stats import Need, Stats, mean, norm2, var
from onnxcomp.target import Target
from onnxcomp.validation.outputs import View

__all__ = [
    "INT8",
    "LEAST",
    "LOSSES",
    "SAMPLES",
    "Choice",
    "Inputs",
    "Moments",
    "Static",
    "Unit",
    "Way",
    "loss_of",
    "measure",
    "metric_of",
    "moments_of",
    "named",
    "nbytes",
    "plainly",
    "units",
]

SAMPLES = 32  # of the left-out data: errors of sites differ by factors, which few samples tell
COLUMNS = 128  # out-channels of a weight that its options are compared on; they agree to a few percent on any others
LEAST = 1e-30  # in place of an error of zero, so that options keep their order
LOSSES = ("kl", "rel-l2", "sqnr", "pooled-sqnr")  # metrics whose losses of sites add while they are small


class Static:
    """Static int8: a scale for each out-channel of the weight, a range for its readers' inputs."""

    def __repr__(self) -> str:
        return "int8"


INT8 = Static()
Way = Method | Static | None  # of a weight; None leaves it float
Choice = Mapping[str, Way]  # of each weight by its name


@dataclass(frozen=True)
class Unit:
    """A stored weight with the linears that read it, which have one option together."""

    weight: ir.Value
    readers: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """That of the weight's first product."""
        return self.readers[0].name

    @property
    def bias(self) -> ir.Value | None:
        """A bias of its own, which can take what rounding does to the means."""
        bias = self.readers[0].bias
        own = len(self.readers) == 1 and bias is not None and bias.is_initializer() and len(list(bias.uses())) == 1
        return bias if own else None


def units(found: Iterable[Linear]) -> list[Unit]:
    """Linears by the weight that they read, in the order of the graph."""
    by_weight: dict[ir.Value, list[Linear]] = {}
    for x in found:
        by_weight.setdefault(x.weight, []).append(x)
    return [Unit(w, tuple(readers)) for w, readers in by_weight.items()]


def named(m: Way) -> str:
    """An option in words."""
    return f"{m.bits} bits in {m.block}" if isinstance(m, Method) else "float" if m is None else str(m)


def nbytes(weight: ir.Value, m: Way) -> int:
    """Bytes of a weight `[K, N]` as codes, scales and zero points as they are stored in the end, or in float."""
    k, n = (int(d) for d in weight.shape or (0, 0))  # type: ignore[arg-type]
    item = weight.dtype.itemsize if weight.dtype is not None else 4
    if m is None:
        return int(k * n * item)
    if isinstance(m, Static):
        return int(n * (k + item))
    bits = {3: 4}.get(m.bits, m.bits)
    blocks_of = math.ceil(k / m.block)
    zero = 0 if m.symmetric else math.ceil(blocks_of * bits / 8)
    return n * (blocks_of * m.block * bits // 8 + blocks_of * int(item) + zero)


def metric_of(g: Graph, asked: str | None) -> str:
    """The metric that is asked for, else `kl` where an output has scores of classes, or `rel-l2`."""
    return asked or ("kl" if any("kl" in measured for measured in View.of(g).measures().values()) else "rel-l2")


def loss_of(score: float, metric: str) -> float:
    """A score of `env.evaluate` on a scale on which small errors of several sites add: squares, divergences."""
    if metric in ("sqnr", "pooled-sqnr"):
        return float(10 ** (score / 10))  # decibels, negated
    return score**2 if metric == "rel-l2" else score


@dataclass(frozen=True)
class Inputs:
    """Sums of squares of a weight's input channels over the rows, about their means where those are free, and means."""

    squares: Float64
    means: Float64


@dataclass(frozen=True)
class Moments:
    """What rounding needs of the inputs of weights, by the name of the unit, and codes of values for int8."""

    inputs: Mapping[str, Inputs]
    ranges: Ranges = field(default_factory=dict)


def measure(
    g: Graph, env: Env, found: Sequence[Unit], ways: Sequence[Way], base: Method, metric: str, moments: Moments
) -> dict[str, list[float]]:
    """Loss of every option of every weight, by the name of the unit.

    Each weight is rounded alone by the method `base`, and the model run on what `env` judges on; what its other codes
    lose is in proportion to their squared errors, `sum_k E[x_k^2] |e_k|^2`. As int8 it is run once more.
    """
    coded = any(isinstance(m, Method) for m in ways)
    gains = _gains(g, env, found, base, metric, moments.inputs) if coded else {}
    wholes = _integers(g, env, found, metric, moments.ranges) if INT8 in ways else {}

    def loss(u: Unit, weight: Array, m: Way) -> float:
        if isinstance(m, Method):
            return _error(weight, m, moments.inputs[u.name]) * gains[u.name]
        return 0.0 if m is None else wholes[u.name]

    table = {}
    for u in found:
        weight = _thinned(g.array(u.weight))
        table[u.name] = [loss(u, weight, m) for m in ways]
    return table


def _gains(
    g: Graph, env: Env, found: Sequence[Unit], base: Method, metric: str, inputs: Mapping[str, Inputs]
) -> dict[str, float]:
    """What the model loses by a weight for a unit of its squared error."""
    edits = [plainly([u], {u.name: base}, Moments(inputs), env.target) for u in found]
    scores = env.evaluate(edits, metric, SAMPLES)
    return {
        u.name: max(loss_of(s.value, metric), LEAST)
        / max(_error(_thinned(g.array(u.weight)), base, inputs[u.name]), LEAST)
        for u, s in zip(found, scores, strict=True)
    }


def _thinned(weight: Array) -> Array:
    return np.asarray(weight[:, :: -(-weight.shape[1] // COLUMNS)])


def _integers(g: Graph, env: Env, found: Sequence[Unit], metric: str, ranges: Ranges) -> dict[str, float]:
    """What static int8 of the weight and of its readers' inputs loses, by unit, each alone."""
    edits = [plainly([u], {u.name: INT8}, Moments({}, ranges), env.target) for u in found]
    scores = env.evaluate(edits, metric, SAMPLES)
    return {
        u.name: loss_of(s.value, metric) if _reached(u, ranges) else math.inf
        for u, s in zip(found, scores, strict=True)
    }


def _reached(u: Unit, ranges: Ranges) -> bool:
    return all(str(x.source.name) in ranges for x in u.readers)


def moments_of(g: Graph, env: Env, found: Sequence[Unit], ways: Sequence[Way]) -> Moments:
    """What all roundings of these weights need of their inputs, of the graph as it is."""
    inputs = _inputs_of(g, env, found) if any(isinstance(m, Method) for m in ways) else {}
    return Moments(inputs, ranges(g, env, [x for u in found for x in u.readers]) if INT8 in ways else {})


def _inputs_of(g: Graph, env: Env, found: Sequence[Unit]) -> dict[str, Inputs]:
    """The moments of the inputs of every unit, of the graph as it is."""
    needs: dict[ir.Value, tuple[Need, Need, Need]] = {
        x.source: (norm2(x.source), mean(x.source), var(x.source)) for u in found for x in u.readers
    }
    stats = env.collect(g, [n for three in needs.values() for n in three])
    return {u.name: _inputs(u, needs, stats) for u in found}


def _inputs(u: Unit, needs: Mapping[ir.Value, tuple[Need, Need, Need]], stats: Stats) -> Inputs:
    total: Array | float = 0.0
    means: Array | float = 0.0
    for x in u.readers:
        norm, average, spread = (np.asarray(stats[n], np.float64) for n in needs[x.source])
        rows = affine.count(norm, average, spread)
        total, means = total + (rows * spread if u.bias is not None else norm**2), average
    return Inputs(np.asarray(total), np.asarray(means))


def _rounded(weight: Array, m: Method, inputs: Inputs) -> Array:
    """To nearest, ranges clipped by the error that the inputs weigh."""
    importance = inputs.squares[:, None] if inputs.squares.any() else 1.0
    return formats.fit(
        weight, m.fmt, axis=0, block=m.block, symmetric=m.symmetric, mse=True, importance=importance
    ).array()


def _error(weight: Array, m: Method, inputs: Inputs) -> float:
    return float(inputs.squares @ np.square(_rounded(weight, m, inputs) - weight).sum(axis=1, dtype=np.float64))


def plainly(found: Iterable[Unit], choice: Choice, moments: Moments, target: Target) -> Edit:
    """An edit that rounds weights to nearest, in float, biases taking what that does to means; int8 with its inputs."""
    units = list(found)
    chosen = [(u, choice.get(u.name)) for u in units]
    coded = [
        (str(u.weight.name), u.bias and str(u.bias.name), m, moments.inputs[u.name])
        for u, m in chosen
        if isinstance(m, Method)
    ]
    integers = as_integers(
        {x.name for u, m in chosen if isinstance(m, Static) for x in u.readers}, moments.ranges, target
    )

    def edit(g: Graph) -> None:
        for name, bias, method, inputs in coded:
            weight = g.array(v := g.value(name))
            new = _rounded(weight.astype(np.float32), method, inputs)
            g.put(v, new.astype(weight.dtype))
            if bias:
                b = g.array(g.value(bias))
                gain = inputs.means @ (weight - new)
                g.put(g.value(bias), (b + gain.reshape(b.shape)).astype(b.dtype))
        integers(g)

    return edit
