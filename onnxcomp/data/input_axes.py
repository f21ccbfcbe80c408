"""Which axis of an input counts samples, and which one of a key-value cache the tokens so far, by structure.

A cache is an input that the model appends new keys or values to: by Concat, by an attention that takes a past, or by
TensorScatter. Names do not matter, but where the appending is not visible `past` in the name counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

__all__ = ["alone_behind_a_cache", "cache_axis", "sample_axes"]

# Inputs of an operator that hold the keys or values so far, and the axis of their tokens.
PAST = {
    ("", "Attention"): ((4, 5), 2),
    ("com.microsoft", "GroupQueryAttention"): ((3, 4), 2),
    ("com.microsoft", "MultiHeadAttention"): ((6, 7), 2),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): ((5, 6), 2),
    ("com.microsoft", "Attention"): ((4,), 3),
}
PASSED_ON = ("Identity", "Cast", "DequantizeLinear")
RANKS = (3, 4, 5)
Shape = tuple[int | str, ...]


def cache_axis(v: ir.Value, shape: Shape) -> int | None:
    """The axis of an input that grows with the tokens so far; None for an input that is no cache."""
    if len(shape) not in RANKS or v.dtype is None or v.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    found = _appended(v, list(range(len(shape))))
    if found is not None and isinstance(shape[found], str):
        return found
    name = str(v.name).lower()
    open_axes = [i for i, d in enumerate(shape) if i and isinstance(d, str)]
    return open_axes[0] if "past" in name and "encoder" not in name and len(open_axes) == 1 else None


def alone_behind_a_cache(nodes: Iterable[ir.Node]) -> bool:
    """Whether several new tokens behind a cache must be of one sample: GroupQueryAttention takes no batch of them."""
    return any(n.op_type == "GroupQueryAttention" and len(n.inputs) > 3 and n.inputs[3] is not None for n in nodes)


def _appended(v: ir.Value, axes: list[int]) -> int | None:
    """The axis of the input along which something is appended to `v`, whose axes are those `axes` of the input."""
    pending = [(use, axes) for use in v.uses()]
    while pending:
        (user, index), axes = pending.pop(0)
        at = _appends_at(user, index)
        if at is not None and -len(axes) <= at < len(axes):
            return axes[at]
        if moved := _moved(user, axes):
            pending[:0] = [(use, moved) for use in user.outputs[0].uses()]
    return None


def _appends_at(user: ir.Node, index: int) -> int | None:
    """The axis along which a node appends to its input of that index."""
    taken = PAST.get((user.domain, user.op_type))
    if taken is not None and index in taken[0]:
        return taken[1]
    if user.op_type == "Concat" and not user.domain and index == 0 and _grows(user):
        return user.attributes.get_int("axis", 0)
    return user.attributes.get_int("axis", -2) if user.op_type == "TensorScatter" and index == 0 else None


def _grows(concat: ir.Node) -> bool:
    """Whether a Concat appends one computed value: two inputs of the model side by side are no cache."""
    new = concat.inputs[1] if len(concat.inputs) == 2 else None
    return new is not None and new.producer() is not None and not new.is_graph_input()


def _moved(node: ir.Node, axes: list[int]) -> list[int]:
    """The input's axes behind a node that only moves or converts its first operand; empty for another node."""
    if node.op_type == "Transpose" and not node.domain:
        perm = node.attributes.get_ints("perm", list(range(len(axes)))[::-1])
        return [axes[i] for i in perm] if len(perm) == len(axes) else []
    if node.op_type == "Gather" and len(axes) == 5 and node.attributes.get_int("axis", 0) == 0:
        return axes[1:]  # keys and values stacked in one tensor
    alone = node.op_type == "Concat" and len(node.inputs) == 1
    return axes if alone or node.op_type in PASSED_ON else []


def sample_axes(shapes: Mapping[str, Shape]) -> dict[str, int | None]:
    """The axis of each input that counts samples: the first, or for a state `[2, b, 128]` the one named as the others'.

    None for scalars and for flags: an input of fixed size while the samples of others are not fixed.
    """
    first = [s[0] for s in shapes.values() if s]
    named = [d for d in first if isinstance(d, str)]
    return {name: _sample_axis(shape, named, first) for name, shape in shapes.items()}


def _sample_axis(shape: Shape, named: Sequence[str], first: Sequence[int | str]) -> int | None:
    if not shape:
        return None
    if isinstance(shape[0], str) or (not named and shape[0] == first[0]):
        return 0
    known = [i for i, d in enumerate(shape) if d in (named or first[:1]) and d not in ("", "?")]
    free = [i for i, d in enumerate(shape) if isinstance(d, str)]
    return next(iter(known or free), None)
