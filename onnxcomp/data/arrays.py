"""Samples that are arrays already: npz files, Python objects, functions, and random numbers."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from onnxcomp.data.input_axes import alone_behind_a_cache
from onnxcomp.data.inputs import LABELS, Batch, TensorSpec, id_ranges, roles, specs, total_mask
from onnxcomp.data.random_feeds import random_feeds
from onnxcomp.data.untrusted import guarded, read_npz, whole_number
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.machine import size_text
from onnxcomp.maths import Array

__all__ = ["Axes", "Npz", "Random", "Rows", "axes_of", "from_function", "read_json"]

Axes = Mapping[str, int | None]  # by input: the axis of its samples, None for one that all samples share

LIMIT = 2 * 10**9  # bytes of batches from Python that are kept in memory; more belongs in files


def axes_of(inputs: Sequence[TensorSpec]) -> Axes:
    """The axis of the samples of each input."""
    return {s.name: s.samples for s in inputs}


class Rows:
    """Samples of batches in memory; only consecutive samples of equal shapes and types share a batch.

    Samples are along the first axis of all arrays but those that they share.
    """

    def __init__(self, parts: Sequence[Batch], name: str, random: bool = False, axes: Axes | None = None) -> None:
        self.name, self.random, self.notes = name, random, list[str]()
        self.shared = {n for n, axis in (axes or {}).items() if axis is None}
        self.parts = parts
        self.index: list[tuple[int, int]] = []
        self.keys: list[object] = []
        unlabelled = set()
        for p, part in enumerate(parts):
            self.index += [(p, r) for r in range(part.size)]
            self.keys.append(tuple((n, a.dtype.str, a.shape[1:]) for n, a in sorted(part.feeds.items())))
            unlabelled.add(part.labels is None)
        self.widest = max(Counter(p for p, _ in self.index).values(), default=1)
        if len(unlabelled) > 1:
            raise DataError(f"{name}: some batches have labels and some have none")

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> object:
        """Shapes and types of the sample."""
        return self.keys[self.index[index][0]]

    def rows(self, indices: Sequence[int]) -> Batch:
        """The samples as one batch; a scalar or shared input is that of the first sample's batch."""
        spans = [(p, slice(rows[0], rows[-1] + 1)) for p, rows in _runs([self.index[i] for i in indices])]
        first = self.parts[spans[0][0]]
        feeds = {
            n: a if not a.ndim or n in self.shared else _stack([self.parts[p].feeds[n][s] for p, s in spans])
            for n, a in first.feeds.items()
        }
        labels = [self.parts[p].labels for p, _ in spans]
        stacked = (
            None
            if first.labels is None
            else _stack([x[s] for x, (_, s) in zip(labels, spans, strict=True) if x is not None])
        )
        return Batch(feeds, stacked)

    @classmethod
    def of(cls, x: Any, name: str, axes: Axes | None = None) -> Rows:
        """From a dict of arrays, or from an iterable of such dicts or of `Batch`, in the model's `axes`."""
        if isinstance(x, (Mapping, Batch)):
            x = [x]
        if not isinstance(x, Iterable):
            raise DataError(f"data of type {type(x).__name__} is no Dataset, path or iterable of batches")
        parts, size = [], 0
        once = isinstance(x, Iterator)
        for n, item in enumerate(x):
            part = _batch(item, f"{name}, batch {n}", axes)
            size += 0 if isinstance(x, (list, tuple)) else sum(a.nbytes for a in part.feeds.values())
            if size > LIMIT:
                what = "A generator can be read only once, and this one" if once else "It"
                raise DataError(
                    f"{name}: {what} gives more than {size_text(LIMIT)}; write it to a folder of .npz files"
                )
            parts.append(part)
        return cls(parts, name, axes=axes)


