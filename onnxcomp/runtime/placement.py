"""Where the runtime really runs each operator of a model: read from its own profile of one run."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import CONTRIB
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import Model, graph_of
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["Placement", "placement"]

# Sizes and small integers belong on the host whatever the device; a node that computes on floats does not.
WORK = {
    "Attention", "BiasGelu", "Conv", "DynamicQuantizeMatMul", "Erf", "FastGelu", "FusedMatMul", "Gelu", "Gemm",
    "GroupQueryAttention", "LayerNormalization", "MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
    "MultiHeadAttention", "QuickGelu", "RMSNormalization", "RotaryEmbedding", "Sigmoid", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Operators by provider, counted; `elsewhere` are those that compute but not on the target's provider."""

    provider: str
    ran: bool
    nodes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was found in the wrong place."""
        return not self.elsewhere


def placement(model: Model, target: Target, feeds: Mapping[str, Array] | None, why: str = "") -> Placement:
    """Run once with the profiler and read who ran what; without feeds only what the target's tables say is checked.

    `why` says why nothing can be run.
    """
    g = graph_of(model)
    if feeds is None:
        own = {n.op_type for n in g.nodes() if n.domain == CONTRIB and n.op_type not in target.contrib}
        lost = own | {n.op_type for n in g.nodes() if n.domain == "" and n.op_type in target.lacks}
        return Placement(target.provider, False, {}, tuple(sorted(lost)), f"not run: {why}" if why else "not run")
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        profile = Path(folder) / "profile.json"
        try:
            with Session(model, target, prepack=False, profile=profile) as session:
                session.run(feeds)
        except OnnxcompError as e:
            return Placement(target.provider, False, {}, (), f"not run: {e}")
        events = json.loads(profile.read_text(encoding="utf-8"))
    found: dict[str, Counter[str]] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") == "Node" and args.get("provider") and args.get("op_name"):
            found.setdefault(args["provider"], Counter())[args["op_name"]] += 1
    lost = {
        op for p, ops in found.items() if p != target.provider for op in ops if op in WORK or op.startswith("Memcpy")
    }
    counted = {p: dict(sorted(ops.items())) for p, ops in sorted(found.items())}
    return Placement(target.provider, True, counted, tuple(sorted(lost)))
