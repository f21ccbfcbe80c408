"""The residual stream through experts: what gathers, scatters and tables of weights couple."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import coupling
from onnxcomp.canonical import canonicalize
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from tests import cuts, hand, tiny
from tests.mixtures import WIDTH, mixture


def in_a_stream(form: str) -> Graph:
    """A mixture between a linear that makes the stream and one that reads it."""
    inner = mixture(form)
    x, y = inner.inputs[0], inner.outputs[0]
    before = inner.op("MatMul", x, hand.weight(WIDTH, WIDTH), name="before")
    inner.replace(x, before, users=[u for u, _ in x.uses() if u is not before.producer()])
    after = inner.op("MatMul", y, hand.weight(WIDTH, 3))
    inner.model.graph.outputs.clear()
    inner.sort()
    g = tiny.finish(inner, after, "z", ["tokens", 3])
    canonicalize(g)
    return g


@pytest.mark.parametrize("form", ["batched", "looped"])
def test_the_stream_is_cut_with_every_expert(form):
    g = in_a_stream(form)
    group = coupling.couple(g, g.node("before").outputs[0])
    assert group.units == WIDTH
    feeds = [{"x": np.random.default_rng(i).standard_normal((5 + i, WIDTH)).astype(np.float32)} for i in range(2)]
    cuts.check(g, group, [0, 3, 6], *feeds)


@pytest.mark.parametrize("op", ["GatherND", "ScatterND", "ScatterElements"])
def test_axes_that_indices_address_stay(op):
    g = hand.graph(x=[4, 4])
    h = g.op("Relu", g.op("MatMul", g.inputs[0], hand.weight(4, 4)), name="h")
    flat = g.op("Transpose", h, perm=[1, 0])  # the channels come first
    at = hand.i64(2, 0)[:, None]
    if op == "GatherND":
        y = g.op(op, flat, at)
    elif op == "ScatterND":
        y = g.op(op, flat, at, g.op("Slice", g.inputs[0], hand.i64(0), hand.i64(2), hand.i64(0)))
    else:
        y = g.op(
            op,
            flat,
            np.array([[2, 0, 1, 1]]),
            g.op("Slice", g.inputs[0], hand.i64(0), hand.i64(1), hand.i64(0)),
            axis=0,
        )
    g = tiny.finish(g, y, "y", [2 if op == "GatherND" else 4, 4])
    with pytest.raises(ModelError, match="works along axis 0"):
        coupling.couple(g, g.node("h").outputs[0])
