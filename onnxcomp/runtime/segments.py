"""Execution of a graph segment by segment, so that memory is that of one segment: all data runs through one first.

A `Layout` finds the cuts where few values cross. A `Walk` remembers where it stands: the values at one cut for every
run of the data, in files once they are large. A `Stage` is the session of one segment, a sub-model that
reads the original external data. What depends on no weight product (masks, positions, embeddings) crosses no cut: it is
computed again in every segment that reads it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.data.narrowed import sized, taken
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import has_body
from onnxcomp.graph.scratch import release_weights
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import prepacks
from onnxcomp.runtime.sessions import Session
from onnxcomp.runtime.sub_models import segment
from onnxcomp.target import Target

__all__ = ["Cut", "Layout", "Stage", "Walk", "signature"]

Runs = Callable[[], Iterable[Mapping[str, Array]]]
# Products with a weight: what depends on one is worth carrying over a cut, the rest is cheap to compute again.
PRODUCTS = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "Attention", "MatMulInteger",
    "ConvInteger", "QLinearMatMul", "QLinearConv", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
    "FusedMatMul", "QGemm", "QAttention",
})  # fmt: skip
# Values that may cross a cut: each of them is stored for every run of the data.
MAX_CROSSING = 6
# Weight products in a segment above which it is split again, at cuts that more values cross.
MAX_PRODUCTS = 16


@dataclass(frozen=True)
class Cut:
    """A place in a sorted graph: `place` nodes come before it, and `values` are the names of those that cross it."""

    place: int
    values: tuple[str, ...]


class Layout:
    """The cuts of a graph, the position of the node that computes each value, and the bytes of constants in between."""

    def __init__(self, graph: Graph) -> None:
        graph.sort()
        nodes = _early_order(list(graph.model.graph))
        self.count = len(nodes)
        self._position: dict[str, int] = {}
        products = [0]
        self._bytes = [0]
        last_use: dict[ir.Value, int] = {}
        after_product: set[ir.Value] = set()
        for i, node in enumerate(nodes):
            product = _is_product(graph, node)
            products.append(products[-1] + product)
            constants = [t for x in node.inputs if (t := graph.tensor(x)) is not None]
            self._bytes.append(self._bytes[-1] + sum(t.nbytes for t in constants))
            depends = product or any(x in after_product for x in node.inputs)
            last_use.update(dict.fromkeys((x for x in node.inputs if x is not None), i))
            if depends:
                after_product.update(node.outputs)
                self._position.update({str(v.name): i for v in node.outputs})
        self.cuts = [] if any(map(has_body, nodes)) else _cuts(_crossing(nodes, after_product, last_use), products)

    def before(self, wanted: Iterable[str]) -> Cut | None:
        """The last cut from which all wanted values can still be computed; None where only the inputs are enough."""
        computed = [w for w in wanted if w in self._position]
        for cut in reversed(self.cuts):
            if computed and all(self._position[w] >= cut.place or w in cut.values for w in computed):
                return cut
        return None

    def nbytes(self, start: int, end: int) -> int:
        """Bytes of the constants that the nodes from `start` to `end` read."""
        return self._bytes[end] - self._bytes[start]

    def end(self, wanted: Iterable[str]) -> int:
        """Number of nodes up to the last wanted value."""
        return max((self._position[w] + 1 for w in wanted if w in self._position), default=0)


def _early_order(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Sorted nodes with those that reach no graph output moved right behind their producers.

    Passes add such nodes to observe values; at the end of the order, every value they read would cross all later cuts.
    """
    dangling: set[ir.Node] = set()
    for node in reversed(nodes):
        users = {u for v in node.outputs for u, _ in v.uses()}
        if users <= dangling and not any(v.is_graph_output() for v in node.outputs):
            dangling.add(node)
    position: dict[ir.Node, int] = {}
    for i, node in enumerate(nodes):
        producers = (x.producer() for x in node.inputs if x is not None)
        position[node] = max((position[m] for m in producers if m in position), default=-1) if node in dangling else i
    return sorted(nodes, key=lambda n: (position[n], n in dangling))


def _is_product(graph: Graph, node: ir.Node) -> bool:
    """Whether a node multiplies with a weight matrix, stored plainly, transposed or quantized."""
    if node.op_type not in PRODUCTS:
        return False
    for x in node.inputs:
        v = x
        while (
            v is not None
            and (producer := v.producer()) is not None
            and producer.op_type in ("Transpose", "DequantizeLinear")
        ):
            v = producer.inputs[0]
        t = graph.tensor(v)
        if t is not None and sum(n > 1 for n in t.shape.numpy()) > 1:
            return True
    return False


