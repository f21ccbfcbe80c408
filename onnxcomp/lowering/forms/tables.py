"""Forms of embedding tables stored in 8 bits: rows dequantized after they are looked up, or all at every run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot

__all__ = ["TABLE"]

SMALLEST_BLOCK = 16  # elements of one scale; GatherBlockQuantized takes powers of two from here on


def _find(g: Graph) -> list[Spot]:
    """Look-ups in a DequantizeLinear of constant int8 codes `[rows, width]`, one scale per row or one in all."""
    spots = []
    for gather in g.nodes("Gather"):
        dequantize = gather.inputs[0].producer() if gather.inputs[0] is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or gather.attributes.get_int("axis", 0) != 0:
            continue
        codes, scale = (g.tensor(v) for v in dequantize.inputs[:2])
        if codes is None or scale is None or codes.dtype is not ir.DataType.INT8 or len(codes.shape) != 2:
            continue
        per_row = len(scale.shape) == 1 and dequantize.attributes.get_int("axis", 1) % 2 == 0
        plain = "block_size" not in dequantize.attributes and len(dequantize.inputs) == 2
        if plain and (per_row or len(scale.shape) == 0) and gather.outputs[0].dtype is not None:
            spots.append(Spot("table", str(gather.name), (dequantize, gather), "dequantized", per_row))
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
    """Codes and scales looked up, then multiplied."""
    (codes, scale, indices, out), g, name = _parts(spot), ctx.g, spot.name
    assert out.dtype is not None
    q = g.op("Gather", codes, indices, axis=0, name=f"{name}_codes")
    s = g.op("Gather", _column(ctx, scale), indices, axis=0, name=f"{name}_scales") if spot.data else scale
    wide = g.op("Cast", q, to=out.dtype.value, name=f"{name}_wide", like=out)
    g.replace(out, g.op("Mul", wide, s, name=f"{name}_rows", like=out))


def _blocks(ctx: Context, spot: Spot) -> None:
    """`GatherBlockQuantized` with one block per row, of unsigned codes around 128."""
    (codes, scale, indices, out), g = _parts(spot), ctx.g
    tensor = g.tensor(codes)
    assert tensor is not None

    def unsigned() -> ir.TensorProtocol:
        return ir.tensor((tensor.numpy().astype(np.int16) + 128).astype(np.uint8))

    stored = g.constant(
        ir.LazyTensor(unsigned, dtype=ir.DataType.UINT8, shape=ir.Shape(tensor.shape.numpy())), f"{spot.name}_uint8"
    )
    block = max(SMALLEST_BLOCK, 1 << (int(tensor.shape.numpy()[1]) - 1).bit_length())
    args, name = (stored, indices, _column(ctx, scale)), f"{spot.name}_blocks"
    attrs = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    g.replace(out, g.op("GatherBlockQuantized", *args, domain=CONTRIB, name=name, like=out, **attrs))


def _refuse_blocks(ctx: Context, spot: Spot) -> str:
    codes, _, indices, out = _parts(spot)
    if not spot.data:
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
        Form("gathered", _gathered),
        Form("GatherBlockQuantized", _blocks, ((CONTRIB, "GatherBlockQuantized"),), _refuse_blocks),
        Form("dequantized", lambda ctx, spot: None),
    ),
)
