"""Weight-only quantization: linears keep float inputs, their weights become codes of 8, 4 or 3 bits in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.scratch import release_weights
from onnxcomp.maths.formats import FORMATS
from onnxcomp.methods.quantize import linears, tables
from onnxcomp.methods.quantize.weight_rounding import Inputs, Method, inputs_of, nearest, rounded
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["QuantizeWeights"]

Codes = tuple[ir.Value, ir.Value, ir.Value | None]  # with scales and zero points
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
        uncut, made = g.clone(), dict[ir.Value, Codes]()
        g.model.graph.sort()
        for group in blocks.siblings(linears.chosen(g, self.skip, self.min_size, found)):
            rest = [x for x in group if not x.transposed]
            for x in group:
                if x.weight in shared:  # a head keeps the codes of its table
                    linears.product(g, x, x.input, linears.integer_weight(codes, x))
                elif x.transposed:
                    g.decline(x.site, "it shares the embedding table, which stays float without embeddings: true")
            if not rest:
                continue
            fitted = self.method != "nearest" and not env.dry
            inputs = inputs_of(g, uncut, env, rest[0].source) if fitted else None
            for x in rest:
                self._replace(g, x, made, inputs)
            if g.spool is not None:
                release_weights(g.model)
        tables.store(g, eligible, codes)

    def _tables(self, g: Graph) -> list[blocks.Embedding]:
        return tables.quantizable(g) if self.embeddings else []

    def _method(self) -> Method:
        f = FORMATS[f"{'' if self.symmetric else 'u'}int{8 if self.bits == 8 else 4}"].narrowed(self.bits)
        fits = self.method == "least-squares"
        return Method(f, self.block, self.symmetric, fits, self.pull, self.damp, self.refits if fits else 0)

    def _replace(self, g: Graph, x: Linear, made: dict[ir.Value, Codes], inputs: Inputs | None) -> None:
        """Put codes behind DequantizeLinear in the place of a weight; linears that share one share its codes."""
        if x.weight not in made:
            made[x.weight] = self._codes(g, x, inputs)
        w = g.op(
            "DequantizeLinear", *made[x.weight], axis=0, block_size=self.block, name=f"{x.name}_weight", like=x.weight
        )
        linears.product(g, x, x.input, w)

    def _codes(self, g: Graph, x: Linear, inputs: Inputs | None) -> Codes:
        """Codes `[K, N]`, scales and zero points of a weight as constants; its bias takes the change of the means."""
        weight, m = g.array(x.weight), self._method()
        if inputs is None:
            q = nearest(weight, m)
        else:
            own = all(v is not None and g.is_constant(v) and len(list(v.uses())) == 1 for v in (x.bias, x.weight))
            q, gain = rounded(weight, inputs, self.bias and own, m)
            if gain.any() and x.bias is not None:
                old = g.array(x.bias)
                g.put(x.bias, (old + gain.reshape(old.shape)).astype(old.dtype))
        name = f"{x.weight.name}_int{self.bits}"
        zero = None if self.symmetric else g.constant(q.zero, f"{name}_zero")
        return g.constant(np.ascontiguousarray(q.codes), name), g.constant(q.scale, f"{name}_scale"), zero
