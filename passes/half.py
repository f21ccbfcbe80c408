"""Half precision: weights and activations become fp16 or bf16 wherever their range allows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, Stats, absmax
from onnxcomp.structure import precision, retype
from onnxcomp.structure.precision import Ports
from onnxcomp.target import Target

__all__ = ["Half"]

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Half(Pass):
    """Store weights and compute in a half type; what would leave its range stays float32 between Casts, by name.

    Inputs and outputs keep their types. Positions, angles and counts, which half types cannot hold, stay float32; norms
    and softmax keep float32 inside (`stash_type`, `softmax_precision`); infinite fills of masks become finite.
    """

    stage: ClassVar[Stage] = Stage.ACTIVATIONS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

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

    def notes(self, target: Target) -> Iterable[str]:
        """On a CPU half precision saves memory and costs time."""
        if target.provider.startswith("CPU"):
            yield (
                f"{self.dtype} is not faster on '{target.name}': the runtime computes in float32 there and adds "
                "conversions, only the file is smaller; use --target cuda or tensorrt, or int8 for a faster CPU model"
            )

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every node that makes float32 and could make half; those that only read it (comparisons) follow."""
        return [_site(p) for p in precision.candidates(g, TYPES[self.dtype]) if p.outputs]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The largest magnitude of every value that would become half (fp16)."""
        if self.dtype == "fp16" and not self.is_identity:
            found, masks = precision.candidates(g, TYPES[self.dtype]), precision.from_fills(g, precision.fills(g))
            yield from dict.fromkeys(need for p in found for need in _needs(g, p, masks))

    def run(self, g: Graph, env: Env) -> None:
        """Choose the nodes that can be half, say why the others cannot, convert."""
        half = TYPES[self.dtype]
        found, angles = precision.candidates(g, half), precision.precise(g)
        chosen, checked = [], _Ranges(g, env.stats, self.headroom, half)
        for p in found:
            pattern = next((s for s in self.skip if fnmatchcase(str(p.node.name), s)), None)
            why = f"skipped by the pattern '{pattern}'" if pattern else ""
            why = why or ("feeds a sine or cosine: angles need float32" if p.node in angles else checked.trouble(p))
            if why:
                g.decline(_site(p), why)
            else:
                chosen.append(p)
        alone = precision.islands(chosen)
        for p in chosen:
            if p.node in alone:
                g.decline(_site(p), "reads and makes float32 values only: Casts around it would gain nothing")
        retype.convert(g, [p for p in chosen if p.node not in alone], half)


def _site(p: Ports) -> Site:
    return Site(str(p.node.name), (str(p.node.name),), p.node.op_type)


def _needs(g: Graph, p: Ports, masks: set[ir.Value]) -> Iterator[Need]:
    for v in p.values:
        empty = v.shape is not None and 0 in v.shape.dims
        if not g.is_constant(v) and v not in masks and not empty:
            yield absmax(v)
    if p.node.op_type == "Attention" and p.node.domain == "":
        yield from (absmax(v, "channel") for v in p.node.inputs[:2] if v is not None)


class _Ranges:
    """What keeps a node in float32: constants and values that the half type cannot hold."""

    def __init__(self, g: Graph, stats: Stats, headroom: float, half: ir.DataType) -> None:
        self.g, self.stats, self.headroom, self.half = g, stats, headroom, half
        limits = ml_dtypes.finfo(half.numpy())
        self.top, self.low = float(limits.max), float(limits.smallest_normal)
        self.asked = set(stats)
        self._known: dict[ir.Value, str] = {}

    def trouble(self, p: Ports) -> str:
        """Why the node must stay float32, empty if it need not."""
        return next((why for v in p.values if (why := self._of(v))), "") or self._scores(p)

    def _of(self, v: ir.Value) -> str:
        if v not in self._known:
            t = self.g.tensor(v)
            self._known[v] = self._seen(v) if t is None else precision.constant_trouble(t, self.half)
        return self._known[v]

    def _seen(self, v: ir.Value) -> str:
        need = absmax(v)
        if need not in self.asked:
            return ""
        peak = float(self.stats[need])
        if peak * self.headroom > self.top:
            return f"'{v.name}' reaches {peak:.3g} on calibration data; with headroom {self.headroom:g} that overflows"
        return f"'{v.name}' stays below {peak:.2g}, too small for the type" if 0 < peak < self.low else ""

    def _scores(self, p: Ports) -> str:
        """Whether an Attention's products could overflow: `sum_c max|q_c| max|k_c|` bounds them, head by head."""
        q, k = (p.node.inputs[i] if len(p.node.inputs) > i else None for i in (0, 1))
        if p.node.op_type != "Attention" or p.node.domain != "" or q is None or k is None:
            return ""
        if not {absmax(q, "channel"), absmax(k, "channel")} <= self.asked:
            return ""
        a, b = (self.stats[absmax(v, "channel")].astype(np.float64) for v in (q, k))
        heads, kv = (p.node.attributes.get_int(f"{x}_num_heads", 1) for x in ("q", "kv"))
        a, b = a.reshape(heads, -1), np.repeat(b.reshape(kv, -1), heads // kv, axis=0)
        bound = float((a * b).sum(1).max()) * (p.node.attributes.get_float("scale", 0.0) or a.shape[1] ** -0.5)
        return f"its scores may reach {bound:.3g}, beyond {self.top:.0f}" if bound > self.top else ""