def _crossing(
    nodes: Sequence[ir.Node], after_product: set[ir.Value], last_use: Mapping[ir.Value, int]
) -> list[tuple[str, ...]]:
    """Names of the values behind a weight product that later nodes read, after every number of nodes."""
    alive: dict[ir.Value, None] = {}
    crossing: list[tuple[str, ...]] = [()]
    for i, node in enumerate(nodes):
        for x in node.inputs:
            if x in alive and last_use[x] == i:
                del alive[x]
        alive.update(dict.fromkeys(v for v in node.outputs if v in after_product and last_use.get(v, -1) > i))
        crossing.append(tuple(str(v.name) for v in alive))
    return crossing


def _cuts(crossing: Sequence[tuple[str, ...]], products: Sequence[int]) -> list[Cut]:
    places = _split(crossing, products, 0, len(crossing) - 1)
    cuts: list[Cut] = []
    for i in places:
        if cuts and set(cuts[-1].values) == set(crossing[i]):
            cuts.pop()  # the same values cross a few cheap nodes later
        cuts.append(Cut(i, crossing[i]))
    return cuts


def _split(crossing: Sequence[tuple[str, ...]], products: Sequence[int], low: int, high: int) -> list[int]:
    """Places between `low` and `high` that the fewest values cross; segments with many products are split again."""
    inside = [i for i in range(low + 1, high) if crossing[i]]
    fewest = min((len(crossing[i]) for i in inside), default=MAX_CROSSING + 1)
    if fewest > MAX_CROSSING:
        return []
    chosen = [i for i in inside if len(crossing[i]) == fewest]
    finer = [
        i
        for a, b in itertools.pairwise([low, *chosen, high])
        if products[b] - products[a] > MAX_PRODUCTS
        for i in _split(crossing, products, a, b)
    ]
    return sorted(chosen + finer)


def signature(graph: Graph, names: Iterable[str]) -> tuple[Any, ...]:
    """All that determines the named values: operators, edges and constants (by identity) upstream; for comparison.

    It refers to the constants, so that no new object can take the identity of one while the signature lives.
    """
    wanted = set(names)
    pending = [v for node in graph.model.graph for v in node.outputs if v.name in wanted]
    visited: set[ir.Node] = set()
    parts, objects = list[Any](), list[object]()
    while pending:
        node = pending.pop().producer()
        if node is None or node in visited:
            continue
        visited.add(node)
        inputs = node.inputs
        objects += [graph.tensor(x) for x in inputs]
        pending += [x for x in inputs if x is not None]
        edges = [x and x.name for x in inputs], [v.name for v in node.outputs]
        attributes = [(n, None if _is_large(a) else repr(a.value)) for n, a in node.attributes.items()]
        objects += [a.value for a in node.attributes.values() if _is_large(a)]
        parts.append((node.op_type, node.domain, edges, attributes))
    return sorted(wanted), parts, _ById(objects)


def _is_large(a: ir.Attr) -> bool:
    return a.type in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class _ById:
    """Compares objects by identity."""

    def __init__(self, objects: Sequence[object]) -> None:
        self.objects, self.ids = objects, [*map(id, objects)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.ids == other.ids


class _Store:
    """The carried values of every run, by its number: in memory up to `limit` bytes, the rest in files of `scratch`.

    With a `lender` they are those of another store, which keeps its files.
    """

    def __init__(self, limit: int, scratch: Path | None, lender: _Store | None = None) -> None:
        self.limit, self.scratch, self.lender = limit, scratch, lender
        self._runs: list[dict[str, Array | Path]] = [] if lender is None else lender._runs
        self._bytes = 0

    def append(self, values: Mapping[str, Array]) -> None:
        size = sum(a.nbytes for a in values.values())
        if self._bytes + size <= self.limit or self.scratch is None:
            self._bytes += size
            self._runs.append(dict(values))
            return
        self.scratch.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Array | Path] = {}
        for name, a in values.items():
            with tempfile.NamedTemporaryFile(suffix=".npy", dir=self.scratch, delete=False) as f:
                np.save(f, a, allow_pickle=False)
            stored[name] = Path(f.name)
        self._runs.append(stored)

    def __getitem__(self, number: int) -> dict[str, Array]:
        return {k: np.load(a) if isinstance(a, Path) else a for k, a in self._runs[number].items()}

    def __len__(self) -> int:
        return len(self._runs)

    def clear(self) -> None:
        """Drop all values and delete their files, unless a lender owns them."""
        for values in self._runs if self.lender is None else ():
            for a in values.values():
                if isinstance(a, Path):
                    a.unlink(missing_ok=True)
        self._runs, self._bytes, self.lender = [], 0, None


