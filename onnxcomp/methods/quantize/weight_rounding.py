"""Weights of the linears that read one value, rounded to few bits towards what the original gives there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Embedding, Linear
from onnxcomp.graph import Graph
from onnxcomp.graph.scratch import release_weights
from onnxcomp.maths import Array, Float64, affine, formats, rounding, saturation
from onnxcomp.maths.formats import FORMATS, Format, Quantized
from onnxcomp.maths.hqq import hqq
from onnxcomp.maths.solve import least_squares
from onnxcomp.methods.quantize import linears
from onnxcomp.methods.quantize.covered import weight_covered
from onnxcomp.methods.quantize.table_blocks import BlockTables, RowTables, Tables
from onnxcomp.methods.repair.correspondence import reference_value
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, cross_gram, gram, mean, norm2, var

__all__ = ["Inputs", "Method", "Rounder", "Rule", "inputs_of", "round_sites", "rounded"]

Rule = Literal["least-squares", "gptq", "weighted", "hqq", "nearest"]
Codes = tuple[ir.Value, ir.Value, ir.Value | None]  # with scales and zero points


@dataclass(frozen=True)
class Method:
    """How a weight is rounded: bits in use, in-channels per scale (0 for all), zero points or none, and by which rule.

    Of the rules `nearest` and `hqq` (zero points fitted to the weights) need no data; `weighted` rounds to nearest
    under ranges that err least on the inputs' squares; `least-squares` first fits weights to the original's outputs,
    damped by `pull` towards what they are, and then rounds them as `gptq` does, with `refits` of codes and scales.
    `limited` codes cannot saturate (`maths.saturation`); `full_range` takes symmetric scales with the sign of the
    extreme. Codes may be floats of 8 bits (`fp8`).
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = False
    rule: Rule = "least-squares"
    pull: float | None = None
    damp: float | None = None
    refits: int = 3
    limited: bool = False
    full_range: bool = False
    codes: Literal["integer", "fp8"] = "integer"

    @property
    def fmt(self) -> Format:
        """The type of the codes, of which `bits` are in use: fewer than 4 stand in 4 until lowering packs them."""
        if self.codes == "fp8":
            return FORMATS["float8e4m3fn"]
        return FORMATS[f"{'' if self.symmetric else 'u'}int{8 if self.bits > 4 else 4}"].narrowed(self.bits)

    @property
    def wants_data(self) -> bool:
        """Whether it rounds with the moments of the inputs."""
        return self.rule not in ("nearest", "hqq")


# Damping relative to the mean of the Gram diagonal, at least, and for each in-channel per row of data: with as many
# channels as rows a fit would follow the noise of these rows. Chosen on MiniLM (867 rows; pooled SQNR on held-out
# sentences) and docs_lm (8,192 rows; KL), 4 bits in blocks of 32; half and twice as much changes little.
LEAST_DAMP = 0.01
# Of few bits the errors of the layers before are large, and other on other data. Chosen on 62 windows of docs_lm's
# training text that are neither calibration nor held out (pull, damp > KL). 2 bits in blocks of 64: 0.01, 0.01 > 0.168;
# 0.03, 0.03 > 0.163; 0.1, 0.1 > 0.158; 0.1, 0.3 > 0.156; 0.3, 0.3 > 0.157. 3 bits in 32: 0.01 > 0.0271, 0.03 > 0.0265.
LEAST_OF_FEW = {2: (0.1, 0.3), 3: (0.03, 0.03)}
PULL_PER_CHANNEL = 0.7
DAMP_PER_CHANNEL = 0.25
SMALLEST_BLOCK = 16  # of look-ups
WIDEST = 8192  # out-channels fitted at a time: a head of 32,000 would take five arrays of its size in float64
TABLE_BLOCK = 64  # of 8 bits for look-ups and a head: KL of docs_lm 1.3e-4 with one scale per row


@dataclass(frozen=True)
class Inputs:
    """Moments of a linear's inputs over the calibration rows: `X~` as they are now, `X` as they were in the original.

    `gram` is `X~^T X~` and `cross` is `X~^T X`, `[K, K]`; `now` and `then` are their means `[K]`.
    """

    gram: Float64
    cross: Float64
    now: Float64
    then: Float64
    rows: float

    @property
    def centred(self) -> Inputs:
        """The moments about the means, for a linear whose bias is free."""
        now, then, n = self.now, self.then, self.rows
        return dataclasses.replace(
            self, gram=self.gram - n * np.outer(now, now), cross=self.cross - n * np.outer(now, then)
        )


