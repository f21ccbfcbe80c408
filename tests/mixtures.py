"""Mixtures of experts written by hand: batched, looped, and looped over the experts that are hit."""

import numpy as np

from onnxcomp.graph import Graph
from tests import hand, tiny

WIDTH, FFN, EXPERTS, CHOSEN = 8, 12, 4, 2


def mixture(form: str, bias: bool = False, chosen_by: str = "TopK") -> Graph:
    """`x + experts(x)` with softmax before the choice, as transformers' exporters write all forms."""
    rng = np.random.default_rng(3)
    g = hand.graph(x=["tokens", WIDTH])
    x = g.inputs[0]
    scores = g.op("MatMul", x, hand.f32(rng.standard_normal((WIDTH, EXPERTS))))
    if bias:
        scores = g.op("Add", scores, hand.f32(rng.standard_normal(EXPERTS)))
    weights, ids = choice(g, scores) if chosen_by == "TopK" else one_by_one(g, scores)
    up, down = (hand.f32(rng.standard_normal(s) / 4) for s in ((EXPERTS, FFN, WIDTH), (EXPERTS, WIDTH, FFN)))
    y = {"batched": batched, "looped": looped, "hit": looped_over_hits}[form](g, x, weights, ids, up, down)
    return tiny.finish(g, g.op("Add", x, y), "y", ["tokens", WIDTH])


def choice(g, scores):
    node_outputs = g.op("TopK", g.op("Softmax", scores, axis=-1), hand.i64(CHOSEN), axis=-1, outputs=2)
    weights, ids = node_outputs.producer().outputs
    return g.op("Div", weights, g.op("ReduceSum", weights, hand.i64(-1), keepdims=1)), ids


def one_by_one(g, scores):
    """The highest score, then the highest of the others, each with the weight of a softmax over what is near it."""
    weights, ids, left = [], [], scores
    for _ in range(CHOSEN):
        best = g.op("ArgMax", left, axis=-1, keepdims=1)
        high = g.op("ReduceMax", left, hand.i64(-1), keepdims=1)
        far = g.op("Div", g.op("Sub", high, scores), g.op("Max", g.op("Abs", scores), high))
        near = g.op("Where", g.op("Greater", far, np.array(0.9, np.float32)), np.array(-np.inf, np.float32), left)
        weights.append(g.op("GatherElements", g.op("Softmax", near, axis=-1), best, axis=-1))
        ids.append(best)
        low = g.op("Expand", np.array(-np.inf, np.float32), g.op("Shape", best))
        left = g.op("ScatterElements", left, best, low, axis=-1)
    return g.op("Concat", *weights, axis=-1), g.op("Concat", *ids, axis=-1)


def batched(g, x, weights, ids, up, down):
    flat = g.op("Reshape", ids, hand.i64(-1))
    rows = g.op(
        "Reshape", g.op("Expand", g.op("Unsqueeze", x, hand.i64(1)), hand.i64(1, CHOSEN, 1)), hand.i64(-1, WIDTH, 1)
    )
    hidden = g.op("Relu", g.op("MatMul", g.op("Gather", up, flat, axis=0), rows))
    out = g.op("Squeeze", g.op("MatMul", g.op("Gather", down, flat, axis=0), hidden), hand.i64(-1))
    scaled = g.op("Mul", out, g.op("Reshape", weights, hand.i64(-1, 1)))
    return g.op("ReduceSum", g.op("Reshape", scaled, hand.i64(-1, CHOSEN, WIDTH)), hand.i64(1), keepdims=0)


def looped(g, x, weights, ids, up, down):
    out = g.op("Sub", x, x)
    hit = g.op("OneHot", ids, np.array(EXPERTS, np.int64), hand.i64(0, 1), axis=-1)
    hit = g.op("Transpose", hit, perm=[2, 1, 0])
    for i in range(EXPERTS):
        at = g.op("Transpose", g.op("NonZero", g.op("Gather", hit, np.array(i, np.int64), axis=0)), perm=[1, 0])
        slot, token = (g.op("Gather", at, hand.i64(j), axis=1) for j in (0, 1))
        rows = g.op("GatherND", x, token)
        y = g.op("MatMul", g.op("Relu", g.op("MatMul", rows, up[i].T.copy())), down[i].T.copy())
        w = g.op("GatherND", weights, g.op("Concat", token, slot, axis=-1))
        out = g.op("ScatterND", out, token, g.op("Mul", y, g.op("Unsqueeze", w, hand.i64(1))), reduction="add")
    return out


def looped_over_hits(g, x, weights, ids, up, down):
    """As tracing writes a loop over the experts that some token chose, when its example chose all of them."""
    out = g.op("Sub", x, x)
    hit = g.op("OneHot", ids, np.array(EXPERTS + 1, np.int64), hand.i64(0, 1), axis=-1)
    hit = g.op("Transpose", hit, perm=[2, 1, 0])
    some = g.op("Greater", g.op("ReduceSum", hit, hand.i64(-1, -2), keepdims=0), np.array(0, np.int64))
    places = g.op("Transpose", g.op("NonZero", some), perm=[1, 0])
    for part in g.op("Split", places, hand.i64(*[1] * EXPERTS), axis=0, outputs=EXPERTS).producer().outputs:
        i = g.op("Squeeze", part, hand.i64(0, 1))
        at = g.op("Transpose", g.op("NonZero", g.op("Gather", hit, i, axis=0)), perm=[1, 0])
        slot, token = (g.op("Gather", at, hand.i64(j), axis=1) for j in (0, 1))
        w1, w2 = (g.op("Transpose", g.op("Gather", w, i, axis=0), perm=[1, 0]) for w in (up, down))
        y = g.op("MatMul", g.op("Relu", g.op("MatMul", g.op("GatherND", x, token), w1)), w2)
        w = g.op("GatherND", weights, g.op("Concat", token, slot, axis=-1))
        out = g.op("ScatterND", out, token, g.op("Mul", y, g.op("Unsqueeze", w, hand.i64(1))), reduction="add")
    return out
