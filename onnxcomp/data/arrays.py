"""Samples that are arrays already: npz files, Python objects, functions, and random numbers."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from onnxcomp.data.inputs import LABELS, Batch, TensorSpec, roles, specs, vocabulary
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.machine import size_text
from onnxcomp.maths import Array

__all__ = ["Npz", "Random", "Rows", "from_function", "read_json"]

LIMIT = 2 * 10**9  # bytes of batches from Python that are kept in memory; more belongs in files


class Rows:
    """Samples of batches in memory; only consecutive samples of equal shapes and types share a batch."""

    def __init__(self, parts: Sequence[Batch], name: str, random: bool = False) -> None:
        self.name, self.random, self.notes = name, random, list[str]()
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
        """The samples as one batch; a scalar input is that of the first sample's batch."""
        spans = [(p, slice(rows[0], rows[-1] + 1)) for p, rows in _runs([self.index[i] for i in indices])]
        first = self.parts[spans[0][0]]
        feeds = {
            n: a if not a.ndim else _stack([self.parts[p].feeds[n][s] for p, s in spans])
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
    def of(cls, x: Any, name: str) -> Rows:
        """From a dict of arrays, or from an iterable of such dicts or of `Batch`."""
        if isinstance(x, (Mapping, Batch)):
            x = [x]
        if not isinstance(x, Iterable):
            raise DataError(f"data of type {type(x).__name__} is no Dataset, path or iterable of batches")
        parts, size = [], 0
        once = isinstance(x, Iterator)
        for n, item in enumerate(x):
            part = _batch(item, f"{name}, batch {n}")
            size += 0 if isinstance(x, (list, tuple)) else sum(a.nbytes for a in part.feeds.values())
            if size > LIMIT:
                what = "A generator can be read only once, and this one" if once else "It"
                raise DataError(
                    f"{name}: {what} gives more than {size_text(LIMIT)}; write it to a folder of .npz files"
                )
            parts.append(part)
        return cls(parts, name)


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


def _batch(item: Any, where: str) -> Batch:
    """A `Batch` from a dict of arrays (labels under their own name) or a `Batch`; first axes must agree."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Mapping):
        item = Batch(dict(item[0]), None if item[1] is None else np.asarray(item[1]))
    if isinstance(item, Mapping):
        arrays = {str(k): np.asarray(v) for k, v in item.items()}
        labels = next((arrays.pop(k) for k in LABELS if k in arrays), None)
        item = Batch(arrays, labels)
    if not isinstance(item, Batch):
        raise DataError(f"{where}: is a {type(item).__name__}, not a dict of arrays by input name")
    feeds = {k: np.asarray(v) for k, v in item.feeds.items()}
    every = feeds if item.labels is None else feeds | {"labels": np.asarray(item.labels)}
    counts = {k: v.shape[0] for k, v in every.items() if v.ndim}
    if not feeds:
        raise DataError(f"{where}: holds no arrays")
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: the first axes differ: {counts}; the first axis counts samples")
    return Batch(feeds, None if item.labels is None else np.asarray(item.labels))


class Npz(Rows):
    """Samples of `.npz` files, arrays by input name; `labels` is optional. No pickled objects."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        super().__init__(_Files(files), name)


class _Files(Sequence[Batch]):
    """The batches of several files, read on access; all stay in memory below `LIMIT / 4` bytes of files, else two."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        size = sum(f.stat().st_size for f in files)
        self._read = lru_cache(maxsize=None if size < LIMIT // 4 else 2)(_read_npz)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        return [self._read(f) for f in self.files[index]] if isinstance(index, slice) else self._read(self.files[index])


def _read_npz(path: Path) -> Batch:
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as z:
            return _batch({k: z[k] for k in z.files}, str(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        why = "it holds Python objects (pickle)" if "pickle" in str(e).lower() and zipfile.is_zipfile(path) else str(e)
        raise DataError(f"{path}: cannot be read as .npz: {why}") from e


def from_function(src: str, allow_code: bool) -> Rows:
    """The batches that `package.module:function` yields; raises `DataError` where running code was not allowed."""
    if not allow_code:
        raise DataError(f"{src}: names Python code, which is run only with --allow-code")
    module, _, function = src.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise DataError(f"{src}: cannot be found: {e}") from e
    finally:
        sys.path.remove(str(Path.cwd()))
    return Rows.of(call(), src)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, `{}` where there is no file; raises `DataError`."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(raw, dict):
        raise DataError(f"{path}: is not a JSON object")
    return raw


class Random(Rows):
    """Random samples of the model's shapes: ids within the vocabulary, normally distributed floats, masks of ones."""

    def __init__(self, graph: Graph, folder: Path | None, samples: int, sequence: int | None, seed: int) -> None:
        inputs, vocab = specs(graph), vocabulary(graph)
        config = read_json(folder / "config.json") if folder is not None else {}
        role = {name: r for r, name in roles(inputs).items()}
        limit = vocab.get(roles(inputs).get("positions", ""), config.get("max_position_embeddings", 1 << 30))
        sizes = {"length": min(sequence or 32, int(limit)), "pixels": int(config.get("image_size") or 32)}
        rng = np.random.default_rng(seed)
        feeds = {}
        for s in inputs:
            kind = role.get(s.name, "")
            free = sizes["pixels" if kind == "pixels" else "length"]
            shape = tuple(samples if i == 0 else d if isinstance(d, int) else free for i, d in enumerate(s.shape))
            rows = vocab.get(s.name) or (config.get("vocab_size") if kind == "tokens" else None)
            feeds[s.name] = random_input(s, shape, kind, rows, rng)
        super().__init__([Batch(feeds)], "random", random=True)


def random_input(s: TensorSpec, shape: tuple[int, ...], kind: str, rows: int | None, rng: np.random.Generator) -> Array:
    """A valid random value of an input by its role; ids stay below `rows`, other integers are zero."""
    if kind == "mask" or s.dtype.kind == "b":
        return np.ones(shape, s.dtype)
    if kind == "positions":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(s.dtype)
    if s.integer and kind != "types" and (kind == "tokens" or rows):
        return rng.integers(0, rows or 2, shape).astype(s.dtype)
    if s.integer:
        return np.zeros(shape, s.dtype)
    return rng.standard_normal(shape, np.float32).astype(s.dtype)
