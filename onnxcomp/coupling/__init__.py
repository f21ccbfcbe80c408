"""Coupling analysis: from any axis of a model to the group of all places that must shrink with it.

`Coupling.couple` is the only analysis: attention heads, channels of MLPs and convolutions and the residual width are
axes to start from. `prove` checks cuts by shape inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Dim, Shape, Size
from onnxcomp.blocks import Attention
from onnxcomp.coupling.collect import Blocked, collect
from onnxcomp.coupling.rules import RULES
from onnxcomp.coupling.trace import Tracer
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array

__all__ = ["Blocked", "Coupling", "couple", "prove"]


class Coupling:
    """The coupling analysis of a graph's current state; shapes are inferred once for all queries."""

    def __init__(self, g: Graph) -> None:
        self.g, self.facts = g, _facts(g)

    def couple(self, v: ir.Value | str, axis: int = -1, *, block: int = 1, io: bool = False) -> Group:
        """The group of one axis of a value, a constant or a computed one, in units of `block` positions or coarser.

        With `io` the group may change axes of the model's inputs and outputs. Raises `ModelError`, with the path to the
        cause, where no unit can be cut.
        """
        value = self.g.value(v) if isinstance(v, str) else v
        t = Tracer(self.g, self.facts, RULES, io=io)
        n = t.size(value, axis)
        if n is None or n % block:
            raise ModelError(f"axis {axis} of '{value.name}' has no fixed length that is a multiple of {block}")
        reader = next((u for u, _ in value.uses()), None)
        start = t.axis(value, axis, reader)
        t.put(start, np.repeat(t.new(n // block), block), None)
        t.run()
        return collect(t, start)

    def heads(self, attention: Attention | ir.Node, *, whole: bool = True, io: bool = False) -> Group:
        """The heads of an attention: with `whole` a unit is a key-value head with all its query heads, else a query
        head, of which every key-value head must keep equally many."""
        node = attention.node if isinstance(attention, Attention) else attention
        heads, kv = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
        n = self._width(node.outputs[0])
        if not heads or not kv or n % heads:
            raise ModelError(f"attention '{node.name}' has no number of heads, or one that does not divide its width")
        return self.couple(node.outputs[0], -1, block=n // (kv if whole else heads), io=io)

    def channels(self, node: ir.Node) -> Group:
        """The channels that a linear or convolution reads: its input's feature axis."""
        x = node.inputs[0]
        if x is None:
            raise ModelError(f"'{node.name}' has no input")
        return self.couple(x, 1 if node.op_type.startswith("Conv") else -1)

    def _width(self, v: ir.Value) -> int:
        shape = self.facts.shape(v)
        n = shape[-1] if shape else 0
        return n if isinstance(n, int) else 0


def _facts(g: Graph) -> Facts:
    """Facts, with shapes by ONNX's inference where none are recorded; the graph is not changed."""
    computed = [(v, v.type, v.shape) for node in g.nodes() for v in node.outputs]
    if all(shape is not None for _, _, shape in computed):
        return Facts(g)
    g.infer_shapes()
    try:
        return Facts(g)
    finally:
        for v, kind, shape in computed:
            v.type, v.shape = kind, shape


def couple(g: Graph, v: ir.Value | str, axis: int = -1, *, block: int = 1, io: bool = False) -> Group:
    """The group of one axis of a value; see `Coupling.couple`."""
    return Coupling(g).couple(v, axis, block=block, io=io)


def prove(before: Facts, g: Graph, cuts: Iterable[tuple[Group, Sequence[int] | Array]]) -> None:
    """Check by shape inference that a graph has exactly the shapes that the groups predict after the cuts.

    `before` are the facts of the uncut graph. Raises `ModelError` naming the value where they differ.
    """
    expected: dict[str, Shape] = {
        str(v.name): s for node in before.g.nodes() for v in node.outputs if (s := before.shape(v)) is not None
    }
    for group, keep in cuts:
        for slot in group.computed:
            if (s := expected.get(slot.value)) is not None:
                n, old_size = int(slot.kept(np.asarray(keep)).sum()), s[slot.axis]
                new_size = n if isinstance(old_size, int) else Dim(n, old_size.names)
                expected[slot.value] = (*s[: slot.axis], new_size, *s[slot.axis + 1 :])
    after = Facts(g)
    for node in g.nodes():
        for v in node.outputs:
            actual, predicted = after.shape(v), expected.get(str(v.name))
            if actual is not None and predicted is not None and not _agree(actual, predicted):
                raise ModelError(f"after the cut '{v.name}' has the shape {_text(actual)}, not {_text(predicted)}")


def _agree(a: Shape, b: Shape) -> bool:
    """Whether two shapes agree wherever both have numbers, or multiples of the same unknown."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x == y for x, y in pairs if _names(x) == _names(y))


def _names(d: Size) -> tuple[str, ...]:
    return () if isinstance(d, int) else d.names


def _text(shape: Shape) -> str:
    return "x".join(str(d) for d in shape)
