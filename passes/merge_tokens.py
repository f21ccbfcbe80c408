"""Merge similar tokens between attention and MLP, so that later layers see fewer of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.methods.tokens import Place, Tokens, places, removals
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["MergeTokens"]

TOO_FEW = "the ratio is too small to remove a token here"


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Average the most similar pairs of tokens, layer by layer, weighted by how many tokens each stands for.

    Tokens at even positions are matched with tokens at odd positions by the cosine of their mean keys; the best pairs
    merge, and later attention adds the logarithm of a token's weight to its score (Bolya et al., Token Merging, 2023,
    arXiv 2210.09461). The first token never merges away; padding goes first and weighs nothing. Where all tokens are
    read after the last layer, each gets the value of the token it went into, so outputs keep their axes.
    """

    stage: ClassVar[Stage] = Stage.TOKENS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.05}

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the tokens that are gone after the last layer, taken evenly from all layers."""
    proportional: bool = True
    """Count a merged token as often as the tokens it stands for when later layers attend to it."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every layer of one attention and one MLP."""
        found, blocked = places(g)
        return [p.site for p in found] + [site for site, _ in blocked]

    def run(self, g: Graph, env: Env) -> None:
        """Insert the merges, each layer attending with the weights of what reaches it."""
        found, blocked = places(g)
        for site, why in blocked:
            g.decline(site, why)
        plan = removals(found, self.ratio)
        if not any(plan):
            for place in found:
                g.decline(place.site, TOO_FEW)
            return
        tokens = Tokens(g, found[0])
        for place, gone in zip(found, plan, strict=True):
            if tokens.where is not None and tokens.weight is not None:
                g.set_input(place.attention.node, 3, tokens.bias())
            if gone:
                self._merge(g, tokens, place, gone)
            else:
                g.decline(place.site, TOO_FEW)
        tokens.restore(found[-1])
        g.forget_shapes()

    def _merge(self, g: Graph, tokens: Tokens, place: Place, gone: int | float) -> None:
        """Take `gone` tokens (a number, or a share of however many there are) out of the stream at one place."""
        readers, two, x = place.readers, np.array(2, np.int64), place.x
        score, match = _matches(g, tokens, place)
        count = g.constant(np.array([gone], np.int64)) if isinstance(gone, int) else tokens.share(x, gone)
        best = g.op("TopK", score, count, axis=1, outputs=2).producer()
        assert best is not None
        leaving = g.op("Mul", best.outputs[1], two)
        partner = g.op("GatherElements", match, best.outputs[1], axis=1)
        partner = g.op("Add", g.op("Mul", partner, two), np.array(1, np.int64))
        zero = g.op("Sub", leaving, leaving)
        stays = g.op("ScatterElements", tokens.like_tokens(x, 1), leaving, zero, axis=1)
        place_of = g.op("Sub", g.op("CumSum", stays, np.array(1, np.int64)), np.array(1, np.int64))
        joined = g.op("GatherElements", place_of, partner, axis=1)
        onto = g.op("ScatterElements", place_of, leaving, joined, axis=1)
        matrix = tokens.move(x, onto, tokens.left(x, count), tokens.weight, readers)
        if self.proportional or tokens.padded:
            weight = tokens.mass(matrix, tokens.weight)
            tokens.weight = weight if self.proportional else g.op("Min", weight, tokens.number(1))


def _matches(g: Graph, tokens: Tokens, place: Place) -> tuple[ir.Value, ir.Value]:
    """For every even token the cosine `[b, ceil(t / 2)]` with its most similar odd one, and that one's index.

    The first token scores below, padding above everything; no real token is matched with padding.
    """
    keys = place.attention.node.inputs[1]
    assert keys is not None
    split = tokens.heads(keys, place.attention.kv_heads, place.attention.head_dim)
    mean = g.op("ReduceMean", split, np.array([2], np.int64), keepdims=0)
    norm = g.op("Max", g.op("ReduceL2", mean, np.array([2], np.int64), keepdims=1), tokens.number(1e-4))
    unit = g.op("Div", mean, norm)
    even, odd = (tokens.cut(unit, start, step=2) for start in (0, 1))
    cosine = g.op("MatMul", even, g.op("Transpose", odd, perm=[0, 2, 1]))
    if tokens.padded and tokens.weight is not None:
        real = g.op("Min", tokens.weight, tokens.number(1))
        rows, columns = (g.op("Sub", tokens.cut(real, start, step=2), tokens.number(1)) for start in (0, 1))
        cosine = g.op("Add", cosine, g.op("Mul", tokens.unsqueeze(columns, 1), tokens.number(64)))
        cosine = g.op("Sub", cosine, g.op("Mul", tokens.unsqueeze(rows, 2), tokens.number(256)))
    match = g.op("ArgMax", cosine, axis=2, keepdims=0)
    score = g.op("ReduceMax", cosine, np.array([2], np.int64), keepdims=0)
    return g.op("Pad", tokens.cut(score, 1), np.array([0, 1, 0, 0], np.int64), tokens.number(-1e4)), match
