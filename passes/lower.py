"""Give each site the form the target runs fastest, from the target's table; equal outputs to float noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.structure import decompose
from onnxcomp.target import Target

__all__ = ["Lower"]

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class Lower(Pass):
    """Choose the runtime's fastest spelling of biases and residuals, from the target's table.

    On the CPU a bias behind an integer product is written `Sum`: `MatMul, Add` becomes a float `Gemm` there for rank-2
    or static inputs, and the int8 weight is dequantized on every run. A residual before a norm and a bias before GELU
    are written `Sum` too: the runtime's fusions of `Add` with them (SkipLayerNormalization, BiasGelu) are slower. A
    target that takes only older operator sets gets attention, RMS norm, rotary embedding and GELU spelled out.
    """

    stage: ClassVar[Stage] = Stage.LOWER
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every `Add` that has a faster form on the target, and every operator that is too new for it."""
        adds = [Site(str(add.name), (str(add.name),), kind) for add, kind in _adds(g, target)]
        return [*adds, *decompose.newer_sites(g, target.max_opset)]

    def run(self, g: Graph, env: Env) -> None:
        """Rewrite the sites; their number is what `sites` says."""
        for add, _ in list(_adds(g, env.target)):
            out = add.outputs[0]
            g.replace(out, g.op("Sum", *add.inputs, name=f"{add.name}_sum", like=out))
        if g.opset > env.target.max_opset:
            decompose.lower_opset(g, env.target.max_opset)


def _adds(g: Graph, target: Target) -> Iterator[tuple[ir.Node, str]]:
    seen = set()
    if target.forms.get("bias") == "Sum":
        for linear in blocks.linears(g):
            if linear.add is None or linear.add.op_type != "Add":
                continue
            if linear.quantized or any(u.op_type == "Gelu" for u in linear.users):
                seen.add(linear.add)
                yield linear.add, "bias"
    if target.forms.get("residual") == "Sum":
        for node in g.nodes("Add"):
            if node not in seen and not any(g.is_constant(x) for x in node.inputs) and _feeds_norm(node):
                yield node, "residual"


def _feeds_norm(add: ir.Node) -> bool:
    return any(user.op_type in NORMS and index == 0 for user, index in add.outputs[0].uses())