def inputs_of(g: Graph, uncut: Graph, env: Env, source: ir.Value) -> Inputs:
    """The moments of a value, of the graph as it is and of the original, or of `uncut` where it has none as wide."""
    against, there = reference_value(env.original, uncut, uncut.value(str(source.name)))
    needs: dict[str, Need] = {"gram": gram(source), "cross": cross_gram(source, there, other_of="original")}
    needs |= {"now": mean(source), "then": mean(there, of="original"), "var": var(source), "norm": norm2(source)}
    stats = env.collect(g, needs.values(), against)
    got: Mapping[str, Array] = {k: np.asarray(stats[n], np.float64) for k, n in needs.items()}
    rows = affine.count(got["norm"], got["now"], got["var"])
    return Inputs(got["gram"], got["cross"], got["now"], got["then"], rows)


def shared_inputs(g: Graph, env: Env, sources: Sequence[ir.Value]) -> Inputs:
    """The moments of all inputs of a weight that several layers share, as they are now and as if they were before.

    Rounding for one layer changes the inputs of the others, so the weight is not fitted towards the original's outputs.
    """
    needs = [(gram(v), mean(v), var(v), norm2(v)) for v in sources]
    stats = env.collect(g, [n for each in needs for n in each])
    got = [[np.asarray(stats[n], np.float64) for n in each] for each in needs]
    rows = [affine.count(norm, means, spread) for _, means, spread, norm in got]
    squares = np.asarray(sum(x[0] for x in got))
    means = np.asarray(sum(n * x[1] for n, x in zip(rows, got, strict=True))) / max(sum(rows), 1.0)
    return Inputs(squares, squares, means, means, sum(rows))


def rounded(weight: Array, inputs: Inputs, free: bool, m: Method) -> tuple[Quantized, Float64]:
    """The codes of a weight `[K, N]`, and what its bias must gain, `[N]`, which is zero where it is not `free`.

    The weights are first fitted to give the original's outputs from the inputs as they are now, `(H + l I)^-1 (C + l I)
    W` with `H = X~^T X~` and `C = X~^T X` (Qronos, arXiv 2505.11695, and GPTAQ, arXiv 2504.02692, in closed form), and
    then rounded with `H`. A free bias takes the means, so that only what is about them has to be fitted.
    """
    moments = inputs.centred if free else inputs
    parts = [weight[:, i : i + WIDEST] for i in range(0, weight.shape[1], WIDEST)]
    found = [_fitted(part, moments, m) for part in parts]
    if not free:
        return rounding.joined(found), np.zeros(weight.shape[1])
    gains = [
        inputs.then @ p.astype(np.float64) - inputs.now @ q.array().astype(np.float64)
        for p, q in zip(parts, found, strict=True)
    ]
    return rounding.joined(found), np.concatenate(gains)


def _fitted(weight: Array, moments: Inputs, m: Method) -> Quantized:
    """The codes of some out-channels of a weight."""
    if m.rule == "weighted":
        return nearest(weight, m, np.diag(moments.gram)[:, None])
    w = np.asarray(weight, np.float64)
    channels = len(w) / moments.rows
    least_pull, least_damp = LEAST_OF_FEW.get(m.bits, (LEAST_DAMP, LEAST_DAMP))
    pull = max(least_pull, PULL_PER_CHANNEL * channels) if m.pull is None else m.pull
    damp = max(least_damp, DAMP_PER_CHANNEL * channels) if m.damp is None else m.damp
    goal = least_squares(moments.gram, moments.cross @ w, pull, start=w).weights if m.rule == "least-squares" else w
    return rounding.round_weights(
        moments.gram, goal, m.fmt, block=m.block, symmetric=m.symmetric, damp=damp,
        refits=m.refits if m.rule == "least-squares" else 0, scale_type=weight.dtype, limited=m.limited,
        full_range=m.full_range,
    ).quantized  # fmt: skip


def nearest(weight: Array, m: Method, importance: Array | float = 1.0) -> Quantized:
    """Codes by rounding to nearest, scales clipped where that errs less on inputs of that importance.

    Of HQQ zero points are fitted instead.
    """
    if m.rule == "hqq" and m.block and not m.symmetric:
        return hqq(weight, m.fmt, m.block, weight.dtype)
    if m.limited:
        return saturation.nearest(weight, m.fmt, scale_type=weight.dtype)
    axis = 0 if m.block else 1
    return formats.fit(
        weight, m.fmt, axis=axis, block=m.block, symmetric=m.symmetric, mse=True, scale_type=weight.dtype,
        importance=importance, full_range=m.full_range,
    )  # fmt: skip


def round_sites(
    g: Graph,
    env: Env,
    methods: Mapping[str, Method],
    *,
    free_bias: bool = True,
    tables: Sequence[Embedding] = (),
    table_method: Method | None = None,
) -> None:
    """Round the weights of the linears that `methods` names, in the order of the graph; all others stay as they are.

    Each is fitted on the inputs that the rounded ones before it give. Where `free_bias`, biases take what rounding does
    to the means of the outputs. Heads that share one of the `tables` share its codes, and need no method. Tables are
    int8 with one scale per row, or in blocks where `table_method` says so: of 4 bits, or of 8 where a head shares them.
    """
    rounder = Rounder(g, env, methods, free_bias=free_bias)
    shared = {e.table for e in tables}
    g.sort()
    wanted = [x for x in linears.quantizable(g) if x.name in methods or (x.transposed and x.weight in shared)]
    codes = _tables(g, env, tables, table_method, [x.sizes[0] for x in wanted if x.transposed])
    for group in blocks.siblings(wanted):
        rounder.replace(group, codes)
    codes.store()


