"""A layer-wise GPTQ: proves `SequentialPass`, Gram statistics on the changed prefix, and the solver."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import formats, rounding
from onnxcomp.pipeline import Env, Fidelity, SequentialPass, Stage
from onnxcomp.stats import Need, gram
from onnxcomp.target import Target


@dataclass(frozen=True)
class GptqLinear(SequentialPass):
    """Round each linear's weight to `bits` by GPTQ (Frantar 2022, algorithm 1), keeping it stored as float."""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of a weight."""
    plain: bool = False
    """Round to nearest instead, for comparison."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        return [linear.site for linear in blocks.linears(g)]

    def site_needs(self, g: Graph, site: Site, target: Target) -> Iterable[Need]:
        yield gram(self._linear(g, site).source)

    def edit(self, g: Graph, site: Site, env: Env) -> None:
        linear = self._linear(g, site)
        weight = g.array(linear.weight)
        fmt = formats.FORMATS["int8"].narrowed(self.bits)
        if self.plain:
            rounded = formats.fit(weight, fmt, axis=1, mse=True).array()
        else:
            rounded = rounding.round_weights(env.stats[gram(linear.source)], weight, fmt).quantized.array()
        g.put(linear.weight, rounded.astype(weight.dtype))

    @staticmethod
    def _linear(g: Graph, site: Site) -> blocks.Linear:
        return next(x for x in blocks.linears(g) if x.name == site.name)
