"""Static selections along one axis: which positions a Split, Slice, Gather or GatherND takes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.analysis.sizes import Shape

__all__ = ["Selection", "selections"]


@dataclass(frozen=True)
class Selection:
    """Fixed positions `keep` along one axis of the input of `node`, as its output `out`; `squeezed` drops the axis."""

    node: ir.Node
    out: ir.Value
    axis: int
    keep: tuple[int, ...]
    squeezed: bool = False


def selections(f: Facts, node: ir.Node) -> list[Selection] | None:
    """The selections of a Split, Slice, Gather or GatherND along one axis; None where they are not static."""
    shape = f.shape(node.inputs[0])
    if shape is None or node.domain:
        return None
    rule = {"Split": _split, "Slice": _slice, "Gather": _gather, "GatherND": _gather_nd}.get(node.op_type)
    return rule(f, node, shape) if rule is not None else None


def _split(f: Facts, node: ir.Node, shape: Shape) -> list[Selection] | None:
    axis, offset, parts = axis_of(node, len(shape), 0), 0, []
    for out in node.outputs:
        size = (f.shape(out) or shape)[axis]
        if not isinstance(size, int):
            return None
        parts.append(Selection(node, out, axis, tuple(range(offset, offset + size))))
        offset += size
    return parts


def _slice(f: Facts, node: ir.Node, shape: Shape) -> list[Selection] | None:
    parts = [f.content(x) for x in node.inputs[1:]]
    if any(c is None or not all(isinstance(n, int) for n in c.reshape(-1)) for c in parts):
        return None
    numbers = [[int(n) for n in c.reshape(-1)] for c in parts if c is not None]
    starts, ends = numbers[0], numbers[1]
    axes = numbers[2] if len(numbers) > 2 else list(range(len(starts)))
    steps = numbers[3] if len(numbers) > 3 else [1] * len(starts)
    ranges = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        if (start, step) == (0, 1) and end >= 2**31 - 1:
            continue
        if not isinstance(size, int) or step < 1:
            return None
        ranges.append((axis % len(shape), tuple(range(*slice(start, end, step).indices(size)))))
    return [Selection(node, node.outputs[0], *ranges[0])] if len(ranges) == 1 else None


def _gather(f: Facts, node: ir.Node, shape: Shape) -> list[Selection] | None:
    indices, axis = f.content(node.inputs[1]), axis_of(node, len(shape), 0)
    size = shape[axis]
    if indices is None or indices.ndim > 1 or not isinstance(size, int):
        return None
    if not all(isinstance(n, int) and -size <= n < size for n in indices.reshape(-1)):
        return None
    keep = tuple(int(n) % size for n in indices.reshape(-1))
    return [Selection(node, node.outputs[0], axis, keep, indices.ndim == 0)]


def _gather_nd(f: Facts, node: ir.Node, shape: Shape) -> list[Selection] | None:
    """Positions along the first axis: how exporters write indexing by a list."""
    indices = f.content(node.inputs[1])
    size = shape[0]
    if indices is None or indices.ndim != 2 or indices.shape[1] != 1 or node.attributes.get_int("batch_dims", 0):
        return None
    if not isinstance(size, int) or not all(isinstance(n, int) and -size <= n < size for n in indices.reshape(-1)):
        return None
    return [Selection(node, node.outputs[0], 0, tuple(int(n) % size for n in indices.reshape(-1)))]
