"""Attention in three axes: the standard operator, the runtime's own ones, and plain products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot, ints
from onnxcomp.lowering.older_opsets import scale_of, spell_attention, unspeakable

__all__ = ["ATTENTION", "float_mask", "heads_of", "padding_row"]


def _find(g: Graph) -> list[Spot]:
    return [Spot("attention", str(n.name), (n,), "Attention") for n in g.nodes("Attention") if n.domain == ""]


# ---- masks, in the layouts the runtime's operators take --------------------------------------------------------------


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dim(v: ir.Value | None, axis: int) -> int | str | None:
    """A recorded size: a number, a name, or None."""
    if v is None or v.shape is None or not -len(v.shape) <= axis < len(v.shape):
        return None
    d = v.shape[axis]
    return d if isinstance(d, int) else d.value


def _full_rows(ctx: Context, mask: ir.Value, q: ir.Value) -> ir.Value:
    """A mask with a row for every query; a kernel takes no other."""
    if _dim(mask, -2) != 1 or _dim(q, 1) == 1 or mask.shape is None:
        return mask
    ones = np.ones(len(mask.shape) - 2, np.int64)

    def make() -> ir.Value:
        rows = ctx.g.op("Shape", q, start=1, end=2)
        parts: list[ir.Value | np.ndarray] = [ones, rows, ints(1)] if len(ones) else [rows, ints(1)]
        wide = ctx.g.op("Expand", mask, ctx.g.op("Concat", *parts, axis=0), name=f"{mask.name}_rows")
        wide.type = mask.type
        return wide

    return ctx.shared("full", mask, make, once=True)


def float_mask(ctx: Context, mask: ir.Value, q: ir.Value) -> ir.Value:
    """A mask as numbers to add, `[b or 1, heads or 1, s, t]`; forbidden is half the lowest number, never -inf (NaN)."""

    def make() -> ir.Value:
        g, full = ctx.g, _full_rows(ctx, mask, q)
        dtype = (q.dtype or ir.DataType.FLOAT).numpy()
        low = np.array(np.finfo(dtype).min / 2, dtype)
        if mask.dtype is ir.DataType.BOOL:
            bias = g.op("Where", full, np.array(0, dtype), low, name=f"{mask.name}_bias")
        else:
            bias = g.op("Max", full, low, name=f"{mask.name}_bias")
        missing = 4 - len(mask.shape or ())
        return g.op("Unsqueeze", bias, ints(*range(missing)), name=f"{mask.name}_bias4") if missing else bias

    return ctx.shared("bias", mask, make, once=True)


def padding_row(ctx: Context, mask: ir.Value) -> ir.Value:
    """Which keys are real, int32 `[b, t]`, of a bool mask `[b, 1 or heads, s or 1, t]` equal for all queries."""

    def make() -> ir.Value:
        first = ctx.g.op("Slice", mask, ints(0, 0), ints(1, 1), ints(1, 2), name=f"{mask.name}_first")
        flat = ctx.g.op("Squeeze", first, ints(1, 2), name=f"{mask.name}_row")
        return ctx.g.op("Cast", flat, to=int(ir.DataType.INT32), name=f"{mask.name}_keys")

    return ctx.shared("padding", mask, make, once=True)


def heads_of(node: ir.Node) -> tuple[int, int]:
    """Query heads and key heads."""
    return node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)


# ---- why not ---------------------------------------------------------------------------------------------------------


def _plain(ctx: Context, spot: Spot) -> str:
    """Why an attention fits none of the runtime's own operators."""
    node = spot.nodes[0]
    if why := unspeakable(node):
        return f"{why} is not taken"
    q, mask = node.inputs[0], _input(node, 3)
    if q is None or q.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "takes float32 and float16"
    if mask is not None and (mask.shape is None or not 2 <= len(mask.shape) <= 4):
        return "the rank of the mask is not known"
    capped = bool(node.attributes.get_float("softcap", 0.0))
    return "soft-capped scores are not taken" if capped else ctx.moves_rows(mask)


def _multi_head(ctx: Context, spot: Spot) -> str:
    heads, kv = heads_of(spot.nodes[0])
    return _plain(ctx, spot) or ("" if heads == kv else "grouped heads are not taken")


def _padding(ctx: Context, spot: Spot) -> str:
    if why := _multi_head(ctx, spot):
        return why
    node = spot.nodes[0]
    mask = _input(node, 3)
    if mask is None or mask.dtype is not ir.DataType.BOOL or ctx.mask(mask) != "padding" or len(mask.shape or ()) != 4:
        return "the mask is not seen to be padding alone"
    if _input(node, 4) is not None:
        return "a cache with padding is not taken"
    same = _dim(mask, 0) is not None and _dim(mask, 0) == _dim(node.inputs[0], 0)
    return "" if same else "the mask has no row for each sample"


