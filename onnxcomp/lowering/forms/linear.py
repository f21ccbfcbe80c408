"""Forms of float linears with a bias, of these with GELU, of heads tied to the embedding table, and of SiLU."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot, ints

__all__ = ["ACTIVATION", "LINEAR", "SILU", "TIED"]


def _gelu(linear: Linear) -> ir.Node | None:
    """The GELU that is the only user of a linear."""
    users = linear.users
    fits = len(users) == 1 and users[0].op_type == "Gelu" and not linear.output.is_graph_output()
    return users[0] if fits else None


def _with_bias(g: Graph) -> list[Linear]:
    """Float linears whose bias vector is added behind the product."""
    linears = [x for x in blocks.linears(g) if not x.quantized and x.add is not None and x.bias is not None]
    return [x for x in linears if x.bias is not None and x.bias.shape is not None and len(x.bias.shape) == 1]


def _plain(g: Graph) -> list[Spot]:
    linears = (x for x in _with_bias(g) if _gelu(x) is None)
    return [Spot("linear", x.name, tuple(n for n in (x.node, x.add) if n), x.add.op_type, x) for x in linears if x.add]


def _activated(g: Graph) -> list[Spot]:
    pairs = ((x, _gelu(x)) for x in _with_bias(g))
    return [Spot("activation", x.name, (x.node, x.add, gelu), x.add.op_type, x) for x, gelu in pairs if gelu and x.add]


def _bias(ctx: Context, x: Linear, op: str) -> ir.Value:
    """The linear's output with its bias added by `Add` or `Sum`."""
    g = ctx.g
    if x.add is not None and x.add.op_type != op:
        g.replace(x.output, new := g.op(op, *x.add.inputs, name=f"{x.add.name}_{op.lower()}", like=x.output))
        return new
    return x.output


def _as(op: str) -> Form:
    return Form(op, lambda ctx, spot: void(_bias(ctx, spot.data, op)))


def void(_: object) -> None:
    """Discard a value, for lambdas that return nothing."""


def _gemm(ctx: Context, x: Linear) -> ir.Value:
    """`Gemm` on rows: `[..., K]` to `[rows, K]` and back, the bias inside the product."""
    g, source, width = ctx.g, x.node.inputs[0], x.sizes[1]
    rest = (x.weight if x.transposed else x.node.inputs[1], *([x.bias] if x.bias is not None else []))
    name, transposed = f"{x.name}_gemm", int(x.transposed)
    rank = len(source.shape) if source is not None and source.shape is not None else 2
    if source is None or rank == 2:
        out = g.op("Gemm", source, *rest, name=name, like=x.output, transB=transposed)
    else:
        rows = ctx.shared("rows", source, lambda: g.op("Reshape", source, ints(-1, x.sizes[0]), name=f"{x.name}_rows"))
        flat = g.op("Gemm", rows, *rest, name=name, transB=transposed)
        flat.type, flat.shape = x.output.type, ir.Shape([None, width])
        lead = ctx.shared("lead", source, lambda: g.op("Shape", source, start=0, end=rank - 1))
        shape = ctx.shared(f"to{width}", source, lambda: g.op("Concat", lead, ints(width), axis=0))
        out = g.op("Reshape", flat, shape, name=f"{x.name}_back", like=x.output)
    g.replace(x.output, out)
    return out


def _refuse_gemm(ctx: Context, spot: Spot) -> str:
    source = spot.data.node.inputs[0]
    known = source is not None and source.shape is not None and len(source.shape) >= 2
    return "" if known and spot.data.node.op_type == "MatMul" else "the rank of its input is not known"


LINEAR = Kind(
    "linear", _plain, (_as("Add"), _as("Sum"), Form("Gemm", lambda c, s: void(_gemm(c, s.data)), (), _refuse_gemm))
)


# ---- a head tied to the embedding table --------------------------------------------------------------------------


def _tied(g: Graph) -> list[Spot]:
    """Products with the Transpose of a stored table."""
    spots = []
    for x in blocks.linears(g, tied=True):
        transpose = x.node.inputs[1].producer() if x.node.inputs[1] is not None else None
        if x.transposed and not x.quantized and x.node.op_type == "MatMul" and transpose is not None:
            nodes = tuple(n for n in (transpose, x.node, x.add) if n is not None)
            spots.append(Spot("tied", x.name, nodes, "MatMul", x))
    return spots


def _refuse_tied_gemm(ctx: Context, spot: Spot) -> str:
    bias = spot.data.bias
    fits = bias is None or (bias.shape is not None and len(bias.shape) == 1)
    return _refuse_gemm(ctx, spot) if fits else "takes a bias of one axis"