class Walk:
    """The position of a segmented execution: the values at one cut for every run, valid while their producers are.

    `memory` is the budget in bytes, of which an eighth each is for the weights of a segment and for carried values.
    """

    def __init__(self, target: Target, memory: int, scratch: Path | None = None) -> None:
        self.target, self.memory, self.scratch = target, memory, scratch
        self.cut: Cut | None = None
        self.store = self.new_store()
        self._made_by: tuple[Any, ...] = ()

    def new_store(self) -> _Store:
        """An empty store for the values of the next cut."""
        return _Store(self.memory // 8, self.scratch)

    def fork(self) -> Walk:
        """Another walk at the same cut; when it moves on, this one keeps its values."""
        other = Walk(self.target, self.memory, self.scratch)
        other.cut, other._made_by = self.cut, self._made_by
        other.store = _Store(self.store.limit, self.scratch, self.store)
        return other

    def stand(self, graph: Graph, cut: Cut, store: _Store) -> None:
        """Move to a cut whose values are in `store`."""
        self.store.clear()
        self.cut, self.store, self._made_by = cut, store, signature(graph, cut.values)

    def reset(self) -> None:
        """Move back to the inputs."""
        self.store.clear()
        self.cut, self._made_by = None, ()

    def seek(self, graph: Graph, layout: Layout, wanted: Sequence[str], runs: Runs) -> None:
        """Move to the last cut before the wanted values, in steps within the budget; from the inputs if need be."""
        goal = layout.before(wanted)
        if self.cut is not None and layout.end(wanted):  # values before all products need no cut
            current = next((c for c in layout.cuts if set(c.values) == set(self.cut.values)), None)
            passed = goal is None or current is None or current.place > goal.place
            if passed or current is None or signature(graph, self.cut.values) != self._made_by:
                self.reset()
            else:
                self.cut = current
        self._forward(graph, layout, goal, runs)

    def go(self, graph: Graph, layout: Layout, goal: Cut, runs: Runs) -> None:
        """Move to one cut, from the current one if that lies before it and is still valid, else from the inputs."""
        if self.cut is not None:
            current = next((c for c in layout.cuts if set(c.values) == set(self.cut.values)), None)
            if current is None or current.place > goal.place or signature(graph, current.values) != self._made_by:
                self.reset()
            else:
                self.cut = current
        self._forward(graph, layout, goal, runs)

    def _forward(self, graph: Graph, layout: Layout, goal: Cut | None, runs: Runs) -> None:
        while goal is not None and (self.cut is None or self.cut.place < goal.place):
            with Stage(self, graph, (), self.hop(layout, goal)) as stage:
                for feeds in runs():
                    stage.run(feeds)

    def hop(self, layout: Layout, goal: Cut) -> Cut:
        """The furthest cut up to the goal whose weights fit an eighth of the budget, at least the next one."""
        place = 0 if self.cut is None else self.cut.place
        ahead = [c for c in layout.cuts if place < c.place <= goal.place]
        fits = [c for c in ahead if layout.nbytes(place, c.place) <= self.memory // 8]
        return fits[-1] if fits else ahead[0]


class Stage:
    """The session of one segment, for use in a `with` statement: from the cut of the walk to the wanted values.

    With `to` the values of that cut are stored as well, and the walk moves there when the stage ends without an error.
    The runs must come in the same order each time.
    """

    def __init__(self, walk: Walk, graph: Graph, wanted: Sequence[str], to: Cut | None = None) -> None:
        self.walk, self.graph, self.to = walk, graph, to
        self.wanted = list(wanted)
        self._next = walk.new_store()
        self._number = 0
        carried = walk.store[0] if walk.cut is not None and len(walk.store) else {}
        inputs = {str(v.name) for v in graph.inputs}
        asked = dict.fromkeys([*self.wanted, *(() if to is None else to.values)])
        self._computed = [n for n in asked if n not in inputs and n not in carried]
        self._taken = taken(graph.inputs)
        self._session: Session | None = None
        if self._computed:
            part = segment(graph, carried, self._computed)
            self._session = Session(part, walk.target, prepack=prepacks(graph, None))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute the next run and return its wanted values."""
        carried = self.walk.store[self._number] if self.walk.cut is not None else {}
        self._number += 1
        known = {**sized(feeds, self._taken), **carried}
        computed = {} if self._session is None else self._session.run(known, self._computed)
        values = {**known, **computed}
        if self.to is not None:
            self._next.append({n: values[n] for n in self.to.values})
        return {n: values[n] for n in self.wanted}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._session is not None:
            self._session.close()
            release_weights(self.graph.model)
        if kind is not None:
            self._next.clear()
        elif self.to is not None:
            self.walk.stand(self.graph, self.to, self._next)
