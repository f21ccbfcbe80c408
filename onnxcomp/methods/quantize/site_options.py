"""What each linear loses in the model's outputs by each way to round its weight, measured one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, Float64, affine, formats
from onnxcomp.maths.clipping import clip_range
from onnxcomp.maths.frontier import Option
from onnxcomp.methods.quantize import linears
from onnxcomp.methods.quantize.weight_rounding import Method
from onnxcomp.pipeline import Edit, Env
from onnxcomp.stats import Need, Stats, histogram, mean, norm2, var
from onnxcomp.validation.outputs import View

__all__ = [
    "LEAST",
    "LOSSES",
    "SAMPLES",
    "Inputs",
    "Unit",
    "inputs_of",
    "integers",
    "loss_of",
    "measure",
    "metric_of",
    "named",
    "nbytes",
    "plainly",
    "units",
]

SAMPLES = 32  # of the left-out data: errors of sites differ by factors, which few samples tell
COLUMNS = 128  # out-channels of a weight that its options are compared on; they agree to a few percent on any others
LEAST = 1e-30  # in place of an error of zero, so that options keep their order
LOSSES = ("kl", "rel-l2", "sqnr", "pooled-sqnr")  # metrics whose losses of sites add while they are small

Choice = Mapping[str, Method | None]  # of each weight by its name; None leaves it float


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


def named(m: Method | None) -> str:
    """An option in words."""
    return "float" if m is None else f"{m.bits} bits in {m.block}"


def nbytes(weight: ir.Value, m: Method | None) -> int:
    """Bytes of a weight `[K, N]` as codes, scales and zero points as they are stored in the end, or in float."""
    k, n = (int(d) for d in weight.shape or (0, 0))  # type: ignore[arg-type]
    item = weight.dtype.itemsize if weight.dtype is not None else 4
    if m is None:
        return int(k * n * item)
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


def measure(
    g: Graph, env: Env, found: Sequence[Unit], methods: Sequence[Method | None], base: Method, metric: str,
    inputs: Mapping[str, Inputs],
) -> dict[str, list[Option]]:  # fmt: skip
    """Bytes and loss of every option of every weight, by the name of the unit.

    Each weight is rounded alone by the method `base`, and the model run on what `env` judges on; what its other options
    lose is in proportion to their squared errors, `sum_k E[x_k^2] |e_k|^2`.
    """
    edits = [plainly([u], {u.name: base}, inputs) for u in found]
    scores = env.evaluate(edits, metric, SAMPLES)
    table = {}
    for u, score in zip(found, scores, strict=True):
        weight = g.array(u.weight)
        weight = weight[:, :: -(-weight.shape[1] // COLUMNS)]
        errors = [_error(weight, m, inputs[u.name]) for m in methods]
        gain = max(loss_of(score.value, metric), LEAST) / max(_error(weight, base, inputs[u.name]), LEAST)
        table[u.name] = [Option(nbytes(u.weight, m), e * gain) for m, e in zip(methods, errors, strict=True)]
    return table


def inputs_of(g: Graph, env: Env, found: Sequence[Unit]) -> dict[str, Inputs]:
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


def _error(weight: Array, m: Method | None, inputs: Inputs) -> float:
    if m is None:
        return 0.0
    return float(inputs.squares @ np.square(_rounded(weight, m, inputs) - weight).sum(axis=1, dtype=np.float64))


def plainly(found: Iterable[Unit], choice: Choice, inputs: Mapping[str, Inputs]) -> Edit:
    """An edit that rounds weights to nearest, in float, biases taking what that does to means."""
    chosen = [(str(u.weight.name), u.bias and str(u.bias.name), choice.get(u.name), inputs[u.name]) for u in found]

    def edit(g: Graph) -> None:
        for name, bias, method, moments in chosen:
            if method is None:
                continue
            weight = g.array(v := g.value(name))
            new = _rounded(weight.astype(np.float32), method, moments)
            g.put(v, new.astype(weight.dtype))
            if bias:
                b = g.array(g.value(bias))
                gain = moments.means @ (weight - new)
                g.put(g.value(bias), (b + gain.reshape(b.shape)).astype(b.dtype))

    return edit


def integers(g: Graph, env: Env, found: Sequence[Unit], metric: str) -> dict[str, float]:
    """What static int8 of the weight and of its readers' inputs loses, by unit, each alone."""
    sources = list(dict.fromkeys(x.source for u in found for x in u.readers))
    stats = env.collect(g, [histogram(v) for v in sources])
    edits = [_as_integers(u, env, stats) for u in found]
    scores = env.evaluate(edits, metric, SAMPLES)
    return {u.name: loss_of(s.value, metric) for u, s in zip(found, scores, strict=True)}


def _as_integers(u: Unit, env: Env, stats: Stats) -> Edit:
    """An edit that puts a Q/DQ pair on the inputs of a weight's readers, and int8 codes in its place."""
    names = {x.name for x in u.readers}

    def edit(g: Graph) -> None:
        codes = linears.WeightCodes(g, "channel", env.target)
        for x in [x for x in linears.quantizable(g) if x.name in names]:
            symmetric = not env.target.quantized.zero_points
            low, high = clip_range(stats[histogram(x.source)], method="mse", bits=8, symmetric=symmetric)
            scale, zero = formats.affine(low, high, "int8" if symmetric else "uint8", symmetric=symmetric)
            source = linears.in_float32(g, x.input)
            pair = g.constant(scale, f"{x.name}_scale"), g.constant(zero, f"{x.name}_zero")
            q = g.op("QuantizeLinear", source, *pair)
            linears.product(
                g, x, g.op("DequantizeLinear", q, *pair, like=source),
                linears.integer_weight(codes, x, wide=source is not x.input),
            )  # fmt: skip

    return edit
