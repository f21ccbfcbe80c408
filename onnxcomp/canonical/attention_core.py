"""The core of attention: from a Softmax back to the product of queries and keys, forward to that with values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.canonical.attention_axes import Heads, NotAttention, heads_of, regroups
from onnxcomp.canonical.masks import Masks
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.canonical.sinks import find_sink, mask_with_sink, with_zero_key
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OR_CAST
from onnxcomp.graph.values import users_of

__all__ = ["Core", "NotAttention", "find_core", "is_routing", "raise_core"]

# Scalings, masks and casts between the product and the softmax; bounds the search, which branches at every addition.
MAX_DEPTH = 12
ROUTER_LAYOUT = LAYOUT_OR_CAST | {"Sub"}  # between a router's softmax and the choice; Sub takes the maximum away


@dataclass
class Bias:
    """A mask or bias that is added to the scores, and its factor: the scale between it and the softmax."""

    value: ir.Value
    factor: float = 1.0


@dataclass
class Core:
    """`softmax(scale * q @ k + masks) @ v`; `k` is `[b, n, h, t]`, `out` the product with `v`, or the guard behind it.

    `changes`: query rows without visible keys would change. `precision`: the type of the softmax where it differs from
    that of the products. `heads`: how products of 3 or 5 axes become 4. `row_scales` `[.., 1]` multiply rows of scores.
    `sink` `[.., n, 1, 1]` is a score of no key.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    out: ir.Value
    scale: float
    softcap: float = 0.0
    masks: list[Bias] = field(default_factory=list)
    changes: bool = False
    precision: ir.DataType | None = None
    heads: Heads = field(default_factory=Heads)
    row_scales: list[ir.Value] = field(default_factory=list)
    sink: ir.Value | None = None


