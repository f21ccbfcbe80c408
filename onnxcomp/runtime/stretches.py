"""A graph in stretches: cut where few values cross, each stretch run over all data before the next one begins.

Memory is that of one stretch: its sub-model reads the original external data, and the hidden states of every run are
carried from cut to cut, in files once they are large. What does not depend on any weight product (masks, positions,
embeddings) is computed again in every stretch that reads it.
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
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcomp.graph import Graph
from onnxcomp.graph.scratch import forget
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import prepacks, tap, whole_caches
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["Cut", "Layout", "Stage", "Walk", "signature", "stretch"]

Runs = Callable[[], Iterable[Mapping[str, Array]]]
# Products with a weight: everything behind one is worth carrying, everything before is cheap to compute again.
PRODUCTS = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "Attention", "MatMulInteger",
    "ConvInteger", "QLinearMatMul", "QLinearConv", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
    "FusedMatMul", "QGemm", "QAttention",
})  # fmt: skip
CROSSING = 6  # values that may cross a cut
LONG = 16  # products in a stretch from which on it is cut again where more values cross


@dataclass(frozen=True)
class Cut:
    """A place in a graph: the number of nodes before it and the values that cross it."""

    place: int
    values: tuple[str, ...]


class Layout:
    """The cuts of a sorted graph, where its values are made, and the bytes of constants in between."""

    def __init__(self, graph: Graph) -> None:
        graph.model.graph.sort()
        nodes = _early(list(graph.model.graph))
        self.count = len(nodes)
        self._made: dict[str, int] = {}
        heavy = [0]
        self._bytes = [0]
        last: dict[ir.Value, int] = {}
        costly: set[ir.Value] = set()
        for i, node in enumerate(nodes):
            product = _is_product(graph, node)
            heavy.append(heavy[-1] + product)
            held = [t for x in node.inputs if (t := graph.tensor(x)) is not None]
            self._bytes.append(self._bytes[-1] + sum(t.nbytes for t in held))
            behind = product or any(x in costly for x in node.inputs)
            last.update(dict.fromkeys((x for x in node.inputs if x is not None), i))
            if behind:
                costly.update(node.outputs)
                self._made.update({str(v.name): i for v in node.outputs})
        has_bodies = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for n in nodes for a in _attrs(n))
        self.cuts = [] if has_bodies else _cuts(_crossing(nodes, costly, last), heavy)

    def before(self, wanted: Iterable[str]) -> Cut | None:
        """The last cut behind which all wanted values can still be computed; None for the inputs."""
        names = [w for w in wanted if w in self._made]
        for cut in reversed(self.cuts):
            if names and all(self._made[w] >= cut.place or w in cut.values for w in names):
                return cut
        return None

    def nbytes(self, start: int, end: int) -> int:
        """Bytes of the constants that the nodes from `start` to `end` read."""
        return self._bytes[end] - self._bytes[start]

    def end(self, wanted: Iterable[str]) -> int:
        """How many nodes lie before and at the last wanted value."""
        return max((self._made[w] + 1 for w in wanted if w in self._made), default=0)


def _early(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Sorted nodes, those that lead to no graph output right behind what they read.

    Such nodes are what a pass adds to look at values: at the end of the order every value they read would cross all
    cuts in between.
    """
    aside: set[ir.Node] = set()
    for node in reversed(nodes):
        users = {u for v in node.outputs for u, _ in v.uses()}
        if users <= aside and not any(v.is_graph_output() for v in node.outputs):
            aside.add(node)
    place: dict[ir.Node, int] = {}
    for i, node in enumerate(nodes):
        makers = (x.producer() for x in node.inputs if x is not None)
        place[node] = max((place[m] for m in makers if m in place), default=-1) if node in aside else i
    return sorted(nodes, key=lambda n: (place[n], n in aside))


def _attrs(node: ir.Node) -> Iterable[ir.Attr]:
    return (a for a in node.attributes.values() if isinstance(a, ir.Attr))


def _is_product(graph: Graph, node: ir.Node) -> bool:
    """Whether a node multiplies with a matrix of weights, stored as it is, transposed or quantized."""
    if node.op_type not in PRODUCTS:
        return False
    for x in node.inputs:
        v = x
        while (
            v is not None and (made := v.producer()) is not None and made.op_type in ("Transpose", "DequantizeLinear")
        ):
            v = made.inputs[0]
        t = graph.tensor(v)
        if t is not None and sum(n > 1 for n in t.shape.numpy()) > 1:
            return True
    return False


