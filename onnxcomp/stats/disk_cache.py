"""A cache of collected statistics on disk, by a hash of all that determines them: nodes and weights, needs and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.untrusted import read_npz
from onnxcomp.errors import DataError
from onnxcomp.files.atomic import replacing
from onnxcomp.files.seal import seal
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.runtime.sub_models import segment
from onnxcomp.stats.statistic import Need, Of, Stats, fetched, statistic
from onnxcomp.target import Target

__all__ = ["key", "read", "write"]

VERSION = "1"


def _fingerprint(graph: Graph, names: Sequence[str]) -> str:
    """SHA-256 of the part of a graph that computes the named values, weights included."""
    digest = hashlib.sha256()
    part = segment(graph, {}, [n for n in names if n not in {v.name for v in graph.inputs}]).model
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


def key(graphs: Mapping[Of, Graph], asked: Sequence[Need], data: Dataset, target: Target) -> str:
    """The name of an entry."""
    wanted = [k for n in asked for k in fetched(n)]
    parts = [VERSION, target.name, data.fingerprint(), *map(repr, asked)]
    parts += [f"{n.stat.kind} {v}" for n in asked if (v := statistic(n.stat).version) > 1]
    for of, graph in graphs.items():
        names = list(dict.fromkeys(name for o, name in wanted if o == of))
        parts.append(f"{of} {_fingerprint(graph, names) if names else '-'}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read(path: Path, asked: Sequence[Need], notes: list[str] | None = None) -> Stats | None:
    """Statistics from a cache file; None where it does not exist, or, with a note, where it is not what was written."""
    if not path.exists():
        return None
    try:
        held = read_npz(path)
        arrays = {f"s{i}": held[f"s{i}"] for i in range(len(asked))}
        known = str(held["seal"]) == _seal(path, arrays)
    except (DataError, KeyError):
        known = False
    if not known:
        if notes is not None:
            notes.append(f"the cached statistics {path.name} are not those that were written; collected again")
        return None
    return Stats({n: arrays[f"s{i}"] for i, n in enumerate(asked)})


def write(path: Path, asked: Sequence[Need], stats: Stats) -> None:
    """Write a cache entry atomically, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"s{i}": np.asarray(stats[n]) for i, n in enumerate(asked)}
    with replacing(path) as temporary, temporary.open("wb") as f:
        np.savez(f, allow_pickle=False, **arrays, seal=np.array(_seal(path, arrays)))


def _seal(path: Path, arrays: Mapping[str, Array]) -> str:
    parts: list[str | bytes] = [path.name]
    for name, a in sorted(arrays.items()):
        parts += [f"{name} {a.dtype.str} {a.shape}", np.ascontiguousarray(a).tobytes()]
    return seal(parts)
