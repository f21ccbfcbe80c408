"""Norms recognized by dataflow: from the mean of squares forward to the scaled value, back to the squared one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.shape_rules import axes_of
from onnxcomp.analysis.sizes import Size
from onnxcomp.graph import Graph
from onnxcomp.graph.values import sole_use, users_of
from onnxcomp.maths import Array

__all__ = ["find_norms", "raise_norms"]

# `max(|x|, eps)` and `sqrt(|x|^2 + eps^2)` agree to a share of 5e-7 from lengths of a thousand times `eps` on; layers
# write 1e-12, and a thousandth is no length of an activation.
MAX_LENGTH_EPSILON = 1e-6
SAME_FACTOR = 1e-6  # a square root that was rounded to float32


@dataclass(frozen=True)
class NormMatch:
    """A decomposed norm: `x` normalized to `y`, before gain and bias; `factor` multiplies the gain."""

    x: ir.Value
    y: ir.Value
    epsilon: float
    centred: bool
    width: int
    factor: float = 1.0


def find_norms(g: Graph, f: Facts) -> Iterator[tuple[ir.Node, NormMatch | str]]:
    """The mean of squares of each decomposed norm, with the match or the reason why it is not raised."""
    for mean in g.nodes("ReduceMean"):
        squared = _squared(f, mean.inputs[0])
        root = _root(f, mean) if squared is not None else None
        normalized = _scaled(f, squared, root[0]) if squared is not None and root is not None else None
        if squared is None or root is None or normalized is None:
            continue
        x, centred = _uncentred(f, squared)
        reason, width = _why_not_last_axis(f, mean), _width(f, x)
        if reason or width is None:
            yield mean, reason or "norm: the normalized width is not static"
        else:
            yield mean, NormMatch(x, normalized, root[1], centred, width)
    for length in g.nodes("ReduceL2"):
        if (match := _unit_length(g, f, length)) is not None:
            yield length, match


def _unit_length(g: Graph, f: Facts, length: ir.Node) -> NormMatch | None:
    """`x / max(|x|, eps)`, times `sqrt(width)` or a row, which is an RMS norm with a tiny epsilon.

    A vector of unit length alone, as for cosines, is none.
    """
    x, bounded = length.inputs[0], sole_use(length.outputs[0])
    width = None if x is None else _width(f, x)
    if x is None or width is None or bounded is None or _why_not_last_axis(f, length):
        return None
    node, index = bounded
    operands = [v for v in node.inputs if v is not None]
    smallest = f.scalar(operands[1 - index]) if node.op_type in ("Clip", "Max") and len(operands) == 2 else None
    if smallest is None or not 0 <= smallest <= MAX_LENGTH_EPSILON or (node.op_type == "Clip" and index):
        return None
    use = sole_use(node.outputs[0])
    if use is not None and use[0].op_type == "Expand":
        use = sole_use(use[0].outputs[0])
    if use is None or use[0].op_type != "Div" or use[0].inputs[0] is not x:
        return None
    y, root = use[0].outputs[0], float(np.sqrt(width))
    factor, use = 1.0, sole_use(y)
    number = f.scalar(use[0].inputs[1 - use[1]]) if use is not None and use[0].op_type == "Mul" else None
    if use is not None and number is not None:
        y, factor = use[0].outputs[0], number
    scaled = abs(factor / root - 1) < SAME_FACTOR
    if not scaled and any(gain is None for gain, _ in _gains(g, y, width)):
        return None
    return NormMatch(x, y, smallest**2 / width, False, width, 1.0 if scaled else factor / root)


def raise_norms(g: Graph, f: Facts) -> None:
    """Rewrite decomposed norms over the last axis to LayerNormalization and RMSNormalization."""
    for mean, match in find_norms(g, f):
        if isinstance(match, str):
            g.decline(mean, match)
        else:
            _rewrite(g, match)


def _users_of_type(v: ir.Value, *ops: str) -> list[ir.Node]:
    return [u for u in users_of(v) if u.op_type in ops and u.domain == ""]


def _squared(f: Facts, v: ir.Value | None) -> ir.Value | None:
    """`c` where `v` is `c * c` or `c ** 2`."""
    node = v.producer() if v is not None else None
    if node is None:
        return None
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    return node.inputs[0] if node.op_type == "Pow" and f.scalar(node.inputs[1]) == 2 else None


def _root(f: Facts, mean: ir.Node) -> tuple[ir.Value, float] | None:
    """The square root of `mean + eps` (its inverse when it is a Pow), and the epsilon."""
    for add in _users_of_type(mean.outputs[0], "Add"):
        other = add.inputs[1] if add.inputs[0] is mean.outputs[0] else add.inputs[0]
        epsilon = f.scalar(other)
        if epsilon is None:
            continue
        for node in _users_of_type(add.outputs[0], "Sqrt", "Pow"):
            if node.op_type == "Sqrt" or f.scalar(node.inputs[1]) == -0.5:
                return node.outputs[0], epsilon
    return None


def _scaled(f: Facts, c: ir.Value, root: ir.Value) -> ir.Value | None:
    """`c / root`, written as a quotient or as a product with the inverse."""
    node = root.producer()
    if node is not None and node.op_type == "Pow":
        return _product_with(c, root)
    for div in _users_of_type(root, "Div"):
        if div.inputs[0] is c and div.inputs[1] is root:
            return div.outputs[0]
        if f.scalar(div.inputs[0]) == 1 and div.inputs[1] is root:
            return _product_with(c, div.outputs[0])
    for inverse in _users_of_type(root, "Reciprocal"):
        return _product_with(c, inverse.outputs[0])
    return None


def _product_with(c: ir.Value, r: ir.Value) -> ir.Value | None:
    for mul in _users_of_type(r, "Mul"):
        if c in mul.inputs:
            return mul.outputs[0]
    return None


def _why_not_last_axis(f: Facts, mean: ir.Node) -> str:
    rank, axes = f.rank(mean.inputs[0]), axes_of(f, mean)
    if rank is None or axes is None or [a % rank for a in axes] != [rank - 1]:
        return "norm: the mean is not over the last axis alone"
    return "" if mean.attributes.get_int("keepdims", 1) else "norm: the mean drops its axis"


def _uncentred(f: Facts, c: ir.Value) -> tuple[ir.Value, bool]:
    """`x` and True where `c` is `x - mean(x)` over the last axis, else `c` itself."""
    node = c.producer()
    if node is None or node.op_type != "Sub" or node.inputs[0] is None or node.inputs[1] is None:
        return c, False
    mean = node.inputs[1].producer()
    if (
        mean is None
        or mean.op_type != "ReduceMean"
        or mean.inputs[0] is not node.inputs[0]
        or _why_not_last_axis(f, mean)
    ):
        return c, False
    return node.inputs[0], True


def _width(f: Facts, x: ir.Value) -> int | None:
    shape = f.shape(x)
    last: Size | None = shape[-1] if shape else None
    return last if isinstance(last, int) else None


def _rewrite(g: Graph, match: NormMatch) -> None:
    x, y = match.x, match.y
    casts = _surrounding_casts(match)
    if casts is not None:
        x, y = casts
    dtype = (x.dtype or ir.DataType.FLOAT).numpy()
    for gain, scaled in _gains(g, y, match.width):
        row = gain if gain is not None else np.ones(match.width, dtype)
        if match.factor != 1:
            row = np.asarray((g.array(gain) if gain is not None else 1) * np.full(match.width, match.factor), dtype)
        _replace(g, match, x, row, scaled or y)


def _replace(g: Graph, match: NormMatch, x: ir.Value, scale: ir.Value | Array, out: ir.Value) -> None:
    """Add one norm with its gain, and with a bias where an addition is the only use of `out`."""
    attrs: dict[str, Any] = {"axis": -1, "epsilon": match.epsilon, "stash_type": 1}
    if not match.centred:
        g.replace(out, g.op("RMSNormalization", x, scale, like=out, **attrs))
        return
    bias, shifted = _affine(g, out, "Add", match.width)
    out = shifted or out
    g.replace(out, g.op("LayerNormalization", x, scale, bias, like=out, **attrs))


def _gains(g: Graph, y: ir.Value, width: int) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """The gains of `y` and the products: several where norms of one value share their statistics."""
    uses = [] if y.is_graph_output() else list(y.uses())
    gains = [_row(g, user, index, "Mul", width) for user, index in uses]
    return gains if gains and all(gain is not None for gain, _ in gains) else [(None, None)]


def _surrounding_casts(match: NormMatch) -> tuple[ir.Value, ir.Value] | None:
    """The low-precision input and output around a norm computed in float32."""
    down = [u for u, _ in match.y.uses()]
    up = match.x.producer()
    if up is None or up.op_type != "Cast" or len(down) != 1 or down[0].op_type != "Cast" or up.inputs[0] is None:
        return None
    source = up.inputs[0]
    if source.dtype is None or down[0].attributes.get_int("to", 0) != source.dtype:
        return None
    return source, down[0].outputs[0]


def _affine(g: Graph, y: ir.Value, op: str, width: int) -> tuple[ir.Value | None, ir.Value | None]:
    """The constant row that scales or shifts `y`, and the result, where that is the only use of `y`."""
    use = sole_use(y)
    return (None, None) if use is None else _row(g, *use, op, width)


def _row(g: Graph, node: ir.Node, index: int, op: str, width: int) -> tuple[ir.Value | None, ir.Value | None]:
    """The constant row that is the other operand of a node of that operator, and its output."""
    row = node.inputs[1 - index] if node.op_type == op and len(node.inputs) == 2 else None
    tensor = g.tensor(row)
    if row is None or tensor is None or tensor.size != width or tensor.shape[-1] != width:
        return None, None
    if len(tensor.shape) > 1:
        row = g.constant(tensor.numpy().reshape(width), str(row.name))
    return row, node.outputs[0]
