"""Forms of Attention with rank-3 inputs: the standard operator, ONNX Runtime's own operators, and decomposed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.canonical.sinks import has_sink
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot, ints
from onnxcomp.lowering.older_opsets import decompose_attention, not_decomposable, scale_of

__all__ = ["ATTENTION", "float_mask", "heads_of", "padding_row"]


def _find(g: Graph) -> list[Spot]:
    return [Spot("attention", str(n.name), (n,), "Attention") for n in g.nodes("Attention") if n.domain == ""]


# ---- masks, in the layouts that the runtime's operators take ---------------------------------------------------------


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dim(v: ir.Value | None, axis: int) -> int | str | None:
    """The recorded size of an axis: a number, a name, or None."""
    if v is None or v.shape is None or not -len(v.shape) <= axis < len(v.shape):
        return None
    d = v.shape[axis]
    return d if isinstance(d, int) else d.value


def _full_rows(ctx: Context, mask: ir.Value, q: ir.Value) -> ir.Value:
    """The mask with a row for every query, as kernels do not broadcast that axis."""
    if _dim(mask, -2) != 1 or _dim(q, -2) == 1 or mask.shape is None:
        return mask
    ones = np.ones(len(mask.shape) - 2, np.int64)

    def make() -> ir.Value:
        rows = ctx.g.op("Shape", q, start=-2, end=-1)
        parts: list[ir.Value | np.ndarray] = [ones, rows, ints(1)] if len(ones) else [rows, ints(1)]
        expanded = ctx.g.op("Expand", mask, ctx.g.op("Concat", *parts, axis=0), name=f"{mask.name}_rows")
        expanded.type = mask.type
        return expanded

    return ctx.shared("full", mask, make, once=True)


def float_mask(ctx: Context, mask: ir.Value, q: ir.Value) -> ir.Value:
    """The mask as a bias `[b or 1, heads or 1, s, t]`; hidden keys have half the lowest number, as -inf gives NaN."""

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
    """Which keys are not padding, int32 `[b, t]`, of a bool mask `[b, 1 or heads, s or 1, t]` equal for all queries."""

    def make() -> ir.Value:
        first = ctx.g.op("Slice", mask, ints(0, 0), ints(1, 1), ints(1, 2), name=f"{mask.name}_first")
        flat = ctx.g.op("Squeeze", first, ints(1, 2), name=f"{mask.name}_row")
        return ctx.g.op("Cast", flat, to=int(ir.DataType.INT32), name=f"{mask.name}_keys")

    return ctx.shared("padding", mask, make, once=True)


def heads_of(node: ir.Node) -> tuple[int, int]:
    """Number of query heads and of key heads."""
    return node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)


# ---- why not ---------------------------------------------------------------------------------------------------------


def _refuse_contrib(ctx: Context, spot: Spot) -> str:
    """Why none of the runtime's own operators fits an attention, empty if some may."""
    node = spot.nodes[0]
    if why := not_decomposable(node):
        return f"{why} is not taken"
    q, mask = node.inputs[0], _input(node, 3)
    if q is None or q.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "takes float32 and float16"
    if mask is not None and (mask.shape is None or not 2 <= len(mask.shape) <= 4):
        return "the rank of the mask is not known"
    capped = bool(node.attributes.get_float("softcap", 0.0))
    return "soft-capped scores are not taken" if capped else ctx.changes_masked_rows(mask)


def _refuse_multi_head(ctx: Context, spot: Spot) -> str:
    heads, kv = heads_of(spot.nodes[0])
    return _refuse_contrib(ctx, spot) or ("" if heads == kv else "grouped heads are not taken")


def _refuse_padding(ctx: Context, spot: Spot) -> str:
    if why := _refuse_multi_head(ctx, spot):
        return why
    node = spot.nodes[0]
    mask = _input(node, 3)
    if mask is None or mask.dtype is not ir.DataType.BOOL or ctx.mask(mask) != "padding" or len(mask.shape or ()) != 4:
        return "the mask is not seen to be padding alone"
    if _input(node, 4) is not None:
        return "a cache with padding is not taken"
    same = _dim(mask, 0) is not None and _dim(mask, 0) == _dim(node.inputs[0], 0)
    return "" if same else "the mask has no row for each sample"


def _refuse_grouped(ctx: Context, spot: Spot) -> str:
    if why := _refuse_contrib(ctx, spot):
        return why
    node = spot.nodes[0]
    if has_sink(node):
        return "a score that belongs to no key is not taken"
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
    """The width of a mask that is just a causal window, 0 for any other mask."""
    kind, _, width = ctx.mask(_input(node, 3)).partition(" ")
    return int(width) if kind == "window" else 0


