"""Half precision: weights and activations become fp16 or bf16 wherever their range allows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.half import candidates, convert, ranges
from onnxcomp.methods.half.candidates import Ports
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need
from onnxcomp.target import Target

__all__ = ["Half"]

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Half(Pass):
    """Store weights and compute in a half type; nodes that would leave its range stay float32 between Casts, by name.

    Inputs and outputs keep their types. Positions, angles and counts, which half types cannot hold, stay float32; norms
    and softmax keep float32 inside (`stash_type`, `softmax_precision`); infinite fills of masks become finite.
    """

    stage: ClassVar[Stage] = Stage.ACTIVATIONS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}
    rounding_db: ClassVar[float] = 6.0  # every other order of operations rounds anew, as much as converting did

    dtype: Literal["fp16", "bf16"] = "fp16"
    """The half type; bf16 has the range of float32, 8 bits of precision, and needs no calibration data."""
    headroom: Annotated[float, Field(ge=1, le=1024)] = 4.0
    """A value is half where this many times its largest magnitude on calibration data still fits (fp16)."""
    skip: tuple[str, ...] = ()
    """Patterns of node names that stay float32."""

    @property
    def is_identity(self) -> bool:
        """Whether every node is skipped."""
        return "*" in self.skip

    @property
    def wants_data(self) -> bool:
        """Only fp16 can overflow, so only it needs ranges."""
        return self.dtype == "fp16"

    def advice(self, target: Target) -> Iterable[str]:
        """On a CPU half precision saves memory and costs time."""
        if target.provider.startswith("CPU"):
            yield (
                f"{self.dtype} is not faster on '{target.name}': the runtime computes in float32 there and adds "
                "conversions, only the file is smaller; use --target cuda or tensorrt, or int8 for a faster CPU model"
            )

    def require(self, target: Target) -> None:
        """Refuse bf16 on a CPU, which has no kernels for it."""
        if self.dtype == "bf16" and target.provider.startswith("CPU"):
            raise TargetError(f"half: '{target.name}' does not run bf16; use --target cuda or tensorrt")

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every node that produces float32 and could produce half; those that only consume it (comparisons) follow."""
        return [_site(p) for p in candidates.candidates(g, TYPES[self.dtype]) if p.outputs]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The largest magnitude of every value that would become half (fp16)."""
        if self.dtype == "fp16" and not self.is_identity:
            eligible = candidates.candidates(g, TYPES[self.dtype])
            masks = candidates.from_fills(g, candidates.fills(g))
            yield from dict.fromkeys(need for p in eligible for need in ranges.needs(g, p, masks))

    def run(self, g: Graph, env: Env) -> None:
        """Choose the nodes that can be half, say why the others cannot, convert."""
        half, other = TYPES[self.dtype], TYPES["fp16" if self.dtype == "bf16" else "bf16"]
        if stayed := [x for x in blocks.linears(g) if x.weight.dtype is other]:
            what = f"{len(stayed)} stayed {other.name.lower()}: only float32 is made {self.dtype} (export --dtype fp32)"
            g.note("weights", what)
        eligible, angles = candidates.candidates(g, half), candidates.precise(g)
        chosen, checked = [], ranges.Ranges(g, env.stats, self.headroom, half)
        for p in eligible:
            pattern = skipped(self.skip, str(p.node.name))
            why = f"skipped by the pattern '{pattern}'" if pattern else ""
            why = why or ("feeds a sine or cosine: angles need float32" if p.node in angles else checked.trouble(p))
            if why:
                g.decline(_site(p), why)
            else:
                chosen.append(p)
        isolated = candidates.islands(chosen)
        for p in chosen:
            if p.node in isolated:
                g.decline(_site(p), "reads and makes float32 values only: Casts around it would gain nothing")
        convert.convert(g, [p for p in chosen if p.node not in isolated], half)


def _site(p: Ports) -> Site:
    return Site(str(p.node.name), (str(p.node.name),), p.node.op_type)
