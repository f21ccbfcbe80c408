"""The choice of a form for every site of a graph: measured with micro-models, remembered, or from a target's table."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Size
from onnxcomp.data import open_axes
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.graph import Graph, extract
from onnxcomp.lowering import mask_kinds
from onnxcomp.lowering.choices import Choice, Choices, Header
from onnxcomp.lowering.forms import KINDS, Context, Form, Kind, Spot, default, legal
from onnxcomp.lowering.race import APPROXIMATE, FINER, Entry, race, unfinished, winner
from onnxcomp.machine import machine
from onnxcomp.maths import Array
from onnxcomp.runtime.installed import installed_runtimes
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["BUDGET", "Planner", "asked_shapes", "known_choices"]

# Seconds of measuring per graph where nobody sets them; sites that are not measured by then take the table's form.
BUDGET = 50.0


@dataclass
class _Group:
    """Spots of equal run time: same structure, types, sizes and kind of mask; only one of them is measured."""

    key: str
    spots: list[Spot]
    model: Graph
    sizes: list[dict[str, tuple[int, ...]]]
    what: str


@dataclass
class Planner:
    """Chooses forms for one graph; `chosen` collects all choices.

    Without `measure` nothing is timed: remembered choices are taken, else the table's, so that results are the same on
    every machine. `budget` is in seconds, `threads` are those of the sessions that are timed, and `watch` is told what
    is being timed. `seconds` is the time that choosing took so far; `exact_rows` and `inputs` are passed to
    all forms.
    """

    g: Graph
    target: Target
    shapes: Sequence[Mapping[str, int]]
    choices: Choices
    measure: bool = True
    budget: float = BUDGET
    threads: int = 0
    watch: Callable[[str, int, int], None] | None = None
    chosen: list[Choice] = field(default_factory=list)
    seconds: float = 0.0
    exact_rows: bool = False
    inputs: str = "any"
    _facts: Facts | None = None
    _masks: dict[str, str] = field(default_factory=dict)
    _context: Context | None = None
    _light: list[dict[str, Array]] = field(default_factory=list)
    _spent: float = 0.0

    def choose(self, name: str, *, standard: bool, approximate: bool) -> list[tuple[Spot, Form | None, str]]:
        """Every spot of a kind with its form (None where the target has none) and the reason, in graph order."""
        with self._clocked():
            return self._chosen(KINDS[name], standard, approximate)

    def _chosen(self, kind: Kind, standard: bool, approximate: bool) -> list[tuple[Spot, Form | None, str]]:
        spots = kind.find(self.g)
        if not spots:
            return []
        ctx = self.context(spots)
        chosen: list[tuple[Spot, Form | None, str]] = []
        groups = self._grouped(kind, spots, f"{standard} {approximate} {self.exact_rows} {self.inputs}")
        for i, group in enumerate(groups):
            if self.watch and self.measure:
                self.watch(f"timing forms of {kind.name}, kinds of sites", i, len(groups))
            names = legal(ctx, group.spots[0], standard=standard, approximate=approximate)
            choice = self._choice(kind, group, names, default(ctx, kind.name, names))
            self.chosen.append(choice)
            form = kind.form(choice.form) if choice.form in names else None
            chosen += [(spot, form, choice.reason) for spot in group.spots]
        place = {node: i for i, node in enumerate(self.g.model.graph)}
        return sorted(chosen, key=lambda x: place[x[0].nodes[0]])

    def context(self, spots: Sequence[Spot] = ()) -> Context:
        """The context that forms are given; masks are probed once, helper values are shared by all sites."""
        read = [n.inputs[3] for s in spots for n in s.nodes if n.op_type == "Attention" and len(n.inputs) > 3]
        new = [v for v in dict.fromkeys(read) if v is not None and str(v.name) not in self._masks]
        if new:
            self._masks |= mask_kinds.probe(self.g, new)
        if self._context is None:
            self._context = Context(self.g, self.target, self._masks, exact_rows=self.exact_rows, inputs=self.inputs)
        return self._context

    def dims(self, v: ir.Value) -> list[tuple[int, ...]]:
        """The shape of a value at each measured shape of the inputs; empty where one is not known."""
        with self._clocked():
            dims = [self._dims(v, i) for i in range(len(self.shapes))]
        known = [d for d in dims if d is not None]
        return known if len(known) == len(dims) else []

    @contextlib.contextmanager
    def _clocked(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    # ---- one choice ----------------------------------------------------------------------------------------------

    def _choice(self, kind: Kind, group: _Group, names: Sequence[str], first: str) -> Choice:
        sites = tuple(s.name for s in group.spots)
        shapes = tuple(open_axes.label(s) for s in self.shapes)
        base = Choice(kind.name, group.what, first or group.spots[0].present, first, "", "table", sites, shapes)
        if not first:
            return replace(base, reason=f"'{self.target.name}' has no form for it")
        known = self.choices.sites.get(group.key)
        if known is not None and known.form in names:
            source = "file" if self.choices.pinned else "remembered"
            return replace(known, sites=sites, source=source)
        if len(names) == 1:
            return replace(base, reason="the only form that is legal here")
        if not self.measure or not kind.timed or self.choices.pinned or not self.target.here:
            return replace(base, reason=f"the table of '{self.target.name}'")
        if not group.sizes:
            return replace(base, reason="its sizes at the asked shapes are not known before it runs")
        if self._spent > self.budget:
            return replace(base, reason=self._used_up)
        measured, complete = self._measure(kind, group, [first, *(f for f in names if f != first)], base)
        if complete:
            self.choices.sites[group.key] = replace(measured, sites=())
        return measured

    @property
    def _used_up(self) -> str:
        return f"{round(max(self.budget, 0.0), 1):g} s of measuring were used up"

    def _measure(self, kind: Kind, group: _Group, names: Sequence[str], base: Choice) -> tuple[Choice, bool]:
        """The measured choice, and whether there was time enough for it to be remembered."""
        began = time.perf_counter()
        feeds = [self._feeds(group.model, sizes, i) for i, sizes in enumerate(group.sizes)]
        entries = [_entry(kind, name, group.model, feeds, self.context()) for name in names]
        ready = [e for e in entries if not e.note]
        if entries[0].note:
            why, failed = f"{names[0]} {entries[0].note}", tuple(e.candidate(e) for e in entries)
            return replace(base, reason=why, candidates=failed), True
        race(ready, self.target, threads=self.threads, deadline=began + self.budget - self._spent)
        best, complete = winner(ready), not unfinished(ready)
        self._spent += time.perf_counter() - began
        candidates = tuple(e.candidate(entries[0]) for e in entries)
        if best is entries[0]:
            why = entries[0].note or f"none of {len(entries) - 1} other forms is reliably faster than {names[0]}"
            why = why if complete else f"{self._used_up} before another form had won"
        else:
            c = best.candidate(entries[0])
            why = f"{c.ratio:.2f}x [{c.low:.2f}, {c.high:.2f}] the speed of {names[0]}"
        return replace(base, form=best.form, reason=why, source="measured", candidates=candidates), complete

    # ---- what is equal to the clock ------------------------------------------------------------------------------

    def _grouped(self, kind: Kind, spots: Sequence[Spot], rules: str) -> list[_Group]:
        cuts = [(spot, extract.extract_subgraph(self.g, spot.nodes, spot.outputs)) for spot in spots]
        values = self._inputs(cuts)
        self._run_light(values.values())
        groups: dict[str, _Group] = {}
        for spot, model in cuts:
            sizes = [self._sizes(model, values, i) for i in range(len(self.shapes))]
            known = [s for s in sizes if s is not None]
            complete = len(known) == len(sizes) and bool(known)
            shown = known if complete else [{str(v.name): () for v in model.inputs}]
            masks = "".join(self._masks.get(str(v.name), "") for v in model.inputs)
            text = "\n".join([kind.name, rules, masks, spot.detail, *(extract.timing_key(model, s) for s in shown)])
            key = hashlib.sha256(text.encode()).hexdigest()[:24]
            if key in groups:
                groups[key].spots.append(spot)
                continue
            what = extract.describe(model, known[0] if complete else {})
            groups[key] = _Group(key, [spot], model, known if complete else [], what)
        return list(groups.values())

    def _inputs(self, cuts: Sequence[tuple[Spot, Graph]]) -> dict[str, ir.Value]:
        """The values of the graph that the micro-models read, by name."""
        read = {str(v.name): v for spot, _ in cuts for n in spot.nodes for v in n.inputs if v is not None}
        return {str(v.name): read[str(v.name)] for _, model in cuts for v in model.inputs}

    def _sizes(self, model: Graph, values: Mapping[str, ir.Value], i: int) -> dict[str, tuple[int, ...]] | None:
        """The shape of every input of a micro-model at the i-th measured shape, or None where one is not known."""
        sizes = {}
        for name in (str(v.name) for v in model.inputs):
            light = self._light[i].get(name) if self._light else None
            dims = light.shape if light is not None else self._dims(values[name], i)
            if dims is None:
                return None
            sizes[name] = dims
        return sizes

    def _dims(self, v: ir.Value, i: int) -> tuple[int, ...] | None:
        """The shape of a value at the i-th measured shape, as far as it follows from the model's inputs."""
        self._facts = self._facts or Facts(self.g)
        given = open_axes.shapes_of(self.g, self.shapes[i])
        known = {n: given[str(x.name)][axis] for n, (x, axis) in self._facts.roots.items() if str(x.name) in given}
        shape = self._facts.shape(v)
        sizes = [self._number(d, known) for d in shape] if shape is not None else [None]
        dims = tuple(d for d in sizes if d is not None)
        return dims if len(dims) == len(sizes) else None

    def _number(self, d: Size, known: Mapping[str, int]) -> int | None:
        assert self._facts is not None
        plain = self._facts.equal.plain(d)
        if isinstance(plain, int):
            return plain
        total = plain.factor
        for name in plain.names:
            if name not in known:
                return None
            total *= known[name]
        return total

    # ---- inputs --------------------------------------------------------------------------------------------------

    def _run_light(self, values: Iterable[ir.Value]) -> None:
        """Compute masks, angles and other cheap values from the model's inputs, with no key masked."""
        if not self.shapes:
            return
        self._light = self._light or [{} for _ in self.shapes]
        wanted = [v for v in values if str(v.name) not in self._light[0]]
        nodes, light = extract.light_prefix(self.g, wanted)
        if not light:
            return
        model = extract.extract_subgraph(self.g, nodes, light)
        try:
            with Session(model, prepack=False) as session:
                for known, shape in zip(self._light, self.shapes, strict=True):
                    feeds = open_axes.feeds_for(self.g, shape)
                    known |= session.run({p.name: feeds[p.name] for p in session.inputs})
        except OnnxcompError:
            return  # micro-models get random values instead; without sizes the table decides

    def _feeds(self, model: Graph, sizes: Mapping[str, tuple[int, ...]], i: int) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        feeds: dict[str, Array] = {}
        for v in model.inputs:
            name = str(v.name)
            known = self._light[i].get(name) if self._light else None
            dtype = np.dtype((v.dtype or ir.DataType.FLOAT).numpy())
            if known is not None:
                feeds[name] = known
            elif dtype.kind == "b":
                feeds[name] = np.ones(sizes[name], dtype)
            elif dtype.itemsize == 1 and dtype.kind in "iu":
                feeds[name] = rng.integers(0, 127, sizes[name]).astype(dtype)
            elif dtype.kind in "iu":
                feeds[name] = np.zeros(sizes[name], dtype)
            else:
                feeds[name] = rng.standard_normal(sizes[name], np.float32).astype(dtype)
        return feeds