def _grouped(ctx: Context, spot: Spot) -> str:
    if why := _plain(ctx, spot):
        return why
    node = spot.nodes[0]
    width, heads = _dim(node.inputs[0], 2), heads_of(node)[0]
    if not isinstance(width, int) or width // heads % 8:
        return "takes heads of a multiple of 8 channels"  # checked by the kernels of CPU and CUDA when they run
    one = _dim(node.inputs[0], 1) == 1
    if _input(node, 4) is not None and not one and _dim(node.inputs[0], 0) != 1:
        return "with a cache it takes one new token, or one sample"  # ONNX Runtime refuses others when it runs
    if one or ctx.mask(_input(node, 3)) in ("causal", "causal+") or _window(ctx, node):
        return ""
    return "the mask is not seen to be causal"


def _window(ctx: Context, node: ir.Node) -> int:
    """How many keys a causal window shows that hides nothing else, 0 where the mask is another one."""
    kind, _, width = ctx.mask(_input(node, 3)).partition(" ")
    return int(width) if kind == "window" else 0


# ---- rewrites --------------------------------------------------------------------------------------------------------


def _standard(ctx: Context, spot: Spot) -> None:
    """The operator as it is, its mask with a row for every query."""
    node, mask = spot.nodes[0], _input(spot.nodes[0], 3)
    q = node.inputs[0]
    if mask is not None and q is not None:
        ctx.g.set_input(node, 3, _full_rows(ctx, mask, q))


def _decomposed(ctx: Context, spot: Spot) -> None:
    node = spot.nodes[0]
    ctx.g.replace(node.outputs[0], spell_attention(ctx.g, node, exact_rows=_empty(ctx, node)))


def _empty(ctx: Context, node: ir.Node) -> bool:
    """Whether zeros of rows without a key have to be written out."""
    return bool(ctx.moves_rows(_input(node, 3)))


def _take(ctx: Context, spot: Spot, op: str, args: list[ir.Value | None], **attrs: int | float) -> None:
    """Put one operator of the runtime in place of the standard one, cache included."""
    node = spot.nodes[0]
    count = len(node.outputs) if op != "GroupQueryAttention" else 3
    out = ctx.g.op(
        op, *args, domain=CONTRIB, outputs=count, name=f"{node.name}_{op.lower()}", like=node.outputs[0],
        scale=scale_of(node), **attrs,
    )  # fmt: skip
    made = out.producer()
    assert made is not None
    for old, new in zip(node.outputs, made.outputs, strict=False):
        if old is not node.outputs[0]:
            new.type, new.shape = old.type, old.shape
        ctx.g.replace(old, new)


def _as_multi_head(ctx: Context, spot: Spot, *, row: bool) -> None:
    """`MultiHeadAttention`, the mask as numbers to add or as a row of real keys."""
    node = spot.nodes[0]
    q, mask = node.inputs[0], _input(node, 3)
    assert q is not None
    dtype = (q.dtype or ir.DataType.FLOAT).numpy()
    keys = padding_row(ctx, mask) if mask is not None and row else None
    bias = float_mask(ctx, mask, q) if mask is not None and not row else None
    args = [*node.inputs[:3], None, keys, bias, _input(node, 4), _input(node, 5)]
    low = float(np.finfo(dtype).min / 2)
    _take(ctx, spot, "MultiHeadAttention", args, num_heads=heads_of(node)[0], mask_filter_value=low)


def _as_grouped(ctx: Context, spot: Spot) -> None:
    """`GroupQueryAttention`, causal and with a window by itself; anything else the mask forbids is added."""
    node, g = spot.nodes[0], ctx.g
    q, k, mask, past = node.inputs[0], node.inputs[1], _input(node, 3), _input(node, 4)
    assert q is not None
    assert k is not None
    new, old = g.op("Shape", k, start=1, end=2), None if past is None else g.op("Shape", past, start=2, end=3)
    total = g.op("Cast", new if old is None else g.op("Add", new, old), to=int(ir.DataType.INT32))
    last = g.op("Expand", g.op("Sub", total, np.array([1], np.int32)), g.op("Shape", q, start=0, end=1))
    window = _window(ctx, node)
    bias = None if mask is None or window or ctx.mask(mask) == "causal" else float_mask(ctx, mask, q)
    whole = g.op("Squeeze", total, ints(0))
    args = [*node.inputs[:3], past, _input(node, 5), last, whole, None, None, None, bias]
    heads, kv = heads_of(node)
    attrs = {"local_window_size": window} if window else {}
    _take(ctx, spot, "GroupQueryAttention", args, num_heads=heads, kv_num_heads=kv, **attrs)


ATTENTION = Kind(
    "attention",
    _find,
    (
        Form("Attention", _standard, (("", "Attention"),)),
        Form("decomposed", _decomposed, (), lambda ctx, spot: unspeakable(spot.nodes[0])),
        Form(
            "MultiHeadAttention",
            lambda ctx, spot: _as_multi_head(ctx, spot, row=False),
            ((CONTRIB, "MultiHeadAttention"),),
            _multi_head,
        ),
        Form(
            "MultiHeadAttention padding",
            lambda ctx, spot: _as_multi_head(ctx, spot, row=True),
            ((CONTRIB, "MultiHeadAttention"),),
            _padding,
        ),
        Form("GroupQueryAttention", _as_grouped, ((CONTRIB, "GroupQueryAttention"),), _grouped),
    ),
)
