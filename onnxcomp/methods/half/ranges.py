"""Whether the values of a node fit a half type: the statistics needed, and the verdict on its ranges."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.methods.half.candidates import Ports, constant_trouble
from onnxcomp.stats import Need, Stats, absmax

__all__ = ["Ranges", "needs"]


def needs(g: Graph, p: Ports, masks: Collection[ir.Value]) -> Iterator[Need]:
    """The largest magnitudes that `Ranges` reads for a node; `masks` are values whose magnitude says nothing."""
    for v in p.values:
        empty = v.shape is not None and 0 in v.shape.dims
        if not g.is_constant(v) and v not in masks and not empty:
            yield absmax(v)
    if p.node.op_type == "Attention" and p.node.domain == "":
        yield from (absmax(v, "channel") for v in p.node.inputs[:2] if v is not None)


class Ranges:
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
            self._known[v] = self._measured(v) if t is None else constant_trouble(t, self.half)
        return self._known[v]

    def _measured(self, v: ir.Value) -> str:
        need = absmax(v)
        if need not in self.asked:
            return ""
        if not self.stats.reached(need):  # an empty cache holds what its output does, which is measured
            return "" if v.is_graph_input() else f"no sample reaches '{v.name}'"
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