TIED = Kind(
    "tied",
    _tied,
    (
        Form("MatMul", lambda ctx, spot: None),
        Form("Gemm", lambda c, s: void(_gemm(c, s.data)), (), _refuse_tied_gemm),
    ),
)


# ---- with GELU -------------------------------------------------------------------------------------------------------


def _tanh(spot: Spot) -> bool:
    return bool(spot.nodes[2].attributes.get_string("approximate", "none") == "tanh")


def _bias_gelu(ctx: Context, spot: Spot) -> None:
    """`BiasGelu(product, bias)`."""
    x, gelu, g = spot.data, spot.nodes[2], ctx.g
    args = (x.node.outputs[0], x.bias)
    g.replace(gelu.outputs[0], g.op("BiasGelu", *args, domain=CONTRIB, name=f"{gelu.name}_bias", like=gelu.outputs[0]))


def _fast_gelu(ctx: Context, spot: Spot) -> None:
    """`FastGelu(Sum(product, bias))`: the tanh form of GELU."""
    gelu, g = spot.nodes[2], ctx.g
    y = _bias(ctx, spot.data, "Sum")
    g.replace(gelu.outputs[0], g.op("FastGelu", y, domain=CONTRIB, name=f"{gelu.name}_fast", like=gelu.outputs[0]))


def _computed_by(tanh: bool) -> str:
    return "computes GELU by tanh" if tanh else "computes GELU by erf"


ACTIVATION = Kind(
    "activation",
    _activated,
    (
        _as("Sum"),
        _as("Add"),
        Form("Gemm", lambda c, s: void(_gemm(c, s.data)), (), _refuse_gemm),
        Form("BiasGelu", _bias_gelu, ((CONTRIB, "BiasGelu"),), lambda c, s: _computed_by(False) if _tanh(s) else ""),
        Form("FastGelu", _fast_gelu, ((CONTRIB, "FastGelu"),), lambda c, s: "" if _tanh(s) else _computed_by(True)),
        Form(
            "FastGelu approximated",
            _fast_gelu,
            ((CONTRIB, "FastGelu"),),
            lambda c, s: "GELU is by tanh already" if _tanh(s) else "",
            approximate=True,
        ),
    ),
)


# ---- x * Sigmoid(a x) ------------------------------------------------------------------------------------------------


def _silus(g: Graph) -> list[Spot]:
    """Products `x * Sigmoid(a x)`: SiLU, and GELU's approximation with `a = 1.702`."""
    spots = []
    for mul in g.nodes("Mul"):
        for x, gate in ((mul.inputs[0], mul.inputs[1]), (mul.inputs[1], mul.inputs[0])):
            sigmoid = gate.producer() if gate is not None else None
            if (
                x is None
                or gate is None
                or sigmoid is None
                or sigmoid.op_type != "Sigmoid"
                or len(tuple(gate.uses())) != 1
            ):
                continue
            if sigmoid.inputs[0] is x:
                spots.append(Spot("silu", str(mul.name), (sigmoid, mul), "spelled", 1.0))
                break
            if (scaled := _scaled(g, sigmoid.inputs[0], x)) is not None:
                spots.append(Spot("silu", str(mul.name), (scaled[0], sigmoid, mul), "spelled", scaled[1]))
                break
    return spots


def _scaled(g: Graph, v: ir.Value | None, x: ir.Value) -> tuple[ir.Node, float] | None:
    """The product `a x` and `a`, where nothing but the sigmoid reads it."""
    node = v.producer() if v is not None else None
    if node is None or v is None or node.op_type != "Mul" or x not in node.inputs or len(tuple(v.uses())) != 1:
        return None
    number = g.tensor(node.inputs[1 - list(node.inputs).index(x)])
    return (node, float(number.numpy().item())) if number is not None and number.size == 1 else None


def _quick(ctx: Context, spot: Spot) -> None:
    """`QuickGelu(x)`, alpha being the factor inside the sigmoid."""
    mul, sigmoid, g = spot.nodes[-1], spot.nodes[-2], ctx.g
    x = next(v for v in mul.inputs if v is not sigmoid.outputs[0])
    name = f"{mul.name}_quick"
    out = g.op("QuickGelu", x, domain=CONTRIB, alpha=float(spot.data), name=name, like=mul.outputs[0])
    g.replace(mul.outputs[0], out)


SILU = Kind(
    "silu", _silus, (Form("spelled", lambda ctx, spot: None), Form("QuickGelu", _quick, ((CONTRIB, "QuickGelu"),)))
)
