"""Symbolic shape inference in one forward pass, with contents of small values (`content_rules`) and bounds (`bounds`).

Weights are not read. Shapes recorded by the exporter are used only where no rule applies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from onnxcomp.analysis.bounds import uniform, uniform_of
from onnxcomp.analysis.content_rules import CONTENT_RULES, constant_content, small
from onnxcomp.analysis.fused_rules import CONTRIB_RULES
from onnxcomp.analysis.known import Content, Uniform, Unknown
from onnxcomp.analysis.shape_rules import SHAPE_RULES, present_shape, split_shape
from onnxcomp.analysis.sizes import Dim, Equalities, Shape, Size, divide, named, product
from onnxcomp.graph import CONTRIB, Graph

__all__ = ["Facts"]

RULES = {"": SHAPE_RULES, "ai.onnx": SHAPE_RULES, CONTRIB: CONTRIB_RULES}
# Their fourth output is the sum that they normalize, of the same shape.
SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


class Facts:
    """What is known about values before the model runs; nodes added later are analysed on demand."""

    def __init__(self, g: Graph) -> None:
        self.g = g
        self.roots: dict[str, tuple[ir.Value, int]] = {}
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, Content | None] = {}
        self._uniform: dict[ir.Value, Uniform | None] = {}
        for v in g.inputs:
            self._shapes[v] = self._of_input(v)
        self.equal = Equalities(self.roots)
        for node in g.nodes():
            self._visit(node)

    # ---- queries -------------------------------------------------------------------------------------------------

    def shape(self, v: ir.Value | None) -> Shape | None:
        """Sizes of the axes; None where not even the rank is known."""
        if v is None:
            return None
        if v not in self._shapes:
            self._learn(v)
        return self._shapes[v]

    def content(self, v: ir.Value | None) -> Content | None:
        """Elements of a small value (int, `Dim`, float, bool, None where unknown); None for other values."""
        if v is None:
            return None
        if v not in self._contents:
            self._learn(v)
        return self._contents.get(v)

    def uniform(self, v: ir.Value | None) -> Uniform | None:
        """Bounds on all elements, whatever the shape."""
        if v is None:
            return None
        if v not in self._uniform:
            self._learn(v)
        return self._uniform.get(v)

    def scalar(self, v: ir.Value | None) -> float | None:
        """The number that a value of one element holds, or None."""
        c = self.content(v)
        if c is None or c.size != 1:
            return None
        x = c.reshape(-1)[0]
        return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None

    def rank(self, v: ir.Value | None) -> int | None:
        """Number of axes."""
        s = self.shape(v)
        return None if s is None else len(s)

    def same(self, a: Size, b: Size) -> bool:
        """Whether two sizes are equal, by proof or by assumption."""
        return self.equal.same(a, b)

    def quotient(self, a: Size, b: Size) -> Size | None:
        """`a / b` where it is exact, with equal unknowns replaced by one symbol."""
        return divide(self.equal.plain(a), self.equal.plain(b))

    def broadcast(self, shapes: Sequence[Shape]) -> Shape:
        """The broadcast shape; different unknowns that meet are assumed equal."""
        rank = max((len(s) for s in shapes), default=0)
        result: list[Size] = [1] * rank
        for s in shapes:
            for i, d in enumerate(s, rank - len(s)):
                result[i] = self._joined(result[i], d)
        return tuple(result)

    def _joined(self, a: Size, b: Size) -> Size:
        if b == 1 or a == b:
            return a
        if a == 1 or isinstance(b, int):
            return b
        self.equal.assume(a, b)
        if self.rooted(a) != self.rooted(b):
            return a if self.rooted(a) else b
        # Either may be 1 at run time, so the result is neither: equal in proofs, but not readable from an input.
        both = named("|".join(sorted((str(a), str(b)))))
        self.equal.assume(a, both)
        return both

    def rooted(self, a: Size) -> bool:
        """Whether a size can be computed from axes of the graph inputs."""
        return isinstance(a, int) or all(n in self.roots for n in a.names)

    # ---- forward pass --------------------------------------------------------------------------------------------

    def _of_input(self, v: ir.Value) -> Shape | None:
        if v.shape is None:
            return None
        dims: list[Size] = []
        for i, d in enumerate(v.shape):
            size = d if isinstance(d, int) and d >= 0 else named(str(getattr(d, "value", d) or f"{v.name}.{i}"))
            if isinstance(size, Dim):
                self.roots.setdefault(size.names[0], (v, i))
            dims.append(size)
        return tuple(dims)

    def _learn(self, v: ir.Value) -> None:
        node = v.producer()
        tensor = self.g.tensor(v)
        if tensor is not None:
            self._shapes[v] = tuple(d for d in tensor.shape if isinstance(d, int))
            self._contents[v] = constant_content(tensor)
            self._uniform[v] = uniform_of(tensor)
        elif node is not None and node.graph is self.g.model.graph:
            self._visit(node)
        else:
            self._shapes[v], self._contents[v], self._uniform[v] = self.recorded(v), None, None

    def _visit(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and self.g.tensor(node.outputs[0]) is not None:
            return self._learn(node.outputs[0])
        rule = RULES.get(node.domain, {}).get(node.op_type)
        first = _asked(rule, self, node)
        for i, out in enumerate(node.outputs):
            inferred = first if i == 0 or node.op_type == "Dropout" or (i == 3 and node.op_type in SKIP_NORMS) else None
            if node.op_type == "Split" and node.domain == "":
                inferred = _asked(split_shape, self, node, i)
            if node.op_type == "Attention" and node.domain == "" and i in (1, 2):
                inferred = _asked(present_shape, self, node, i)
            negative = inferred is not None and any(isinstance(d, int) and d < 0 for d in inferred)
            self._shapes[out] = self.recorded(out) if inferred is None or negative else inferred
            self._contents[out] = None
            self._uniform[out] = None
        if node.domain == "" and len(node.outputs) == 1:
            self._contents[node.outputs[0]] = small(_asked(CONTENT_RULES.get(node.op_type), self, node))
            self._uniform[node.outputs[0]] = _asked(uniform, self, node)
        if node.op_type == "Split" and node.domain == "":
            self._split_contents(node)
        return None

    def _split_contents(self, node: ir.Node) -> None:
        """Contents of a Split's outputs, such as sizes that an optimizer reads by one Split for several Gathers."""
        c, shapes = self.content(node.inputs[0]), [self.shape(v) for v in node.outputs]
        sizes = [s[0] for s in shapes if s and len(s) == 1 and isinstance(s[0], int)]
        if c is None or c.ndim != 1 or len(sizes) < len(shapes) or sum(sizes) != c.size:
            return
        first = 0
        for v, size in zip(node.outputs, sizes, strict=True):
            self._contents[v] = c[first : first + size]
            first += size

    def recorded(self, v: ir.Value) -> Shape | None:
        """The shape that the exporter recorded; what is declared of an output is a claim that runtimes ignore."""
        if v.shape is None or v.is_graph_output():
            return None
        return tuple(self._named(v, i, d) for i, d in enumerate(v.shape))

    def _named(self, v: ir.Value, axis: int, d: int | ir.SymbolicDim) -> Size:
        if isinstance(d, int) and d >= 0:
            return d
        text = None if isinstance(d, int) else d.value
        if not text:
            return self.fresh(v, axis)
        parts = str(text).split("*")
        if all(p.isdigit() or p in self.roots for p in parts):
            return product([int(p) if p.isdigit() else named(p) for p in parts])
        return named(str(text))

    def fresh(self, v: ir.Value, axis: int) -> Size:
        """A new unknown for one axis of one value."""
        return named(f"?{v.name}.{axis}")


def _asked(rule: Callable[..., Any] | None, f: Facts, node: ir.Node, *more: int) -> Any:
    """What a rule knows: nothing where it finds a node that its operator does not allow."""
    try:
        return rule(f, node, *more) if rule is not None else None
    except Unknown:
        return None
