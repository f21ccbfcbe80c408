"""Drop the tokens that the first one attends to least, in a few layers, and fuse them into one token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.methods.tokens import PADDING_BIAS, Place, Tokens, places
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["DropTokens"]

FIRST_TOKEN = 2.0  # attention that the first token is given: above all probabilities, so that it is always kept
LEAST_ATTENTION = 1e-6  # weight of a dropped token: where all weights underflow the fused token is still their mean


@dataclass(frozen=True)
class DropTokens(Pass):
    """Keep the share of tokens that the first token attends to most and fuse the others into one.

    Attention is that of the first query, averaged over heads; the fused token is the attention-weighted mean of the
    dropped ones (Liang et al., EViT, 2022, arXiv 2202.07800, eq. 5, with the weights normalised since nothing is
    trained here). Padding is dropped first. Where all tokens are used after the last layer, a dropped one gets the
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
        eligible, blocked = places(g)
        return [p.site for p in self._chosen(eligible)] + [site for site, _ in blocked]

    def run(self, g: Graph, env: Env) -> None:
        """Insert the drops; layers after the first one mask tokens that are only padding."""
        eligible, blocked = places(g)
        for site, why in blocked:
            g.decline(site, why)
        if not eligible or self.is_identity:
            return
        tokens, chosen = Tokens(g, eligible[0]), self._chosen(eligible)
        if tokens.length is None and tokens.weight is None:
            # A short sequence may drop nothing: the weight of its fused token is then zero, as of padding.
            tokens.weight = tokens.cast(tokens.like_tokens(eligible[0].x, 1))
        for place in eligible:
            if tokens.where is not None:
                g.set_input(place.attention.node, 3, tokens.bias() if tokens.weight is not None else None)
            if place not in chosen:
                continue
            if tokens.length is not None and tokens.length - self._kept(tokens.length) < 2:
                g.decline(place.site, "too few tokens are left to drop any")
            else:
                self._drop(g, tokens, place)
        tokens.restore(eligible[-1])
        g.forget_shapes()

    def _chosen(self, eligible: list[Place]) -> list[Place]:
        """The layers that drop tokens, evenly spread."""
        count, layers = min(self.drops, max(1, len(eligible) - 1)), len(eligible)
        return [eligible[layers * (i + 1) // (count + 1)] for i in range(count)] if eligible else []

    def _kept(self, length: int) -> int:
        """Tokens kept, the first one among them."""
        return int(np.ceil(self.keep * (length - 1))) + 1

    def _drop(self, g: Graph, tokens: Tokens, place: Place) -> None:
        """Keep the `k` most attended of `t` tokens at one place, and fuse the others into token `k`."""
        readers, x, one = place.readers, place.x, np.array(1, np.int64)
        attended = _first_row(g, tokens, place)  # [b, t]
        if tokens.length is not None:
            kept = g.constant(np.array([self._kept(tokens.length)], np.int64), "kept")
            tokens.length = self._kept(tokens.length) + 1
        else:
            kept = tokens.share(x, self.keep, up=True)
        rest = g.op("Pad", tokens.cut(attended, 1), np.array([0, 1, 0, 0], np.int64), tokens.number(FIRST_TOKEN))
        best = g.op("TopK", rest, kept, axis=1, outputs=2).producer()
        assert best is not None
        index = best.outputs[1]  # [b, k], positions of the kept tokens
        ones = g.op("Add", g.op("Sub", index, index), one)
        kept_or_not = g.op("ScatterElements", tokens.like_tokens(x, 0), index, ones, axis=1)  # [b, t], 1 or 0
        is_kept = g.op("Cast", kept_or_not, to=ir.DataType.BOOL.value)
        new = g.op("Sub", g.op("CumSum", kept_or_not, one), one)  # [b, t], new positions of kept tokens
        onto = g.op("Where", is_kept, new, kept)  # [b, t], the others are moved to position k
        by = g.op("Where", is_kept, tokens.number(1), g.op("Max", attended, tokens.number(LEAST_ATTENTION)))
        matrix = tokens.move(x, onto, g.op("Add", kept, np.array([1], np.int64)), by, readers)
        if tokens.weight is not None:
            tokens.weight = g.op("Min", tokens.mass(matrix, tokens.weight), tokens.number(1))


def _first_row(g: Graph, tokens: Tokens, place: Place) -> ir.Value:
    """Attention of the first token, averaged over heads: `[b, t]`."""
    a, (q, k) = place.attention, place.attention.node.inputs[:2]
    assert q is not None
    assert k is not None
    # [b, kv, r, D], r query heads on each of kv key heads
    first = g.op("Reshape", tokens.cut(q, 0, 1), np.array([0, a.kv_heads, -1, a.head_dim], np.int64))
    keys = g.op("Transpose", tokens.heads(k, a.kv_heads, a.head_dim), perm=[0, 2, 3, 1])  # [b, kv, D, t]
    scale = a.node.attributes.get_float("scale", a.head_dim**-0.5)
    score = g.op("Mul", g.op("MatMul", first, keys), tokens.number(scale))
    if tokens.weight is not None:
        floor = g.op("Max", g.op("Log", tokens.weight), tokens.number(PADDING_BIAS))
        score = g.op("Add", score, g.op("Unsqueeze", floor, np.array([1, 2], np.int64)))
    return g.op("ReduceMean", g.op("Softmax", score, axis=-1), np.array([1, 2], np.int64), keepdims=0)
