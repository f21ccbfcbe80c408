"""Collection of statistics of activations: all that are asked for in one run over the data, within a memory budget."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.narrowed import narrowed, without_caches
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array
from onnxcomp.runtime.segments import Layout, Stage, Walk, signature
from onnxcomp.stats import disk_cache
from onnxcomp.stats.row_keys import row_keys
from onnxcomp.stats.rows import Dims, Samples, dims, mask_name, rows, token_axis
from onnxcomp.stats.slices import batch_size, slices
from onnxcomp.stats.statistic import Key, Need, NoRows, Of, Statistic, Stats, accumulator, family, fetched, statistic
from onnxcomp.target import CPU, Target

__all__ = ["Collector", "collect"]


WIDTH = 4096  # channels assumed where a shape is unknown


def collect(
    graph: Graph,
    needs: Iterable[Need],
    data: Dataset,
    target: Target = CPU,
    *,
    original: Graph | None = None,
    memory: int | None = None,
    scratch: Path | None = None,
    cache: Path | None = None,
    notes: list[str] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Stats:
    """The statistics that are asked for, of the current graph and the original; only the nodes they need are run.

    `memory` (bytes) bounds what is held at once: beyond it the graph runs segment by segment (`runtime.segments`), in
    smaller batches, with the same results. With `scratch`, results that exceed it go to files there; with `cache`, they
    are read back where model, needs and data are the same, and `notes` gets what is said of damaged entries. Raises
    `DataError` for empty data and for NaN or infinity, naming the value and the batch.
    """
    asked = tuple(dict.fromkeys(needs))
    if not asked:
        return Stats()
    collector = Collector(data, target, original=original, memory=memory, scratch=scratch)
    graphs = collector.graphs(graph, asked)
    path = None if cache is None else cache / f"{disk_cache.key(graphs, asked, data, target)}.npz"
    if path is not None and (cached := disk_cache.read(path, asked, notes)) is not None:
        return cached
    stats = collector.collect(graph, asked, watch)
    if path is not None and all(stats.reached(n) for n in asked):
        disk_cache.write(path, asked, stats)
    return stats


def _names(needs: Iterable[Need], of: Of) -> list[str]:
    """The values of one graph that statistics read."""
    return list(dict.fromkeys(name for n in needs for o, name in fetched(n) if o == of))


@dataclass(frozen=True)
class Blocks:
    """A collection segment by segment: where each graph can be cut, and which needs are answered together."""

    layouts: Mapping[Of, Layout]
    stages: list[list[Need]]


@dataclass(frozen=True)
class SampleRule:
    """How feeds consist of samples: whether batches can be split, and the input that marks padding."""

    splits: bool
    mask: str | None


def _sample_rule(graph: Graph) -> SampleRule:
    shapes = [dims(v) for v in graph.inputs]
    return SampleRule(all(s and isinstance(s[0], str) for s in shapes), mask_name(graph))


class Collector:
    """Statistics over one dataset, in many calls, of graphs that may be edited in between.

    A `sequential` caller asks for values in the order of the graph: each call continues from the cut of the last one,
    as long as nothing before it was edited. A quarter of the `memory` each is for accumulators and for activations, an
    eighth each for weights, for values carried between segments and for results; carried values and results beyond that
    go to files in `scratch`.
    """

    def __init__(
        self,
        data: Dataset,
        target: Target = CPU,
        *,
        original: Graph | None = None,
        memory: int | None = None,
        scratch: Path | None = None,
        sequential: bool = False,
    ) -> None:
        self.data, self.target, self.original, self.sequential = data, target, original, sequential
        self._cut = False
        self.memory, self.scratch = memory or MEMORY, scratch
        self.walks: dict[Of, Walk] = {of: Walk(target, self.memory, scratch) for of in ("current", "original")}
        self.chunk: int | None = None
        self.shapes: dict[Key, Dims | None] = {}
        self._inferred: dict[Key, Dims] = {}
        self.sizes: dict[Key, int] = {}
        self.widths: dict[Need, int] = {}
        self.held = 0
        self._last: dict[Need, tuple[Any, Array | Path | NoRows]] = {}
        self._layouts: dict[Of, tuple[Graph, int, Layout]] = {}

    def graphs(self, graph: Graph, asked: Iterable[Need]) -> dict[Of, Graph]:
        """The graphs by the name that needs give them; raises `OnnxcompError` where the original is not known."""
        graphs: dict[Of, Graph] = {"current": graph}
        if self.original is not None:
            graphs["original"] = self.original
        if missing := [n for n in asked for of, _ in fetched(n) if of not in graphs]:
            raise OnnxcompError(f"statistic {missing[0]} is of the original model, which was not given")
        return graphs

    def collect(self, graph: Graph, needs: Iterable[Need], watch: Callable[[int, int], None] | None = None) -> Stats:
        """Statistics by need; every accumulator is filled once however many needs it answers."""
        asked = list(dict.fromkeys(needs))
        if not asked:
            return Stats()
        graphs = self.graphs(graph, asked)
        self._suit(graph)
        first = next(iter(self.data), None)
        if first is None:
            raise DataError(f"{self.data.name}: there are no samples to collect statistics on")
        shared = list(dict.fromkeys(Need(n.value, family(n.stat), n.of) for n in asked))
        marks = {n: self._mark(graphs, n) for n in shared} if self.sequential else {}
        results = {n: self._last[n][1] for n in marks if n in self._last and self._last[n][0] == marks[n]}
        todo = [n for n in shared if n not in results]
        self.held, self.widths = 0, {}
        if todo:
            self._last.clear()
            results.update(self._run(graphs, todo, first.feeds, watch))
        self._last = {n: (mark, results[n]) for n, mark in marks.items()}
        if all(isinstance(r, NoRows) for r in results.values()):  # else only some experts are reached by none
            raise next(r for r in results.values() if isinstance(r, NoRows))
        return Stats({n: self._finished(n, results[Need(n.value, family(n.stat), n.of)]) for n in asked})

    def _suit(self, graph: Graph) -> None:
        """Go on without caches, from the inputs, once heads of them are cut."""
        if not self._cut and self.original is not None and narrowed(self.original.inputs, graph.inputs):
            self._cut, self.data = True, without_caches(self.data, self.original)
            self._last.clear()
            for walk in self.walks.values():
                walk.reset()

    @staticmethod
    def _finished(need: Need, result: Array | Path | NoRows) -> Array | Path | NoRows:
        """The statistic; one in a file that needs no further computation stays there until it is read."""
        kind = statistic(need.stat)
        if isinstance(result, NoRows):
            return result
        if not isinstance(result, Path):
            return kind.finish(need.stat, result)
        if kind.finish.__func__ is Statistic.finish.__func__:  # type: ignore[attr-defined]
            return result
        return kind.finish(need.stat, np.load(result, mmap_mode="r", allow_pickle=False))

    @staticmethod
    def _mark(graphs: Mapping[Of, Graph], need: Need) -> tuple[Any, ...]:
        """All that determines a statistic on given data, for comparison."""
        return tuple(signature(graphs[of], [name]) for of, name in fetched(need))

    def _run(
        self,
        graphs: Mapping[Of, Graph],
        needs: Sequence[Need],
        feeds: Mapping[str, Array],
        watch: Callable[[int, int], None] | None,
    ) -> dict[Need, Array | Path | NoRows]:
        self.sizes = self._sizes(graphs, list(dict.fromkeys(k for n in needs for k in fetched(n))), feeds)
        samples = _sample_rule(graphs["current"])
        blocks = self._blocks(graphs, needs)
        stages = blocks.stages if blocks is not None else [list(needs)]
        total = len(self.data) * len(stages)
        results: dict[Need, Array | Path | NoRows] = {}
        for i, (stage, following) in enumerate(itertools.pairwise([*stages, []])):
            step = None if watch is None else _from(watch, i * len(self.data), total)
            results.update(self._stage(graphs, blocks, stage, following, samples, step))
        return results

    def _sizes(self, graphs: Mapping[Of, Graph], keys: Sequence[Key], feeds: Mapping[str, Array]) -> dict[Key, int]:
        """Estimated bytes of values for one sample, from recorded or inferred shapes and the first batch."""
        self.shapes = {k: s for of, g in graphs.items() for k, s in self._shapes(g, of, keys).items()}
        symbols: dict[int | str, int] = {}
        for v in graphs["current"].inputs:
            symbols.update(zip(dims(v) or (), feeds[str(v.name)].shape if v.name in feeds else (), strict=False))
        tokens = math.prod(n for d, n in symbols.items() if isinstance(d, str))

        def elements(key: Key) -> int:
            shape = self.shapes[key] or (tokens, WIDTH)
            return math.prod(d if isinstance(d, int) else symbols.get(d, tokens) for d in shape)

        return {k: max(1, 4 * elements(k) // (batch_size(feeds) or 1)) for k in keys}

    def _shapes(self, graph: Graph, of: Of, keys: Iterable[Key]) -> dict[Key, Dims | None]:
        """Shapes of the values of one graph, for estimates; those that are not recorded are inferred once on a copy."""
        names = [name for o, name in keys if o == of]
        recorded = {(of, name): dims(graph.value(name)) for name in names}
        shapes = {k: s if s is not None else self._inferred.get(k) for k, s in recorded.items()}
        if None not in shapes.values():
            return shapes
        graph.sort()
        copy = graph.clone()
        copy.infer_shapes()
        values = (v for node in copy.model.graph for v in node.outputs)
        self._inferred.update({(of, str(v.name)): shape for v in values if (shape := dims(v)) is not None})
        return {k: s if s is not None else self._inferred.get(k) for k, s in recorded.items()}

    def _blocks(self, graphs: Mapping[Of, Graph], needs: Sequence[Need]) -> Blocks | None:
        """How to go segment by segment; None where everything fits the budget in one session of the whole graph."""
        values = {k for n in needs for k in fetched(n)}
        states = sum(self._state(n) for n in needs)
        large = not self.sequential and any(graphs[of].nbytes > self.memory // 2 for of in {of for of, _ in values})
        fits = states <= self.memory // 4 and sum(self.sizes[k] for k in values) <= self.memory // 4
        if fits and not large and not self.sequential:
            return None
        layouts = {of: self._layout(of, g) for of, g in graphs.items() if any(o == of for o, _ in values)}
        if self.chunk is None:  # samples a run: a sixteenth of the budget for the largest value
            self.chunk = max(1, self.memory // 16 // max(self.sizes[k] for k in values))
        return Blocks(layouts, self._grouped(layouts, needs))

    def _layout(self, of: Of, graph: Graph) -> Layout:
        """The cuts of a graph, kept while it is not edited: the original is not between calls."""
        known = self._layouts.get(of)
        if known is None or known[0] is not graph or known[1] != graph.edits:
            known = self._layouts[of] = (graph, graph.edits, Layout(graph))
        return known[2]

    def _grouped(self, layouts: Mapping[Of, Layout], needs: Sequence[Need]) -> list[list[Need]]:
        """Needs in the order of the graph, in groups that keep within the budget."""

        def place(need: Need) -> float:
            return max(layouts[of].end([name]) / max(1, layouts[of].count) for of, name in fetched(need))

        stages: list[list[Need]] = [[]]
        for need in sorted(needs, key=place):
            new = [*stages[-1], need]
            values = {k for n in new for k in fetched(n)}
            weights = 0
            for of, layout in layouts.items():
                names = _names(new, of)
                start = layout.before(names)
                weights += layout.nbytes(
                    start.place if start else 0, max(layout.end(names), start.place if start else 0)
                )
            over = (
                sum(map(self._state, new)) > self.memory // 4
                or sum(self.sizes[k] for k in values) > self.memory // 4
                or weights > self.memory // 8
            )
            if over and stages[-1]:
                stages.append([])
            stages[-1].append(need)
        return stages

    def _state(self, need: Need) -> int:
        """Bytes an accumulator holds, from the recorded width of its values."""
        widths = [s[-1] if (s := self.shapes[k]) and isinstance(s[-1], int) else WIDTH for k in fetched(need)]
        return statistic(need.stat).nbytes(need.stat, widths)

    def _stage(
        self,
        graphs: Mapping[Of, Graph],
        blocks: Blocks | None,
        needs: Sequence[Need],
        following: Sequence[Need],
        rule: SampleRule,
        watch: Callable[[int], None] | None,
    ) -> dict[Need, Array | Path | NoRows]:
        """Fill the accumulators of one stage."""
        accumulators = {n: accumulator(n.stat) for n in needs}
        tasks: dict[tuple[Key, ...], list[Need]] = {}
        for n in needs:
            tasks.setdefault(tuple(fetched(n)), []).append(n)
        chunk = self.chunk
        if blocks is None:
            chunk = max(1, self.memory // 4 // max(1, sum(self.sizes[k] for k in {k for keys in tasks for k in keys})))
        chunk = chunk if rule.splits else None
        done = 0
        with contextlib.ExitStack() as stack:
            sources = [
                (of, stack.enter_context(stage))
                for of, stage in self._sources(graphs, blocks, needs, following, lambda: self._runs(chunk))
            ]
            pool = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1)))
            for index, batch in enumerate(self.data):
                for part in slices(batch.feeds, chunk):
                    values = {(of, k): a for of, s in sources for k, a in s.run(part).items()}
                    samples = Samples(part, rule.mask)
                    # Large values first, so that no thread is left with the largest at the end.
                    order = sorted(tasks.items(), key=lambda t: -values[t[0][0]].nbytes)
                    jobs = [pool.submit(self._reduce, k, ns, values, samples, accumulators, index) for k, ns in order]
                    for job in jobs:
                        job.result()
                    values.clear()
                done += batch_size(batch.feeds) or 1
                if watch is not None:
                    watch(done)
        return {n: self._result(n, accumulators.pop(n)) for n in needs}

    def _runs(self, chunk: int | None) -> Iterator[dict[str, Array]]:
        return (part for batch in self.data for part in slices(batch.feeds, chunk))

    def _sources(
        self,
        graphs: Mapping[Of, Graph],
        blocks: Blocks | None,
        needs: Sequence[Need],
        following: Sequence[Need],
        runs: Callable[[], Iterator[dict[str, Array]]],
    ) -> Iterator[tuple[Of, Stage]]:
        """A stage for each graph that needs read, from the cut of its walk, which moves on towards the next needs."""
        for of, graph in graphs.items():
            wanted, to = _names(needs, of), None
            if not wanted:
                continue
            walk = self.walks[of] if blocks is not None else Walk(self.target, self.memory)
            if blocks is not None:
                layout = blocks.layouts[of]
                walk.seek(graph, layout, wanted, runs)
                goal = layout.before(_names(following, of)) if _names(following, of) else None
                if goal is not None and goal.place > (walk.cut.place if walk.cut else 0):
                    to = walk.hop(layout, goal)
            yield of, Stage(walk, graph, wanted, to)

    def _reduce(
        self,
        keys: tuple[Key, ...],
        needs: Sequence[Need],
        values: Mapping[Key, Array],
        samples: Samples,
        accumulators: Mapping[Need, Any],
        index: int,
    ) -> None:
        try:
            xs = []
            for key in keys:
                a = values[key]
                axis = token_axis(a.shape, self.shapes[key], samples.mask)
                xs.append(rows(a, samples.keep, axis))
            if len(xs) == 2 and len(xs[0]) != len(xs[1]):
                raise DataError(f"has {len(xs[0])} rows, '{keys[1][1]}' has {len(xs[1])}")
            for n in needs:
                if n.stat.per == "channel" and self.widths.setdefault(n, xs[0].shape[1]) != xs[0].shape[1]:
                    raise DataError("its last axis differs between batches, so it has no channels to collect per")
                if statistic(n.stat).draws:
                    drawn = samples.keys(len(xs[0]), axis)
                    accumulators[n].update(
                        np.hstack(xs) if len(xs) == 2 else xs[0], row_keys(xs[0]) if drawn is None else drawn
                    )
                else:
                    accumulators[n].update(xs[0], xs[1] if len(xs) == 2 else None)
        except DataError as e:
            raise DataError(f"value '{keys[0][1]}' in batch {index} of {self.data.name}: {e}") from e

    def _result(self, need: Need, accumulated: Any) -> Array | Path | NoRows:
        """The result, or the file it was written to where all results together exceed an eighth of the budget."""
        try:
            result: Array = accumulated.result()
        except NoRows as e:
            return NoRows(f"value '{need.value}' of {self.data.name}: {e}")
        except DataError as e:
            raise DataError(f"value '{need.value}' of {self.data.name}: {e}") from e
        if self.scratch is None or self.held + result.nbytes <= self.memory // 8 or result.nbytes < 1 << 20:
            self.held += result.nbytes
            return result
        self.scratch.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".npy", dir=self.scratch)
        with os.fdopen(handle, "wb") as f:
            np.save(f, result, allow_pickle=False)
        return Path(name)


def _from(watch: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    return lambda done: watch(min(start + done, total), total)
