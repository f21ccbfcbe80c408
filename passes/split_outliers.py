"""Splitting outliers off: the few largest channels of a linear's input are multiplied in float beside the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import NORMS
from onnxcomp.maths import Array, Float64, int8_error
from onnxcomp.methods.quantize import linears
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, absmax, sample
from onnxcomp.target import Target

__all__ = ["SplitOutliers"]

ROWS = 512  # of an input, on which its error with and without a split is compared: 256 for each half
PAYS = 0.33  # error left, relative, below which a split is worth its run time: smoothing takes as much off for less


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Add `x[outliers] W[outliers]` in float to `x W`, whose weights of these channels become zero.

    Quantizers leave channels without weights out of ranges (LLM.int8, arXiv 2208.07339, with static channels). Only
    where the int8 outputs then err less, on rows that the channels were not chosen on.
    """

    stage: ClassVar[Stage] = Stage.RESCALE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    channels: Annotated[int, Field(ge=1)] = 4
    """Channels that are split off an input."""
    activated: Annotated[int, Field(ge=1)] = 8
    """Channels that are split off the output of an activation, whose outliers are more."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay as they are."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Linears with fewer weights stay as they are, since quantizers leave them in float."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        return [x.site for x in linears.quantizable(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The largest magnitude of every channel of the inputs, and rows of them."""
        for group in self._groups(g.clone()):
            yield from (absmax(group[0].source, "channel"), sample(group[0].source, ROWS))

    def run(self, g: Graph, env: Env) -> None:
        """Split inputs, all linears of one together."""
        silent, every = linears.silent_channels(g), blocks.siblings(blocks.linears(g, tied=True))
        readers = {group[0].source: len(group) for group in every}
        for group in self._groups(g):
            v = group[0].source
            why = _unfit(group, v in silent, readers[v])
            found = np.zeros(0, np.int64) if why else self._outliers(g, env, group)
            if found.size:
                _split(g, group, np.sort(found))
                continue
            for x in group:
                g.decline(x.site, why or "no few channels make its int8 outputs err")

    def _groups(self, g: Graph) -> list[list[Linear]]:
        return blocks.siblings(linears.chosen(g, self.skip, self.min_size))

    def _outliers(self, g: Graph, env: Env, group: Sequence[Linear]) -> Array:
        """The channels to split off, none where that does not pay."""
        v, count = group[0].source, self._count(group[0].source)
        rows, some = env.stats[sample(v, ROWS)], [int8_error.thinned(g.array(x.weight)) for x in group]
        if count >= rows.shape[1]:
            return np.zeros(0, np.int64)

        def change(fitted: Array) -> tuple[Float64, Array]:
            return np.ones(rows.shape[1]), _largest(np.abs(fitted).max(axis=0), count)

        limited = env.target.quantized.saturates
        plain = int8_error.left_out_error(rows, some, limited=limited)
        error = int8_error.left_out_error(rows, some, change, limited=limited)
        if not error < PAYS * plain:
            return np.zeros(0, np.int64)
        g.note(group[0].site, f"{count} channels split off, int8 error {error / plain:.2f} of what it was")
        return _largest(env.stats[absmax(v, "channel")], count)

    def _count(self, v: ir.Value) -> int:
        """Norms and attentions have few outliers."""
        node = v.producer()
        few = node is None or node.op_type in ("Attention", *NORMS)
        return self.channels if few else self.activated


def _largest(magnitudes: Array, count: int) -> Array:
    return np.argsort(-magnitudes, kind="stable")[:count]


def _unfit(group: Sequence[Linear], silent: bool, readers: int) -> str:
    """Why an input is not split, empty if it is."""
    if silent:
        return "channels of its input have no weights already"
    if readers > len(group):
        return "another linear that stays as it is reads the same input"
    shared = any(x.transposed or len(list(x.weight.uses())) > 1 for x in group)
    return "its weights are shared, so rows cannot be taken out for one place" if shared else ""


def _split(g: Graph, group: Sequence[Linear], channels: Array) -> None:
    """Write the products of some channels beside those of the others."""
    v = group[0].source
    picked = g.op("Gather", v, channels.astype(np.int64), axis=-1, name=f"{v.name}_outliers")
    picked.type = v.type
    if v.shape is not None:
        picked.shape = ir.Shape([*v.shape[:-1], len(channels)])
    for x in group:
        weight = g.array(x.weight)
        beside = g.op("MatMul", picked, weight[channels], name=f"{x.name}_outliers", like=x.output)
        rest = weight.copy()
        rest[channels] = 0
        g.put(x.weight, rest, users=[x.node])
        g.replace(x.output, g.op("Add", x.output, beside, name=f"{x.name}_whole", like=x.output))
