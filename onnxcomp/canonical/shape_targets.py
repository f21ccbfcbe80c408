"""Sizes rebuilt from the graph inputs: constants where they are static, else computed from `Shape` of an input.

The shape arithmetic that exporters write, much of which reads shapes of activations, loses its users and is removed;
what replaces it is the same for every exporter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import constant_target, target_of
from onnxcomp.analysis.sizes import Dim, Size, difference_of, parts_of
from onnxcomp.graph import Graph

__all__ = ["Sizes", "rebuild_sizes"]

Key = tuple[Size, ...]
SHAPE_ARITHMETIC = {
    "Shape",
    "Gather",
    "Slice",
    "Concat",
    "Squeeze",
    "Unsqueeze",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Equal",
    "Max",
    "Min",
}


class Sizes:
    """Computes sizes from graph inputs, one shared value per list of sizes; values of an earlier run are reused."""

    def __init__(self, g: Graph, f: Facts) -> None:
        self.g, self.f = g, f
        self._vectors: dict[Key, ir.Value] = {}
        self._scalars: dict[Size, ir.Value] = {}
        computed: set[ir.Value] = set()
        for node in g.nodes("Shape", "Concat", "Squeeze", "Add", "Sub"):
            if node.domain == "" and self._is_ours(node, computed):
                self._remember(node.outputs[0], computed)

    def _is_ours(self, node: ir.Node, computed: set[ir.Value]) -> bool:
        x = node.inputs[0]
        if node.op_type == "Shape":
            c = self.f.content(node.outputs[0])
            d = c[0] if c is not None and c.size == 1 else None
            return isinstance(d, Dim) and self.f.roots.get(d.names[0]) == (x, node.attributes.get_int("start", 0))
        if node.op_type == "Squeeze":
            return x in computed and x is not None and node.inputs[-1] is not x
        return all(v in computed or self._is_number(v) for v in node.inputs)

    def _is_number(self, v: ir.Value | None) -> bool:
        t = self.g.tensor(v)
        return t is not None and len(t.shape) == 1

    def _remember(self, v: ir.Value, computed: set[ir.Value]) -> None:
        c = self.f.content(v)
        if c is None or not all(isinstance(x, int | Dim) for x in c.reshape(-1)):
            return
        computed.add(v)
        if c.ndim == 0:
            self._scalars.setdefault(c.item(), v)
        else:
            self._vectors.setdefault(tuple(c), v)

    def can_compute(self, sizes: Sequence[object]) -> bool:
        """Whether every size is a number, an axis of a graph input, or a sum of these."""
        return all(self._readable(d) for d in sizes)

    def _readable(self, d: object) -> bool:
        if isinstance(d, int) and not isinstance(d, bool):
            return True
        if not isinstance(d, Dim) or d.factor != 1 or len(d.names) != 1:
            return False
        parts = parts_of(d) or difference_of(d)
        return self.f.rooted(d) or (parts is not None and all(self._readable(p) for p in parts))

    def vector(self, sizes: Sequence[Size]) -> ir.Value:
        """The sizes as int64 `[len(sizes)]`; `can_compute` must hold for them."""
        key = tuple(sizes)
        if all(isinstance(d, int) for d in key):
            return self.g.constant(np.array(key, np.int64), "sizes")
        if key not in self._vectors:
            self._vectors[key] = self._shape(key[0]) if len(key) == 1 else self._concat(key)
        return self._vectors[key]

    def _shape(self, d: Size) -> ir.Value:
        assert isinstance(d, Dim)
        parts = parts_of(d)
        if parts is not None and not self.f.rooted(d):
            return self.g.op("Add", self.vector([parts[0]]), self.vector([parts[1]]))
        difference = difference_of(d)
        if difference is not None and not self.f.rooted(d):
            return self.g.op("Sub", self.vector([difference[0]]), self.vector([difference[1]]))
        source, axis = self.f.roots[d.names[0]]
        return self.g.op("Shape", source, start=axis, end=axis + 1)

    def _concat(self, key: Key) -> ir.Value:
        return self.g.op("Concat", *[self.vector([d]) for d in key], axis=0)

    def can_reshape(self, shape: Sequence[Size], to: Sequence[Size]) -> bool:
        """Whether `reshaped` can write a target: at most one of the sizes is neither computable nor kept."""
        if target_of(self.f, tuple(shape), to) is not None:
            return True
        return sum(1 for d in to if not self.can_compute([d])) <= 1

    def reshaped(self, x: ir.Value, to: Sequence[Size], like: ir.Value | None = None) -> ir.Value:
        """`x` in another shape, by a constant target or one computed from graph inputs; `can_reshape` must hold."""
        constant = constant_target(self.f, x, to)
        readable = [d if self.can_compute([d]) else -1 for d in to]
        assert constant is not None or readable.count(-1) <= 1, f"{to} cannot be written"
        target = self.vector(readable) if constant is None else np.array(constant, np.int64)
        y = self.g.op("Reshape", x, target, like=like)
        if y.type is None:
            y.type = x.type
        return y

    def scalar(self, d: Size) -> ir.Value:
        """One size as an int64 scalar."""
        if isinstance(d, int):
            return self.g.constant(np.array(d, np.int64), "size")
        if d not in self._scalars:
            self._scalars[d] = self.g.op("Squeeze", self.vector([d]), np.array([0], np.int64))
        return self._scalars[d]


def rebuild_sizes(g: Graph, f: Facts) -> None:
    """Rebuild every computed size that a node reads; Reshape and Expand targets become constants where possible."""
    sizes = Sizes(g, f)
    for node in g.nodes():
        if node.domain:
            continue
        if node.op_type in ("Reshape", "Expand"):
            _rewrite_target(g, f, sizes, node)
            continue
        if node.op_type in SHAPE_ARITHMETIC and f.content(node.outputs[0]) is not None:
            continue
        for i, v in enumerate(node.inputs):
            if v is not None and not g.is_constant(v) and _is_sizes(f, v):
                _rebuild(g, f, sizes, node, i, v)


def _is_sizes(f: Facts, v: ir.Value) -> bool:
    node = v.producer()
    c = f.content(v)
    known = c is not None and c.ndim <= 1 and c.size > 0
    return (
        known
        and node is not None
        and (v.dtype == ir.DataType.INT64 or (v.dtype is None and node.op_type in SHAPE_ARITHMETIC))
    )


def _rebuild(g: Graph, f: Facts, sizes: Sizes, node: ir.Node, index: int, v: ir.Value) -> None:
    c = f.content(v)
    if c is None or not sizes.can_compute(list(c.reshape(-1))):
        return
    g.set_input(node, index, sizes.scalar(c.item()) if c.ndim == 0 else sizes.vector(list(c)))


def _rewrite_target(g: Graph, f: Facts, sizes: Sizes, node: ir.Node) -> None:
    x, target, shape = node.inputs[0], node.inputs[1], f.shape(node.outputs[0])
    if x is None or target is None or shape is None:
        return
    if node.op_type == "Reshape":
        constant = constant_target(f, x, shape)
    else:
        constant = _expand_target(f, x, target)
    if constant is not None:
        if node.op_type == "Reshape":
            g.set_attr(node, allowzero=None)
        _set_constant(g, f, node, constant)
        return
    c = f.content(target)
    if c is not None and not g.is_constant(target) and c.ndim == 1 and sizes.can_compute(list(c)):
        g.set_input(node, 1, sizes.vector(list(c)))


def _set_constant(g: Graph, f: Facts, node: ir.Node, target: list[int]) -> None:
    """Give the node a constant of its own, so that pruning one layer does not change others."""
    old = node.inputs[1]
    if old is not None and g.is_constant(old) and old.producer() is None and len(list(old.uses())) == 1:
        c = f.content(old)
        if c is not None and c.ndim == 1 and list(c) == target:
            return
    g.set_input(node, 1, g.constant(np.array(target, np.int64), "shape"))


def _expand_target(f: Facts, x: ir.Value, target: ir.Value) -> list[int] | None:
    """An Expand target with 1 where the input already has the size; None where a new axis has an unknown size."""
    shape, c = f.shape(x), f.content(target)
    if shape is None or c is None or c.ndim != 1:
        return None
    padded = (1,) * (c.size - len(shape)) + shape
    result = []
    for size, input_size in zip(c, padded[-c.size :], strict=True):
        if isinstance(size, int):
            result.append(1 if size == input_size and size != 1 else size)
        elif isinstance(size, Dim) and size == input_size:
            result.append(1)
        else:
            return None
    return result
