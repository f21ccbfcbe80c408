"""From a part of the model to the group of places that must shrink with it, proved by the shapes of the constants."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.blocks import Attention, Linear, Mlp
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.groups import AttrSlot, Group, Size, Slot
from onnxcomp.structure.shapes import Facts

__all__ = ["ffn_of", "heads_of"]


def ffn_of(g: Graph, mlp: Mlp) -> Group:
    """The channels between up and down: columns of up and gate with their biases, rows of down.

    Raises `ModelError` where one of them is read elsewhere, so that cutting it would change another part.
    """
    width = mlp.width
    slots: list[Slot] = []
    for linear in (mlp.up, mlp.gate):
        if linear is not None:
            slots += _columns(g, linear, width, 1)
    slots += _rows(g, mlp.down, width, 1)
    return Group(width, tuple(slots))


def heads_of(g: Graph, attention: Attention) -> Group:
    """The heads that share a key-value head: columns of q, k and v, rows of the output projection, head counts.

    A unit is one key-value head with its `heads // kv_heads` query heads (with equal counts, one head). Reshape
    targets between the projections and the attention that hold a head count are part of the group.
    """
    units, repeat = attention.kv_heads, attention.heads // attention.kv_heads
    q = attention.head_dim * repeat
    v = attention.v.sizes[1] // units
    slots = [
        *_columns(g, attention.q, units, q),
        *_columns(g, attention.k, units, attention.head_dim),
        *_columns(g, attention.v, units, v),
        *_rows(g, attention.o, units, v * repeat),
    ]
    name = attention.name
    attrs = [AttrSlot(name, "q_num_heads", repeat), AttrSlot(name, "kv_num_heads", 1)]
    sizes: list[Size] = []
    for node, per in _between(attention, repeat):
        if node.op_type == "RotaryEmbedding" and "num_heads" in node.attributes:
            attrs.append(AttrSlot(str(node.name), "num_heads", per))
        elif node.op_type == "Reshape":
            sizes += _head_counts(g, node, units * per, per, attention.head_dim if per == repeat else v)
    return Group(units, tuple(slots), tuple(sizes), tuple(dict.fromkeys(attrs)))


def _columns(g: Graph, linear: Linear, units: int, block: int) -> list[Slot]:
    """Output positions of a linear: the weight's last axis and the bias."""
    _own(g, linear)
    if linear.sizes[1] != units * block:
        raise ModelError(f"linear '{linear.name}' has {linear.sizes[1]} outputs, not {units} units of {block}")
    slots = [Slot(str(linear.weight.name), 0 if linear.transposed else 1, block)]
    if linear.bias is not None:
        rank = len(linear.bias.shape or ())
        slots.append(Slot(str(linear.bias.name), rank - 1, block))
    return slots


def _rows(g: Graph, linear: Linear, units: int, block: int) -> list[Slot]:
    """Input positions of a linear: the weight's first axis."""
    _own(g, linear)
    if linear.sizes[0] != units * block:
        raise ModelError(f"linear '{linear.name}' has {linear.sizes[0]} inputs, not {units} units of {block}")
    return [Slot(str(linear.weight.name), 1 if linear.transposed else 0, block)]


def _own(g: Graph, linear: Linear) -> None:
    """Refuse a weight that something else reads, or that is stored quantized with scales of its own."""
    if linear.quantized:
        raise ModelError(f"linear '{linear.name}' is quantized; cut the model before quantizing it")
    for v in (linear.weight, linear.bias):
        if v is not None and len({u for u, _ in v.uses()}) > 1:
            raise ModelError(
                f"constant '{v.name}' of linear '{linear.name}' is shared, so it cannot be cut for one of them"
            )


def _between(attention: Attention, repeat: int) -> Iterator[tuple[ir.Node, int]]:
    """Nodes from the projections to the attention and on to the output projection, with heads per unit."""
    ends = ((attention.q, repeat), (attention.k, 1), (attention.v, 1))
    for x, (linear, per) in zip(attention.node.inputs[:3], ends, strict=True):
        v = x
        while v is not None and v is not linear.output:
            node = v.producer()
            if node is None:
                break
            yield node, per
            v = node.inputs[0]
    v = attention.node.outputs[0]
    while v is not attention.o.source:
        node = next(iter(v.uses()))[0]
        yield node, repeat
        v = node.outputs[0]


def _head_counts(g: Graph, node: ir.Node, heads: int, per: int, width: int) -> list[Size]:
    """Entries of a Reshape target that are a head count, or heads times width."""
    target = node.inputs[1]
    if target is None or not g.is_constant(target):
        raise ModelError(f"the target of reshape '{node.name}' is computed, so its head count cannot be changed")
    wanted, found = g.array(target).reshape(-1).tolist(), []
    shape = Facts(g).shape(node.outputs[0]) or ()
    for i, size in enumerate(wanted):
        is_heads = size == heads and i == len(wanted) - 2 and len(shape) == 4 and shape[-1] == width
        if is_heads or (size == heads * width and i == len(wanted) - 1):
            found.append(Size(str(target.name), i, per if is_heads else per * width))
    if len({u for u, _ in target.uses()}) > 1 and found:
        raise ModelError(f"the target of reshape '{node.name}' is shared; run canonicalize first")
    return found