# ---- what is known beforehand ----------------------------------------------------------------------------------------


def known_choices(target: Target, file: Path | None = None, cache: Path | None = None, threads: int = 0) -> Choices:
    """The choices of a file of `onnxcomp tune`, else those cached for this machine, else none."""
    facts = machine()
    where = f"{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['features'])}"
    runtime = " ".join(f"{n} {v}" for n, v in installed_runtimes().items())
    header = Header(target.name, where, runtime, threads)
    if file is not None:
        return Choices.load(file, header)
    return Choices.cached(cache, header) if cache is not None else Choices(header)


def asked_shapes(g: Graph, given: Sequence[Mapping[str, int]]) -> tuple[Mapping[str, int], ...]:
    """The shapes to measure at: the given ones, else batch 1 and 8 with 128 tokens; none where more axes are dynamic.

    Raises `DataError` where a given shape does not fit the model.
    """
    if given:
        for shape in given:
            open_axes.shapes_of(g, shape)
        return tuple(given)
    shapes = open_axes.default_shapes(g)
    try:
        for shape in shapes:
            open_axes.shapes_of(g, shape)
    except DataError:
        return ()
    return tuple(shapes)


# ---- micro-models in a form ------------------------------------------------------------------------------------------


def _entry(kind: Kind, name: str, site: Graph, feeds: Sequence[dict[str, Array]], of: Context) -> Entry:
    """The micro-model in one form; values that a model computes once for all sites become inputs of it."""
    model = site.clone()
    try:
        ctx = Context(model, of.target, of.masks, exact_rows=of.exact_rows, inputs=of.inputs)
        kind.form(name).rewrite(ctx, kind.find(model)[0])
        model.sort()
        model.sweep()
        return Entry(name, model, _hoist(model, ctx, feeds), tolerance=_tolerance(kind.form(name)))
    except OnnxcompError as e:
        return Entry(name, model, feeds, note=f"cannot be written: {e}")


