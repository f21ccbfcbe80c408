"""Mixtures of experts in forms that are not known: they are listed with the reason, and nothing else is."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import canonicalize
from tests import hand, tiny
from tests.mixtures import CHOSEN, EXPERTS, FFN, WIDTH, choice, mixture


def expert(g, x, i):
    hidden = g.op("Relu", g.op("MatMul", x, hand.f32(np.eye(WIDTH, FFN) * (i + 1))))
    return g.op("MatMul", hidden, hand.f32(np.eye(FFN, WIDTH) * (i + 2)))


def dense(g, x, scores, weights, ids):
    """Every expert on every token, its result times its score, which is zero where it was not chosen."""
    gates = g.op("ScatterElements", g.op("Sub", scores, scores), ids, weights, axis=-1)
    parts = [
        g.op("Mul", g.op("Slice", gates, hand.i64(i), hand.i64(i + 1), hand.i64(1)), expert(g, x, i))
        for i in range(EXPERTS)
    ]
    return g.op("Add", g.op("Add", parts[0], parts[1]), g.op("Add", parts[2], parts[3]))


def grouped(g, x, scores, weights, ids):
    """Rows in the order of their first expert, an equal share for each."""
    first = g.op("Reshape", g.op("Slice", ids, hand.i64(0), hand.i64(1), hand.i64(1)), hand.i64(-1))
    order = g.op("TopK", first, hand.i64(EXPERTS), outputs=2).producer().outputs[1]
    rows = g.op("Gather", x, order)
    parts = [expert(g, g.op("Slice", rows, hand.i64(i), hand.i64(i + 1), hand.i64(0)), i) for i in range(EXPERTS)]
    return g.op("Concat", *parts, axis=0)


def none(g, x, scores, weights, ids):
    """The choice is part of the result and steers nothing."""
    return g.op("Concat", expert(g, x, 0), weights, axis=-1)


def left(form):
    g = hand.graph(x=[4, WIDTH])
    x = g.inputs[0]
    scores = g.op("MatMul", x, hand.f32(np.random.default_rng(0).standard_normal((WIDTH, EXPERTS))), name="router")
    y = form(g, x, scores, *choice(g, scores))
    g = tiny.finish(g, y, "y", [4, WIDTH + CHOSEN if form is none else WIDTH])
    canonicalize(g)
    assert blocks.experts(g) == []
    return [d["why"] for d in describe(g)["not_recognised"] if d["why"].startswith("experts:")]


@pytest.mark.parametrize(("form", "how"), [(dense, "every expert works on every token"), (grouped, "sorted")])
def test_a_mixture_in_another_form_is_listed_with_the_reason(form, how):
    (why,) = left(form)
    assert how in why
    assert f"{CHOSEN} of {EXPERTS} are chosen" in why


def test_a_choice_that_steers_no_linear_is_no_mixture():
    assert left(none) == []


@pytest.mark.parametrize("form", ["batched", "looped"])
def test_a_mixture_that_is_recognised_is_not_listed(form):
    g = mixture(form)
    canonicalize(g)
    assert len(blocks.experts(g)) == 1
    assert describe(g)["not_recognised"] == []
