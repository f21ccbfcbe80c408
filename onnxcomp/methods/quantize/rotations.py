"""Rotations of a transformer that change nothing but how it rounds (QuaRot, arXiv 2404.00456), and what they gain.

R1 turns the residual stream, R2 the values of each head, folded into weights; R4 turns the inputs of the second linear
of a feed-forward part, which takes a product at run time. Of several random ones the data chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp import blocks
from onnxcomp.blocks import Attention, Linear
from onnxcomp.blocks.linears import Index, NormSite
from onnxcomp.blocks.stream import Stream
from onnxcomp.graph import Graph
from onnxcomp.graph.values import sole_use
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.rotation import random_rotation
from onnxcomp.maths.trial_rounding import Trial, TrialRounding, most_columns
from onnxcomp.methods.rotate_stream import basis, is_free, multiply, rotate
from onnxcomp.pipeline import Env
from onnxcomp.stats import sample

__all__ = ["Choice", "Search", "rotate_inputs", "rotate_values", "turn_stream", "untie", "values_refusal"]

ROWS = 512  # of a value that judge a rotation, of which a quarter are multiplied
NORMS = 6  # of a stream that judge its rotation, evenly spread: all are turned alike


@dataclass(frozen=True)
class Choice:
    """The best of the random rotations, and the error of rounding under it as a share of the error without any.

    `usual` is the share of the median one: outliers are spread by any rotation, chance by the best of some only.
    """

    rotation: Float64
    share: float
    usual: float


@dataclass(frozen=True)
class Search:
    """Draws rotations and judges each by the error of rounding on left-out rows."""

    env: Env
    how: TrialRounding
    seeds: int

    def stream(self, g: Graph, stream: Stream) -> Choice:
        """R1 `[d, d]`, judged by what linears that read some of its norms make of it."""
        step = max(1, -(-len(stream.norms) // NORMS))
        chosen = stream.norms[::step]
        index = Index.of(g)
        linears = {n.node: [x for x in index.by_source.get(n.output, []) if not x.quantized] for n in chosen}
        chosen = [n for n in chosen if linears[n.node]]
        stats = self.env.collect(g, [sample(n.input, ROWS) for n in chosen])
        before, after = list[Trial](), list[Trial]()
        for norm in chosen:
            rows = _normalized(norm, np.asarray(stats[sample(norm.input, ROWS)], np.float64))
            gain = np.asarray(g.array(norm.gain), np.float64).reshape(-1)
            shift = 0.0 if norm.bias is None else np.asarray(g.array(norm.bias), np.float64).reshape(-1)
            weights = [_weight(g, x) for x in linears[norm.node]]
            before.append(Trial(rows * gain + shift, weights, self.how))
            after.append(Trial(rows, [gain[:, None] * w for w in weights], self.how))
        return self._best(stream.width, before, after, lambda q: q)

    def values(self, g: Graph, a: Attention) -> Choice:
        """R2 `[h, h]`, the same for every head, judged by the output projection."""
        trial = self._trial(g, a.o)
        size = a.v.sizes[1] // a.kv_heads
        return self._best(size, [trial], [trial], lambda r: repeated(r, a.heads))

    def inputs(self, g: Graph, x: Linear) -> Choice:
        """R4 `[K, K]` before one linear."""
        trial = self._trial(g, x)
        return self._best(x.sizes[0], [trial], [trial], lambda q: q)

    def _trial(self, g: Graph, x: Linear) -> Trial:
        stats = self.env.collect(g, [sample(x.source, ROWS)])
        return Trial(np.asarray(stats[sample(x.source, ROWS)], np.float64), [_weight(g, x)], self.how)

    def _best(
        self, width: int, before: Sequence[Trial], after: Sequence[Trial], whole: Callable[[Float64], Float64]
    ) -> Choice:
        """The rotation of least error; `whole` makes the basis of the rows from it."""
        plain = sum(t.error() for t in before)
        drawn = [random_rotation(width, self.env.rng) for _ in range(self.seeds)]
        errors = [sum(t.error(basis=whole(q)) for t in after) for q in drawn]
        best = int(np.argmin(errors))
        return Choice(drawn[best], *((errors[best] / plain, float(np.median(errors)) / plain) if plain else (1.0, 1.0)))


def turn_stream(g: Graph, stream: Stream, q: Float64) -> None:
    """Express a whole stream in one basis `Q [d, d]`; heads that share the embedding table get a copy of it first."""
    untie(g, stream)
    one = basis(g, q)
    rotate(g, stream, dict.fromkeys(stream.values, one))
    g.model.graph.sort()
    g.sweep()


def untie(g: Graph, stream: Stream) -> None:
    """Give output heads that read a stream's norms through an embedding table a weight `[d, V]` of their own."""
    outputs = {n.output for n in stream.norms}
    for x in blocks.linears(g, tied=True):
        if x.source in outputs and x.transposed and x.node.op_type == "MatMul" and not x.quantized:
            weight = g.constant(np.ascontiguousarray(g.array(x.weight).T), f"{x.weight.name}_head")
            g.set_input(x.node, 1, weight)
    g.sweep()  # the table's Transpose, without which only the look-up reads the table


def values_refusal(a: Attention) -> str:
    """Why the values of an attention cannot be turned, empty if they can."""
    if a.past is not None or len(a.node.outputs) > 1:
        return "its cached values are inputs and outputs of the model"
    is_direct = a.node.inputs[2] is a.v.output and a.o.source is a.node.outputs[0]
    if not is_direct or a.v.sizes[1] % a.kv_heads or a.o.sizes[0] != a.v.sizes[1] // a.kv_heads * a.heads:
        return "something lies between its values and its projections"
    use = sole_use(a.v.output)
    if use is None or use[0] is not a.node or not is_free(a.v) or not is_free(a.o):
        return "a projection is quantized, or shares its output or its weight"
    return ""


def rotate_values(g: Graph, a: Attention, r: Float64) -> None:
    """Turn the values of every head by `R [h, h]`, and the output projection back."""
    for_values, back = repeated(r, a.kv_heads), repeated(r, a.heads)
    multiply(g, a.v.weight, for_values, 0 if a.v.transposed else 1)
    if a.v.bias is not None:
        multiply(g, a.v.bias, for_values, -1)
    multiply(g, a.o.weight, back, 1 if a.o.transposed else 0)


def rotate_inputs(g: Graph, x: Linear, q: Float64) -> None:
    """Let one linear read `x Q` with weights `Q^T W`; the product is made at run time."""
    dtype = x.source.dtype.numpy() if x.source.dtype is not None else np.float32
    turned = g.op("MatMul", x.source, q.astype(dtype), name=f"{x.name}_rotated", like=x.source)
    multiply(g, x.weight, q, 1 if x.transposed else 0)
    g.set_input(x.node, 0, turned)


def _weight(g: Graph, x: Linear) -> Float64:
    w: Array = g.array(x.weight)
    return most_columns(w.T if x.transposed else w)


def _normalized(norm: NormSite, x: Float64) -> Float64:
    """What a norm makes of rows `[T, d]` before gain and bias."""
    centred = x - x.mean(axis=1, keepdims=True) if norm.kind == "layer" else x
    epsilon = norm.node.attributes.get_float("epsilon", 1e-5)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon))


def repeated(r: Float64, count: int) -> Float64:
    """A block-diagonal matrix of `count` times `R`."""
    return np.asarray(np.kron(np.eye(count), r), np.float64)
