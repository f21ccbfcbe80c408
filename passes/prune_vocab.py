"""Keep the tokens a corpus uses: fewer rows in the embedding and columns in the head, and a tokenizer to match."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Embedding, Head
from onnxcomp.data import vocabulary
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.pipeline import Companions, Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, counts
from onnxcomp.target import Target

__all__ = ["PruneVocab"]


@dataclass(frozen=True)
class PruneVocab(Pass):
    """Remove tokens that the calibration texts do not use from the embedding, the head and the tokenizer files.

    Special tokens, single characters and the parts of byte-pair merges are kept, so the corpus is split into the same
    tokens as before; other texts into smaller ones. Token ids change: use the tokenizer written beside the result. For
    comparison, data of original ids is renumbered, and texts with removed tokens are re-tokenized; perplexity stays per
    original token.
    """

    stage: ClassVar[Stage] = Stage.CORRECT
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_interface: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"min_count": 0}

    min_count: Annotated[int, Field(ge=0)] = 1
    """Occurrences in the calibration texts from which a token is kept; 0 keeps all."""
    multiple_of: Annotated[int, Field(ge=1)] = 8
    """The number of tokens kept is rounded up to a multiple."""

    def companions(self, result: Graph) -> Companions | None:
        """A tokenizer of its own, with the new ids."""
        words = vocabulary.renumbering(result, vocabulary.STEP)
        if words is None:
            return None
        note = (
            f"{len(words.kept)} of {words.size} tokens are left and have new ids: use the tokenizer beside the result"
        )
        why = f"{self.name} renumbers the tokens, so the result needs a tokenizer of its own"
        return Companions(why, note, functools.partial(vocabulary.rewrite, words=words))

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """The table that is read by token ids."""
        return [_site(e) for e in _tokens(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """How often each token occurs."""
        for e in _tokens(g)[:1]:
            yield counts(e.indices, e.rows)

    def run(self, g: Graph, env: Env) -> None:
        """Cut the table, the head and the declared outputs, and record the new ids."""
        self._reduce(g, env)
        step = vocabulary.between(env.original, g)
        g.model.metadata_props.pop(vocabulary.STEP, None)  # that of an earlier job, whose files have the new ids
        if step is not None:
            g.model.metadata_props[vocabulary.STEP] = step.text()

    def _reduce(self, g: Graph, env: Env) -> None:
        tables = _tokens(g)
        if self.is_identity or not tables:
            return
        e, why = tables[0], ""
        if len({t.table for t in tables}) > 1:
            why = "several tables are read by token ids"
        elif e.table.dtype is None or not e.table.dtype.is_floating_point():
            why = "the embedding table is quantized; prune the vocabulary before that"
        if why:
            for t in tables:
                g.decline(_site(t), why)
            return
        often = env.stats[counts(e.indices, e.rows)]
        folder = g.path if g.path is None or g.path.is_dir() else g.path.parent
        try:
            keep, unknown = vocabulary.closure(folder, often >= self.min_count, e.rows)
        except ModelError as error:
            g.decline(_site(e), str(error))
            return
        keep = vocabulary.rounded(keep, self.multiple_of, np.flatnonzero(~keep))
        kept = np.flatnonzero(keep)
        if kept.size == e.rows:
            g.decline(_site(e), "the calibration texts use every token")
            return
        _cut(g, e, blocks.head(g), kept)
        words = vocabulary.Renumbering(kept, e.rows, int(keep[:unknown].sum()))
        g.model.metadata_props[vocabulary.KEY] = words.after(vocabulary.renumbering(g)).text()


def _tokens(g: Graph) -> list[Embedding]:
    return [e for e in blocks.embeddings(g) if e.kind == "tokens"]


def _site(e: Embedding) -> Site:
    return Site(str(e.node.name), (str(e.node.name),), "embedding")


def _cut(g: Graph, e: Embedding, head: Head | None, kept: np.ndarray) -> None:
    """Rows of the table, columns of a head over the same tokens, axes of the outputs it makes."""
    if head is not None and head.outputs == e.rows and head.weight is not e.table:
        linear = head.linear
        axis = 0 if linear is None or linear.transposed else 1
        places = [(head.weight, axis)]
        if linear is not None and linear.bias is not None:
            places.append((linear.bias, -1))
        if linear is not None and linear.dequantize is not None:
            places += [(v, -1) for v in linear.dequantize.inputs[1:] if v is not None and g.array(v).size == e.rows]
        for v, along in places:
            g.put(v, np.take(g.array(v), kept, axis=along))
    g.put(e.table, g.array(e.table)[kept])
    if head is None or head.outputs != e.rows:
        return
    for out in g.outputs:
        shape = out.shape
        if shape is not None and len(shape) and shape[-1] == e.rows:
            out.shape = ir.Shape([*list(shape)[:-1], kept.size])
    g.forget_shapes()
