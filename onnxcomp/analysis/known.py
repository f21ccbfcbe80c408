"""What rules may ask about the values of a graph: the protocol between `Facts`, which answers, and the rules it runs.

Rules of one operator ask for the shapes, contents and bounds of its inputs; `Facts` learns these by calling the rules
of the operators before it. The protocol lets rules and `Facts` name each other without importing each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.analysis.sizes import Equalities, Shape, Size

__all__ = ["Content", "Known", "Uniform", "Unknown", "cast_type", "checked_axes", "given", "require"]

# Elements of a small value: int, float, bool or `Dim`, None where an element is unknown.
Content = NDArray[np.object_]


@dataclass(frozen=True)
class Uniform:
    """Smallest and largest value any element can have; None is no bound."""

    low: float | None
    high: float | None

    @property
    def value(self) -> float | None:
        """The value of every element, where they are all the same."""
        return self.low if self.low is not None and self.low == self.high else None


class Unknown(Exception):
    """Raised by a rule for a node that its operator does not allow, such as an axis that its input lacks."""


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None where it is left out, or where an older or unknown operator has fewer."""
    return node.inputs[index] if index < len(node.inputs) else None


def checked_axes(axes: Collection[object], rank: int) -> list[int]:
    """Axes as non-negative numbers; raises `Unknown` for one that is not there, or that is named twice."""
    found = [a + rank if a < 0 else a for a in axes if isinstance(a, int) and -rank <= a < rank]
    if len(found) < len(axes) or len(set(found)) < len(found):
        raise Unknown
    return found


def cast_type(node: ir.Node) -> ir.DataType:
    """What a Cast casts to; raises `Unknown` for a number without a type, and for names (below opset 6)."""
    to = node.attributes["to"].value if "to" in node.attributes else None
    if not isinstance(to, int) or to not in {kind.value for kind in ir.DataType}:
        raise Unknown
    return ir.DataType(to)


def require(holds: bool) -> None:
    """Raise `Unknown` where a node is not as its operator needs it."""
    if not holds:
        raise Unknown


class Known(Protocol):
    """Answers about values before the model runs; see `Facts` for each."""

    roots: dict[str, tuple[ir.Value, int]]
    equal: Equalities

    def shape(self, v: ir.Value | None) -> Shape | None: ...

    def content(self, v: ir.Value | None) -> Content | None: ...

    def uniform(self, v: ir.Value | None) -> Uniform | None: ...

    def same(self, a: Size, b: Size) -> bool: ...

    def quotient(self, a: Size, b: Size) -> Size | None: ...

    def broadcast(self, shapes: Sequence[Shape]) -> Shape: ...

    def recorded(self, v: ir.Value) -> Shape | None: ...

    def fresh(self, v: ir.Value, axis: int) -> Size: ...
