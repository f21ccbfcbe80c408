"""Dynamic int8: ranges of the linears' inputs are taken at run time, so no data is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.quantize import batched, linears, payoff, tables
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Granularity, Target

__all__ = ["DynamicQuant"]


@dataclass(frozen=True)
class DynamicQuant(Pass):
    """Replace linears by DynamicQuantizeLinear and MatMulInteger over int8 weights (float32 models).

    The range is that of the whole batch at hand, padding included: a sample's result depends on its batch.
    """

    stage: ClassVar[Stage] = Stage.ACTIVATIONS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}
    example: ClassVar[Mapping[str, Any]] = {"min_size": 1}

    weights: Granularity = "channel"
    """One weight scale per output channel, or one per tensor."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay float."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements stay float."""
    embeddings: bool = False
    """Store embedding tables as int8 too, one scale per row; a head that shares its table keeps sharing it."""
    only_faster: bool = True
    """Linears that integers would make slower at the asked shapes stay float; false puts size first."""

    @property
    def is_identity(self) -> bool:
        """Whether everything is skipped."""
        return "*" in self.skip

    def require(self, target: Target) -> None:
        """Refuse targets without a dynamic int8 product."""
        if not target.provider.startswith("CPU"):
            raise TargetError(
                f"target '{target.name}' has no dynamic int8 product; use qdq where it is legal, or the cpu target"
            )

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        found: list[Linear | blocks.BatchedLinear] = [*linears.quantizable(g), *batched.quantizable(g)]
        return [*(x.site for x in found), *map(tables.site, self._tables(g))]

    def run(self, g: Graph, env: Env) -> None:
        """Quantize the chosen linears, siblings with one run-time range, and tables."""
        found = self._tables(g)
        eligible = tables.chosen(g, self.skip, self.min_size) if found else []
        codes = linears.WeightCodes(g, self.weights, env.target, eligible)
        # From the last one on: a product takes the place of its value, which later ones read by then.
        named: list[blocks.Embedding | blocks.BatchedLinear] = [*found, *batched.quantizable(g)]
        for group in reversed(blocks.siblings(linears.chosen(g, self.skip, self.min_size, named))):
            source = group[0].source
            if source.dtype is None:
                why = "the type of its input is unknown; run canonicalize first"
            elif source.dtype not in linears.FLOATS:
                why = f"dynamic quantization takes no inputs of {source.dtype.name.lower()}"
            else:
                why = payoff.loses(group, env, dynamic=True) if self.only_faster else ""
            if why:
                for linear in group:
                    g.decline(linear.site, why)
                continue
            wide = linears.in_float32(g, source)  # the operator takes float32 only
            q = g.op("DynamicQuantizeLinear", wide, outputs=3, name=f"{source.name}_quantize").producer()
            assert q is not None
            for linear in group:
                self._replace(g, linear, q, codes)
        tables.store(g, eligible, codes)
        weights = batched.TableCodes(g, env.target, batched.run_time)
        experts = batched.chosen(g, self.skip, self.min_size, env.target)
        for x in payoff.paying(experts, g, env, only_faster=self.only_faster):
            batched.store(g, x, weights)

    def _tables(self, g: Graph) -> list[blocks.Embedding]:
        return tables.quantizable(g) if self.embeddings else []

    def _replace(self, g: Graph, linear: Linear, x: ir.Node, codes: linears.WeightCodes) -> None:
        weight, scale = codes(linear)
        y = linears.run_time_product(g, x, weight, scale, linear.name, linear.node.outputs[0])
        if linear.node.op_type == "Gemm" and linear.bias is not None:
            y = g.op("Add", y, linear.bias, name=f"{linear.name}_bias", like=linear.output)
        g.replace(linear.node.outputs[0], y)
