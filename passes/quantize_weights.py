"""Weight-only quantization: linears keep float inputs, their weights become codes of 8 to 2 bits in blocks, or fp8."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.data.datasets import Dataset
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.quantize import kernels, linears, tables
from onnxcomp.methods.quantize.augmentation import augmented
from onnxcomp.methods.quantize.weight_rounding import Method, round_sites
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import CPU, Target

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
    rounding_db: ClassVar[float] = 3.0  # lowered products may round their inputs to 8 bits in larger blocks

    bits: Literal[8, 4, 3, 2] = 4
    """Bits of a weight; 3 are stored in 4, and so are 2 until lower packs them (blocks of 32 to 128)."""
    block: Literal[16, 32, 64, 128, 256, "channel"] = 32
    """In-channels that share a scale; channel takes one for each out-channel, as integer products do (8 bits)."""
    method: Literal["least-squares", "gptq", "weighted", "hqq", "nearest"] = "least-squares"
    """Rounding: towards the original's outputs, for itself, to nearest by the inputs' squares, or without data."""
    symmetric: bool | None = None
    """No zero points: the codes are signed; by default only where the target needs it."""
    codes: Literal["integer", "fp8", "nvfp4", "mxfp4", "mxfp8"] = "integer"
    """Type of the codes; floats have one scale per out-channel (fp8) or block, where the target multiplies by them."""
    pull: Annotated[float, Field(gt=0)] | None = None
    """Damping of the fit to the original, relative to the mean of the inputs' squares; by default from the rows."""
    damp: Annotated[float, Field(gt=0)] | None = None
    """Damping of the Gram matrix in GPTQ, relative to the same; by default from the rows."""
    refits: Annotated[int, Field(ge=0)] = 3
    """Rounds of coordinate descent with refitted scales."""
    bias: bool = True
    """Biases take what rounding does to the means of the outputs."""
    overrides: Mapping[str, Literal[8, 4, 3, 2, "float"]] = field(default_factory=dict)
    """Other bits by pattern of node or weight names, such as {"*down_proj*": 8}; the first that matches counts."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay float."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements stay float."""
    augment: bool | None = None
    """Fit on copies of the texts with tokens replaced at random as well; by default where the data has few tokens."""
    embeddings: bool | Literal[8, 4, "float"] = False
    """Bits of embedding tables, one scale per row of 8 bits; a head that shares its table keeps sharing it."""
    head: Literal[8, 4, "float"] | None = None
    """Bits of the output head; by default those of its table where it shares one, else those of other linears."""

    @property
    def is_identity(self) -> bool:
        """Whether everything is skipped."""
        return "*" in self.skip

    @property
    def wants_data(self) -> bool:
        """Rounding to nearest and HQQ need none."""
        return self._method(8, CPU).wants_data

    def advice(self, target: Target) -> Iterable[str]:
        """Where products with few bits are slower than float ones."""
        return kernels.slower(target) if self.codes == "integer" and self.block != "channel" else ()

    def calibration(self, data: Dataset, g: Graph) -> Dataset:
        """With copies of small sets of texts."""
        return augmented(data, g, self.augment, self.name)

    def require(self, target: Target) -> None:
        """Refuse codes that the target, or any, has no product for."""
        used = (self.bits, *self.overrides.values(), self.embeddings == 4 and 4, self.head) * (not self.is_identity)
        kernels.require(target, used, self.block, symmetric=self._is_symmetric(target), codes=self.codes)

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight, and tables where they are asked for."""
        return [*(x.site for x in linears.quantizable(g)), *map(tables.site, self._tables(g))]

    def run(self, g: Graph, env: Env) -> None:
        """Round the linears of one input after the other, then the tables."""
        found = self._tables(g)
        eligible = tables.chosen(g, self.skip, self.min_size) if found else []
        if not self.is_identity and self.block != "channel" and g.opset < BLOCKWISE:
            raise ModelError(f"quantize-weights: operator set {g.opset} has no codes in blocks; put canonicalize first")
        shared, last, methods = {e.table for e in eligible}, blocks.head(g), {}
        for x in linears.chosen(g, self.skip, self.min_size, found):
            bits, why = self._bits(x, last)
            if x.transposed and x.weight not in shared:
                g.decline(x.site, "it shares the embedding table, which stays float without embeddings: true")
            elif bits == "float":
                g.decline(x.site, f"stays float by {why}")
            elif not x.transposed:
                methods[x.name] = self._method(bits, env.target)
        for pattern in set(self.overrides) - {self._override(x) for x in linears.quantizable(g)}:
            g.decline(f"overrides: {pattern}", "matches no linear that an earlier pattern left")
        table = self._method(self._table_bits(last, shared), env.target)
        round_sites(g, env, methods, free_bias=self.bias, tables=eligible, table_method=table)

    def _bits(self, x: blocks.Linear, last: blocks.Head | None) -> tuple[int | Literal["float"], str]:
        """Bits of a linear's weight, and the option that says so."""
        if (pattern := self._override(x)) is not None:
            return self.overrides[pattern], f"the override '{pattern}'"
        if self.head is not None and last is not None and x.node is last.node:
            return self.head, f"head: {self.head}"
        return self.bits, f"bits: {self.bits}"

    def _table_bits(self, last: blocks.Head | None, tables: Collection[ir.Value]) -> int:
        """Bits of tables, those of the head where it shares one and wants more."""
        bits = 4 if self.embeddings == 4 else 8
        return max(bits, self.head) if isinstance(self.head, int) and last and last.weight in tables else bits

    def _override(self, x: blocks.Linear) -> str | None:
        return skipped(self.overrides, x.name, str(x.weight.name))

    def _tables(self, g: Graph) -> list[blocks.Embedding]:
        return tables.quantizable(g) if self.embeddings not in (False, "float") else []

    def _is_symmetric(self, target: Target) -> bool:
        return not target.quantized.block_zero_points if self.symmetric is None else self.symmetric

    def _method(self, bits: int, target: Target) -> Method:
        rest = (self.method, self.pull, self.damp, self.refits)
        if self.codes == "fp8":
            return Method(8, 0, True, *rest, codes="fp8")
        if self.block == "channel":  # integer products take no zero point of the weight
            return Method(bits, 0, True, *rest, target.quantized.saturates)
        positive = target.provider.startswith("Tensorrt")  # its parser takes no negative scales
        return Method(bits, self.block, self._is_symmetric(target), *rest, full_range=not positive)