@dataclass
class _State:
    """What was collected on the way back from the Softmax to the scores' product."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Bias] = field(default_factory=list)
    row_scales: list[ir.Value] = field(default_factory=list)
    finite: bool = False
    wide: bool = False  # the scores were cast to a wider type


def is_routing(softmax: ir.Node) -> bool:
    """Whether a Softmax makes the scores of a router of experts: TopK or ArgMax chooses of them, or chose them."""
    v: ir.Value | None = softmax.inputs[0]
    while v is not None and (node := v.producer()) is not None and node.op_type in ROUTER_LAYOUT:
        v = node.inputs[0]
    if v is not None and (node := v.producer()) is not None and node.op_type == "TopK":
        return True
    pending = list(softmax.outputs)
    while pending:
        for user in users_of(pending.pop()):
            if user.op_type == "TopK" or _takes_highest(user):
                return True
            pending += user.outputs if user.op_type in ROUTER_LAYOUT else ()
    return False


def _takes_highest(node: ir.Node) -> bool:
    """Whether a node reads the one score of each row that an ArgMax points to."""
    index = node.inputs[1].producer() if node.op_type == "GatherElements" and node.inputs[1] is not None else None
    return index is not None and index.op_type == "ArgMax"


def find_core(g: Graph, f: Facts, masks: Masks, softmax: ir.Node) -> Core:
    """The attention around a Softmax; raises `NotAttention` with the reason where it is none."""
    x = softmax.inputs[0]
    rank = f.rank(x)
    if x is None or rank is None:
        raise NotAttention("the rank of the scores is unknown")
    if axis_of(softmax, rank) != rank - 1:
        raise NotAttention("the softmax is not over the last axis")
    state, sink = _State(), find_sink(f, softmax)
    product = _to_product(f, masks, state, x if sink is None else sink.scores)
    guarded, v, out, cast_back = _to_values(f, softmax.outputs[0] if sink is None else sink.kept)
    q, k = product.inputs[0], product.inputs[1]
    if q is None or k is None or v is None:
        raise NotAttention("an input of a product is missing")
    if state.wide != cast_back:
        raise NotAttention("the scores are cast to another type and not back")
    only = state.masks[0].value if len(state.masks) == 1 else None
    repeated = masks.guarded(out, only)
    exact = repeated is not None and (only is None or masks.is_bool(only))
    changes = sink is None and not exact and (state.finite or not guarded)
    core = Core(q, k, v, repeated or out, state.scale, state.softcap, state.masks, bool(state.masks) and changes)
    core.sink = None if sink is None else sink.logits
    core.precision = softmax.outputs[0].dtype or x.dtype if state.wide else None
    core.heads, core.row_scales = heads_of(f, q, k, v, product.outputs[0]), state.row_scales
    if core.row_scales and core.heads.rank != 4:
        raise NotAttention("the scores are scaled by a computed value")
    if state.masks and state.scale <= 0:
        raise NotAttention("the scale of masked scores is not positive")
    if core.sink is not None and (core.heads.rank != 4 or state.wide):
        raise NotAttention("a sink is joined to scores without an axis of heads or of another type")
    return core


def _to_product(f: Facts, masks: Masks, state: _State, v: ir.Value) -> ir.Node:
    """The product of queries and keys behind `v`; scale and masks on the way go into `state`."""
    node = v.producer()
    if v.is_graph_output() or len(set(v.uses())) > 1:
        raise NotAttention("the scores have other users")
    if node is None or node.domain or not _leads_to_product(f, v):
        if node is not None and node.op_type == "DequantizeLinear":
            raise NotAttention("its scores are quantized")
        raise NotAttention("no product of queries and keys leads to the softmax")
    step: Callable[..., ir.Value] | None = _STEPS.get(node.op_type)
    if step is None:
        return node
    return _to_product(f, masks, state, step(f, masks, state, node))


def _leads_to_product(f: Facts, v: ir.Value | None, depth: int = MAX_DEPTH) -> bool:
    """Whether scalings, masks and casts lead back to a product of two computed values."""
    node = v.producer() if v is not None else None
    if node is None or node.domain or depth == 0:
        return False
    if node.op_type == "MatMul":
        return not any(f.g.is_constant(x) for x in node.inputs)
    if node.op_type not in _STEPS:
        return False
    return any(_leads_to_product(f, x, depth - 1) for x in node.inputs)


def _outside(state: _State, how: str) -> None:
    """Raise where a mask acts on scores that are changed behind it in a way the operator has not."""
    if state.softcap:
        raise NotAttention(f"a mask is {how} inside the soft-cap")
    if state.row_scales:
        raise NotAttention(f"a mask is {how} before the scores are scaled by a computed value")


def _mask_added(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    a, b = node.inputs[0], node.inputs[1]
    scores, mask = (a, b) if _leads_to_product(f, a) else (b, a)
    if scores is None or mask is None:
        raise NotAttention("an input of the mask addition is missing")
    _outside(state, "added")
    bool_mask = masks.as_bool(mask)
    state.masks.append(Bias(bool_mask) if bool_mask is not None else Bias(mask, state.scale))
    state.finite |= masks.is_finite(mask)
    return scores


def _mask_subtracted(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    scores, mask = node.inputs[0], node.inputs[1]
    if scores is None or mask is None or state.softcap or state.row_scales or not _leads_to_product(f, scores):
        raise NotAttention("the scores are subtracted from another value, or a mask is subtracted inside the soft-cap")
    bool_mask = masks.subtracted(mask)
    state.masks.append(Bias(bool_mask) if bool_mask is not None else Bias(mask, -state.scale))
    state.finite = True
    return scores


def _mask_selected(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    condition, x, y = node.inputs[:3]
    _outside(state, "applied")
    for scores, fill, positive in ((x, y, True), (y, x, False)):
        low = masks.fill(fill)
        if scores is not None and condition is not None and low is not None and _leads_to_product(f, scores):
            state.masks.append(Bias(condition if positive else masks.negated(condition)))
            state.finite |= low != -np.inf
            return scores
    raise NotAttention("a Where that is no mask selects the scores")


def _scaled(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    a, b = node.inputs[0], node.inputs[1]
    for x, factor in ((a, b), (b, a)):
        if (
            x is not None
            and node.op_type == "Mul"
            and _is_masked_already(masks, state, factor)
            and _leads_to_product(f, x)
        ):
            return x
    x, number = (a, f.scalar(b)) if f.scalar(b) is not None else (b, f.scalar(a))
    if number is None and node.op_type == "Mul" and not state.softcap:
        rows = _row_scaled(f, state, a, b) or _row_scaled(f, state, b, a)
        if rows is not None:
            return rows
    if x is None or number is None or not np.isfinite(number) or (node.op_type == "Div" and (x is b or number == 0)):
        raise NotAttention("the scores are scaled by a computed value")
    state.scale *= number if node.op_type == "Mul" else 1 / number
    return x


def _row_scaled(f: Facts, state: _State, x: ir.Value | None, factor: ir.Value | None) -> ir.Value | None:
    """The scores that are multiplied by one factor a row or head, which may multiply the queries instead."""
    shape = f.shape(factor)
    if x is None or factor is None or not shape or shape[-1] != 1 or len(shape) > 4 or not _leads_to_product(f, x):
        return None
    state.row_scales.append(factor)
    return x


def _is_masked_already(masks: Masks, state: _State, factor: ir.Value | None) -> bool:
    """Whether a factor of zeros and ones is 0 only where a mask found before hides the key anyway."""
    if not state.masks or factor is None or (masks.g.is_constant(factor) and masks.f.scalar(factor) is not None):
        return False
    bool_mask = masks.uncast(factor)
    return bool_mask is not None and any(m.value is bool_mask for m in state.masks)


def _softcapped(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    """`cap * tanh(a * s) = cap * tanh(scale * s / cap)` with `scale = a * cap`, whatever the order of the factors."""
    if state.softcap or state.scale <= 0 or node.inputs[0] is None:
        raise NotAttention("a Tanh that is no soft-cap is applied to the scores")
    state.softcap = state.scale
    return node.inputs[0]


def _casts(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    if x is None:
        raise NotAttention("an operand of the scores is missing")
    if node.op_type == "Cast" and x.dtype != node.outputs[0].dtype:
        to, source_type = node.attributes.get_int("to", 1), x.dtype
        if state.wide or to != ir.DataType.FLOAT or source_type not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise NotAttention("the scores are cast to another type")
        if any(not masks.is_bool(m.value) for m in state.masks):
            raise NotAttention("a float bias is added in a wider type than that of queries and keys")
        state.wide = True
    return x


def _regrouped(f: Facts, masks: Masks, state: _State, node: ir.Node) -> ir.Value:
    """Heads and batch as one axis or as two: `[b * n, s, t]` and `[b, n, s, t]`."""
    x = node.inputs[0]
    if x is None or not regroups(f, x, node.outputs[0]):
        raise NotAttention("a Reshape changes the scores in other axes than batch and heads")
    return x


_STEPS: dict[str, Callable[[Facts, Masks, _State, ir.Node], ir.Value]] = {
    "Add": _mask_added,
    "Sub": _mask_subtracted,
    "Where": _mask_selected,
    "Mul": _scaled,
    "Div": _scaled,
    "Tanh": _softcapped,
    "Cast": _casts,
    "Identity": _casts,
    "Reshape": _regrouped,
    "Unsqueeze": _regrouped,
    "Squeeze": _regrouped,
}


def _to_values(f: Facts, p: ir.Value) -> tuple[bool, ir.Value | None, ir.Value, bool]:
    """From the probabilities on: whether NaN is guarded, the values, the product, and whether a cast came before."""
    guarded = cast_back = False
    while True:
        users = users_of(p)
        guard = _guard(f, p, users)
        if guard is not None:
            guarded, p = True, guard
            continue
        if p.is_graph_output() or len(users) != 1:
            raise NotAttention("the attention probabilities have other users")
        node = users[0]
        if node.op_type == "MatMul" and node.inputs[0] is p and not f.g.is_constant(node.inputs[1]):
            return guarded, node.inputs[1], node.outputs[0], cast_back
        out = node.outputs[0]
        if node.op_type == "Cast" and p.dtype != out.dtype and p.dtype == ir.DataType.FLOAT and not cast_back:
            cast_back = True
        elif node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
            if not regroups(f, p, out):
                raise NotAttention("a Reshape changes the probabilities in other axes than batch and heads")
        elif node.op_type not in ("Identity", "Cast") or (node.op_type == "Cast" and p.dtype != out.dtype):
            raise NotAttention(f"the softmax is followed by {node.op_type}, not by a product with values")
        p = out


def _guard(f: Facts, p: ir.Value, users: list[ir.Node]) -> ir.Value | None:
    """`Where(IsNaN(p), 0, p)`, which only affects rows without visible keys."""
    kinds = {u.op_type: u for u in users}
    if set(kinds) != {"IsNaN", "Where"} or len(users) != 2 or p.is_graph_output():
        return None
    where, zero = kinds["Where"], f.uniform(kinds["Where"].inputs[1])
    matches = where.inputs[0] is kinds["IsNaN"].outputs[0] and where.inputs[2] is p
    return where.outputs[0] if matches and zero is not None and zero.value == 0.0 else None


def raise_core(g: Graph, sizes: Sizes, masks: Masks, core: Core) -> None:
    """Replace a core by one Attention in four axes; raises `NotAttention` where its operands do not fit together."""
    four = core.heads.four(sizes, core.q, core.k, core.v, [m.value for m in core.masks])
    dtype = core.q.dtype or core.out.dtype or ir.DataType.FLOAT
    keys = g.op("Transpose", four.k, perm=[0, 1, 3, 2])
    scaled = [masks.scaled(m, bias.factor) for m, bias in zip(four.masks, core.masks, strict=True)]
    mask, values = masks.combined(scaled, dtype), four.v
    queries = four.q
    for factor in core.row_scales:
        queries = g.op("Mul", queries, factor, like=four.q)
    if core.sink is not None:
        mask = _mask_with_sink(sizes, masks, core, mask)
        keys.type = core.k.type
        keys, values = (with_zero_key(g, x, 4) for x in (keys, values))
    new = g.op("Attention", queries, keys, values, mask, scale=core.scale, softcap=core.softcap or None)
    node = new.producer()
    if node is not None and core.precision is not None:
        g.set_attr(node, softmax_precision=int(core.precision))
    g.replace(core.out, core.heads.back(sizes, new, core.out))


def _mask_with_sink(sizes: Sizes, masks: Masks, core: Core, mask: ir.Value | None) -> ir.Value:
    assert core.sink is not None
    f, (q, k) = sizes.f, (sizes.f.shape(core.q) or (1,), sizes.f.shape(core.k) or (1,))
    lengths = [f.equal.plain(q[-2]), f.equal.plain(k[-1])]
    fitted = None if mask is None else masks.with_full_axes(mask, lengths[0], lengths[1], sizes)
    if (mask is not None and fitted is None) or not sizes.can_compute(lengths):
        raise NotAttention("the numbers of queries and keys, to which a sink is joined, are not known")
    return mask_with_sink(masks, sizes, fitted, core.sink, lengths)
