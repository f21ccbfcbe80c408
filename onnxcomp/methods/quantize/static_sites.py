"""Linears as static int8, inputs and weights, whose ranges are decided once and written into any copy of a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.methods.quantize import linears
from onnxcomp.methods.quantize.inputs import InputCodes
from onnxcomp.pipeline import Edit, Env
from onnxcomp.target import Target

__all__ = ["Ranges", "as_integers", "ranges"]

Ranges = Mapping[str, tuple[Array, Array]]  # scale and zero point of values, by name


def ranges(g: Graph, env: Env, found: Sequence[Linear]) -> Ranges:
    """The codes of the inputs of linears, of least error at their outputs; none of an input that no sample reaches."""
    legal = env.target.quantized
    codes = InputCodes(
        legal.activations[0] == "s8", not legal.zero_points, "output", 100.0, linears.silent_channels(g)
    )  # fmt: skip
    groups = blocks.siblings(found)
    stats = env.collect(g, [n for group in groups for n in codes.needs(group[0].source)])
    return {
        str(group[0].source.name): codes.constants(g, group[0].source, stats, group, wide=_wide(group[0], env.target))
        for group in groups
        if stats.reached(codes.need(group[0].source))
    }


def as_integers(names: Collection[str], known: Ranges, target: Target) -> Edit:
    """An edit that makes linears integer products, by name; those of one input share its codes."""

    def edit(g: Graph) -> None:
        codes = linears.WeightCodes(g, "channel", target)
        found = [x for x in linears.quantizable(g) if x.name in names and str(x.source.name) in known]
        # From the last one on: a product that is cast back takes the place of its value, which later ones read by then.
        for group in reversed(blocks.siblings(found)):
            source = group[0].source
            scale, zero = known[str(source.name)]
            wide = _wide(group[0], target)
            x = InputCodes.coded(g, linears.in_float32(g, source) if wide else source, scale, zero)
            for linear in group:
                linears.product(g, linear, x, linears.integer_weight(codes, linear, wide=wide))

    return edit


def _wide(x: Linear, target: Target) -> bool:
    """Whether the product is made in float32: a CPU's integer kernels take scales of that type."""
    return target.provider.startswith("CPU") and x.source.dtype in linears.HALVES
