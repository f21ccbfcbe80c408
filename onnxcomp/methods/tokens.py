"""Token reduction: where tokens can be removed, the map from old to new positions, and the restored sequence.

Shapes: `[b, t, c]` is the stream of `t` tokens at one place, `t0` of them at the first layer, `t'` after a removal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks import Attention, Layer, layers
from onnxcomp.blocks.linears import Index
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import NORMS
from onnxcomp.maths import Array

__all__ = ["PADDING_BIAS", "Place", "Tokens", "places", "removals"]

QUERY_MASK = "the attention mask depends on the query (causal, window or position bias), so tokens cannot move"
# Nodes from an attention to the MLP of its layer: projection, bias, scale, residual, norm and reshapes are fewer; the
# search doubles with each sum.
MOST_STEPS = 12
PADDING_BIAS = -3e4  # in place of log 0: below every score, and finite in half types, whose range ends at 65504
LEAST_MASS = 1e-4  # in place of the zero mass of a token that is all padding, a divisor; a normal number in half types


@dataclass(frozen=True)
class Place:
    """Between a layer's attention and its MLP: the stream `x` `[b, t, c]`, consumed by the MLP and the residual."""

    layer: Layer
    x: ir.Value
    length: int | None

    @property
    def attention(self) -> Attention:
        """The layer's attention."""
        assert self.layer.attention is not None
        return self.layer.attention

    @property
    def site(self) -> Site:
        """The attention and the node after which tokens are removed."""
        producer = self.x.producer()
        assert producer is not None
        return Site(self.attention.name, (self.attention.name, str(producer.name)), "layer")

    @property
    def readers(self) -> list[ir.Node]:
        """The consumers of the stream here."""
        return [u for u, _ in self.x.uses()]


class Blocked(Exception):
    """Why tokens cannot be removed at a layer; caught where the site is declined."""


def places(g: Graph) -> tuple[list[Place], list[tuple[Site, str]]]:
    """Layers where tokens can be removed, and the others with the reason; none if one of them blocks the rest."""
    f, index = Facts(g), Index.of(g)
    places: list[Place] = []
    for layer in layers(g):
        try:
            places.append(_place(g, f, index, layer))
        except Blocked as why:
            return [], [(a.site, f"layer {layer.index}: {why}") for x in layers(g) for a in x.attentions]
    try:
        _only_layers_between(g, places)
        if places:
            padding(g, f, places[0].attention.node)
    except Blocked as why:
        return [], [(p.site, str(why)) for p in places]
    return places, []


def _place(g: Graph, f: Facts, index: Index, layer: Layer) -> Place:
    a, mlp = layer.attention, layer.mlp
    if a is None or mlp is None or len(layer.attentions) != 1 or layer.unknown or layer.experts or mlp.inner:
        raise Blocked("it is not one attention followed by one MLP")
    if a.is_cross or a.rotary:
        raise Blocked("keys come from another sequence" if a.is_cross else "positions are rotated inside attention")
    x = mlp.up.source
    norm = index.norm_by_output.get(x)
    if norm is not None and any(u.op_type in ("Add", "Sum") for u, _ in norm.input.uses()):
        x = norm.input
    if x in {a.q.source, a.k.source, a.v.source} or not _comes_from(x, a.node):
        raise Blocked("attention and MLP run in parallel on one input")
    shape = f.shape(x)
    if shape is None or len(shape) != 3:
        raise Blocked("the stream is not [batch, tokens, channels]")
    return Place(layer, x, shape[1] if isinstance(shape[1], int) else None)


def _comes_from(v: ir.Value, node: ir.Node, depth: int = MOST_STEPS) -> bool:
    """Whether a value is computed from a node's output within a few steps."""
    producer = v.producer()
    if producer is None or depth == 0:
        return False
    return producer is node or any(x is not None and _comes_from(x, node, depth - 1) for x in producer.inputs)


def _only_layers_between(g: Graph, places: list[Place]) -> None:
    """Refuse when the stream of an inner layer has consumers besides the layers themselves."""
    for here, after in itertools.pairwise(places):
        ahead = _downstream(here.x, stop={after.x})
        outside = [v for v in ahead if v.is_graph_output()]
        if outside:
            raise Blocked(f"output '{outside[0].name}' reads the tokens of layer {here.layer.index}")
        for v in ahead:
            for user, _ in v.uses():
                if user.op_type in ("Reshape", "Expand", "Gather", "Slice", "Concat", "Split", "Transpose", "Pad"):
                    raise Blocked(f"node '{user.name}' ({user.op_type}) re-arranges tokens between layers")


def _downstream(x: ir.Value, stop: set[ir.Value]) -> set[ir.Value]:
    """Values computed from `x`, not past the ones in `stop`."""
    reached: set[ir.Value] = set()
    pending = [x]
    while pending:
        v = pending.pop()
        if v in reached or v in stop:
            continue
        reached.add(v)
        pending += [out for user, _ in v.uses() for out in user.outputs]
    return reached


