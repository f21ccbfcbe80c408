"""One walk over the data answers all statistics that were asked for, within a memory budget."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcomp.accumulate import BUFFER, PAIRS, accumulator, family, finish
from onnxcomp.data import Dataset
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.handover import tap
from onnxcomp.maths import Array
from onnxcomp.rows import Dims, Samples, dims, mask_name, rows, token_axis
from onnxcomp.runtime import Session
from onnxcomp.stats import Need, Of, Stats
from onnxcomp.target import CPU, Target

__all__ = ["collect"]

MEMORY = 2 << 30  # bytes; half for the activations of one run, half for the statistics of one walk
WIDTH = 4096  # channels assumed where a shape is unknown
CACHE_VERSION = "1"
Key = tuple[Of, str]


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
    watch: Callable[[int, int], None] | None = None,
) -> Stats:
    """All statistics asked for, on the current graph and the original; only the part of a graph that is needed runs.

    `memory` (bytes) bounds what is held at once: more walks or smaller runs, never other results. With `scratch`,
    results larger than the budget live in files there; with `cache`, they are read back where model, needs and data
    are the same. Raises `DataError` for empty data and for NaN or infinity, naming the value and the batch.
    """
    asked = tuple(dict.fromkeys(needs))
    if not asked:
        return Stats()
    graphs: dict[Of, Graph] = {"current": graph}
    if original is not None:
        graphs["original"] = original
    if lost := [n for n in asked for of, _ in _fetched(n) if of not in graphs]:
        raise OnnxcompError(f"statistic {lost[0]} is of the original model, which was not given")
    path = None if cache is None else cache / f"{_cache_key(graphs, asked, data, target)}.npz"
    if path is not None and (found := _read(path, asked)) is not None:
        return found
    stats = Stats(_Collection(graphs, data, target, memory or MEMORY, scratch).run(asked, watch))
    if path is not None:
        _write(path, asked, stats)
    return stats


def _fetched(need: Need) -> list[Key]:
    """The values a statistic reads, each of its graph."""
    second: list[Key] = [(need.stat.other_of or need.of, need.stat.other)] if need.stat.kind in PAIRS else []
    return [(need.of, need.value), *second]


def prefix(graph: Graph, names: Sequence[str]) -> Graph:
    """The part of a graph that computes the named values, which become its only outputs; tensors are shared."""
    graph.model.graph.sort()
    model = graph.model.clone()
    model.graph.outputs.clear()
    tap(model, names)
    RemoveUnusedNodesPass()(model)
    return Graph(model, graph.path)


def _shapes(graph: Graph, of: Of, keys: Iterable[Key]) -> dict[Key, Dims | None]:
    """Shapes of the values of one graph, inferred on a copy where they are not recorded."""
    names = [name for o, name in keys if o == of]
    found = {(of, name): dims(graph.value(name)) for name in names}
    if None not in found.values():
        return found
    graph.model.graph.sort()
    copy = graph.clone()
    copy.infer_shapes()
    return {(of, name): dims(copy.value(name)) for name in names}


class _Collection:
    """The walks behind one call of `collect`."""

    def __init__(self, graphs: Mapping[Of, Graph], data: Dataset, target: Target, memory: int, scratch: Path | None):
        self.graphs, self.data, self.target, self.memory, self.scratch = graphs, data, target, memory, scratch
        self.mask = mask_name(graphs["current"])
        self.shapes: dict[Key, Dims | None] = {}
        self.sizes: dict[Key, int] = {}
        self.widths: dict[Need, int] = {}
        self.held = 0

    def run(self, asked: Sequence[Need], watch: Callable[[int, int], None] | None) -> dict[Need, Array]:
        """Statistics by need; every accumulator is filled once however many needs it answers."""
        first = next(iter(self.data), None)
        if first is None:
            raise DataError(f"{self.data.name}: there are no samples to collect statistics on")
        shared = dict.fromkeys(Need(n.value, family(n.stat), n.of) for n in asked)
        walks = self._plan(list(shared), first.feeds)
        total, found = len(self.data) * len(walks), {}
        for i, walk in enumerate(walks):
            step = None if watch is None else _from(watch, i * len(self.data), total)
            found.update(self._walk(walk, first.feeds, step))
        return {n: finish(n.stat, found[Need(n.value, family(n.stat), n.of)]) for n in asked}

    def _sizes(self, keys: Sequence[Key], feeds: Mapping[str, Array]) -> dict[Key, int]:
        """Estimated bytes of values for one sample, from recorded or inferred shapes and the first batch."""
        self.shapes = {k: s for of, g in self.graphs.items() for k, s in _shapes(g, of, keys).items()}
        symbols: dict[int | str, int] = {}
        for v in self.graphs["current"].inputs:
            symbols.update(zip(dims(v) or (), feeds[str(v.name)].shape if v.name in feeds else (), strict=False))
        tokens = math.prod(n for d, n in symbols.items() if isinstance(d, str))

        def elements(key: Key) -> int:
            shape = self.shapes[key] or (tokens, WIDTH)
            return math.prod(d if isinstance(d, int) else symbols.get(d, tokens) for d in shape)

        return {k: max(1, 4 * elements(k) // (_batch(feeds) or 1)) for k in keys}

    def _plan(self, needs: Sequence[Need], feeds: Mapping[str, Array]) -> list[list[Need]]:
        """Split needs, in order, into walks of which each keeps within the budget."""
        self.sizes = sizes = self._sizes(list(dict.fromkeys(k for n in needs for k in _fetched(n))), feeds)
        walks: list[list[Need]] = [[]]
        values: set[Key] = set()
        held = 0
        for need in needs:
            new = values | set(_fetched(need))
            state = self._state(need)
            if walks[-1] and (sum(sizes[k] for k in new) > self.memory // 2 or held + state > self.memory // 2):
                walks.append([])
                new, held = set(_fetched(need)), 0
            walks[-1].append(need)
            values, held = new, held + state
        return walks

    def _state(self, need: Need) -> int:
        """Bytes an accumulator holds, from the recorded width of its values."""
        if need.stat.kind == "histogram":
            return 8 << 16
        widths = [s[-1] if (s := self.shapes[k]) and isinstance(s[-1], int) else WIDTH for k in _fetched(need)]
        if need.stat.kind in ("gram", "cross_gram"):
            return int(widths[0] * widths[-1] * 8 + sum(widths) * BUFFER * 4)
        return int(widths[0] * 4 * max(need.stat.n, 6))

    def _walk(
        self, needs: Sequence[Need], feeds: Mapping[str, Array], watch: Callable[[int], None] | None
    ) -> dict[Need, Array]:
        accumulators = {n: accumulator(n.stat) for n in needs}
        tasks: dict[tuple[Key, ...], list[Need]] = {}
        for n in needs:
            tasks.setdefault(tuple(_fetched(n)), []).append(n)
        wanted = list(dict.fromkeys(k for keys in tasks for k in keys))
        chunk = max(1, self.memory // 2 // max(1, sum(self.sizes[k] for k in wanted)))
        done = 0
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(_Source(g, of, wanted, self.target)) for of, g in self.graphs.items()]
            pool = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1)))
            for index, batch in enumerate(self.data):
                for part in _slices(batch.feeds, chunk if all(s.splits for s in sources) else None):
                    values = {k: a for s in sources for k, a in s.run(part).items()}
                    samples = Samples(part, self.mask)
                    # Large values first, so that no thread is left with the largest at the end.
                    order = sorted(tasks.items(), key=lambda t: -values[t[0][0]].nbytes)
                    jobs = [pool.submit(self._reduce, k, ns, values, samples, accumulators, index) for k, ns in order]
                    for job in jobs:
                        job.result()
                    values.clear()
                done += _batch(batch.feeds) or 1
                if watch is not None:
                    watch(done)
        return {n: self._result(n, a) for n, a in accumulators.items()}

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
                extra = xs[1] if len(xs) == 2 else samples.keys(len(xs[0]), axis) if n.stat.kind == "sample" else None
                accumulators[n].update(xs[0], extra)
        except DataError as e:
            raise DataError(f"value '{keys[0][1]}' in batch {index} of {self.data.name}: {e}") from e

    def _result(self, need: Need, accumulated: Any) -> Array:
        """The result, moved into a mapped file once all results together exceed the budget."""
        try:
            result: Array = accumulated.result()
        except DataError as e:
            raise DataError(f"value '{need.value}' of {self.data.name}: {e}") from e
        self.held += result.nbytes
        if self.scratch is None or self.held <= self.memory or result.nbytes < 1 << 20:
            return result
        self.scratch.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".npy", dir=self.scratch)
        with os.fdopen(handle, "wb") as f:
            np.save(f, result, allow_pickle=False)
        self.held -= result.nbytes
        mapped: Array = np.load(name, mmap_mode="r", allow_pickle=False)
        return mapped


class _Source:
    """A session over the needed part of one graph; without one where only its inputs are asked for."""

    def __init__(self, graph: Graph, of: Of, wanted: Sequence[Key], target: Target) -> None:
        self.of = of
        self.names = [name for o, name in wanted if o == of]
        fed = {str(v.name) for v in graph.inputs}
        self.computed = [n for n in self.names if n not in fed]
        self.session: Session | None = None
        if self.computed:
            part = prefix(graph, self.computed)
            self.session = Session(part, target)
        self.splits = self.session is None or all(p.shape and isinstance(p.shape[0], str) for p in self.session.inputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[Key, Array]:
        made = {} if self.session is None else self.session.run(feeds, self.computed)
        return {(self.of, n): made[n] if n in made else feeds[n] for n in self.names}

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.session is not None:
            self.session.close()


def _from(watch: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    return lambda done: watch(min(start + done, total), total)


def _batch(feeds: Mapping[str, Array]) -> int | None:
    """Samples in a batch: the common first axis of all feeds, None where they do not have one."""
    sizes = {a.shape[0] if a.ndim else -1 for a in feeds.values()}
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None


def _slices(feeds: Mapping[str, Array], chunk: int | None) -> Iterator[dict[str, Array]]:
    """A batch in runs of at most `chunk` samples; whole where it cannot be split."""
    n = _batch(feeds)
    if n is None or chunk is None or chunk >= n:
        yield dict(feeds)
        return
    for i in range(0, n, chunk):
        yield {name: a[i : i + chunk] for name, a in feeds.items()}


# ---- cache ---------------------------------------------------------------------------------------------------------


def _fingerprint(graph: Graph, names: Sequence[str]) -> str:
    """SHA-256 of the part of a graph that computes the named values, weights included."""
    digest = hashlib.sha256()
    part = prefix(graph, [n for n in names if n not in {v.name for v in graph.inputs}]).model
    for v in part.graph.initializers.values():
        t = v.const_value
        if t is None:
            continue
        digest.update(f"{v.name} {t.dtype} {t.shape} ".encode())
        digest.update(
            t.tobytes() if t.nbytes < 4096 else np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8).data
        )
        v.const_value = ir.ExternalTensor("x", 0, 0, t.dtype, shape=ir.Shape([0]), name=str(v.name))
    message = ir.to_proto(part)
    digest.update(message.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _cache_key(graphs: Mapping[Of, Graph], asked: Sequence[Need], data: Dataset, target: Target) -> str:
    wanted = [k for n in asked for k in _fetched(n)]
    parts = [CACHE_VERSION, target.name, data.fingerprint(), *map(repr, asked)]
    for of, graph in graphs.items():
        names = list(dict.fromkeys(name for o, name in wanted if o == of))
        parts.append(f"{of} {_fingerprint(graph, names) if names else '-'}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(path: Path, asked: Sequence[Need]) -> Stats | None:
    """Statistics from the cache; None where there are none or the file is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as f:
            return Stats({n: f[f"s{i}"] for i, n in enumerate(asked)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: Path, asked: Sequence[Need], stats: Stats) -> None:
    """Publish a cache entry at once, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    with os.fdopen(handle, "wb") as f:
        np.savez(f, allow_pickle=False, **{f"s{i}": stats[n] for i, n in enumerate(asked)})
    Path(name).replace(path)
