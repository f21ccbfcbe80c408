"""Which execution provider runs each operator of a model, read from the runtime's profile of one run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxcomp.errors import OnnxcompError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.graph import CONTRIB
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import Model, graph_of
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["Placement", "placement"]

# Operators on floating-point activations. Others (shapes, indices) run on the host with every provider, by design.
COMPUTE_OPS = {
    "Attention", "BiasGelu", "Conv", "DynamicQuantizeMatMul", "Erf", "FastGelu", "FusedMatMul", "Gelu", "Gemm",
    "GroupQueryAttention", "LayerNormalization", "MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
    "MultiHeadAttention", "QuickGelu", "RMSNormalization", "RotaryEmbedding", "Sigmoid", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Operator counts by provider; `elsewhere` are compute operators that run on another provider than the target's."""

    provider: str
    ran: bool
    nodes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether all compute operators run on the target's provider."""
        return not self.elsewhere


def placement(model: Model, target: Target, feeds: Mapping[str, Array] | None, why: str = "") -> Placement:
    """Run once with the profiler on and count operators by provider.

    Without feeds nothing runs (`why` is the reason) and operators are only looked up in the target's tables.
    """
    g = graph_of(model)
    if feeds is None:
        unsupported_contrib = {n.op_type for n in g.nodes() if n.domain == CONTRIB and n.op_type not in target.contrib}
        unsupported = {n.op_type for n in g.nodes() if n.domain == "" and n.op_type in target.lacks}
        misplaced = unsupported_contrib | unsupported
        return Placement(target.provider, False, {}, tuple(sorted(misplaced)), f"not run: {why}" if why else "not run")
    with scratch_folder() as folder:
        profile = folder / "profile.json"
        try:
            with Session(model, target, prepack=False, profile=profile) as session:
                session.run(feeds)
        except OnnxcompError as e:
            return Placement(target.provider, False, {}, (), f"not run: {e}")
        events = json.loads(profile.read_text(encoding="utf-8"))
    by_provider: dict[str, Counter[str]] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") == "Node" and args.get("provider") and args.get("op_name"):
            by_provider.setdefault(args["provider"], Counter())[args["op_name"]] += 1
    misplaced = {
        op
        for p, ops in by_provider.items()
        if p != target.provider
        for op in ops
        if op in COMPUTE_OPS or op.startswith("Memcpy")
    }
    counted = {p: dict(sorted(ops.items())) for p, ops in sorted(by_provider.items())}
    return Placement(target.provider, True, counted, tuple(sorted(misplaced)))
