"""How outputs are read for comparison: which axis holds tokens, which rows are padding, which are class scores."""

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
from onnxcomp.validation.rows import OutputRows

__all__ = ["OutputLayout", "View", "as_float", "declared_otherwise", "output_rows"]

FLOATS, POOLED = ("sqnr", "cosine", "max-abs", "rel-l2", "agreement"), ("pooled-sqnr", "pooled-cosine")
ALL = (*FLOATS, *POOLED, "kl", "exact-match")


@dataclass(frozen=True)
class OutputLayout:
    """How an output is read: the axis of its tokens (None: one row per sample), and whether rows are class scores.

    One that is not `floating` holds integers, booleans or strings, which are compared for equality. `side` is
    `decoder_` where its tokens are those of a decoder behind an encoder, whose inputs have roles of their own.
    """

    name: str
    tokens: int | None
    logits: bool
    floating: bool = True
    side: str = ""


@dataclass(frozen=True)
class View:
    """What comparison needs of a model's interface: inputs by role, vocabulary size, outputs.

    `flat` are outputs that are sequences or optional, whose elements are compared one by one; outputs that are maps are
    `uncompared`; the element types of those `undeclared` are known when the model has run; labels are for `labelled`,
    and `worded` has scores of all words for each token.
    """

    roles: Mapping[str, str]
    vocabulary: int | None
    outputs: tuple[OutputLayout, ...]
    uncompared: tuple[str, ...] = ()
    flat: frozenset[str] = frozenset()
    undeclared: frozenset[str] = frozenset()
    labelled: str = ""
    worded: str = ""

    @classmethod
    def of(cls, g: Graph) -> View:
        """From a graph; tensors come first."""
        role = dict(roles(specs(g)))
        words = vocabulary(g).get(role.get("decoder_tokens", role.get("tokens", "")))
        axes = {side: _sequence_axis(g, role, side) for side in ("decoder_", "") if f"{side}tokens" in role or not side}
        tensors = [v for v in g.outputs if v.type is None or isinstance(v.type, ir.TensorType)]
        others = [str(v.name) for v in g.outputs if v not in tensors]
        layouts = [*(_reading(v, axes, words) for v in tensors), *(OutputLayout(name, None, False) for name in others)]
        undeclared = frozenset((*others, *(str(v.name) for v in tensors if v.dtype is None)))
        return cls(role, words, tuple(layouts), flat=frozenset(others), undeclared=undeclared)

    @property
    def scored(self) -> OutputLayout:
        """The output that task metrics read: that of the labels or words, the first of class scores, floats, or all."""
        if named := self.labelled or self.worded:
            return next(r for r in self.outputs if r.name == named)
        floats = [r for r in self.outputs if r.floating]
        return next((r for r in floats if r.logits), (floats or self.outputs)[0])

    def of_words(self, made: Mapping[str, Array]) -> str:
        """The first output with a score of every word for each token; empty without one."""
        shaped = (r for r in self.outputs if r.floating and r.tokens == 1 and made[r.name].ndim == 3)
        return next((r.name for r in shaped if made[r.name].shape[-1] == self.vocabulary), "")

    def answering(self, labels: Array, made: Mapping[str, Array], feeds: Mapping[str, Array]) -> list[str]:
        """Outputs that integer labels `[b]` or `[b, tokens]` can be for, the likeliest first.

        Scores of more classes than the largest label, along an axis that does not count tokens; integers `[b]` that are
        predicted labels; scores of exactly as many classes as there are tokens.
        """
        found: list[tuple[int, str]] = []
        for r in self.outputs:
            a = made[r.name]
            if a.dtype.kind in "iu" and labels.ndim == 1 and a.shape == labels.shape:
                found.append((1, r.name))
            per_token = labels.ndim == 2
            fits = r.logits and a.ndim == labels.ndim + 1 and a.shape[0] == len(labels) and (r.tokens == 1) == per_token
            if fits and a.shape[-1] > labels.max(initial=0):
                tokens = feeds.get(self.tokens(r))
                as_tokens = tokens is not None and tokens.ndim == 2 and tokens.shape[1] == a.shape[-1]
                found.append((2 if as_tokens and not per_token else 0, r.name))
        return [name for _, name in sorted(found, key=lambda x: x[0])]

    def measures(self) -> dict[str, frozenset[str]]:
        """What can be measured of each output, by gate name; everything where its type is not declared."""
        return {r.name: frozenset(ALL if r.name in self.undeclared else self._measured(r)) for r in self.outputs}

    def _measured(self, r: OutputLayout) -> Iterator[str]:
        yield from FLOATS if r.floating else ("exact-match",)
        yield from ("kl",) if r.logits else ()
        yield from POOLED if self.pools(r) else ()

    def pools(self, r: OutputLayout) -> bool:
        """Whether an output is features of tokens, whose mean over each sample is compared as well."""
        return r.floating and not r.logits and r.tokens == 1 and "mask" in self.roles

    def with_types(self, made: Mapping[str, Array]) -> View:
        """The same where the element types of the outputs are those of arrays that were made.

        What no array was made of is not compared; raises `ModelError` where that is all.
        """
        there = [r for r in self.outputs if r.name in made]
        if not there:
            raise ModelError("the outputs of the model are maps, so there is nothing to compare")
        kinds = {r.name: made[r.name].dtype.kind not in "iubOSU" for r in there}
        changed = [dataclasses.replace(r, floating=kinds[r.name], logits=r.logits and kinds[r.name]) for r in there]
        uncompared = tuple(r.name for r in self.outputs if r not in there)
        return dataclasses.replace(self, outputs=tuple(changed), uncompared=uncompared)

    def tokens(self, layout: OutputLayout) -> str:
        """The input whose tokens an output has rows for; empty without one."""
        return self.roles.get(f"{layout.side}tokens", "")

    def visible(self, feeds: Mapping[str, Array], side: str = "") -> Array | None:
        """Which tokens are not padding, bool `[B, S]`; None for a model (or its decoder) without an attention mask."""
        name = self.roles.get(f"{side}mask")
        if name is None:
            return None
        mask = feeds[name]
        visible: Array = (
            mask > -1e4 if np.issubdtype(mask.dtype, np.floating) and mask.min(initial=0) < 0 else mask != 0
        )
        if visible.ndim == 4:  # [B, heads, queries, keys]
            visible = np.logical_or.reduce(visible, axis=1)
        if visible.ndim == 3:
            visible = visible[:, 0] if visible.shape[1] == 1 else np.logical_or.reduce(visible, axis=2)
        tokens = feeds.get(self.roles.get(f"{side}tokens", ""))
        if tokens is not None and tokens.ndim == visible.ndim == 2 and 0 < tokens.shape[1] < visible.shape[1]:
            visible = visible[:, -tokens.shape[1] :]  # earlier columns are keys in the cache
        return visible