def _tolerance(form: Form) -> float:
    """How far outputs may be from those of the default, relative to the largest; 0 for float noise."""
    return FINER if form.finer else APPROXIMATE if form.approximate else 0.0


def _hoist(model: Graph, ctx: Context, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Turn the values that all sites of a model share into inputs; returns feeds with their computed content."""
    shared = [v for v in ctx.once if v.producer() is not None and v.uses()]
    hoisted = [dict(f) for f in feeds]
    if shared:
        nodes, light = extract.light_prefix(model, shared)
        with Session(extract.extract_subgraph(model, nodes, light), prepack=False) as session:
            for f in hoisted:
                f |= session.run({p.name: f[p.name] for p in session.inputs})
        for v in shared:
            rank = hoisted[0][str(v.name)].ndim
            name = model.fresh(f"{v.name}_shared")
            new = ir.Value(name=name, type=v.type, shape=ir.Shape([None] * rank))
            if new.type is None:
                new.type = ir.TensorType(ir.DataType.from_numpy(hoisted[0][str(v.name)].dtype))
            model.model.graph.inputs.append(new)
            model.replace(v, new)
            for f in hoisted:
                f[name] = f[str(v.name)]
    model.sweep()
    _drop_unread(model)
    names = {str(v.name) for v in model.inputs}
    return [{k: a for k, a in f.items() if k in names} for f in hoisted]


def _drop_unread(model: Graph) -> None:
    """Remove inputs that nothing reads."""
    inputs = model.model.graph.inputs
    for v in [v for v in inputs if not v.uses() and not v.is_graph_output()]:
        inputs.remove(v)
