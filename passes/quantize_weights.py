"""Weight-only quantization: linears keep float inputs, their weights become codes of 8, 4 or 3 bits in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp import blocks
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.maths.formats import FORMATS
from onnxcomp.methods.quantize import linears, tables
from onnxcomp.methods.quantize.weight_rounding import Method, Rounder
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["QuantizeWeights"]

BLOCKWISE = 21  # the operator set from which DequantizeLinear has blocks and codes of 4 bits


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of linears as codes with one scale per block of in-channels: `W ~ s (q - z)`.

    In the order of the graph, each rounded with the inputs that the rounded ones before it give, towards what the
    original gives there; the runtime multiplies by the codes (`MatMulNBits`).
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}
    example: ClassVar[Mapping[str, Any]] = {"min_size": 1, "bits": 8, "block": 16}
    plans: ClassVar[bool] = True

    bits: Literal[8, 4, 3] = 4
    """Bits of a weight; 3 are stored in 4."""
    block: Literal[16, 32, 64, 128, 256] = 32
    """In-channels that share a scale."""
    method: Literal["least-squares", "gptq", "nearest"] = "least-squares"
    """Rounding: towards the original's outputs, each weight for itself, or to nearest without data."""
    symmetric: bool = False
    """No zero points: the codes are signed."""
    pull: Annotated[float, Field(gt=0)] | None = None
    """Damping of the fit to the original, relative to the mean of the inputs' squares; by default from the rows."""
    damp: Annotated[float, Field(gt=0)] | None = None
    """Damping of the Gram matrix in GPTQ, relative to the same; by default from the rows."""
    refits: Annotated[int, Field(ge=0)] = 3
    """Rounds of coordinate descent with refitted scales."""
    bias: bool = True
    """Biases take what rounding does to the means of the outputs."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay float."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements stay float."""
    embeddings: bool = False
    """Store embedding tables as int8, one scale per row; a head that shares its table keeps sharing it."""

    @property
    def is_identity(self) -> bool:
        """Whether everything is skipped."""
        return "*" in self.skip

    @property
    def wants_data(self) -> bool:
        """Rounding to nearest needs none."""
        return self.method != "nearest"

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight, and tables where they are asked for."""
        return [*(x.site for x in linears.quantizable(g)), *map(tables.site, self._tables(g))]

    def run(self, g: Graph, env: Env) -> None:
        """Round the linears of one input after the other, then the tables."""
        found = self._tables(g)
        eligible = tables.chosen(g, self.skip, self.min_size) if found else []
        if not self.is_identity and g.opset < BLOCKWISE:
            raise ModelError(f"quantize-weights: operator set {g.opset} has no codes in blocks; put canonicalize first")
        shared = {e.table for e in eligible}
        codes = linears.WeightCodes(g, "channel", env.target, eligible)
        rounder = Rounder(g, env, self._method(), fits=self.method != "nearest", free_bias=self.bias)
        g.model.graph.sort()
        for group in blocks.siblings(linears.chosen(g, self.skip, self.min_size, found)):
            kept = [x for x in group if not x.transposed or x.weight in shared]
            for x in group:
                if x not in kept:
                    g.decline(x.site, "it shares the embedding table, which stays float without embeddings: true")
            if kept:
                rounder.replace(kept, codes)
        tables.store(g, eligible, codes)

    def _tables(self, g: Graph) -> list[blocks.Embedding]:
        return tables.quantizable(g) if self.embeddings else []

    def _method(self) -> Method:
        f = FORMATS[f"{'' if self.symmetric else 'u'}int{8 if self.bits == 8 else 4}"].narrowed(self.bits)
        fits = self.method == "least-squares"
        return Method(f, self.block, self.symmetric, fits, self.pull, self.damp, self.refits if fits else 0)
