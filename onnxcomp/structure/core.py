"""The core of attention in four axes: from a Softmax up to the product of queries and keys, down to the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.structure.mask import Masks
from onnxcomp.structure.rules import axis_of
from onnxcomp.structure.shapes import Facts

__all__ = ["Core", "NotAttention", "find_core", "raise_core"]


class NotAttention(Exception):
    """Why a Softmax is not raised; caught where the site is declined."""


@dataclass
class Core:
    """`softmax(scale * q @ k + masks) @ v`; `k` is `[b, n, h, t]`, `out` the product with `v`, or what guards it.

    `changes` tells that rows which see no key would come out differently.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    out: ir.Value
    scale: float
    softcap: float = 0.0
    masks: list[ir.Value] = field(default_factory=list)
    changes: bool = False


@dataclass
class _Walk:
    """State of the way up from the Softmax."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[ir.Value] = field(default_factory=list)
    finite: bool = False


def find_core(g: Graph, f: Facts, masks: Masks, softmax: ir.Node) -> Core:
    """The attention around a Softmax; raises `NotAttention` with the reason when it is none."""
    x = softmax.inputs[0]
    rank = f.rank(x)
    if x is None or rank is None:
        raise NotAttention("the number of axes of the scores is not known")
    if axis_of(softmax, rank) != rank - 1:
        raise NotAttention("the softmax is not over the last axis")
    walk = _Walk()
    product = _up(f, masks, walk, x)
    if rank != 4:
        raise NotAttention(f"the scores have {rank} axes, not 4")
    guarded, v, out = _down(f, softmax.outputs[0])
    q, k = product.inputs[0], product.inputs[1]
    if q is None or k is None or v is None:
        raise NotAttention("an input of a product is missing")
    repeated = masks.guarded(out, walk.masks[0] if len(walk.masks) == 1 else None)
    changes = repeated is None and (walk.finite or not guarded)
    core = Core(q, k, v, repeated or out, walk.scale, walk.softcap, walk.masks, bool(walk.masks) and changes)
    _check(f, core)
    return core


def _up(f: Facts, masks: Masks, walk: _Walk, v: ir.Value) -> ir.Node:
    """Collect scale and masks from `v` up to the product of queries and keys."""
    node = v.producer()
    if v.is_graph_output() or len(set(v.uses())) > 1:
        raise NotAttention("the scores are read elsewhere")
    if node is None or node.domain or not _leads_up(f, v):
        raise NotAttention("no product of queries and keys above the softmax")
    step: Callable[..., ir.Value] | None = _STEPS.get(node.op_type)
    if step is None:
        return node
    return _up(f, masks, walk, step(f, masks, walk, node))


def _leads_up(f: Facts, v: ir.Value | None, depth: int = 12) -> bool:
    """Whether a chain of scalings, masks and casts ends in a product of two computed values."""
    node = v.producer() if v is not None else None
    if node is None or node.domain or depth == 0:
        return False
    if node.op_type == "MatMul":
        return not any(f.g.is_constant(x) for x in node.inputs)
    if node.op_type not in _STEPS:
        return False
    return any(_leads_up(f, x, depth - 1) for x in node.inputs)


def _mask_added(f: Facts, masks: Masks, walk: _Walk, node: ir.Node) -> ir.Value:
    a, b = node.inputs[0], node.inputs[1]
    scores, mask = (a, b) if _leads_up(f, a) else (b, a)
    if scores is None or mask is None:
        raise NotAttention("an input of the mask addition is missing")
    meaning = masks.as_bool(mask)
    if meaning is None and walk.scale != 1.0:
        raise NotAttention("the scale is applied after a position bias")
    walk.masks.append(meaning if meaning is not None else mask)
    walk.finite |= masks.is_finite(mask)
    return scores


def _mask_selected(f: Facts, masks: Masks, walk: _Walk, node: ir.Node) -> ir.Value:
    condition, x, y = node.inputs[:3]
    for scores, fill, positive in ((x, y, True), (y, x, False)):
        low = masks.fill(fill)
        if scores is not None and condition is not None and low is not None and _leads_up(f, scores):
            walk.masks.append(condition if positive else masks.negated(condition))
            walk.finite |= low != -np.inf
            return scores
    raise NotAttention("the scores are selected by something that is not a mask")


def _scaled(f: Facts, masks: Masks, walk: _Walk, node: ir.Node) -> ir.Value:
    a, b = node.inputs[0], node.inputs[1]
    x, number = (a, f.scalar(b)) if f.scalar(b) is not None else (b, f.scalar(a))
    if x is None or number is None or not np.isfinite(number) or (node.op_type == "Div" and (x is b or number == 0)):
        raise NotAttention("the scores are scaled by something computed")
    factor = number if node.op_type == "Mul" else 1 / number
    inner = x.producer()
    if inner is not None and inner.op_type == "Tanh" and walk.scale == 1.0 and not walk.softcap:
        walk.softcap = factor
        return x
    walk.scale *= factor
    return x


def _capped(f: Facts, masks: Masks, walk: _Walk, node: ir.Node) -> ir.Value:
    """The inside of `cap * tanh(scores / cap)`: the 1 / cap belongs to the operator, not to the scale."""
    if not walk.softcap or walk.scale != 1.0 or node.inputs[0] is None:
        raise NotAttention("the scores go through a Tanh that is no soft-cap")
    walk.scale *= walk.softcap
    return node.inputs[0]


def _passed(f: Facts, masks: Masks, walk: _Walk, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    if x is None or (node.op_type == "Cast" and x.dtype != node.outputs[0].dtype):
        raise NotAttention("the scores are cast to another type")
    return x


_STEPS: dict[str, Callable[[Facts, Masks, _Walk, ir.Node], ir.Value]] = {
    "Add": _mask_added,
    "Where": _mask_selected,
    "Mul": _scaled,
    "Div": _scaled,
    "Tanh": _capped,
    "Cast": _passed,
    "Identity": _passed,
}


def _down(f: Facts, p: ir.Value) -> tuple[bool, ir.Value | None, ir.Value]:
    """Whether NaN is guarded, the values, and the product, from the probabilities on."""
    guarded = False
    while True:
        users = list(dict.fromkeys(u for u, _ in p.uses()))
        guard = _guard(f, p, users)
        if guard is not None:
            guarded, p = True, guard
            continue
        if p.is_graph_output() or len(users) != 1:
            raise NotAttention("the attention probabilities are read elsewhere")
        node = users[0]
        if node.op_type == "MatMul" and node.inputs[0] is p and not f.g.is_constant(node.inputs[1]):
            return guarded, node.inputs[1], node.outputs[0]
        if node.op_type not in ("Identity", "Cast") or (node.op_type == "Cast" and p.dtype != node.outputs[0].dtype):
            raise NotAttention(f"the softmax is followed by {node.op_type}, not by a product with values")
        p = node.outputs[0]


def _guard(f: Facts, p: ir.Value, users: list[ir.Node]) -> ir.Value | None:
    """`Where(IsNaN(p), 0, p)`, which only tidies up rows that see no key."""
    kinds = {u.op_type: u for u in users}
    if set(kinds) != {"IsNaN", "Where"} or len(users) != 2 or p.is_graph_output():
        return None
    where, zero = kinds["Where"], f.uniform(kinds["Where"].inputs[1])
    right = where.inputs[0] is kinds["IsNaN"].outputs[0] and where.inputs[2] is p
    return where.outputs[0] if right and zero is not None and zero.value == 0.0 else None


def _check(f: Facts, core: Core) -> None:
    q, k, v = f.shape(core.q), f.shape(core.k), f.shape(core.v)
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        raise NotAttention("queries, keys and values do not all have 4 axes")
    if not (f.same(q[0], k[0]) and f.same(q[0], v[0])):
        raise NotAttention("queries, keys and values differ in batch size")
    if not isinstance(q[1], int) or not isinstance(k[1], int) or not isinstance(q[3], int) or not isinstance(v[3], int):
        raise NotAttention("head count or head width is not static")
    if k[1] != v[1] or k[1] not in (1, q[1]):
        raise NotAttention(f"{q[1]} query heads meet {k[1]} key heads")
    if core.softcap and core.scale == 0:
        raise NotAttention("the scale is zero")


def raise_core(g: Graph, f: Facts, masks: Masks, core: Core) -> None:
    """Replace a core by one Attention in four axes."""
    dtype = core.q.dtype or core.out.dtype or ir.DataType.FLOAT
    keys = g.op("Transpose", core.k, perm=[0, 1, 3, 2])
    mask = masks.combined(core.masks, dtype)
    cap = core.softcap if core.softcap else None
    g.replace(core.out, g.op("Attention", core.q, keys, core.v, mask, scale=core.scale, softcap=cap, like=core.out))