def _crossing(nodes: Sequence[ir.Node], costly: set[ir.Value], last: Mapping[ir.Value, int]) -> list[tuple[str, ...]]:
    """The costly values still to be read, after every number of nodes."""
    live: dict[ir.Value, None] = {}
    found: list[tuple[str, ...]] = [()]
    for i, node in enumerate(nodes):
        for x in node.inputs:
            if x in live and last[x] == i:
                del live[x]
        live.update(dict.fromkeys(v for v in node.outputs if v in costly and last.get(v, -1) > i))
        found.append(tuple(str(v.name) for v in live))
    return found


def _cuts(crossing: Sequence[tuple[str, ...]], heavy: Sequence[int]) -> list[Cut]:
    places = _split(crossing, heavy, 0, len(crossing) - 1)
    found: list[Cut] = []
    for i in places:
        if found and set(found[-1].values) == set(crossing[i]):
            found.pop()  # the same values a few light nodes later
        found.append(Cut(i, crossing[i]))
    return found


def _split(crossing: Sequence[tuple[str, ...]], heavy: Sequence[int], low: int, high: int) -> list[int]:
    """Places strictly between two others where the fewest values cross; long stretches are split again."""
    inside = [i for i in range(low + 1, high) if crossing[i]]
    fewest = min((len(crossing[i]) for i in inside), default=CROSSING + 1)
    if fewest > CROSSING:
        return []
    chosen = [i for i in inside if len(crossing[i]) == fewest]
    finer = [
        i
        for a, b in itertools.pairwise([low, *chosen, high])
        if heavy[b] - heavy[a] > LONG
        for i in _split(crossing, heavy, a, b)
    ]
    return sorted(chosen + finer)


def stretch(graph: Graph, given: Mapping[str, Array], names: Sequence[str]) -> Graph:
    """The part of a graph that computes the named values from its inputs and the given ones; tensors are shared.

    `given` has one example of each carried value, which lends its type and rank to a new input of that name.
    """
    graph.model.graph.sort()
    model = graph.model.clone()
    model.graph.outputs.clear()
    made = {v.name: v for node in model.graph for v in node.outputs if v.name in given}
    for name, example in given.items():
        old = made[name]
        old.name = f"{name}_computed"
        kind = ir.TensorType(ir.DataType.from_numpy(example.dtype))
        new = ir.Value(name=name, type=kind, shape=ir.Shape([None] * example.ndim))
        old.replace_all_uses_with(new)
        model.graph.inputs.append(new)
    tap(model, names)
    RemoveUnusedNodesPass()(model)
    whole_caches(model)
    return Graph(model, graph.path)


def signature(graph: Graph, names: Iterable[str]) -> tuple[Any, ...]:
    """What decides the named values: the operators, wiring and constants before them; equal only for equal ones.

    Holds the constants themselves, so that no other one can take an identity while the signature lives.
    """
    wanted = set(names)
    pending = [v for node in graph.model.graph for v in node.outputs if v.name in wanted]
    seen: dict[ir.Node, None] = {}
    parts: list[Any] = [tuple(sorted(wanted))]
    while pending:
        v = pending.pop()
        node = v.producer()
        if node is None or node in seen:
            continue
        seen[node] = None
        held = tuple(_Same(t) for x in node.inputs if (t := graph.tensor(x)) is not None)
        inputs = tuple("" if x is None else str(x.name) for x in node.inputs)
        attributes = tuple((n, _Same(a.value) if _is_large(a) else repr(a.value)) for n, a in node.attributes.items())
        parts.append((node.op_type, node.domain, inputs, tuple(str(o.name) for o in node.outputs), attributes, held))
        pending += [x for x in node.inputs if x is not None]
    return tuple(parts)


def _is_large(a: ir.Attr) -> bool:
    return a.type in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class _Same:
    """Equal only to the same object."""

    def __init__(self, it: object) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