def _runs(places: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Group (part, row) pairs into runs of consecutive rows of one part."""
    runs: list[tuple[int, list[int]]] = []
    for p, r in places:
        if runs and runs[-1][0] == p and runs[-1][1][-1] + 1 == r:
            runs[-1][1].append(r)
        else:
            runs.append((p, [r]))
    return runs


def _stack(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _batch(item: Any, where: str, axes: Axes | None = None) -> Batch:
    """A `Batch` from a dict of arrays (labels under their own name) or a `Batch`, samples first; they must agree."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Mapping):
        item = Batch(dict(item[0]), None if item[1] is None else np.asarray(item[1]))
    if isinstance(item, Mapping):
        arrays = {str(k): np.asarray(v) for k, v in item.items()}
        labels = next((arrays.pop(k) for k in LABELS if k in arrays), None)
        item = Batch(arrays, labels)
    if not isinstance(item, Batch):
        raise DataError(f"{where}: is a {type(item).__name__}, not a dict of arrays by input name")
    axes = axes or {}
    feeds = {k: _samples_first(np.asarray(v), axes.get(k, 0)) for k, v in item.feeds.items()}
    every = feeds if item.labels is None else feeds | {"labels": np.asarray(item.labels)}
    counts = {k: v.shape[0] for k, v in every.items() if v.ndim and axes.get(k, 0) is not None}
    if not feeds:
        raise DataError(f"{where}: holds no arrays")
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: the first axes differ: {counts}; the first axis counts samples")
    return Batch(feeds, None if item.labels is None else np.asarray(item.labels), next(iter(counts.values()), None))


def _samples_first(a: Array, axis: int | None) -> Array:
    return np.moveaxis(a, axis, 0) if axis and a.ndim > axis else a


class Npz(Rows):
    """Samples of `.npz` files, arrays by input name; `labels` is optional. No pickled objects."""

    def __init__(self, files: Sequence[Path], name: str, axes: Axes | None = None) -> None:
        super().__init__(_Files(files, axes or {}), name, axes=axes)


class _Files(Sequence[Batch]):
    """The batches of several files, read on access; all stay in memory below `LIMIT / 4` bytes of files, else two."""

    def __init__(self, files: Sequence[Path], axes: Axes) -> None:
        self.files = files
        size = sum(f.stat().st_size for f in files)
        self._read = lru_cache(maxsize=None if size < LIMIT // 4 else 2)(lambda path: _read_npz(path, axes))

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        return [self._read(f) for f in self.files[index]] if isinstance(index, slice) else self._read(self.files[index])


def _read_npz(path: Path, axes: Axes) -> Batch:
    return _batch(read_npz(path), str(path), axes)


def from_function(src: str, allow_code: bool, axes: Axes | None = None) -> Rows:
    """The batches that `package.module:function` yields; raises `DataError` where running code was not allowed."""
    if not allow_code:
        raise DataError(f"{src}: names Python code, which is run only with --allow-code")
    module, _, function = src.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with guarded(f"{src}: cannot be found"):
            call = getattr(importlib.import_module(module), function)
    finally:
        sys.path.remove(str(Path.cwd()))
    with guarded(f"{src}: failed"):
        return Rows.of(call(), src, axes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, `{}` where there is no file; raises `DataError`."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(raw, dict):
        raise DataError(f"{path}: is not a JSON object")
    return raw


class Random(Rows):
    """Random samples of the model's shapes, of `sequence` new tokens behind half as many in caches, if it has any.

    Caches are empty where the runtime takes several tokens behind one of a single sample only.
    """

    def __init__(self, graph: Graph, folder: Path | None, samples: int, sequence: int | None, seed: int) -> None:
        inputs, vocab = specs(graph), id_ranges(graph)
        config = read_json(folder / "config.json") if folder is not None else {}
        if not inputs:
            raise DataError("the model takes no inputs: there is nothing to run it on, and what it gives is constant")
        role, where = roles(inputs), f"{folder}/config.json"
        table = vocab.get(role.get("positions", ""))
        limit = table or whole_number(config, "max_position_embeddings", 1 << 30, where)
        length = min(sequence or 32, limit)
        alone = length > 1 and samples > 1 and alone_behind_a_cache(graph.model.graph)
        past = 0 if alone else min(length // 2, limit - length)
        pixels = whole_number(config, "image_size", 32, where)
        mask = total_mask(inputs)
        free = {s.name: length for s in inputs} | ({mask.name: past + length} if mask is not None else {})
        if "pixels" in role:
            free[role["pixels"]] = pixels
        dims = {}
        for s in inputs:
            sizes = {s.cache: past, s.samples: samples}
            dims[s.name] = tuple(
                sizes.get(i, d if isinstance(d, int) else free[s.name]) if i != s.cache or isinstance(d, str) else d
                for i, d in enumerate(s.shape)
            )
        if "vocab_size" in config:
            words = whole_number(config, "vocab_size", 2, where)
            vocab = {role[r]: words for r in ("tokens", "decoder_tokens") if r in role} | vocab
        rng = np.random.default_rng(seed)
        feeds = random_feeds(inputs, dims, vocab, lambda name: rng)
        super().__init__([_batch(feeds, "random", axes_of(inputs))], "random", random=True, axes=axes_of(inputs))
