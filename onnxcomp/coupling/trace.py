"""The coupling analysis: unit numbers are propagated along axes to a fixed point, from one axis to all coupled ones.

Every axis that is reached holds an array of unit numbers, one for each position: `UNKNOWN` where no unit is known, 0
(`FROZEN`) where the position must stay, else its unit. Where two numbers meet, their units are merged (union-find), so
rules only make units coarser and the order of the nodes does not matter.

An axis whose length is `n` times an unknown (an outer batch axis merged with `n` heads) holds one period of `n`
numbers: position `p` belongs to unit `units[p % n]`. A rule may rely on that only where the layout proves it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Size
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import STAYS
from onnxcomp.maths import Array

__all__ = ["FROZEN", "UNKNOWN", "Axis", "Repeats", "Rule", "Tracer", "input_and_output"]

UNKNOWN, FROZEN = STAYS, 0
MAX_PATH = 10_000  # nodes of a path that are followed at most
Repeats = tuple[tuple[str, int], ...]  # axes of graph inputs, by name, whose lengths multiply a count


@dataclass(frozen=True)
class Axis:
    """One axis of a value; `reader` is set where each user may get a copy of its own (see `Tracer.axis`)."""

    value: ir.Value
    axis: int
    reader: ir.Node | None = None


def input_and_output(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The first input and the first output of a node that needs both; raises `ModelError`."""
    x = node.inputs[0] if node.inputs else None
    if x is None:
        raise ModelError(f"{node.op_type} '{node.name}' has no first input")
    return x, node.outputs[0]