def _sequence_axis(g: Graph, role: Mapping[str, str], side: str) -> int | str | None:
    """The length or symbol of the token axis of the inputs of a side."""
    for name in (role.get(f"{side}mask"), role.get(f"{side}tokens")):
        shape = g.value(name).shape if name else None
        if shape is not None and len(shape) == 2:
            return _dim(shape[1])
    return None


def _dim(d: int | ir.SymbolicDim) -> int | str | None:
    return d if isinstance(d, int) else d.value


def _reading(v: ir.Value, axes: Mapping[str, int | str | None], words: int | None) -> OutputLayout:
    name, shape = str(v.name), v.shape
    dims = [] if shape is None else [_dim(d) for d in shape]
    sides = [side for side in axes if side or len(axes) == 1 or name.startswith("encoder")]
    side = next((x for x in axes if axes[x] is not None and axes[x] in dims[1:]), sides[0])
    side = side if len(set(axes.values())) == len(axes) else sides[-1] if name.startswith("encoder") else sides[0]
    axis = axes[side]
    at = next((i for i, d in enumerate(dims) if i and d is not None and d == axis), None)
    if at is not None and at == len(dims) - 1 and isinstance(axis, int):
        at = None  # as many classes as tokens by coincidence
    if at is None and len(dims) >= 3 and not isinstance(dims[1], int):
        at = 1
    logits = "logit" in name.lower() or bool(dims and words is not None and dims[-1] == words)
    floating = v.dtype is None or v.dtype.is_floating_point()
    return OutputLayout(name, at, floating and (logits or (len(dims) == 2 and not _embedding(name))), floating, side)


