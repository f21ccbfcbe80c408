"""Drop the tokens the first one attends to least, in a few layers; what they held is kept in one token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.methods.tokens import Place, Tokens, places
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["DropTokens"]


@dataclass(frozen=True)
class DropTokens(Pass):
    """Keep the share of tokens that the first token attends to most and fuse the others into one.

    Attention is that of the first query, averaged over heads; the fused token is the attention-weighted mean of the
    dropped ones (Liang et al., EViT, 2022, arXiv 2202.07800, eq. 5, with the weights normalised since nothing is
    trained here). Padding is dropped first. Where all tokens are read after the last layer, a dropped one gets the
    value of the fused one, so outputs keep their axes.
    """

    stage: ClassVar[Stage] = Stage.TOKENS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"keep": 1.0}
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.99}

    keep: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of the tokens kept at each drop."""
    drops: Annotated[int, Field(ge=1)] = 3
    """Number of layers that drop, spread evenly over the model, never the first one of several."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """The layers that are to drop tokens."""
        found, blocked = places(g)
        return [p.site for p in self._chosen(found)] + [site for site, _ in blocked]

    def run(self, g: Graph, env: Env) -> None:
        """Insert the drops; layers behind the first one mask what is only padding."""
        found, blocked = places(g)
        for site, why in blocked:
            g.decline(site, why)
        if not found or self.is_identity:
            return
        tokens, chosen = Tokens(g, found[0]), self._chosen(found)
        if (
            tokens.length is None and tokens.weight is None
        ):  # a short sequence may drop nothing: its fused token is void
            tokens.weight = tokens.cast(tokens.like_tokens(found[0].x, 1))
        for place in found:
            if tokens.where is not None:
                g.set_input(place.attention.node, 3, tokens.bias() if tokens.weight is not None else None)
            if place not in chosen:
                continue
            if tokens.length is not None and tokens.length - self._kept(tokens.length) < 2:
                g.decline(place.site, "too few tokens are left to drop any")
            else:
                self._drop(g, tokens, place)
        tokens.restore(found[-1])
        g.forget_shapes()

    def _chosen(self, found: list[Place]) -> list[Place]:
        count = min(self.drops, max(1, len(found) - 1))
        return [found[len(found) * (i + 1) // (count + 1)] for i in range(count)] if found else []

    def _kept(self, length: int) -> int:
        """Tokens kept, the first one among them."""
        return int(np.ceil(self.keep * (length - 1))) + 1

    def _drop(self, g: Graph, tokens: Tokens, place: Place) -> None:
        readers, x, one = place.readers, place.x, np.array(1, np.int64)
        attended = _first_row(g, tokens, place)
        if tokens.length is not None:
            kept = g.constant(np.array([self._kept(tokens.length)], np.int64), "kept")
            tokens.length = self._kept(tokens.length) + 1
        else:
            kept = tokens.share(x, self.keep, up=True)
        rest = g.op("Pad", tokens.cut(attended, 1), np.array([0, 1, 0, 0], np.int64), tokens.number(2.0))
        best = g.op("TopK", rest, kept, axis=1, outputs=2).producer()
        assert best is not None
        index = best.outputs[1]
        ones = g.op("Add", g.op("Sub", index, index), one)
        stays = g.op("ScatterElements", tokens.like_tokens(x, 0), index, ones, axis=1)
        staying = g.op("Cast", stays, to=ir.DataType.BOOL.value)
        place_of = g.op("Sub", g.op("CumSum", stays, one), one)
        onto = g.op("Where", staying, place_of, kept)
        by = g.op("Where", staying, tokens.number(1), g.op("Max", attended, tokens.number(1e-6)))
        matrix = tokens.move(x, onto, g.op("Add", kept, np.array([1], np.int64)), by, readers)
        if tokens.weight is not None:
            tokens.weight = g.op("Min", tokens.mass(matrix, tokens.weight), tokens.number(1))


def _first_row(g: Graph, tokens: Tokens, place: Place) -> ir.Value:
    """Attention of the first token, averaged over heads, `[b, t]`; heads that share a key are rows of one product."""
    a, (q, k) = place.attention, place.attention.node.inputs[:2]
    assert q is not None
    assert k is not None
    first = g.op("Reshape", tokens.cut(q, 0, 1), np.array([0, a.kv_heads, -1, a.head_dim], np.int64))
    keys = g.op("Transpose", tokens.heads(k, a.kv_heads, a.head_dim), perm=[0, 2, 3, 1])
    scale = a.node.attributes.get_float("scale", a.head_dim**-0.5)
    score = g.op("Mul", g.op("MatMul", first, keys), tokens.number(scale))
    if tokens.weight is not None:
        floor = g.op("Max", g.op("Log", tokens.weight), tokens.number(-3e4))
        score = g.op("Add", score, g.op("Unsqueeze", floor, np.array([1, 2], np.int64)))
    return g.op("ReduceMean", g.op("Softmax", score, axis=-1), np.array([1, 2], np.int64), keepdims=0)
