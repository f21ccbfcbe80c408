"""Attention sinks: a logit per head that takes part in the softmax and belongs to no key.

`softmax([scores, sink])[.., :t] @ v` is an attention over one key more, whose value is zero: keys and values get a row
of zeros, so that its score is 0, and the sink is that key's bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.bounds import MAX_FLOATS
from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.analysis.sizes import Size, add
from onnxcomp.canonical.masks import Masks
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.graph import Graph
from onnxcomp.graph.values import users_of

__all__ = ["Sink", "drop_maxima", "find_sink", "has_sink", "mask_with_sink", "with_zero_key", "without_zero_key"]


@dataclass(frozen=True)
class Sink:
    """The `logits` `[.., n, 1, 1]` that are concatenated with `scores`, and the probabilities `kept` without theirs."""

    logits: ir.Value
    scores: ir.Value
    kept: ir.Value


def drop_maxima(g: Graph, f: Facts) -> None:
    """Drop a maximum that is subtracted before a softmax, which is invariant to it."""
    for node in g.nodes("Softmax"):
        x = node.inputs[0]
        sub, rank = x.producer() if x is not None else None, f.rank(x)
        if node.domain or rank is None or sub is None or sub.op_type != "Sub" or sub.domain or sub.inputs[1] is None:
            continue
        largest = sub.inputs[1].producer()
        if largest is None or largest.op_type != "ReduceMax" or largest.inputs[0] is not sub.inputs[0]:
            continue
        axes = f.content(largest.inputs[1]) if len(largest.inputs) > 1 else None
        along = None if axes is None or axes.size != 1 else int(axes.reshape(-1)[0]) % rank
        if along == axis_of(node, rank) and largest.attributes.get_int("keepdims", 1) == 1:
            g.set_input(node, 0, sub.inputs[0])


def find_sink(f: Facts, softmax: ir.Node) -> Sink | None:
    """The sink of a softmax over the last axis, or None."""
    joined, users = softmax.inputs[0], users_of(softmax.outputs[0])
    node = joined.producer() if joined is not None else None
    if joined is None or node is None or node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
        return None
    shapes = [f.shape(x) for x in node.inputs]
    a, b = shapes
    if a is None or b is None or axis_of(node, len(a)) != len(a) - 1 or (a[-1] == 1) == (b[-1] == 1):
        return None
    at = 0 if a[-1] == 1 else 1
    logits, scores = node.inputs[at], node.inputs[1 - at]
    if logits is None or scores is None or len(users) != 1 or len(set(joined.uses())) != 1:
        return None
    keeps = users[0].op_type == "Slice" and users[0].domain == "" and _keeps_scores(f, users[0], shapes[1 - at], at)
    return Sink(_unexpanded(f, logits), scores, users[0].outputs[0]) if keeps else None


def _keeps_scores(f: Facts, node: ir.Node, scores: tuple[Size, ...] | None, at: int) -> bool:
    """Whether a Slice drops the sink's probability, that at the start (`at` 0) or the end, and nothing else."""
    out, starts = f.shape(node.outputs[0]), f.content(node.inputs[1])
    if out is None or scores is None or starts is None or starts.size != 1 or not f.same(out[-1], scores[-1]):
        return False
    steps = f.content(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else np.array([1])
    return steps is not None and steps.reshape(-1)[0] == 1 and starts.reshape(-1)[0] == (1 if at == 0 else 0)


def _unexpanded(f: Facts, v: ir.Value) -> ir.Value:
    """The logits before they were repeated for every sample and query."""
    node, t = v.producer(), f.g.tensor(v)
    if t is not None and len(t.shape) == 4 and t.size <= MAX_FLOATS:
        a, one = t.numpy(), t.numpy()[:1, :, :1]
        return f.g.constant(np.ascontiguousarray(one), str(v.name)) if a.size > one.size and (a == one).all() else v
    if node is None or node.op_type not in ("Expand", "Identity") or node.domain or node.inputs[0] is None:
        return v
    shape = f.shape(node.inputs[0])
    return v if not shape or shape[-1] != 1 else _unexpanded(f, node.inputs[0])


def mask_with_sink(
    masks: Masks, sizes: Sizes, mask: ir.Value | None, logits: ir.Value, lengths: list[Size]
) -> ir.Value:
    """The mask over one key more, which no query is hidden and whose bias is the sink; `lengths` are queries and keys.

    A mask has both of these axes in full.
    """
    g, (_, keys) = masks.g, lengths
    positions = g.op("Range", np.array(0, np.int64), sizes.scalar(add(keys, 1)), np.array(1, np.int64))
    is_key = g.op("Less", positions, sizes.scalar(keys))
    zero = np.array(0, (logits.dtype or ir.DataType.FLOAT).numpy())
    bias = g.op("Where", is_key, zero, logits)
    bias.type = logits.type
    if mask is None:
        return bias
    allows = masks.is_bool(mask)
    padded = _padded(g, mask, masks.f.rank(mask) or 2, -1, np.array(allows) if allows else zero)
    return masks.bias_where_allowed(padded, bias) if allows else g.op("Add", padded, bias)


def with_zero_key(g: Graph, v: ir.Value, rank: int) -> ir.Value:
    """Keys or values `[.., t, h]` with one more that is zero."""
    return _padded(g, v, rank, -2, np.array(0, (v.dtype or ir.DataType.FLOAT).numpy()))


def _padded(g: Graph, v: ir.Value, rank: int, axis: int, fill: np.ndarray) -> ir.Value:
    pads = np.zeros(2 * rank, np.int64)
    pads[2 * rank + axis] = 1
    padded = g.op("Pad", v, pads, fill)
    padded.type = v.type
    return padded


def without_zero_key(v: ir.Value | None) -> ir.Value | None:
    """Keys or values before `with_zero_key`, None where they have none."""
    node = v.producer() if v is not None else None
    if node is None or node.op_type != "Pad" or node.domain or len(node.inputs) != 3 or node.attributes:
        return None
    pads, fill = Graph.tensor(node.inputs[1]), Graph.tensor(node.inputs[2])
    if pads is None or fill is None or pads.size not in (6, 8) or fill.size != 1 or fill.numpy().item() != 0:
        return None
    return node.inputs[0] if pads.numpy().tolist() == [0] * (pads.size - 2) + [1, 0] else None


def has_sink(node: ir.Node) -> bool:
    """Whether an Attention has a sink: both its keys and its values end with a row of zeros."""
    return len(node.inputs) > 3 and all(without_zero_key(v) is not None for v in node.inputs[1:3])
