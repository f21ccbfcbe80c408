"""`group-heads`: exact where heads hold the same thing in turned bases, and the plain mean otherwise."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.data import load_data
from onnxcomp.errors import RecipeError
from onnxcomp.manager import PassManager
from onnxcomp.maths.align import rotations
from onnxcomp.passes.group_heads import GroupHeads
from onnxcomp.passes.lower import Lower
from onnxcomp.runtime import Session
from onnxcomp.target import TENSORRT
from tests import tiny


def data(g, count=5):
    return load_data("random", g, None, batch=2, samples=2 * count, sequence=9)


def run(g, feeds):
    with Session(g) as s:
        return next(iter(s.run(feeds).values()))


def grouped(g, *after, target=None, **options):
    known = {} if target is None else {"target": target}
    return PassManager([GroupHeads(**options), *after], **known).run(g, data(g), data(g))


def near(a, b, tolerance=2e-5):
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def turn(rng, width, rotary):
    if not rotary:
        return np.linalg.qr(rng.standard_normal((width, width)))[0]
    r, half = np.eye(width), width // 2
    for i, angle in enumerate(rng.uniform(0, 2 * np.pi, half)):
        c, s = np.cos(angle), np.sin(angle)
        r[i, i], r[i + half, i], r[i, i + half], r[i + half, i + half] = c, s, -s, c
    return r


def twins(g, share, aligned=True):
    """Make each `share` key and value heads equal up to a rotation, which queries and outputs do not notice."""
    rng = np.random.default_rng(0)
    for a in blocks.attentions(g):
        for x, rotary in ((a.k, bool(a.rotary)), (a.v, False)):
            turns = [turn(rng, a.head_dim, rotary) if aligned else np.eye(a.head_dim) for _ in range(a.kv_heads)]
            for v in (x.weight, x.bias):
                if v is not None:
                    w = g.array(v).reshape(-1, a.kv_heads, a.head_dim)
                    w = np.stack([w[:, h - h % share] @ turns[h] for h in range(a.kv_heads)], 1)
                    g.put(v, w.reshape(g.array(v).shape).astype(np.float32))
    return g


@pytest.mark.parametrize("share", [2, 4])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "encoder-no-bias", "decoder"])
def test_heads_that_are_turned_copies_are_merged_without_loss(kind, aligned, share):
    build = {
        "encoder": lambda: tiny.encoder(heads=4),
        "encoder-no-bias": lambda: tiny.encoder(heads=4, bias=False),
        "decoder": lambda: tiny.decoder(heads=4, kv_heads=4),
    }[kind]
    g = twins(build(), share, aligned)
    result = grouped(g, share=share, align=aligned)
    found = blocks.attentions(result.model)
    assert {(a.heads, a.kv_heads) for a in found} == {(4, 4 // share)}
    assert result.report.step("group-heads").changed == len(found)
    assert result.model.nbytes < g.nbytes
    for batch in data(g):
        # Rotations of turned copies meet to float noise only where rows of padding are left out.
        rows = batch.feeds["attention_mask"].astype(bool)
        assert near(run(result.model, batch.feeds)[rows], run(g, batch.feeds)[rows], 1e-3 if aligned else 2e-5)


def test_without_aligning_it_is_the_mean_of_the_heads():
    g = tiny.encoder(heads=4)
    new = grouped(g, align=False).model
    masked = g.clone()
    for a in blocks.attentions(masked):
        for x in (a.k, a.v):
            for v in (x.weight, x.bias):
                w = masked.array(v).reshape(-1, 2, 2, a.head_dim).mean(2, keepdims=True).repeat(2, 2)
                masked.put(v, w.reshape(masked.array(v).shape).astype(np.float32))
    for batch in data(g):
        assert near(run(new, batch.feeds), run(masked, batch.feeds))


def test_aligning_loses_less_than_the_plain_mean():
    g = tiny.encoder(heads=4)
    drift = [grouped(g, align=a).report.validation.values()["rel-l2"] for a in (True, False)]
    assert drift[0] < drift[1]


def test_turning_alone_changes_nothing():
    rng = np.random.default_rng(1)
    heads, x = rng.standard_normal((3, 8, 4)), rng.standard_normal((50, 8))
    for pairs, free in (((), range(4)), (((0, 2), (1, 3)), ()), (((0, 1),), (2, 3))):
        r = rotations(heads, x.T @ x, pairs, free)
        np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-12)
        before, after = heads, heads @ r
        spread = [float(sum(np.sum((x @ (h - hs.mean(0))) ** 2) for h in hs)) for hs in (before, after)]
        assert spread[1] < spread[0]


def test_grouped_heads_run_on_every_form_of_attention():
    g = tiny.decoder(heads=4, kv_heads=4)
    whole = grouped(g).model
    spelled = grouped(g, Lower(), target=TENSORRT).model
    assert not list(spelled.nodes("Attention"))
    for batch in data(g, 2):
        rows = batch.feeds["attention_mask"].astype(bool)
        assert near(run(spelled, batch.feeds)[rows], run(whole, batch.feeds)[rows])


def test_heads_that_do_not_divide_and_shared_weights_are_declined():
    g = tiny.encoder(heads=4)
    with pytest.raises(RecipeError, match="do not divide"):
        grouped(g, share=3)
    first, second = blocks.attentions(g)[:2]
    g.set_input(second.k.node, 1, first.k.weight)
    with pytest.raises(RecipeError, match="shared"):
        grouped(g)


def test_a_layer_that_would_lose_too_much_stays():
    g = twins(tiny.encoder(heads=4), 2)
    first = blocks.attentions(g)[0]
    rng = np.random.default_rng(3)
    g.put(first.v.weight, rng.standard_normal(g.array(first.v.weight).shape).astype(np.float32))
    step = grouped(g, max_loss=0.01).report.step("group-heads")
    assert step.changed == 1
    assert [d.site for d in step.declined] == [first.name]
    assert "of its values" in step.declined[0].why
