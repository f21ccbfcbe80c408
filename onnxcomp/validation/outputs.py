"""What a model's outputs mean: which axis holds tokens, which rows are padding, which rows are scores of classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.data.inputs import Batch, roles, specs, vocabulary
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.validation.metrics import Seen

__all__ = ["Reading", "View", "see"]


@dataclass(frozen=True)
class Reading:
    """How an output is read: along which axis its tokens lie, and whether a row holds scores of classes."""

    name: str
    tokens: int | None
    logits: bool


@dataclass(frozen=True)
class View:
    """What of a model's interface matters here: its inputs by role, its vocabulary and its non-integer outputs."""

    roles: Mapping[str, str]
    vocabulary: int | None
    outputs: tuple[Reading, ...]

    @classmethod
    def of(cls, g: Graph) -> View:
        """Read it off the graph; raises `ModelError` when there is no non-integer output to compare."""
        role = dict(roles(specs(g)))
        words = vocabulary(g).get(role.get("tokens", ""))
        axis = _sequence_axis(g, role)
        floats = [v for v in g.outputs if v.dtype is None or v.dtype.is_floating_point()]
        if not floats:
            raise ModelError("the model has no floating-point output, so there is nothing to compare")
        return cls(role, words, tuple(_reading(v, axis, words) for v in floats))

    def visible(self, feeds: Mapping[str, Array]) -> Array | None:
        """Which tokens are real and see a key, bool `[B, S]`; None for a model without an attention mask."""
        name = self.roles.get("mask")
        if name is None:
            return None
        m = feeds[name]
        seen: Array = m > -1e4 if np.issubdtype(m.dtype, np.floating) and m.min(initial=0) < 0 else m != 0
        if seen.ndim == 4:  # [B, heads, queries, keys]
            seen = np.logical_or.reduce(seen, axis=1)
        if seen.ndim == 3:
            seen = seen[:, 0] if seen.shape[1] == 1 else np.logical_or.reduce(seen, axis=2)
        tokens = feeds.get(self.roles.get("tokens", ""))
        if tokens is not None and tokens.ndim == seen.ndim == 2 and 0 < tokens.shape[1] < seen.shape[1]:
            seen = seen[:, -tokens.shape[1] :]  # what comes before are keys in the cache
        return seen


def _sequence_axis(g: Graph, role: Mapping[str, str]) -> int | str | None:
    """The length or symbol of the token axis of the inputs."""
    for name in (role.get("mask"), role.get("tokens")):
        shape = g.value(name).shape if name else None
        if shape is not None and len(shape) == 2:
            return _dim(shape[1])
    return None


def _dim(d: int | ir.SymbolicDim) -> int | str | None:
    return d if isinstance(d, int) else d.value


def _reading(v: ir.Value, axis: int | str | None, words: int | None) -> Reading:
    name, shape = str(v.name), v.shape
    dims = [] if shape is None else [_dim(d) for d in shape]
    at = next((i for i, d in enumerate(dims) if i and d is not None and d == axis), None)
    if at is not None and at == len(dims) - 1 and isinstance(axis, int):
        at = None  # as many classes as tokens, by chance
    if at is None and len(dims) >= 3 and not isinstance(dims[1], int):
        at = 1
    logits = "logit" in name.lower() or bool(dims and words is not None and dims[-1] == words)
    return Reading(name, at, logits or (len(dims) == 2 and not _embedding(name)))


def _embedding(name: str) -> bool:
    return any(word in name.lower() for word in ("pool", "embed", "hidden"))


def see(
    reading: Reading, view: View, batch: Batch, out: Mapping[str, Array], reference: Mapping[str, Array]
) -> Iterator[Seen]:
    """One output of a batch as rows without padding; per sample where a row's length differs between samples."""
    y, x, feeds = out[reading.name], reference[reading.name], batch.feeds
    size = next(iter(feeds.values())).shape[0] if feeds else len(y)
    if y.ndim == 0 or len(y) != size:
        y, x, size = y.reshape(1, -1), x.reshape(1, -1), 1
    y, x = (a.reshape(size, -1) if a.ndim == 1 else a for a in (y, x))
    mask = view.visible(feeds)
    tokens = feeds.get(view.roles.get("tokens", ""))
    shared = Seen(y, x, y, y, size, tokens=tokens, labels=batch.labels, outputs=out, feeds=feeds)
    if reading.tokens == y.ndim - 1:  # one score per token, as in question answering
        yield from _score_per_token(shared, mask)
        return
    axis = reading.tokens if reading.tokens is not None else (1 if y.ndim > 2 else None)
    if axis is None:
        keep = np.ones(size, bool) if mask is None else mask.any(axis=1)
        sample = np.flatnonzero(keep)
        yield dataclasses.replace(shared, rows=y[keep], against=x[keep], sample=sample, place=np.zeros_like(sample))
        return
    yield _per_token(shared, axis, mask)


def _per_token(seen: Seen, axis: int, mask: Array | None) -> Seen:
    y, x = (np.moveaxis(a, axis, 1) for a in (seen.rows, seen.against))
    keep = mask if mask is not None and mask.shape == y.shape[:2] else np.ones(y.shape[:2], bool)
    sample, place = np.nonzero(keep)
    inner = math.prod(y.shape[2:-1])  # heads, say, of a key or value output
    return dataclasses.replace(
        seen,
        rows=y[keep].reshape(-1, y.shape[-1]),
        against=x[keep].reshape(-1, y.shape[-1]),
        sample=np.repeat(sample, inner),
        place=np.repeat(place, inner),
        per_token=y.ndim == 3,
    )


def _score_per_token(seen: Seen, mask: Array | None) -> Iterator[Seen]:
    for b in range(seen.size):
        keep = np.ones(seen.rows.shape[-1], bool) if mask is None else mask[b]
        y, x = (a[b].reshape(-1, len(keep))[:, keep] for a in (seen.rows, seen.against))
        rows = np.arange(len(y) if keep.any() else 0)
        yield Seen(
            y[rows],
            x[rows],
            np.zeros_like(rows),
            rows,
            1,
            labels=None if seen.labels is None else seen.labels[b : b + 1],
            outputs={k: a[b : b + 1] for k, a in seen.outputs.items()},
            feeds={k: a[b : b + 1] for k, a in seen.feeds.items()},
        )
