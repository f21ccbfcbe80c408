"""Forms of quantized linears: Q/DQ and run-time (dynamic) quantization as different integer products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.graph.values import untransposed
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot

__all__ = ["DYNAMIC", "QUANTIZED"]

EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)


# ---- Q/DQ ------------------------------------------------------------------------------------------------------------


def _pair(linear: Linear) -> tuple[ir.Node, ir.Node] | None:
    """The DequantizeLinear nodes of the input and the weight, where both are 8 bits."""
    x, w = linear.node.inputs[0].producer() if linear.node.inputs[0] else None, linear.dequantize
    if x is None or w is None or x.op_type != "DequantizeLinear":
        return None
    codes = [n.inputs[0].dtype for n in (x, w) if n.inputs[0] is not None]
    plain = all("block_size" not in n.attributes for n in (x, w))
    return (x, w) if plain and len(codes) == 2 and all(c in EIGHT for c in codes) else None


def _find(g: Graph) -> list[Spot]:
    """Products with a dequantized weight; where the input is float, only the addition of the bias has other forms."""
    spots = []
    for x in blocks.linears(g, tied=True):
        pair = _pair(x)
        if x.dequantize is None or x.node.op_type != "MatMul" or (pair is None and x.add is None):
            continue
        present = x.add.op_type if x.add is not None else "Sum"
        last = x.add if x.add is not None else _requantize(g, x)
        shared = x.dequantize.inputs[0].producer() if x.dequantize.inputs[0] is not None else None  # a Transpose
        nodes = tuple(n for n in (shared, *(pair or (x.dequantize,)), x.node, last) if n is not None)
        spots.append(Spot("quantized", x.name, nodes, present, x))
    return spots


def _requantize(g: Graph, linear: Linear) -> ir.Node | None:
    """The 8-bit QuantizeLinear with one constant scale that is the only user of a product without bias."""
    node = linear.users[0] if len(linear.users) == 1 and not linear.output.is_graph_output() else None
    if node is None or node.op_type != "QuantizeLinear" or node.outputs[0].dtype not in EIGHT:
        return None
    scale = g.tensor(node.inputs[1])
    return node if scale is not None and len(scale.shape) == 0 else None


def _refuse_scales(ctx: Context, linear: Linear) -> str:
    """Why integer products do not take the scales: one for the input, and one in all or per column for the weight."""
    pair = _pair(linear)
    if pair is None:
        return "takes 8-bit codes on both sides"
    ranks = [len(n.inputs[1].shape) if n.inputs[1] is not None and n.inputs[1].shape is not None else -1 for n in pair]
    columns = ranks[1] == 0 or (ranks[1] == 1 and pair[1].attributes.get_int("axis", 1) in (1, -1))
    return "" if ranks[0] == 0 and columns else "takes one scale of the input, and one per column of the weight"


def _args(linear: Linear) -> list[ir.Value | None]:
    """Operands of an integer product: codes, scales and zero points, each of the input and then of the weight."""
    pair = _pair(linear)
    assert pair is not None
    (a, a_scale, a_zero), (b, b_scale, b_zero) = ([*n.inputs, None][:3] for n in pair)
    return [a, b, a_scale, b_scale, a_zero, b_zero]


def _as(op: str) -> Form:
    """The bias added by `Add`, or by `Sum`, which the runtime never fuses into a float Gemm."""

    def rewrite(ctx: Context, spot: Spot) -> None:
        x, g = spot.data, ctx.g
        if x.add is not None and x.add.op_type != op:
            g.replace(x.output, g.op(op, *x.add.inputs, name=f"{x.add.name}_{op.lower()}", like=x.output))

    return Form(op, rewrite)


def _fused(ctx: Context, spot: Spot) -> None:
    """`MatMulIntegerToFloat` with the bias inside."""
    x, g = spot.data, ctx.g
    out = g.op("MatMulIntegerToFloat", *_args(x), x.bias, domain=CONTRIB, name=f"{x.name}_int8", like=x.output)
    g.replace(x.output, out)


def _refuse_fused(ctx: Context, spot: Spot) -> str:
    x = spot.data
    if why := _refuse_scales(ctx, x):
        return why
    if x.output.dtype is not ir.DataType.FLOAT:
        return "makes float32 only"
    one = x.bias is None or (x.bias.shape is not None and len(x.bias.shape) == 1)
    return "" if one else "takes a bias of one axis"


def _qgemm(ctx: Context, spot: Spot) -> None:
    """`QGemm` with the bias as int32 of scale `s_x s_w`, the output float."""
    x, g = spot.data, ctx.g
    a, b, a_scale, b_scale, a_zero, b_zero = _args(x)
    bias = None
    if x.bias is not None:
        step = g.array(a_scale).astype(np.float64) * g.array(b_scale).astype(np.float64)
        codes = np.clip(np.rint(g.array(x.bias) / step), -(2**31), 2**31 - 1).astype(np.int32)
        bias = g.constant(codes, f"{x.bias.name}_int32")
    zeros = [z if z is not None else g.constant(np.zeros((), _type(v)), "zero") for z, v in ((a_zero, a), (b_zero, b))]
    wide = np.zeros(g.array(b_scale).shape, _type(b))
    if b_zero is None:
        zeros[1] = g.constant(wide, "zeros")
    args = (a, a_scale, zeros[0], b, b_scale, zeros[1], bias)
    g.replace(x.output, g.op("QGemm", *args, domain=CONTRIB, name=f"{x.name}_qgemm", like=x.output))


def _type(v: ir.Value | None) -> np.dtype[np.generic]:
    return (v.dtype if v is not None and v.dtype is not None else ir.DataType.INT8).numpy()


def _refuse_qgemm(ctx: Context, spot: Spot) -> str:
    if why := _refuse_fused(ctx, spot):
        return why
    x = spot.data
    rank = len(x.node.inputs[0].shape) if x.node.inputs[0].shape is not None else 0
    known = all(ctx.g.is_constant(v) for v in _args(x)[2:4])
    return "" if rank == 2 and known else "takes two axes and constant scales"


def _qlinear(ctx: Context, spot: Spot) -> None:
    """`QLinearMatMul`: integers in and out, where a QuantizeLinear follows."""
    x, last, g = spot.data, spot.nodes[-1], ctx.g
    a, b, a_scale, b_scale, a_zero, b_zero = _args(x)
    y_scale, y_zero = [*last.inputs, None][1:3]
    zeros = [
        zero if zero is not None else g.constant(np.zeros(_shape(scale), _type(v)), "zero")
        for zero, scale, v in ((a_zero, a_scale, a), (b_zero, b_scale, b), (y_zero, y_scale, last.outputs[0]))
    ]
    args = (a, a_scale, zeros[0], b, b_scale, zeros[1], y_scale, zeros[2])
    g.replace(last.outputs[0], g.op("QLinearMatMul", *args, name=f"{x.name}_codes", like=last.outputs[0]))


def _shape(v: ir.Value | None) -> tuple[int, ...]:
    return tuple(v.shape.numpy()) if v is not None and v.shape is not None else ()


def _refuse_qlinear(ctx: Context, spot: Spot) -> str:
    if why := _refuse_scales(ctx, spot.data):
        return why
    return "" if spot.nodes[-1].op_type == "QuantizeLinear" else "its result is not quantized at once"


def _rounds(x: Linear) -> str:
    return "rounds its bias to int32" if x.bias is not None else ""


QUANTIZED = Kind(
    "quantized",
    _find,
    (
        _as("Sum"),
        _as("Add"),
        Form("MatMulIntegerToFloat", _fused, ((CONTRIB, "MatMulIntegerToFloat"),), _refuse_fused),
        Form("QLinearMatMul", _qlinear, (("", "QLinearMatMul"),), _refuse_qlinear),
        Form("QGemm", _qgemm, ((CONTRIB, "QGemm"),), lambda c, s: _refuse_qgemm(c, s) or _rounds(s.data)),
        Form("QGemm rounded bias", _qgemm, ((CONTRIB, "QGemm"),), _refuse_qgemm, approximate=True),
    ),
)


# ---- quantized at run time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dynamic:
    """`Cast(MatMulInteger(q, w, z)) * (s_x s_w) + bias`: one product behind a DynamicQuantizeLinear."""

    product: ir.Node
    quantize: ir.Node
    weight: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def _dynamic(g: Graph, product: ir.Node) -> Dynamic | None:
    """The chain of nodes from a MatMulInteger, each the only user of the one before; None where it is another."""
    x, w = product.inputs[:2]
    quantize = x.producer() if x is not None else None
    if (
        quantize is None
        or quantize.op_type != "DynamicQuantizeLinear"
        or w is None
        or not g.is_constant(untransposed(w))
    ):
        return None
    if len(product.inputs) < 3 or product.inputs[2] is not quantize.outputs[2] or len(product.inputs) > 3:
        return None
    cast = _next(product.outputs[0], "Cast")
    mul = _next(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or mul is None or cast.outputs[0].dtype is not ir.DataType.FLOAT:
        return None
    factor = next((v for v in mul.inputs if v is not cast.outputs[0]), None)
    both = factor.producer() if factor is not None else None
    if both is None or both.op_type != "Mul" or quantize.outputs[1] not in both.inputs:
        return None
    scale = next((v for v in both.inputs if v is not quantize.outputs[1]), None)
    if scale is None or not g.is_constant(scale):
        return None
    add = _next(mul.outputs[0], "Add", "Sum")
    bias = next((v for v in add.inputs if v is not mul.outputs[0]), None) if add is not None else None
    if bias is None or not g.is_constant(bias) or bias.shape is None or len(bias.shape) != 1:
        add = bias = None
    nodes = tuple(n for n in (w.producer(), product, cast, both, mul, add) if n is not None)
    return Dynamic(product, quantize, w, scale, bias, nodes[-1].outputs[0], nodes)


def _next(v: ir.Value, *ops: str) -> ir.Node | None:
    """The only user of a value, if it is one of the operators."""
    users = tuple(v.uses())
    fits = len(users) == 1 and not v.is_graph_output() and users[0][0].op_type in ops
    return users[0][0] if fits else None


def _dynamics(g: Graph) -> list[Spot]:
    """Products of one DynamicQuantizeLinear, as one spot, since they share its work."""
    groups: dict[ir.Node, list[Dynamic]] = {}
    for product in g.nodes("MatMulInteger"):
        if (chain := _dynamic(g, product)) is not None:
            groups.setdefault(chain.quantize, []).append(chain)
    return [
        Spot(
            "dynamic",
            str(group[0].product.name),
            (quantize, *(n for d in group for n in d.nodes)),
            "standard",
            tuple(group),
        )
        for quantize, group in groups.items()
    ]


def _to_float(ctx: Context, spot: Spot) -> None:
    """One DynamicQuantizeLinear, then `MatMulIntegerToFloat` with the bias inside for each product."""
    for d in spot.data:
        q, s, z = d.quantize.outputs
        args = (q, d.weight, s, d.scale, z, None, d.bias)
        name = f"{d.product.name}_to_float"
        ctx.g.replace(d.output, ctx.g.op("MatMulIntegerToFloat", *args, domain=CONTRIB, name=name, like=d.output))


def _dynamic_quantize(ctx: Context, spot: Spot) -> None:
    """`DynamicQuantizeMatMul`: quantization, product and bias in one, for each product."""
    for d in spot.data:
        args = (d.quantize.inputs[0], d.weight, d.scale, None, d.bias)
        name = f"{d.product.name}_dynamic"
        ctx.g.replace(d.output, ctx.g.op("DynamicQuantizeMatMul", *args, domain=CONTRIB, name=name, like=d.output))


DYNAMIC = Kind(
    "dynamic",
    _dynamics,
    (
        Form("standard", lambda ctx, spot: None),
        Form("MatMulIntegerToFloat", _to_float, ((CONTRIB, "MatMulIntegerToFloat"),)),
        Form("DynamicQuantizeMatMul", _dynamic_quantize, ((CONTRIB, "DynamicQuantizeMatMul"),)),
    ),
)