def _tables(g: Graph, env: Env, eligible: Sequence[Embedding], m: Method | None, widths: Sequence[int]) -> Tables:
    """How tables are stored; `widths` are those of the rows that heads share."""
    even = min((k & -k for k in widths), default=0)  # the largest power of two that divides all rows
    half = any(e.table.dtype in linears.HALVES for e in eligible)  # a head in blocks has no fast product there
    if m is None or m.block == 0 or (m.bits == 8 and (half or even < SMALLEST_BLOCK)):
        return RowTables(g, env.target, eligible)
    return BlockTables(g, eligible, m.fmt, m.block if m.bits == 4 else min(TABLE_BLOCK, even), symmetric=m.symmetric)


class Rounder:
    """Rounds weights of a graph in its order, each with the inputs that the rounded ones before it give.

    `methods` has that of each linear by its name.
    """

    def __init__(self, g: Graph, env: Env, methods: Mapping[str, Method], *, free_bias: bool) -> None:
        self.g, self.env, self.methods, self.free_bias = g, env, methods, free_bias
        self.uncut = g.clone()
        self.sources: dict[ir.Value, list[ir.Value]] = {}  # of every weight; several layers may share it
        for x in blocks.linears(g, tied=True):
            if x.source not in self.sources.setdefault(x.weight, []):
                self.sources[x.weight].append(x.source)
        self._made: dict[ir.Value, tuple[Method, Codes]] = {}  # linears that share a weight share its codes

    def replace(self, group: Sequence[Linear], tables: Tables) -> None:
        """Round the weights of linears that read one value; a head keeps the codes of its table."""
        g, first = self.g, group[0]
        inputs = None
        if any(self._fits(x) and len(self.sources[x.weight]) == 1 for x in group):
            inputs = inputs_of(g, self.uncut, self.env, first.source)
        # CPUs have no kernels for bfloat16, so the products are made in float32 there.
        wide = self.env.target.provider.startswith("CPU") and first.source.dtype is ir.DataType.BFLOAT16
        source = linears.in_float32(g, first.input) if wide else first.input
        for x in group:
            weight = tables.head(x, wide=wide) if x.transposed else self._weight(x, inputs, wide=wide)
            linears.product(g, x, source, weight)
        if g.spool is not None:
            release_weights(g.model)

    def _fits(self, x: Linear) -> bool:
        """Whether the rounding of a linear needs moments of its inputs."""
        return not x.transposed and not self.env.dry and self.methods[x.name].wants_data

    def _weight(self, x: Linear, inputs: Inputs | None, *, wide: bool) -> ir.Value:
        """The dequantized weight `[K, N]`, in float32 where it is `wide`."""
        if x.weight not in self._made:
            sources = self.sources[x.weight]
            if not self._fits(x):
                inputs = None
            elif len(sources) > 1:
                inputs = shared_inputs(self.g, self.env, sources)
            self._made[x.weight] = self.methods[x.name], self._codes(x, inputs, wide=wide)
        method, args = self._made[x.weight]
        axis, block = (0, method.block) if method.block else (1, None)
        w = self.g.op("DequantizeLinear", *args, axis=axis, block_size=block, name=f"{x.name}_weight", like=x.weight)
        if wide:
            w.type = ir.TensorType(ir.DataType.FLOAT)
        return w

    def _codes(self, x: Linear, inputs: Inputs | None, *, wide: bool) -> Codes:
        """Codes `[K, N]`, scales and zero points of a weight as constants; its bias takes the change of the means."""
        g, weight, method = self.g, self.g.array(x.weight), self.methods[x.name]
        weight = weight.astype(np.float32) if wide else weight
        if inputs is None:
            q = nearest(weight, method)
        else:
            own = all(v is not None and g.is_constant(v) and len(list(v.uses())) == 1 for v in (x.bias, x.weight))
            q, gain = rounded(weight, inputs, self.free_bias and own, method)
            if gain.any() and x.bias is not None:
                old = g.array(x.bias)
                g.put(x.bias, (old + gain.reshape(old.shape)).astype(old.dtype))
        weight_covered(g, x.name, str(x.weight.name), weight, q, method.bits)
        name = f"{x.weight.name}_{method.fmt.name if method.codes == 'fp8' else f'int{method.bits}'}"
        zero = None if method.symmetric else g.constant(q.zero, f"{name}_zero")
        return g.constant(np.ascontiguousarray(q.codes), name), g.constant(q.scale, f"{name}_scale"), zero
