"""Forms of linears with the same input (query, key, value): separate, joined to one product, or inside an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.attention import float_mask, heads_of
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot
from onnxcomp.lowering.forms.weight_only import bits_in_use
from onnxcomp.lowering.older_opsets import decompose_attention, not_decomposable, scale_of
from onnxcomp.maths import Array

__all__ = ["CODED_SIBLINGS", "PROJECTIONS", "SIBLINGS", "join"]


@dataclass(frozen=True)
class Family:
    """Linears of one input, all or none with a bias, and the attention that is the only user of all three, if any."""

    linears: tuple[Linear, ...]
    attention: ir.Node | None = None


def _families(g: Graph) -> list[Family]:
    groups = blocks.siblings(x for x in blocks.linears(g) if x.node.op_type == "MatMul" and not x.transposed)
    fit = [tuple(group) for group in groups if len(group) > 1 and _joinable(group)]
    return [Family(group, _attention(group)) for group in fit]


def _joinable(group: Sequence[Linear]) -> bool:
    """Whether the weights can be concatenated: one input, one type and granularity, bias vectors for all or none."""
    first = group[0]
    biases = [x.bias for x in group]
    same_biases = all(b is None for b in biases) or all(
        b is not None and b.shape is not None and len(b.shape) == 1 for b in biases
    )
    same = all(x.input is first.input and x.weight.dtype is first.weight.dtype for x in group)
    scales = {_granularity(x) for x in group}
    return same_biases and same and len(scales) == 1 and "other" not in scales


def _granularity(x: Linear) -> str:
    """`float`, `channel` for codes with one scale per column and no zero points, or `block` with its parts."""
    if x.dequantize is None:
        return "float"
    node = x.dequantize
    scale = Graph.tensor(node.inputs[1])
    rank, axis = -1 if scale is None else len(scale.shape), node.attributes.get_int("axis", 1)
    if block := node.attributes.get_int("block_size", 0):
        zeros = Graph.tensor(node.inputs[2]) if len(node.inputs) > 2 else None
        what = f"block {block} {zeros.dtype if zeros is not None else ''}"
        return what if rank == 2 and axis == 0 and Graph.tensor(node.inputs[0]) is not None else "other"
    return "channel" if rank == 1 and axis == 1 and len(node.inputs) == 2 else "other"


def _attention(group: Sequence[Linear]) -> ir.Node | None:
    """The Attention that takes the three linears as query, key and value and is their only user."""
    users = {u for x in group for u, _ in x.output.uses()}
    node = next(iter(users), None)
    if len(group) != 3 or len(users) != 1 or node is None or node.op_type != "Attention" or node.domain:
        return None
    outs = {x.output for x in group}
    alone = all(len(tuple(v.uses())) == 1 and not v.is_graph_output() for v in outs)
    return node if alone and set(node.inputs[:3]) == outs else None


def _spots(g: Graph, kind: str) -> list[Spot]:
    """Families of a kind: of codes in blocks, else those that an attention reads, else others."""
    spots = []
    for family in _families(g):
        in_blocks = _granularity(family.linears[0]).startswith("block")
        if kind != ("coded siblings" if in_blocks else "projections" if family.attention is not None else "siblings"):
            continue
        if in_blocks and len({bits_in_use(g, x.dequantize) for x in family.linears if x.dequantize is not None}) > 1:
            continue  # 2 bits are packed by themselves later
        nodes = [n for x in family.linears for n in (x.dequantize, x.node, x.add) if n is not None]
        nodes += [family.attention] if kind == "projections" and family.attention is not None else []
        spots.append(Spot(kind, family.linears[0].name, tuple(dict.fromkeys(nodes)), "separate", family))
    return spots


# ---- rewrites --------------------------------------------------------------------------------------------------------


def _concatenated(g: Graph, values: Sequence[ir.Value | None], axis: int, name: str) -> ir.Value:
    """Concatenated constants; the data is concatenated when it is read."""
    tensors = [t for t in (g.tensor(v) for v in values) if t is not None]
    shape = [int(d) for d in tensors[0].shape.numpy()]
    shape[axis] = sum(int(t.shape.numpy()[axis]) for t in tensors)

    def content() -> ir.TensorProtocol:
        joined: Array = np.concatenate([t.numpy() for t in tensors], axis)
        return ir.tensor(joined)

    return g.constant(ir.LazyTensor(content, dtype=tensors[0].dtype, shape=ir.Shape(shape)), name)


def join(g: Graph, group: Sequence[Linear]) -> None:
    """One product `x [W1 | W2 | ...]`, one bias, then Split; quantized weights keep a scale per column."""
    first, widths = group[0], [x.sizes[1] for x in group]
    name = f"{first.name}_joined"
    weight = _concatenated(g, [x.weight for x in group], 1, f"{first.weight.name}_joined")
    if first.dequantize is not None:
        weight = _dequantized(g, [x.dequantize for x in group if x.dequantize is not None], weight, name)
    y = g.op("MatMul", first.node.inputs[0], weight, name=name)
    y.type, y.shape = first.output.type, _wider(first.output, sum(widths))
    if first.bias is not None:
        y = g.op(
            "Add",
            y,
            _concatenated(g, [x.bias for x in group], 0, f"{first.bias.name}_joined"),
            name=f"{name}_bias",
            like=y,
        )
    sizes = np.array(widths, np.int64)
    split = g.op("Split", y, sizes, axis=-1, outputs=len(group), name=f"{name}_split").producer()
    assert split is not None
    for x, part in zip(group, split.outputs, strict=True):
        part.type, part.shape = x.output.type, x.output.shape
        g.replace(x.output, part)


def _dequantized(g: Graph, nodes: Sequence[ir.Node], codes: ir.Value, name: str) -> ir.Value:
    """Joined codes as floats: scales, and zero points of blocks, side by side."""
    block = nodes[0].attributes.get_int("block_size", 0)
    sides = [_concatenated(g, [n.inputs[1] for n in nodes], 1 if block else 0, f"{name}_scale")]
    if block and len(nodes[0].inputs) > 2 and nodes[0].inputs[2] is not None:
        sides.append(_concatenated(g, [n.inputs[2] for n in nodes], 1, f"{name}_zeros"))
    weight = f"{name}_weight"
    if not block:
        return g.op("DequantizeLinear", codes, *sides, axis=1, name=weight)
    return g.op("DequantizeLinear", codes, *sides, axis=0, block_size=block, name=weight)


def _wider(v: ir.Value, width: int) -> ir.Shape | None:
    return None if v.shape is None else ir.Shape([*v.shape[:-1], width])


def _ordered(family: Family) -> list[Linear]:
    """The linears as query, key, value."""
    assert family.attention is not None
    by_output = {x.output: x for x in family.linears}
    return [by_output[v] for v in family.attention.inputs[:3] if v is not None]


def _refuse_contrib(ctx: Context, spot: Spot) -> str:
    """Why the runtime's operators that take weights or biases do not fit, empty if they do."""
    family: Family = spot.data
    node, first = family.attention, family.linears[0]
    assert node is not None
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    heads, kv = heads_of(node)
    if any(x.quantized for x in family.linears):
        return "quantized weights are not taken"
    if not_decomposable(node) or len(node.inputs) > 4 or bool(node.attributes.get_float("softcap", 0.0)):
        return "a cache, a flag or soft-capped scores are not taken"
    if heads != kv or len({x.sizes for x in family.linears}) != 1:
        return "query, key and value of different widths are not taken"
    if mask is not None and (mask.shape is None or not 2 <= len(mask.shape) <= 4):
        return "the rank of the mask is not known"
    if why := ctx.changes_masked_rows(mask):
        return why
    fits = first.input.shape is not None and len(first.input.shape) == 3 and first.output.dtype is ir.DataType.FLOAT
    return "" if fits else "takes a float32 input of three axes"


