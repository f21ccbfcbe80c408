"""Forms of embedding tables stored in 8 or 4 bits: rows dequantized after they are looked up, or all at every run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot
from onnxcomp.lowering.forms.weight_only import EIGHT, FOUR, SIGNED, packed_rows, packed_zeros

__all__ = ["TABLE"]

SMALLEST_BLOCK = 16  # elements of one scale; GatherBlockQuantized takes powers of two from here on


@dataclass(frozen=True)
class Rows:
    """How a table is stored: bits of a code, elements of a row per scale (0 for the whole row), one scale per row."""

    bits: int
    block: int
    per_row: bool


def _find(g: Graph) -> list[Spot]:
    """Look-ups in a DequantizeLinear of constant codes `[rows, width]`.

    Codes are int8 with one scale per row or one in all, or of 8 or 4 bits with a scale for each block of a row.
    """
    spots = []
    for gather in g.nodes("Gather"):
        made = gather.inputs[0].producer() if gather.inputs[0] is not None else None
        if made is None or made.op_type != "DequantizeLinear" or gather.attributes.get_int("axis", 0) != 0:
            continue
        codes, scale = (g.tensor(v) for v in made.inputs[:2])
        if codes is None or scale is None or len(codes.shape) != 2 or gather.outputs[0].dtype is None:
            continue
        axis, block = made.attributes.get_int("axis", 1) % 2, made.attributes.get_int("block_size", 0)
        if codes.dtype is ir.DataType.INT8 and not block and len(made.inputs) == 2:
            per_row = len(scale.shape) == 1 and axis == 0
            rows = Rows(8, 0, per_row) if per_row or len(scale.shape) == 0 else None
        else:
            bits = 4 if codes.dtype in FOUR else 8 if codes.dtype in EIGHT else 0
            rows = Rows(bits, block, False) if bits and block and axis == 1 else None
        if rows is not None:
            spots.append(Spot("table", str(gather.name), (made, gather), "dequantized", rows, f"{rows.bits} bits"))
    return spots


def _parts(spot: Spot) -> tuple[ir.Value | None, ir.Value, ir.Value | None, ir.Value]:
    """Codes, scale, indices and output."""
    dequantize, gather = spot.nodes
    assert dequantize.inputs[1] is not None
    return dequantize.inputs[0], dequantize.inputs[1], gather.inputs[1], gather.outputs[0]


def _column(ctx: Context, scale: ir.Value) -> ir.Value:
    """The scales as a constant `[rows, 1]`."""
    g = ctx.g
    return ctx.shared("column", scale, lambda: g.constant(g.array(scale)[:, None], f"{scale.name}_column"))


def _gathered(ctx: Context, spot: Spot) -> None:
    """Codes and scales looked up, then multiplied; a head that shares the codes may have them around 128."""
    (codes, scale, indices, out), g, name = _parts(spot), ctx.g, spot.name
    assert codes is not None
    assert out.dtype is not None
    unsigned = ctx.made("rows", codes)
    q = g.op("Gather", unsigned or codes, indices, axis=0, name=f"{name}_codes")
    s = g.op("Gather", _column(ctx, scale), indices, axis=0, name=f"{name}_scales") if spot.data.per_row else scale
    wide = g.op("Cast", q, to=out.dtype.value, name=f"{name}_wide", like=out)
    if unsigned is not None:
        wide = g.op("Sub", wide, np.array(128, out.dtype.numpy()), name=f"{name}_signed", like=out)
    g.replace(out, g.op("Mul", wide, s, name=f"{name}_rows", like=out))


def _refuse_gathered(ctx: Context, spot: Spot) -> str:
    if spot.data.bits == 4:
        return "the runtime looks up no codes of 4 bits"
    return "its rows have several scales" if spot.data.block else ""


def _blocks(ctx: Context, spot: Spot) -> None:
    """`GatherBlockQuantized`; codes with one scale per row are one block around 128."""
    (codes, scale, indices, out), g, rows = _parts(spot), ctx.g, spot.data
    assert codes is not None
    tensor = g.tensor(codes)
    assert tensor is not None
    width, args = int(tensor.shape.numpy()[1]), [packed_rows(ctx, codes, rows.bits), indices, scale]
    zero = spot.nodes[0].inputs[2] if len(spot.nodes[0].inputs) > 2 else None
    if rows.block == 0:
        args[2] = _column(ctx, scale)
    elif zero is not None:
        zeros = packed_zeros(g.array(zero), rows.bits, tensor.dtype in SIGNED)
        if zeros is not None:
            args.append(ctx.shared("zeros", zero, lambda: g.constant(zeros, f"{zero.name}_packed")))
    block = rows.block or max(SMALLEST_BLOCK, 1 << (width - 1).bit_length())
    name = f"{spot.name}_blocks"
    attrs = {"bits": rows.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    g.replace(out, g.op("GatherBlockQuantized", *args, domain=CONTRIB, name=name, like=out, **attrs))


def _rows(ctx: Context, spot: Spot) -> None:
    """Codes, scales and zero points of the rows that are looked up, which a DequantizeLinear in blocks multiplies."""
    made, gather = spot.nodes
    g, name = ctx.g, spot.name
    assert gather.inputs[1] is not None
    rank = len(gather.inputs[1].shape or ())
    parts = [
        g.op("Gather", v, gather.inputs[1], axis=0, name=f"{name}_{part}")
        for v, part in zip(made.inputs, ("codes", "scales", "zeros"), strict=False)
        if v is not None
    ]
    out = gather.outputs[0]
    g.replace(
        out, g.op("DequantizeLinear", *parts, axis=rank, block_size=spot.data.block, name=f"{name}_rows", like=out)
    )


def _refuse_rows(ctx: Context, spot: Spot) -> str:
    if spot.data.bits == 4:
        return "the runtime looks up no codes of 4 bits"
    known = spot.nodes[1].inputs[1]
    if known is None or known.shape is None:
        return "the number of axes of its indices is not known"
    return "" if spot.data.block else "its rows have one scale"


def _refuse_blocks(ctx: Context, spot: Spot) -> str:
    codes, _, indices, out = _parts(spot)
    if not spot.data.block and not spot.data.per_row:
        return "takes one scale per row"
    if codes is not None and len(list(codes.uses())) > 1:
        return "the codes are those of another operator as well, which wants them signed"
    indexed = indices is not None and indices.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    fits = indexed and out.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return "" if fits else "takes integer indices, makes float32 or float16"


TABLE = Kind(
    "table",
    _find,
    (
        Form("gathered", _gathered, (), _refuse_gathered),
        Form("GatherBlockQuantized", _blocks, ((CONTRIB, "GatherBlockQuantized"),), _refuse_blocks),
        Form("gathered in blocks", _rows, (), _refuse_rows),
        Form("dequantized", lambda ctx, spot: None),
    ),
)
