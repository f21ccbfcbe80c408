"""Token by token: a decoder that takes the keys and values of earlier tokens, or reads the whole text each time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from onnxcomp.data.inputs import TensorSpec, completed, roles, specs, vocabulary
from onnxcomp.data.narrowed import KEPT
from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.maths.sampling import Sampling
from onnxcomp.runtime import half_arrays
from onnxcomp.runtime.payload import Model, graph_of
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, Target

__all__ = ["Decoder", "cache_pairs", "generated"]

SAME = 1e-3  # of the largest score: products of other shapes add in another order
_NUMBERS = re.compile(r"\d+")


class Decoder:
    """A causal language model that goes on from token to token, for use in a `with` statement.

    With caches as inputs and outputs only new tokens are run; they stay in the runtime's memory. Inputs that are
    `given` are the same for all tokens, such as what an encoder made. Raises `ModelError` for a model that takes no
    tokens, gives no scores of next tokens, or gives not the caches that it takes.
    """

    def __init__(
        self, model: Model, target: Target = CPU, *, threads: int = 0, given: Mapping[str, Array] | None = None
    ) -> None:
        graph = graph_of(model)
        self.inputs: list[TensorSpec] = [s for s in specs(graph) if s.name not in (given or {})]
        role = roles(self.inputs)
        self.name = str(graph.path or "the model")
        if "tokens" not in role or "decoder_tokens" in role or "encoder_states" in role:
            raise ModelError(f"{self.name}: is no decoder of text alone, so it generates nothing")
        self.tokens, self._mask = role["tokens"], role.get("mask")
        self.scores = _scores(graph)
        shape = graph.value(self.scores).shape
        self.last_only = shape is not None and shape[1] == 1
        self._present = cache_pairs(graph, [s for s in self.inputs if s.cache is not None])
        axes = [str(d) for name in self._present.values() for d in graph.value(name).shape or ()]
        self.slides = KEPT in axes
        self._session = Session(model, target, threads=threads)
        self._given: dict[str, Any] = {}
        self.provider = self._session.provider
        self.reset(given or {})

    @property
    def cached(self) -> bool:
        """Whether earlier tokens are remembered by the model's caches."""
        return bool(self._present)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches now."""
        return sum(half_arrays.as_array(v).nbytes for v in self._caches.values())

    def reset(self, given: Mapping[str, Array] | None = None) -> None:
        """Forget all tokens; other inputs of the same names may be `given` for those that follow."""
        if given is not None:
            self._given = {n: self._session.value(a) for n, a in given.items()}
        self._caches: dict[str, Any] = {}
        self._last = np.zeros((0, 0, 0), np.float32)
        self._seen = self._visible = np.zeros((0, 0), np.int64)

    def read(self, tokens: Array, mask: Array | None = None) -> Array:
        """Read more tokens `[b, n]`; the scores of the token behind each: `[b, n, V]`, float32.

        A model that is `last_only` gives those behind the last token, `[b, 1, V]`. A `mask` `[b, n]` is 0 at padding
        (before the first token of a row).
        """
        shown = np.ones_like(tokens) if mask is None else mask
        if not len(self._seen):
            self._seen, self._visible = tokens[:, :0], shown[:, :0]
        self._seen = np.concatenate([self._seen, tokens], axis=1)
        self._visible = np.concatenate([self._visible, shown], axis=1)
        feeds = {self.tokens: tokens if self.cached else self._seen}
        if self._mask is not None:
            feeds[self._mask] = self._visible
        elif not self._visible.all():
            raise DataError("the model takes no mask, so texts of different length cannot be run together")
        types = {s.name: s.dtype for s in self.inputs}
        whole, _ = completed({k: a.astype(types[k]) for k, a in feeds.items()} | self._lengths(), self.inputs)
        arrays = {k: a for k, a in whole.items() if k not in self._caches}
        made = self._session.run_values(arrays, self._caches | self._given, [self.scores, *self._present.values()])
        scores = half_arrays.as_array(made[self.scores]).astype(np.float32, copy=False)
        self._caches = {past: made[present] for past, present in self._present.items()}
        new = tokens.shape[1]
        if not self.cached:
            self._check(scores[:, -new - 1 : -new])
            self._last = scores[:, -1:]
        return scores[:, -new:]

    def forget(self, count: int) -> None:
        """Forget the last `count` tokens of every row, which costs a copy of the caches.

        Raises `ModelError` where these slide: what they dropped for those tokens cannot be had back.
        """
        if not count:
            return
        if self.slides:
            raise ModelError(f"{self.name}: its caches slide, so tokens cannot be taken back; a draft needs whole ones")
        self._seen, self._visible = self._seen[:, :-count], self._visible[:, :-count]
        self._last = self._last[:, :0]
        axes = {s.name: s.cache for s in self.inputs}
        for name, value in self._caches.items():
            a = half_arrays.as_array(value)
            kept = np.take(a, np.arange(a.shape[axes[name] or 0] - count), axis=axes[name])
            self._caches[name] = self._session.value(kept)

    def _check(self, again: Array) -> None:
        """Raise `ModelError` where new tokens changed the scores before them."""
        if again.size and self._last.size:
            moved = float(np.abs(again - self._last).max())
            if not moved <= SAME * max(float(np.abs(again).max()), 1.0):
                raise ModelError(
                    f"{self.name}: later tokens change what it says of earlier ones: it is no causal decoder"
                )

    def _lengths(self) -> dict[str, Array]:
        """Stand-ins for the caches, which tell how long they are."""
        by_name = {s.name: s for s in self.inputs}
        sizes = {name: list(v.shape()) for name, v in self._caches.items()}
        return {k: np.broadcast_to(np.zeros((), by_name[k].dtype), n) for k, n in sizes.items()}

    def close(self) -> None:
        """Free the runtime's memory."""
        self._caches = self._given = {}
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def generated(
    decoder: Decoder,
    tokens: Array,
    most: int,
    sampling: Sampling | None = None,
    *,
    mask: Array | None = None,
    ends: Collection[int] = (),
    pad: int = 0,
    barred: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Iterator[Array]:
    """Up to `most` next tokens of each row of `tokens` `[b, n]`, `[b]` at a time; `pad` where a row has ended.

    A row ends with one of `ends`; nothing more comes once all have ended. Tokens are `barred` everywhere, or as first.
    """
    how = sampling or Sampling()
    rng, done = np.random.default_rng(how.seed), np.zeros(len(tokens), bool)
    scores = decoder.read(tokens, mask)[:, -1] if most > 0 else np.zeros((len(tokens), 1))
    for i in range(most):
        scores[:, [*barred[0], *(barred[1] if i == 0 else ())]] = -np.inf
        new = np.where(done, pad, how.pick(scores, rng))
        yield new
        done |= np.isin(new, list(ends))
        if done.all() or i + 1 == most:
            return
        scores = decoder.read(new[:, None])[:, -1]


def _scores(graph: Graph) -> str:
    """The output with a score for each token and word."""
    words = set(vocabulary(graph).values())
    for v in graph.outputs:
        if v.shape is not None and len(v.shape) == 3 and (v.name == "logits" or v.shape[-1] in words):
            return str(v.name)
    raise ModelError(f"{graph.path or 'the model'}: gives no scores of next tokens, so it generates nothing")


def cache_pairs(graph: Graph, caches: Sequence[TensorSpec]) -> dict[str, str]:
    """The output that goes on each cache input, by kind and number in their names, else by their order."""
    scores = _scores(graph)
    outputs = [
        str(v.name) for v in graph.outputs if v.name != scores and v.shape is not None and len(v.shape) in (3, 4, 5)
    ]
    by_key = {_key(name): name for name in outputs}
    pairs = {s.name: by_key.get(_key(s.name), "") for s in caches}
    if len(set(pairs.values()) - {""}) == len(caches):
        return pairs
    if len(outputs) == len(caches):
        return {s.name: out for s, out in zip(caches, outputs, strict=True)}
    raise ModelError(
        f"{graph.path or 'the model'}: takes {len(caches)} caches and gives {len(outputs)}, so it cannot go on"
    )


def _key(name: str) -> tuple[str, ...]:
    short = name.replace("past_key_values", "").replace("present", "")
    return ("value" if "value" in short else "key" if "key" in short else "", *_NUMBERS.findall(short))
