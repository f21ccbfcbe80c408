"""Mixed precision: each linear's weight gets the bits that cost the model least under a budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.blocks import Embedding
from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.quantize import linears, mixed_bits, site_options, tables
from onnxcomp.methods.quantize.mixed_budget import BUDGETS, Budget
from onnxcomp.methods.quantize.site_options import INT8, Way
from onnxcomp.methods.quantize.weight_rounding import Method
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["MixedPrecision"]

TWO_BITS = (32, 64, 128)  # blocks for which the runtime has a product with 2 bits


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Weights as codes like quantize-weights, with bits and block of each linear chosen under a budget.

    What each weight's options lose in the model's outputs is measured once, on calibration data that is left out of the
    fits; of all choices within the budget the one of the least sum, or a uniform one or the common rule of thumb where
    that loses less on the whole model.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}
    example: ClassVar[Mapping[str, Any]] = {"min_size": 1, "budget": "9x", "bits": (8,), "blocks": (16,)}
    chooses: ClassVar[bool] = True

    budget: Annotated[str, Field(pattern=BUDGETS)] = "1.05x"
    """Size of the weights relative to all at `like` bits (1.05x), in bytes (12MB), time of the linears (3ms), or a gate
    to meet (kl<=0.01)."""
    like: Literal[8, 4, 2] = 4
    """Bits, in blocks of `block`, that a relative budget is relative to, and that each weight is tried at."""
    block: Literal[16, 32, 64, 128, 256] = 32
    """In-channels that share a scale there."""
    bits: tuple[Literal[8, 4, 2, "int8", "float"], ...] = (8, 4)
    """Bits that a weight may get; int8 rounds its inputs too, as qdq with clip: output does."""
    blocks: tuple[Literal[16, 32, 64, 128, 256], ...] = (16, 32, 64, 128)
    """In-channels that may share a scale."""
    metric: str | None = None
    """What counts as loss: a gate's name; by default kl for scores of classes, else rel-l2."""
    method: Literal["least-squares", "gptq", "nearest"] = "least-squares"
    """How the chosen weights are rounded in the end, as for quantize-weights."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay float."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements stay float."""
    embeddings: bool = False
    """Store embedding tables as int8, one scale per row; a head that shares its table keeps sharing it."""

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            Budget.parse(self.budget)
        super().__post_init__()

    @property
    def is_identity(self) -> bool:
        """Whether everything is skipped."""
        return "*" in self.skip

    @property
    def wants_data(self) -> bool:
        """What options lose is measured on data."""
        return not self.is_identity

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight, and tables where they are asked for."""
        if "int8" in self.bits and not target.quantized.pays:
            raise TargetError(f"mixed-precision: '{target.name}' has no int8 product; leave int8 out of bits")
        return [*(x.site for x in linears.quantizable(g)), *map(tables.site, self._tables(g))]

    def run(self, g: Graph, env: Env) -> None:
        """Measure, choose, round."""
        found = self._tables(g)
        eligible = tables.chosen(g, self.skip, self.min_size) if found else []
        shared, kept = {e.table for e in eligible}, []
        for x in linears.chosen(g, self.skip, self.min_size, found):
            if not x.transposed:
                kept.append(x)
            elif x.weight not in shared:
                g.decline(x.site, "it shares the embedding table, which stays float without embeddings: true")
        if not kept and not eligible:
            return
        units = site_options.units(kept)
        chosen = mixed_bits.choose(
            g, env, units, self._options(), self._option(self.like, self.block), Budget.parse(self.budget), self.metric
        )
        mixed_bits.apply(g, env, units, chosen.ways, tables=eligible)
        for n in chosen.notes:
            g.note(n.site, n.what, n.values)

    def _tables(self, g: Graph) -> list[Embedding]:
        return tables.quantizable(g) if self.embeddings else []

    def _options(self) -> list[Way]:
        """Every pair of bits and block that the runtime has a product for."""
        legal = [
            self._option(bits, block)
            for bits, block in itertools.product(self.bits, self.blocks)
            if isinstance(bits, int) and (bits != 2 or block in TWO_BITS)
        ]
        return [*legal, *([INT8] if "int8" in self.bits else []), *([None] if "float" in self.bits else [])]

    def _option(self, bits: int, block: int) -> Method:
        return Method(bits, block, rule=self.method)