def padding(g: Graph, f: Facts, attention: ir.Node) -> list[ir.Value]:
    """The parts of an attention's mask that mark the real keys, bool `[b or 1, 1, 1, t]`; none without a mask.

    Parts that depend on the query alone only empty whole rows, which are undefined by the canonical form's contract.
    Raises `Blocked` where the mask relates queries to keys.
    """
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is not None and mask.dtype is not ir.DataType.BOOL:
        raise Blocked(QUERY_MASK)
    of_keys = list[ir.Value]()
    for v in _conjuncts(mask) if mask is not None else ():
        known = f.shape(v)
        shape = (1, 1, 1, 1, *(known or ()))[-4:]  # of four axes, [b, heads, s, t]
        if known is None or v.dtype not in (ir.DataType.BOOL, None) or (shape[3] != 1 and shape[1:3] != (1, 1)):
            raise Blocked(QUERY_MASK)
        if shape[3] != 1:
            of_keys.append(v)
    return of_keys


def _conjuncts(v: ir.Value) -> list[ir.Value]:
    """The values whose broadcast logical conjunction is the mask."""
    node = v.producer()
    if node is None or node.op_type not in ("And", "Expand", "Identity"):
        return [v]
    inputs = node.inputs if node.op_type == "And" else node.inputs[:1]
    return [x for v in inputs if v is not None for x in _conjuncts(v)]


class Tokens:
    """The sequence as it shrinks: `weight` `[b, t]`, `where` `[b, t0]` and the fixed number of tokens, if there is one.

    `weight` is how many original tokens each token stands for, 0 for padding, None while every token counts the same;
    `where` is the position `[0, t)` that each original token was moved to, None before the first removal.
    """

    def __init__(self, g: Graph, first: Place) -> None:
        self.g, self.f = g, Facts(g)
        self.dtype = first.x.dtype or ir.DataType.FLOAT
        self.weight: ir.Value | None = None
        self.where: ir.Value | None = None
        self.length = first.length
        real = padding(g, self.f, first.attention.node)
        if real:
            both = functools.reduce(lambda a, b: g.op("And", a, b), real)
            self.weight = self.cast(g.op("Squeeze", both, np.array([1, 2], np.int64)))
        self.padded = bool(real)

    # ---- graph fragments -----------------------------------------------------------------------------------------

    def cast(self, v: ir.Value) -> ir.Value:
        """A value in the stream's element type."""
        return self.g.op("Cast", v, to=self.dtype.value)

    def number(self, x: float) -> Array:
        """A scalar constant of the stream's element type."""
        return np.array(x, self.dtype.numpy())

    def squeeze(self, v: ir.Value, axis: int) -> ir.Value:
        """A value without one axis."""
        return self.g.op("Squeeze", v, np.array([axis], np.int64))

    def unsqueeze(self, v: ir.Value, axis: int) -> ir.Value:
        """A value with one more axis."""
        return self.g.op("Unsqueeze", v, np.array([axis], np.int64))

    def cut(self, v: ir.Value, start: int, stop: int = 2**31 - 1, step: int = 1) -> ir.Value:
        """A range of tokens (axis 1)."""
        return self.g.op("Slice", v, *(np.array([i], np.int64) for i in (start, stop, 1, step)))

    def heads(self, v: ir.Value, *shape: int) -> ir.Value:
        """A value `[b, t, n]` with its last axis split."""
        return self.g.op("Reshape", v, np.array([0, 0, *shape], np.int64))

    # ---- moving --------------------------------------------------------------------------------------------------

    def like_tokens(self, x: ir.Value, number: int) -> ir.Value:
        """An int64 `[b, t]` of one number."""
        shape = self.g.op("Shape", x, start=0, end=2)
        return self.g.op("Expand", np.array([[number]], np.int64), shape)

    def share(self, x: ir.Value, part: float, *, up: bool = False) -> ir.Value:
        """A share of the number of tokens, rounded down or up, as int64 `[1]`."""
        length = self.g.op("Cast", self.g.op("Shape", x, start=1, end=2), to=ir.DataType.FLOAT.value)
        part_of = self.g.op("Mul", length, np.array(part, np.float32))
        return self.g.op("Cast", self.g.op("Ceil" if up else "Floor", part_of), to=ir.DataType.INT64.value)

    def remaining(self, x: ir.Value, removed: ir.Value) -> ir.Value:
        """Number of tokens of `x` after `removed` of them, int64 `[1]`."""
        if self.length is not None:
            self.length -= int(self.g.array(removed).item())
            return self.g.constant(np.array([self.length], np.int64), "tokens_left")
        return self.g.op("Sub", self.g.op("Shape", x, start=1, end=2), removed)

    def move(
        self, x: ir.Value, onto: ir.Value, count: ir.Value, by: ir.Value | None, readers: Collection[ir.Node]
    ) -> ir.Value:
        """Feed the readers of `x` from `count` `[1]` new tokens: means, weighted by `by` `[b, t]`, of those moved.

        `onto` `[b, t]` holds the new position of each token, below `count`. Returns the assignment `[b, t', t]`, one
        where a token was moved to a new one and else zero.
        """
        g = self.g
        new = g.op("Range", np.array(0, np.int64), self.squeeze(count, 0), np.array(1, np.int64))  # [t']
        rows = g.op("Unsqueeze", new, np.array([0, 2], np.int64))  # [1, t', 1]
        matrix = self.cast(g.op("Equal", self.unsqueeze(onto, 1), rows))  # [b, t', t]
        weights = None if by is None else self.unsqueeze(by, 2)  # [b, t, 1]
        total = g.op("MatMul", matrix, x if weights is None else g.op("Mul", x, weights))  # [b, t', c]
        mass = self.mass(matrix, by)  # [b, t']
        mean = g.op("Div", total, g.op("Max", self.unsqueeze(mass, 2), self.number(LEAST_MASS)), name="fewer_tokens")
        g.replace(x, mean, users=readers)
        self.where = onto if self.where is None else g.op("GatherElements", onto, self.where, axis=1)
        return matrix

    def mass(self, matrix: ir.Value, by: ir.Value | None) -> ir.Value:
        """Sum of the weights moved to each new token, `[b, t']`."""
        if by is None:
            return self.g.op("ReduceSum", matrix, np.array([2], np.int64), keepdims=0)
        return self.squeeze(self.g.op("MatMul", matrix, self.unsqueeze(by, 2)), 2)

    def bias(self) -> ir.Value:
        """Log of the weights, as attention bias `[b, 1, t, t]`; padding is far below every score, in half types too."""
        assert self.weight is not None
        log = self.g.op("Max", self.g.op("Log", self.weight), self.number(PADDING_BIAS))
        flat = self.g.op("Unsqueeze", log, np.array([1, 2], np.int64))
        length, one = self.g.op("Shape", self.weight, start=1, end=2), np.array([1], np.int64)
        return self.g.op("Expand", flat, self.g.op("Concat", one, one, length, one, axis=0))

    # ---- restoring -----------------------------------------------------------------------------------------------

    def restore(self, last: Place) -> None:
        """Restore the original `t0` tokens for consumers after the last layer, unless these use the first one only."""
        end = _exit(last)
        users = [u for u, _ in end.uses()]
        internal = bool(users) and not end.is_graph_output()
        if self.where is None or (internal and all(self._first_only(u, end) for u in users)):
            return
        shape = self.f.shape(last.x)
        assert shape is not None
        assert isinstance(shape[2], int)
        index = self.g.op("Expand", self.unsqueeze(self.where, 2), np.array([1, 1, shape[2]], np.int64))
        full = self.g.op("GatherElements", end, index, axis=1, name="all_tokens")
        self.g.replace(end, full, users=None if end.is_graph_output() else users)
        gather = full.producer()
        assert gather is not None
        self.g.set_input(gather, 0, end)

    def _first_only(self, user: ir.Node, v: ir.Value) -> bool:
        """Whether a consumer, past norms, uses nothing but token 0."""
        if user.op_type in NORMS and user.inputs[0] is v:
            out = user.outputs[0]
            return not out.is_graph_output() and all(self._first_only(u, out) for u, _ in out.uses())
        known = [self.f.content(x) for x in user.inputs[1:]]
        read = [None if c is None else c.reshape(-1).tolist() for c in known]
        if user.op_type == "Gather":
            return user.attributes.get_int("axis", 0) == 1 and read == [[0]]
        return user.op_type == "Slice" and read[:3] == [[0], [1], [1]]


