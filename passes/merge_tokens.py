"""Merge similar tokens between attention and MLP, so that later layers have fewer of them."""

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

LEAST_NORM = 1e-4  # in place of the norm of a zero key, a divisor; a normal number in half types
# Offsets of cosines, which lie in [-1, 1]: exact in half types, each beyond all sums of the smaller ones.
PADDED_TARGET = 64  # less for a pair whose odd token is padding: a real token is matched with a real one
PADDED_SOURCE = 256  # more for a pair whose even token is padding: padding is merged before real tokens
FIRST_TOKEN = -1e4  # score of the first token: never among the best, and finite in half types
TOO_FEW = "the ratio is too small to remove a token here"


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Average the most similar pairs of tokens, layer by layer, weighted by how many tokens each stands for.

    Tokens at even positions are matched with tokens at odd positions by the cosine of their mean keys; the best pairs
    merge, and later attention adds the logarithm of a token's weight to its score (Bolya et al., Token Merging, 2023,
    arXiv 2210.09461, section 3). The first token is never merged into another; padding is merged first and weighs
    nothing. Where all tokens are used after the last layer, each gets the value of the token it was merged into, so
    outputs keep their axes.
    """

    stage: ClassVar[Stage] = Stage.TOKENS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.05}

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the tokens that are removed in all, evenly over the layers."""
    proportional: bool = True
    """Count a merged token as often as the tokens it stands for when later layers attend to it."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every layer of one attention and one MLP."""
        eligible, blocked = places(g)
        return [p.site for p in eligible] + [site for site, _ in blocked]

    def run(self, g: Graph, env: Env) -> None:
        """Insert the merges, each layer attending with the weights of what reaches it."""
        eligible, blocked = places(g)
        for site, why in blocked:
            g.decline(site, why)
        plan = removals(eligible, self.ratio)
        if not any(plan):
            for place in eligible:
                g.decline(place.site, TOO_FEW)
            return
        tokens = Tokens(g, eligible[0])
        for place, removed in zip(eligible, plan, strict=True):
            if tokens.where is not None and tokens.weight is not None:
                g.set_input(place.attention.node, 3, tokens.bias())
            if removed:
                self._merge(g, tokens, place, removed)
            else:
                g.decline(place.site, TOO_FEW)
        tokens.restore(eligible[-1])
        g.forget_shapes()

    def _merge(self, g: Graph, tokens: Tokens, place: Place, removed: int | float) -> None:
        """Merge `removed` tokens (a number, or a share of however many there are) into others at one place.

        Shapes: `t` tokens, `ceil(t / 2)` of them at even positions, `r` of these merged away; `b` is the batch.
        """
        readers, two, x = place.readers, np.array(2, np.int64), place.x
        score, match = _matches(g, tokens, place)  # [b, ceil(t / 2)] each
        count = g.constant(np.array([removed], np.int64)) if isinstance(removed, int) else tokens.share(x, removed)
        best = g.op("TopK", score, count, axis=1, outputs=2).producer()
        assert best is not None
        source = g.op("Mul", best.outputs[1], two)  # [b, r], even positions in [0, t)
        target = g.op("GatherElements", match, best.outputs[1], axis=1)  # [b, r], in [0, t // 2)
        target = g.op("Add", g.op("Mul", target, two), np.array(1, np.int64))  # [b, r], odd positions in [0, t)
        zero = g.op("Sub", source, source)
        is_kept = g.op("ScatterElements", tokens.like_tokens(x, 1), source, zero, axis=1)  # [b, t], 0 or 1
        new = g.op("Sub", g.op("CumSum", is_kept, np.array(1, np.int64)), np.array(1, np.int64))  # [b, t], of kept ones
        new_of_target = g.op("GatherElements", new, target, axis=1)  # [b, r]
        onto = g.op("ScatterElements", new, source, new_of_target, axis=1)  # [b, t], of all, in [0, t - r)
        matrix = tokens.move(x, onto, tokens.remaining(x, count), tokens.weight, readers)
        if self.proportional or tokens.padded:
            weight = tokens.mass(matrix, tokens.weight)
            tokens.weight = weight if self.proportional else g.op("Min", weight, tokens.number(1))


def _matches(g: Graph, tokens: Tokens, place: Place) -> tuple[ir.Value, ir.Value]:
    """For every even token the cosine `[b, ceil(t / 2)]` with its most similar odd one, and that one's index.

    The first token scores below, padding above everything; no real token is matched with padding.
    """
    keys = place.attention.node.inputs[1]
    assert keys is not None
    heads = tokens.heads(keys, place.attention.kv_heads, place.attention.head_dim)  # [b, t, heads, D]
    mean = g.op("ReduceMean", heads, np.array([2], np.int64), keepdims=0)  # [b, t, D]
    norm = g.op("Max", g.op("ReduceL2", mean, np.array([2], np.int64), keepdims=1), tokens.number(LEAST_NORM))
    unit = g.op("Div", mean, norm)
    even, odd = (tokens.cut(unit, start, step=2) for start in (0, 1))  # [b, ceil(t / 2), D], [b, t // 2, D]
    cosine = g.op("MatMul", even, g.op("Transpose", odd, perm=[0, 2, 1]))  # [b, ceil(t / 2), t // 2]
    if tokens.padded and tokens.weight is not None:
        real = g.op("Min", tokens.weight, tokens.number(1))  # [b, t], 0 for padding
        rows, columns = (g.op("Sub", tokens.cut(real, start, step=2), tokens.number(1)) for start in (0, 1))  # 0 or -1
        cosine = g.op("Add", cosine, g.op("Mul", tokens.unsqueeze(columns, 1), tokens.number(PADDED_TARGET)))
        cosine = g.op("Sub", cosine, g.op("Mul", tokens.unsqueeze(rows, 2), tokens.number(PADDED_SOURCE)))
    match = g.op("ArgMax", cosine, axis=2, keepdims=0)
    score = g.op("ReduceMax", cosine, np.array([2], np.int64), keepdims=0)
    without_first = tokens.cut(score, 1)
    return g.op("Pad", without_first, np.array([0, 1, 0, 0], np.int64), tokens.number(FIRST_TOKEN)), match