class Tracer:
    """Unit numbers by axis, how each was reached, and the edits that the rules have found necessary."""

    def __init__(self, g: Graph, f: Facts, rules: dict[tuple[str, str], Rule], *, io: bool = False) -> None:
        self.g, self.f, self.rules, self.io = g, f, rules, io
        self.units: dict[Axis, Array] = {}
        self.via: dict[Axis, tuple[Axis | None, ir.Node | None]] = {}
        self.roles: dict[Axis, set[str]] = {}
        self.sizes: dict[tuple[ir.Node, int, ir.Node | None], dict[int, tuple[Array, int, Repeats]]] = {}
        self.lengths: dict[tuple[ir.Node, int], int] = {}
        self.measured: set[tuple[ir.Node, int]] = set()  # inputs that depend on the length of a reached axis
        self.attrs: dict[tuple[ir.Node, str], Array] = {}
        self.norms: dict[ir.Node, Array] = {}
        self.indices: dict[tuple[ir.Node, int], Array] = {}
        self.parts: dict[ir.Node, Array] = {}
        self.blocked: list[tuple[Axis, str]] = []
        self.parent = np.zeros(1, np.int64)
        self.joined = 0
        self.may_split = False  # whether units may be assigned to one of several possible axes
        self.settled = False  # whether the fixed point was reached with `may_split`
        self._queue: deque[ir.Node] = deque()
        self._queued: set[ir.Node] = set()
        self._visited: dict[ir.Node, None] = {}
        self._current: ir.Node | None = None
        self._followed: set[Axis] = set()

    # ---- unit numbers --------------------------------------------------------------------------------------------

    def new(self, count: int) -> Array:
        """New unit numbers."""
        first = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(first, first + count)])
        return np.arange(first, first + count)

    def find(self, units: Array) -> Array:
        """The representative of each unit; `UNKNOWN` is unchanged."""
        units = np.asarray(units, np.int64)
        while True:
            up = np.where(units >= 0, self.parent[np.maximum(units, 0)], units)
            if np.array_equal(up, units):
                return np.asarray(units)
            units = up

    def join(self, a: Array, b: Array) -> None:
        """Merge the units of two arrays position by position, where both are known."""
        x, y = (np.ravel(u) for u in np.broadcast_arrays(self.find(a), self.find(b)))
        unlike = (x >= 0) & (y >= 0) & (x != y)
        for p, q in np.unique(np.stack([x[unlike], y[unlike]], axis=1), axis=0):
            r, s = (int(self.find(np.array([u]))[0]) for u in (p, q))
            if r != s:
                self.parent[max(r, s)] = min(r, s)  # 0, `FROZEN`, is the representative of all merged with it
                self.joined += 1

    def at(self, axis: Axis) -> Array | None:
        """Unit numbers of an axis, None where it was not reached."""
        units = self.units.get(axis)
        return None if units is None else self.find(units)

    # ---- axes ----------------------------------------------------------------------------------------------------

    def axis(self, v: ir.Value, axis: int, node: ir.Node | None = None) -> Axis:
        """The axis of a value as a node reads it; a constant vector, or an axis along which an Expand repeats, is a
        separate one for each user, since it is cheap to copy."""
        rank = self.f.rank(v) or 0
        place = axis % rank if rank else 0
        return Axis(v, place, node if node is not None and (self._is_small(v) or self._is_repeated(v, place)) else None)

    def _is_repeated(self, v: ir.Value, axis: int) -> bool:
        """Whether several users share the result of an Expand along the axis."""
        node = v.producer()
        if node is None or node.op_type != "Expand" or v.is_graph_output() or len({u for u, _ in v.uses()}) < 2:
            return False
        short = self.f.shape(node.inputs[0])
        before = self.dim(node.inputs[0], axis - (self.f.rank(v) or 0))
        return short is not None and before in (1, None) and self.dim(v, axis) != 1

    def _is_small(self, v: ir.Value) -> bool:
        t = self.g.tensor(v)
        return t is not None and sum(d != 1 for d in t.shape.numpy()) <= 1

    def size(self, v: ir.Value | None, axis: int) -> int | None:
        """Length of an axis where it is a number."""
        d = self.dim(v, axis)
        return d if isinstance(d, int) else None

    def dim(self, v: ir.Value | None, axis: int) -> Size | None:
        """Length of an axis, which may be unknown but named; None where there is no such axis."""
        shape = self.f.shape(v)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def period(self, v: ir.Value | None, axis: int) -> int | None:
        """How many unit numbers an axis holds: its length, or `n > 1` where that is `n` times an unknown."""
        d = self.dim(v, axis)
        if d is None or isinstance(d, int):
            return d
        return d.factor if d.factor > 1 else None

    # ---- verbs of the rules --------------------------------------------------------------------------------------

    def put(self, to: Axis, units: Array, source: Axis | None) -> None:
        """Give an axis unit numbers, merged with those it has; adjacent nodes are queued if that is new."""
        n = self.period(to.value, to.axis)
        if n != len(units):
            return self.stop(source or to, f"axis {to.axis} of '{to.value.name}' does not have the length {len(units)}")
        old = self.units.get(to)
        if old is None:
            if (units == UNKNOWN).all():
                return None
            self.units[to] = units.copy()
            self.via[to] = (source, self._current)
        else:
            self.join(old, units)
            if not ((old == UNKNOWN) & (units != UNKNOWN)).any():
                return None
            self.units[to] = np.where(old == UNKNOWN, units, old)
        self._reached(to)
        return None

    def same(self, a: Axis, b: Axis) -> None:
        """The two axes have the same positions."""
        self._followed |= {a, b}
        if a in self.units:
            self.put(b, self.units[a], a)
        if b in self.units:
            self.put(a, self.units[b], b)

    def broadcast(self, a: Axis, out: Axis) -> None:
        """The axis is coupled to that of an output or broadcast along it; where neither is proved, both stay."""
        size, out_size = self.dim(a.value, a.axis), self.dim(out.value, out.axis)
        if size is None or out_size is None:
            return
        if size == 1 != out_size:
            self.followed(a)
        elif self.f.same(size, out_size):
            self.same(a, out)
        else:
            for axis in (a, out):
                self.stop(
                    axis,
                    f"'{a.value.name}', {size} long, may or may not be broadcast "
                    f"along '{out.value.name}', {out_size} long",
                )

    def mapped(self, a: Axis, b: Axis, index: Sequence[int] | Array) -> None:
        """Position `i` of `b`, or of its period, is position `index[i]` of `a`."""
        self._followed |= {a, b}
        where = np.asarray(index, np.int64)
        if a in self.units:
            self.put(b, self.units[a][where], a)
        if b in self.units and (n := self.period(a.value, a.axis)) is not None:
            self.put(a, self._scattered(self.units[b], where, n), b)

    def _scattered(self, units: Array, where: Array, n: int) -> Array:
        """Unit numbers of the `n` positions that `where` points at; several for one position are merged."""
        back = np.full(n, UNKNOWN)
        known = units != UNKNOWN
        back[where[known]] = units[known]
        self.join(back[where], units)
        return back

    def blocks(self, axes: Iterable[tuple[Axis, int]], count: int) -> Array:
        """Axes of `count` blocks, each of the given length: a block is cut as a unit, on all axes at once."""
        places = list(axes)
        merged = np.full(count, UNKNOWN)
        for place, block in places:
            self._followed.add(place)
            if place in self.units and len(self.units[place]) == count * block:
                merged = self._folded(merged, self.units[place].reshape(count, block))
        source = next((p for p, _ in places if p in self.units), None)
        if (merged != UNKNOWN).any():
            for place, block in places:
                self.put(place, np.repeat(merged, block), source)
        return self.find(merged)

    def _folded(self, merged: Array, units: Array) -> Array:
        """The unit of every row, merged with those known already."""
        first = np.where(merged != UNKNOWN, merged, units.max(axis=1))
        self.join(first[:, None], units)
        return np.asarray(first)

    def followed(self, *axes: Axis) -> None:
        """The rule has handled these axes itself."""
        self._followed |= set(axes)

    def role(self, axis: Axis, role: str) -> None:
        """A constant `reads` or `writes` the axis."""
        self.roles.setdefault(axis, set()).add(role)

    def stop(self, axis: Axis, why: str) -> None:
        """Freeze all units of this axis, if it is reached."""
        self._followed.add(axis)
        units = self.at(axis)
        if units is None or not (units > FROZEN).any():
            return
        self.blocked.append((axis, why))
        self.join(units, np.zeros_like(units))

    def keep(self, axis: Axis, positions: Array) -> None:
        """Freeze these positions of an axis, with all of their units."""
        self._followed.add(axis)
        units = self.units.get(axis)
        if units is not None:
            self.join(units[positions], np.zeros(1, np.int64))

    def counts(self, node: ir.Node, index: int, entry: int, units: Array, sign: int = 1) -> None:
        """Entry `entry` of integer input `index` of the node counts the positions of `units`."""
        self.sizes.setdefault((node, index, None), {})[entry] = (units, sign, ())

    # ---- propagation ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Visit nodes to a fixed point; ambiguous assignments (`may_split`) are made only after it, and checks that
        need the final state (`settled`) come last."""
        while True:
            self._drain()
            before = self.joined
            for node in list(self._visited):
                self._visit(node)
            if self._queue or self.joined != before:
                continue
            if self.settled:
                return
            self.may_split, self.settled = True, self.may_split

    def _drain(self) -> None:
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(node)
            self._visited[node] = None
            self._visit(node)
            if self._queue:
                self.may_split = self.settled = False

    def _reached(self, axis: Axis) -> None:
        """Queue the nodes adjacent to an axis; axes of the interface, and axes that a subgraph reads, must stay."""
        v = axis.value
        fixed = self.size(v, axis.axis) is not None
        if not self.g.is_constant(v) and (v.is_graph_input() or v.is_graph_output()) and not (self.io and fixed):
            what = "output" if v.is_graph_output() else "input"
            self.stop(axis, f"it is axis {axis.axis} of the model's {what} '{v.name}'")
        around = [v.producer(), *((axis.reader,) if axis.reader is not None else (u for u, _ in v.uses()))]
        for node in around:
            if node is None or node in self._queued:
                continue
            if node.graph is not self.g.model.graph:
                self.stop(axis, f"the subgraph of '{node.name}' reads '{v.name}'")
                continue
            self._queued.add(node)
            self._queue.append(node)

    def _visit(self, node: ir.Node) -> None:
        self._current, self._followed = node, set()
        name = f"{node.op_type} '{node.name}'"
        rule = self.rules.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        if rule is not None:
            rule(self, node)
        for v in dict.fromkeys((*node.inputs, *node.outputs)):
            if v is None:
                continue
            for i in range(self.f.rank(v) or 0):
                axis = self.axis(v, i, node if v in node.inputs else None)
                if axis in self.units and axis not in self._followed:
                    self.stop(axis, f"{name} works along axis {i} of '{v.name}'" if rule else f"{name} has no rule")
        self._current = None

    def path(self, axis: Axis) -> list[str]:
        """Names of the nodes on the path from the starting axis."""
        names: list[str] = []
        current: Axis | None = axis
        while current is not None and len(names) < MAX_PATH:
            current, node = self.via.get(current, (None, None))
            if node is not None and (not names or names[-1] != node.name):
                names.append(str(node.name))
        return names[::-1]


Rule = Callable[[Tracer, ir.Node], None]