def _exit(place: Place) -> ir.Value:
    """The stream after a layer: its MLP's residual sum, normalized in post-norm layers."""
    mlp = place.layer.mlp
    assert mlp is not None
    v = mlp.down.output
    while True:
        users = list(dict.fromkeys(u for u, _ in v.uses()))
        if len(users) != 1 or v.is_graph_output():
            raise ModelError(f"the MLP '{mlp.name}' is read in several places, so its layer has no single end")
        v = users[0].outputs[0]
        if users[0].op_type in ("Add", "Sum"):
            break
    users = list(dict.fromkeys(u for u, _ in v.uses()))
    post = place.layer.position == "post" and len(users) == 1 and users[0].op_type in NORMS
    return users[0].outputs[0] if post else v


def removals(places: list[Place], ratio: float) -> list[int | float]:
    """Tokens to remove at each place for a share `ratio` in all: numbers, or shares of a length that is open."""
    count = len(places)
    if not places or not ratio:
        return [0] * count
    if places[0].length is None:
        return [min(0.5, 1 - (1 - ratio) ** (1 / count))] * count
    plan: list[int | float] = []
    length = places[0].length
    for i in range(count):
        wanted = int(ratio * places[0].length * (i + 1) / count + 1e-9) - (places[0].length - length)
        plan.append(max(0, min(wanted, (length - 1) // 2)))
        length -= int(plan[-1])
    return plan