def _packed(ctx: Context, spot: Spot) -> None:
    """`com.microsoft.Attention`: weights and biases of all three inside."""
    family: Family = spot.data
    node, g, three = family.attention, ctx.g, _ordered(family)
    assert node is not None
    assert node.inputs[0] is not None
    weight = _concatenated(g, [x.weight for x in three], 1, f"{three[0].weight.name}_packed")
    if three[0].bias is not None:
        bias = _concatenated(g, [x.bias for x in three], 0, f"{three[0].bias.name}_packed")
    else:
        bias = g.constant(np.zeros(3 * three[0].sizes[1], np.float32), f"{three[0].name}_no_bias")
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    added = None if mask is None else float_mask(ctx, mask, node.inputs[0])
    args = (three[0].node.inputs[0], weight, bias, None, None, added)
    name, like, heads = f"{node.name}_packed", node.outputs[0], heads_of(node)[0]
    scale = scale_of(node)
    g.replace(like, g.op("Attention", *args, domain=CONTRIB, name=name, like=like, num_heads=heads, scale=scale))


def _bias_inside(ctx: Context, spot: Spot) -> None:
    """`MultiHeadAttention` of three products without bias, the biases inside."""
    family: Family = spot.data
    node, g, three = family.attention, ctx.g, _ordered(family)
    assert node is not None
    assert node.inputs[0] is not None
    assert three[0].bias is not None
    bias = _concatenated(g, [x.bias for x in three], 0, f"{three[0].bias.name}_packed")
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    added = None if mask is None else float_mask(ctx, mask, node.inputs[0])
    args = (*(x.node.outputs[0] for x in three), bias, None, added)
    name, like, heads = f"{node.name}_biased", node.outputs[0], heads_of(node)[0]
    scale = scale_of(node)
    y = g.op("MultiHeadAttention", *args, domain=CONTRIB, name=name, like=like, num_heads=heads, scale=scale)
    g.replace(like, y)