def _embedding(name: str) -> bool:
    return any(word in name.lower() for word in ("pool", "embed", "hidden"))


def declared_otherwise(g: Graph, made: Mapping[str, Array]) -> Iterator[str]:
    """A sentence for every output whose declared shape is not that of what the model gives."""
    for v in g.outputs:
        a = made.get(str(v.name))
        if a is None or v.shape is None:
            continue
        fits = len(v.shape) == a.ndim and all(
            not isinstance(d, int) or d == n for d, n in zip(v.shape, a.shape, strict=True)
        )
        if not fits:
            yield f"output '{v.name}' is declared as {v.shape}, but the original gives {list(a.shape)}"


def as_float(a: Array) -> Array:
    """An output as it is compared: types of less than four bytes as float32, which holds them exactly."""
    return a.astype(np.float32) if a.dtype.kind in "fV" and a.dtype.itemsize < 4 else a


def output_rows(
    layout: OutputLayout, view: View, batch: Batch, out: Mapping[str, Array], reference: Mapping[str, Array]
) -> Iterator[OutputRows]:
    """One output of a batch as rows without padding; per sample where a row's length differs between samples."""
    y, x, feeds = out[layout.name], reference[layout.name], batch.feeds
    samples = batch.size if feeds else len(y)
    # Such as a state, whose samples are along another axis; what is empty is one row without elements.
    if whole := y.ndim == 0 or len(y) != samples or not y.size:
        y, x, samples = y.reshape(1, -1), x.reshape(1, -1), 1
    y, x = (a.reshape(samples, -1) if a.ndim == 1 else a for a in (y, x))
    mask = view.visible(feeds, layout.side)
    tokens = feeds.get(view.tokens(layout))
    shared = OutputRows(y, x, y, y, samples, tokens=tokens, labels=batch.labels, outputs=out, feeds=feeds)
    if whole:
        yield dataclasses.replace(shared, sample=np.zeros(1, np.int64), position=np.zeros(1, np.int64))
        return
    if layout.tokens == y.ndim - 1:  # one score per token, as in question answering
        yield from _score_per_token(shared, mask)
        return
    axis = layout.tokens if layout.tokens is not None else (1 if y.ndim > 2 else None)
    if axis is None:
        keep = np.ones(samples, bool) if mask is None else mask.any(axis=1)
        sample = np.flatnonzero(keep)
        yield dataclasses.replace(
            shared, rows=y[keep], reference=x[keep], sample=sample, position=np.zeros_like(sample)
        )
        return
    yield _per_token(shared, axis, mask)


def _per_token(rows_of: OutputRows, axis: int, mask: Array | None) -> OutputRows:
    y, x = (np.moveaxis(a, axis, 1) for a in (rows_of.rows, rows_of.reference))
    if mask is not None and y.shape[1] == 1:
        mask = mask[:, -1:]  # scores of the last token alone
    keep = mask if mask is not None and mask.shape == y.shape[:2] else np.ones(y.shape[:2], bool)
    sample, place = np.nonzero(keep)
    inner = math.prod(y.shape[2:-1])  # heads, say, of a key or value output
    return dataclasses.replace(
        rows_of,
        rows=y[keep].reshape(-1, y.shape[-1]),
        reference=x[keep].reshape(-1, y.shape[-1]),
        sample=np.repeat(sample, inner),
        position=np.repeat(place, inner),
        per_token=y.ndim == 3,
    )


def _score_per_token(scores: OutputRows, mask: Array | None) -> Iterator[OutputRows]:
    for b in range(scores.samples):
        fits = mask is not None and mask.shape[1] == scores.rows.shape[-1]
        keep = mask[b] if mask is not None and fits else np.ones(scores.rows.shape[-1], bool)
        y, x = (a[b].reshape(-1, len(keep))[:, keep] for a in (scores.rows, scores.reference))
        rows = np.arange(len(y) if keep.any() else 0)
        yield OutputRows(
            y[rows],
            x[rows],
            np.zeros_like(rows),
            rows,
            1,
            labels=None if scores.labels is None else scores.labels[b : b + 1],
            outputs={k: a[b : b + 1] for k, a in scores.outputs.items()},
            feeds={k: a[b : b + 1] if a.ndim else a for k, a in scores.feeds.items()},
        )
