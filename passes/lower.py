"""Give each site the form the target runs fastest, from the target's table; equal outputs to float noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import CONTRIB, Graph, Site
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.structure import decompose
from onnxcomp.target import Target

__all__ = ["Lower"]

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class Lower(Pass):
    """Choose the runtime's fastest spelling of quantized linears, biases and residuals, from the target's table.

    On the CPU a quantized linear is one `MatMulIntegerToFloat` with its bias inside, or with `standard` a `MatMul` over
    Q/DQ whose bias is a `Sum`: behind `Add` the runtime makes a float `Gemm` of rank-2 and static inputs and
    dequantizes the weight on every run. A residual before a norm and a bias before GELU are written `Sum` too: the
    runtime's fusions of `Add` with them (SkipLayerNormalization, BiasGelu) are slower. A target that takes only older
    operator sets gets attention, RMS norm, rotary embedding and GELU spelled out.
    """

    stage: ClassVar[Stage] = Stage.LOWER
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    standard: bool = False
    """Keep to standard ONNX operators, for consumers other than ONNX Runtime."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Quantized linears and additions with a faster form on the target, and operators that are too new for it."""
        fused = [linear.site for linear in self._fusable(g, target)]
        adds = [Site(str(add.name), (str(add.name),), kind) for add, kind in self._adds(g, target)]
        return [*fused, *adds, *decompose.newer_sites(g, target.max_opset)]

    def run(self, g: Graph, env: Env) -> None:
        """Rewrite the sites; their number is what `sites` says."""
        adds = list(self._adds(g, env.target))
        for linear in self._fusable(g, env.target):
            _fuse(g, linear)
        for add, _ in adds:
            out = add.outputs[0]
            g.replace(out, g.op("Sum", *add.inputs, name=f"{add.name}_sum", like=out))
        if g.opset > env.target.max_opset:
            decompose.lower_opset(g, env.target.max_opset)

    def _fusable(self, g: Graph, target: Target) -> list[Linear]:
        if self.standard or target.forms.get("quantized") != "MatMulIntegerToFloat":
            return []
        return [linear for linear in blocks.linears(g) if _pair(linear) is not None]

    def _adds(self, g: Graph, target: Target) -> Iterator[tuple[ir.Node, str]]:
        seen = {linear.add for linear in self._fusable(g, target)}
        if target.forms.get("bias") == "Sum":
            for linear in blocks.linears(g):
                if linear.add is None or linear.add in seen or linear.add.op_type != "Add":
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


def _pair(linear: Linear) -> tuple[ir.Node, ir.Node] | None:
    """The DequantizeLinear nodes of the input and the weight, where both are 8 bits and the result is float32."""
    x, w = linear.node.inputs[0].producer() if linear.node.inputs[0] else None, linear.dequantize
    bias = linear.bias is None or (linear.bias.shape is not None and len(linear.bias.shape) == 1)
    whole = bias and linear.node.op_type == "MatMul" and linear.output.dtype is ir.DataType.FLOAT
    if not whole or x is None or w is None or x.op_type != "DequantizeLinear":
        return None
    eight = (ir.DataType.INT8, ir.DataType.UINT8)
    codes = [n.inputs[0].dtype for n in (x, w) if n.inputs[0] is not None]
    plain = all("block_size" not in n.attributes for n in (x, w))
    return (x, w) if plain and len(codes) == 2 and all(c in eight for c in codes) else None


def _fuse(g: Graph, linear: Linear) -> None:
    pair = _pair(linear)
    assert pair is not None
    (a, a_scale, a_zero), (b, b_scale, b_zero) = ([*n.inputs, None][:3] for n in pair)
    args = (a, b, a_scale, b_scale, a_zero, b_zero, linear.bias)
    name, out = f"{linear.name}_int8", linear.output
    g.replace(out, g.op("MatMulIntegerToFloat", *args, domain=CONTRIB, name=name, like=out))