def _merged(ctx: Context, spot: Spot) -> None:
    """Decomposed attention with the scale of the scores folded into the query's weight and bias."""
    family: Family = spot.data
    node, q = family.attention, _ordered(family)[0]
    assert node is not None
    factor = np.full(q.sizes[1], scale_of(node))
    exact = bool(ctx.changes_masked_rows(node.inputs[3] if len(node.inputs) > 3 else None))
    ctx.g.scale(q.weight, factor, 1, users=[q.node])
    if q.bias is not None and q.add is not None:
        ctx.g.scale(q.bias, factor, 0, users=[q.add])
    ctx.g.replace(node.outputs[0], decompose_attention(ctx.g, node, scaled=False, exact_rows=exact))


def _refuse_merged(ctx: Context, spot: Spot) -> str:
    family: Family = spot.data
    assert family.attention is not None
    if any(x.quantized for x in family.linears):
        return "quantized weights are not scaled"
    return not_decomposable(family.attention)


def _joined(ctx: Context, spot: Spot) -> None:
    join(ctx.g, spot.data.linears)


_SEPARATE = Form("separate", lambda ctx, spot: None)
SIBLINGS = Kind("siblings", lambda g: _spots(g, "siblings"), (_SEPARATE, Form("joined", _joined)))
# Not timed, as what is timed here is no product with codes yet. One product has less to start and divides better among
# threads, which tells where there is one row: genai's own builder joins query, key and value too.
CODED_SIBLINGS = Kind(
    "coded siblings", lambda g: _spots(g, "coded siblings"), (_SEPARATE, Form("joined", _joined)), timed=False
)
PROJECTIONS = Kind(
    "projections",
    lambda g: _spots(g, "projections"),
    (
        _SEPARATE,
        Form("joined", _joined),
        Form("packed", _packed, ((CONTRIB, "Attention"),), _refuse_contrib),
        Form(
            "bias inside",
            _bias_inside,
            ((CONTRIB, "MultiHeadAttention"),),
            lambda c, s: _refuse_contrib(c, s) or ("" if s.data.linears[0].bias is not None else "there is no bias"),
        ),
        Form("scale merged", _merged, (), _refuse_merged),
    ),
)