class _Store:
    """Carried values of every run by number: in memory up to a limit, the rest in files."""

    def __init__(self, limit: int, scratch: Path | None, lender: _Store | None = None) -> None:
        self.limit, self.scratch, self.lender = limit, scratch, lender
        self._held: list[dict[str, Array | Path]] = [] if lender is None else lender._held
        self._bytes = 0

    def append(self, values: Mapping[str, Array]) -> None:
        size = sum(a.nbytes for a in values.values())
        if self._bytes + size <= self.limit or self.scratch is None:
            self._bytes += size
            self._held.append(dict(values))
            return
        self.scratch.mkdir(parents=True, exist_ok=True)
        held: dict[str, Array | Path] = {}
        for name, a in values.items():
            with tempfile.NamedTemporaryFile(suffix=".npy", dir=self.scratch, delete=False) as f:
                np.save(f, a, allow_pickle=False)
            held[name] = Path(f.name)
        self._held.append(held)

    def __getitem__(self, number: int) -> dict[str, Array]:
        return {k: np.load(a) if isinstance(a, Path) else a for k, a in self._held[number].items()}

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Drop everything, files included but for those of a lender."""
        for values in self._held if self.lender is None else ():
            for a in values.values():
                if isinstance(a, Path):
                    a.unlink(missing_ok=True)
        self._held, self._bytes, self.lender = [], 0, None


class Walk:
    """Where the runs of one graph stand: carried values at one cut, good as long as what made them is unchanged."""

    def __init__(self, target: Target, memory: int, scratch: Path | None = None) -> None:
        self.target, self.memory, self.scratch = target, memory, scratch
        self.cut: Cut | None = None
        self.store = self.new_store()
        self._made_by: tuple[Any, ...] = ()

    def new_store(self) -> _Store:
        """An empty place for the values of the next cut."""
        return _Store(self.memory // 8, self.scratch)

    def fork(self) -> Walk:
        """Another walk that stands at the same place, and leaves what this one carries alone when it goes on."""
        other = Walk(self.target, self.memory, self.scratch)
        other.cut, other._made_by = self.cut, self._made_by
        other.store = _Store(self.store.limit, self.scratch, self.store)
        return other

    def stand(self, graph: Graph, cut: Cut, store: _Store) -> None:
        """Move to a cut whose values are at hand."""
        self.store.clear()
        self.cut, self.store, self._made_by = cut, store, signature(graph, cut.values)

    def reset(self) -> None:
        """Back to the inputs."""
        self.store.clear()
        self.cut, self._made_by = None, ()

    def seek(self, graph: Graph, layout: Layout, wanted: Sequence[str], runs: Runs) -> None:
        """Go to the last cut before the wanted values, in steps that keep to the budget, from as far as is valid."""
        goal = layout.before(wanted)
        if self.cut is not None and layout.end(wanted):  # what comes before all products needs no place to stand
            here = next((c for c in layout.cuts if set(c.values) == set(self.cut.values)), None)
            behind = goal is None or here is None or here.place > goal.place
            if behind or here is None or signature(graph, self.cut.values) != self._made_by:
                self.reset()
            else:
                self.cut = here
        self._forward(graph, layout, goal, runs)

    def go(self, graph: Graph, layout: Layout, goal: Cut, runs: Runs) -> None:
        """Go to one cut, from where the walk stands if that is before it and still valid, else from the inputs."""
        if self.cut is not None:
            here = next((c for c in layout.cuts if set(c.values) == set(self.cut.values)), None)
            if here is None or here.place > goal.place or signature(graph, here.values) != self._made_by:
                self.reset()
            else:
                self.cut = here
        self._forward(graph, layout, goal, runs)

    def _forward(self, graph: Graph, layout: Layout, goal: Cut | None, runs: Runs) -> None:
        while goal is not None and (self.cut is None or self.cut.place < goal.place):
            with Stage(self, graph, (), self.hop(layout, goal)) as stage:
                for feeds in runs():
                    stage.run(feeds)

    def hop(self, layout: Layout, goal: Cut) -> Cut:
        """The furthest cut up to the goal that keeps to the budget of weights in one stretch, at least the next."""
        place = 0 if self.cut is None else self.cut.place
        ahead = [c for c in layout.cuts if place < c.place <= goal.place]
        fits = [c for c in ahead if layout.nbytes(place, c.place) <= self.memory // 8]
        return fits[-1] if fits else ahead[0]


class Stage:
    """One stretch ready to run, for use in a `with` statement: from where the walk stands to the wanted values.

    With `to` the values of that cut are kept as well, and the walk stands there when the stage ends without an error.
    The runs must come in the same order each time.
    """

    def __init__(self, walk: Walk, graph: Graph, wanted: Sequence[str], to: Cut | None = None) -> None:
        self.walk, self.graph, self.to = walk, graph, to
        self.wanted = list(wanted)
        self._next = walk.new_store()
        self._number = 0
        example = walk.store[0] if walk.cut is not None and len(walk.store) else {}
        fed = {str(v.name) for v in graph.inputs}
        asked = dict.fromkeys([*self.wanted, *(() if to is None else to.values)])
        self._computed = [n for n in asked if n not in fed and n not in example]
        self._session: Session | None = None
        if self._computed:
            part = stretch(graph, example, self._computed)
            self._session = Session(part, walk.target, prepack=prepacks(graph, None))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The wanted values of the next run."""
        held = self.walk.store[self._number] if self.walk.cut is not None else {}
        self._number += 1
        given = {**feeds, **held}
        made = {} if self._session is None else self._session.run(given, self._computed)
        values = {**given, **made}
        if self.to is not None:
            self._next.append({n: values[n] for n in self.to.values})
        return {n: values[n] for n in self.wanted}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._session is not None:
            self._session.close()
            forget(self.graph.model)
        if kind is not None:
            self._next.clear()
        elif self.to is not None:
            self.walk.stand(self.graph, self.to, self._next)
