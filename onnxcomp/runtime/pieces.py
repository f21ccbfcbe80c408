"""Texts read in pieces, each behind the keys and values of those before: what a decoder says through its caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.data.inputs import roles, specs, total_mask
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.runtime.generation import cache_pairs
from onnxcomp.runtime.sessions import Session

__all__ = ["Pieces"]


class Pieces:
    """Runs batches of texts in pieces of `size` tokens.

    Raises `ModelError` for a model without caches or other than a decoder of text alone.
    """

    def __init__(self, graph: Graph, size: int) -> None:
        self.size, inputs = size, specs(graph)
        role, mask = roles(inputs), total_mask(inputs)
        caches = [s for s in inputs if s.cache is not None]
        name = graph.path or "the model"
        if not caches or "tokens" not in role or "decoder_tokens" in role:
            raise ModelError(f"{name}: is no decoder of text with caches, so it cannot read a text in pieces")
        self._pairs = cache_pairs(graph, caches)
        self._tokens, self._mask = role["tokens"], mask.name if mask is not None else None
        self._past = {s.name: s.cache for s in caches}

    def run(self, session: Session, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """The outputs as if the text were read at once: scores of all tokens, caches behind the last."""
        length, caches = feeds[self._tokens].shape[1], {n: feeds[n] for n in self._past}
        known = next(a.shape[axis or 0] for (n, axis), a in zip(self._past.items(), caches.values(), strict=True))
        scored = [n for n in names if n not in self._pairs.values()]
        parts: dict[str, list[Array]] = {n: [] for n in scored}
        for start in range(0, length, self.size):
            end = min(start + self.size, length)
            # Whatever goes with the tokens is cut with them; the mask also tells of those before.
            piece = {n: a[:, start:end] if a.shape[1:2] == (length,) else a for n, a in feeds.items()}
            if self._mask is not None:
                piece[self._mask] = feeds[self._mask][:, : known + end]
            made = session.run(piece | caches, [*scored, *self._pairs.values()])
            caches = {past: made[present] for past, present in self._pairs.items()}
            for n in scored:
                if made[n].shape[1:2] != (end - start,):
                    why = (
                        "of the last token only: read pieces of one token"
                        if made[n].shape[1:2] == (1,)
                        else "not per token"
                    )
                    raise ModelError(f"output '{n}' is {why}, so it cannot be read in pieces of {self.size}")
                parts[n].append(made[n])
        joined = {n: np.concatenate(found, axis=1) for n, found in parts.items()}
        given = {present: caches[past] for past, present in self._pairs.items()}
        return {n: joined[n] if n in joined else given[n] for n in names}