# ---- rewrites --------------------------------------------------------------------------------------------------------


def _standard(ctx: Context, spot: Spot) -> None:
    """The operator itself, its mask with a row for every query."""
    node, mask = spot.nodes[0], _input(spot.nodes[0], 3)
    q = node.inputs[0]
    if mask is not None and q is not None:
        ctx.g.set_input(node, 3, _full_rows(ctx, mask, q))


def _decomposed(ctx: Context, spot: Spot) -> None:
    node = spot.nodes[0]
    ctx.g.replace(node.outputs[0], decompose_attention(ctx.g, node, exact_rows=_zeroes_masked_rows(ctx, node)))


def _zeroes_masked_rows(ctx: Context, node: ir.Node) -> bool:
    """Whether the decomposed form must produce zeros for queries without a key."""
    return bool(ctx.changes_masked_rows(_input(node, 3)))


def _replace_attention(ctx: Context, spot: Spot, op: str, args: list[ir.Value | None], **attrs: int | float) -> None:
    """Replace the standard operator, including its cache outputs, by one of the runtime."""
    node = spot.nodes[0]
    count = len(node.outputs) if op != "GroupQueryAttention" else 3
    out = ctx.g.op(
        op, *args, domain=CONTRIB, outputs=count, name=f"{node.name}_{op.lower()}", like=node.outputs[0],
        scale=scale_of(node), **attrs,
    )  # fmt: skip
    node_made = out.producer()
    assert node_made is not None
    for old, new in zip(node.outputs, node_made.outputs, strict=False):
        if old is not node.outputs[0]:
            new.type, new.shape = old.type, old.shape
        ctx.g.replace(old, new)


def _as_multi_head(ctx: Context, spot: Spot, *, row: bool) -> None:
    """`MultiHeadAttention` with the mask as a bias, or (`row`) as one row of visible keys per sample."""
    node = spot.nodes[0]
    q, mask = node.inputs[0], _input(node, 3)
    assert q is not None
    dtype = (q.dtype or ir.DataType.FLOAT).numpy()
    keys = padding_row(ctx, mask) if mask is not None and row else None
    bias = float_mask(ctx, mask, q) if mask is not None and not row else None
    args = [*node.inputs[:3], None, keys, bias, _input(node, 4), _input(node, 5)]
    low = float(np.finfo(dtype).min / 2)
    _replace_attention(ctx, spot, "MultiHeadAttention", args, num_heads=heads_of(node)[0], mask_filter_value=low)


def _as_grouped(ctx: Context, spot: Spot) -> None:
    """`GroupQueryAttention`, which is causal and can have a window; other masks are added as a bias."""
    node, g = spot.nodes[0], ctx.g
    q, k, mask, past = node.inputs[0], node.inputs[1], _input(node, 3), _input(node, 4)
    assert q is not None
    assert k is not None
    new, old = g.op("Shape", k, start=1, end=2), None if past is None else g.op("Shape", past, start=2, end=3)
    total = g.op("Cast", new if old is None else g.op("Add", new, old), to=int(ir.DataType.INT32))
    last = g.op("Expand", g.op("Sub", total, np.array([1], np.int32)), g.op("Shape", q, start=0, end=1))
    window = _window(ctx, node)
    bias = None if mask is None or window or ctx.mask(mask) == "causal" else float_mask(ctx, mask, q)
    length = g.op("Squeeze", total, ints(0))
    args = [*node.inputs[:3], past, _input(node, 5), last, length, None, None, None, bias]
    heads, kv = heads_of(node)
    attrs = {"local_window_size": window} if window else {}
    _replace_attention(ctx, spot, "GroupQueryAttention", args, num_heads=heads, kv_num_heads=kv, **attrs)


ATTENTION = Kind(
    "attention",
    _find,
    (
        Form("Attention", _standard, (("", "Attention"),)),
        Form("decomposed", _decomposed, (), lambda ctx, spot: not_decomposable(spot.nodes[0])),
        Form(
            "MultiHeadAttention",
            lambda ctx, spot: _as_multi_head(ctx, spot, row=False),
            ((CONTRIB, "MultiHeadAttention"),),
            _refuse_multi_head,
        ),
        Form(
            "MultiHeadAttention padding",
            lambda ctx, spot: _as_multi_head(ctx, spot, row=True),
            ((CONTRIB, "MultiHeadAttention"),),
            _refuse_padding,
        ),
        Form("GroupQueryAttention", _as_grouped, ((CONTRIB, "GroupQueryAttention"),), _refuse_grouped),
    ),
)
