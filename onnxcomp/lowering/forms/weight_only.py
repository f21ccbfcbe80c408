"""Forms of linears with a float input and codes as weight: the runtime's product with codes, or Q/DQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.graph.values import untransposed
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot, ints
from onnxcomp.maths import Array

__all__ = ["WEIGHT_ONLY", "bits_in_use", "packed_rows", "packed_zeros"]

EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)
SIGNED = (ir.DataType.INT8, ir.DataType.INT4)
FOUR = (ir.DataType.INT4, ir.DataType.UINT4)
INT8_INPUTS = 4  # the accuracy level at which products round their inputs to 8 bits, block by block
FLOAT_INPUTS = 1  # and that at which they do not
LARGEST_BLOCK = 256  # in-channels: a weight with one scale per column gets the same one in each of its blocks
SMALLEST_BLOCK = 16
PROBED = 64  # rows of codes that are looked at first: nearly all weights of more than 2 bits end the search there


@dataclass(frozen=True)
class Weight:
    """A linear with the bits of its codes that are in use, and in-channels per scale; 0 where a column has one."""

    linear: Linear
    bits: int
    block: int


def _find(g: Graph) -> list[Spot]:
    """Linears that read floats, with constant codes of at most 8 bits behind one DequantizeLinear."""
    spots = []
    for x in blocks.linears(g, tied=True):
        made, given = x.dequantize, x.input.producer()
        if made is None or x.node.op_type != "MatMul" or (given is not None and given.op_type == "DequantizeLinear"):
            continue
        codes, scale = x.weight, g.tensor(made.inputs[1])
        if codes.dtype not in (*EIGHT, *FOUR) or scale is None or not _along_inputs(made, scale, x):
            continue
        block = made.attributes.get_int("block_size", 0)
        bits = bits_in_use(g, made)
        shared = made.inputs[0].producer() if made.inputs[0] is not None else None  # the Transpose of a table
        bias = x.add if x.bias is not None and x.bias.shape is not None and len(x.bias.shape) == 1 else None
        nodes = tuple(n for n in (shared, made, x.node, bias) if n is not None)
        spots.append(Spot("weight-only", x.name, nodes, "Q/DQ", Weight(x, bits, block), f"{bits} bits"))
    return spots


def _along_inputs(made: ir.Node, scale: ir.TensorProtocol, x: Linear) -> bool:
    """Whether scales are one for all, one per column, or one per block of in-channels and column."""
    axis, block = made.attributes.get_int("axis", 1) % 2, made.attributes.get_int("block_size", 0)
    rank = len(scale.shape)
    if block:
        return rank == 2 and axis == 0
    return rank == 0 or scale.size == 1 or (rank == 1 and axis == 1)


def bits_in_use(g: Graph, made: ir.Node) -> int:
    """8, 4, or 2 where blocks of 4-bit codes and their zero points use no more than that."""
    codes = g.tensor(untransposed(made.inputs[0]))
    assert codes is not None
    if codes.dtype in EIGHT:
        return 8
    if not made.attributes.get_int("block_size", 0):
        return 4
    low, high = (0, 3) if codes.dtype is ir.DataType.UINT4 else (-2, 1)
    zeros = _wide(g.array(made.inputs[2])) if len(made.inputs) > 2 and made.inputs[2] is not None else np.zeros(1)
    whole = codes.numpy()
    parts = (zeros, _wide(whole[:PROBED]), _wide(whole[PROBED:]))
    return 2 if all(not a.size or (a.min() >= low and a.max() <= high) for a in parts) else 4


def _wide(codes: Array) -> Array:
    """Codes as int16."""
    kinds = {np.dtype(ml_dtypes.int4): np.int8, np.dtype(ml_dtypes.uint4): np.uint8}
    return codes.astype(kinds.get(codes.dtype, codes.dtype)).astype(np.int16)


# ---- MatMulNBits -----------------------------------------------------------------------------------------------------


def pack(codes: Array, bits: int) -> Array:
    """Codes `[..., n]` below `2^bits` as bytes `[..., ceil(n * bits / 8)]`, the first in the lowest bits."""
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, short)]).astype(np.uint8)
    parts = padded.reshape(*codes.shape[:-1], -1, per_byte)
    packed = parts[..., 0].copy()
    for i in range(1, per_byte):
        packed |= parts[..., i] << np.uint8(i * bits)
    return np.ascontiguousarray(packed)


def _product(level: int, *, bias: bool) -> Form:
    """`MatMulNBits` at an accuracy level, with the bias inside or behind it."""

    def rewrite(ctx: Context, spot: Spot) -> None:
        w: Weight = spot.data
        x, g = w.linear, ctx.g
        k, n = x.sizes
        block = w.block or _block(x)
        inside = bias and len(spot.nodes) > 0 and spot.nodes[-1] is x.add
        args = [x.input, *_constants(ctx, w, block), None, x.bias if inside else None]
        while args[-1] is None:
            args.pop()
        old = x.output if inside else x.node.outputs[0]
        attrs = {"K": k, "N": n, "bits": w.bits, "block_size": block, "accuracy_level": level}
        y = g.op("MatMulNBits", *args, domain=CONTRIB, name=f"{x.name}_{w.bits}bits", like=old, **attrs)
        g.replace(old, y)

    name = ("MatMulNBits" if level == INT8_INPUTS else "MatMulNBits in float") + ("" if bias else ", bias behind")
    return Form(name, rewrite, ((CONTRIB, "MatMulNBits"),), _refusal(level), finer=level == FLOAT_INPUTS)


def _block(x: Linear) -> int:
    """In-channels of a block where a column has one scale: all, or as many as divide the rows of a shared table."""
    k = x.sizes[0]
    if x.transposed:
        return min(LARGEST_BLOCK, k & -k)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (k - 1).bit_length()))


def packed_rows(ctx: Context, codes: ir.Value, bits: int) -> ir.Value:
    """Codes `[rows, width]` as bytes without sign, `[rows, width * bits / 8]`, made once for look-ups and the head."""
    g, tensor = ctx.g, ctx.g.tensor(codes)
    assert tensor is not None
    rows, width = tensor.shape.numpy()
    middle = 2 ** (bits - 1) if tensor.dtype in SIGNED else 0

    def content() -> ir.TensorProtocol:
        return ir.tensor(pack(_wide(tensor.numpy()) + middle, bits))

    lazy = ir.LazyTensor(content, dtype=ir.DataType.UINT8, shape=ir.Shape([rows, -(-width * bits // 8)]))
    return ctx.shared("rows", codes, lambda: g.constant(lazy, f"{codes.name}_packed"))


def packed_zeros(zeros: Array, bits: int, signed: bool) -> Array | None:
    """Zero points `[rows, blocks]` as bytes without sign; None where all are the middle of the codes."""
    middle = 2 ** (bits - 1)
    unsigned = _wide(zeros) + (middle if signed else 0)
    return None if (unsigned == middle).all() else pack(unsigned, bits)


def _constants(ctx: Context, w: Weight, block: int) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Packed codes `[N, blocks, bytes]`, scales `[N, blocks]` and packed zero points (None for the middle)."""
    x, g = w.linear, ctx.g
    made, tensor = x.dequantize, g.tensor(x.weight)
    assert made is not None
    assert tensor is not None
    (k, n), name = x.sizes, str(x.weight.name)
    count, size = -(-k // block), block * w.bits // 8
    middle = 2 ** (w.bits - 1)
    signed = tensor.dtype in SIGNED

    def by_columns(v: ir.Value) -> Array:
        """Scales or zero points, `[N, blocks]`."""
        a = g.array(v)
        a = a if a.ndim == 2 else np.broadcast_to(a.reshape(1, -1), (count, n))
        return np.ascontiguousarray(a.T)

    def packed() -> ir.TensorProtocol:
        codes = _wide(tensor.numpy().T) + (middle if signed else 0)
        codes = np.pad(codes, [(0, 0), (0, count * block - k)]).astype(np.uint8)
        return ir.tensor(pack(codes, w.bits).reshape(n, count, size))

    content = ir.LazyTensor(packed, dtype=ir.DataType.UINT8, shape=ir.Shape([n, count, size]))
    if x.transposed:
        rows = packed_rows(ctx, x.weight, w.bits)
        stored = g.op("Reshape", rows, ints(n, count, size), name=f"{x.name}_blocks")
    else:
        stored = ctx.shared(f"packed{block}", x.weight, lambda: g.constant(content, f"{name}_packed"))
    scale = made.inputs[1]
    assert scale is not None
    scales = ctx.shared(f"columns{count}", scale, lambda: g.constant(by_columns(scale), f"{scale.name}_columns"))
    given = made.inputs[2] if len(made.inputs) > 2 else None
    zeros = packed_zeros(np.zeros((n, count), np.int8) if given is None else by_columns(given), w.bits, signed)
    if zeros is None:
        return stored, scales, None
    return stored, scales, ctx.shared("zeros", given or x.weight, lambda: g.constant(zeros, f"{name}_zeros"))


def _refusal(level: int) -> Callable[[Context, Spot], str]:
    def refuse(ctx: Context, spot: Spot) -> str:
        w: Weight = spot.data
        wants = {INT8_INPUTS: "int8", FLOAT_INPUTS: "float"}[level]
        if ctx.inputs not in ("any", wants):
            return f"inputs are to stay {ctx.inputs}"
        if level == FLOAT_INPUTS and w.bits != 4:
            return f"with {w.bits} bits it would dequantize the weight at every run"
        return _no_kernel(ctx, w) or _float_type(ctx, w)

    return refuse


def _no_kernel(ctx: Context, w: Weight) -> str:
    """Why the target has no product with such codes, empty if it has one."""
    q = ctx.target.quantized
    fast = q.blocks.get(w.bits, ())
    if w.block and w.block not in fast:
        legal = " or ".join(map(str, fast)) or "none"
        return f"'{ctx.target.name}' multiplies {w.bits}-bit codes fast in blocks of {legal}, not of {w.block}"
    if w.linear.transposed and w.linear.sizes[0] % max(w.block, SMALLEST_BLOCK):
        return f"blocks would reach over the ends of rows of {w.linear.sizes[0]} in the table that it shares"
    made = w.linear.dequantize
    zero = made.inputs[2] if made is not None and len(made.inputs) > 2 else None
    if not q.block_zero_points and zero is not None and _wide(ctx.g.array(zero)).any():
        return f"'{ctx.target.name}' multiplies codes fast only without zero points"
    return ""


def _float_type(ctx: Context, w: Weight) -> str:
    halves = () if ctx.target.provider.startswith("CPU") else (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    known = w.linear.input.dtype in (ir.DataType.FLOAT, *halves)
    return "" if known else "it takes inputs of float32 only"


def _refuse_pairs(ctx: Context, spot: Spot) -> str:
    """The runtime makes a product of it that rounds inputs, where there is one."""
    if ctx.inputs == "float" and ctx.target.provider.startswith("CPU"):
        return "its inputs would be rounded to 8 bits"
    if spot.data.bits == 2:
        return "it stores 2 bits in 4"
    return _no_kernel(ctx, spot.data)


WEIGHT_ONLY = Kind(
    "weight-only",
    _find,
    (
        _product(INT8_INPUTS, bias=True),
        _product(INT8_INPUTS, bias=False),
        _product(FLOAT_INPUTS, bias=True),
        Form("Q/DQ", lambda ctx, spot: None, (), _refuse_pairs),
    ),
)
