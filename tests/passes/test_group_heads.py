"""`group-heads`: exact where heads hold the same thing in turned bases, and the plain mean otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import blocks
from onnxcomp.blocks.branches import residual_add
from onnxcomp.coupling.sizes import parameters
from onnxcomp.data.datasets import Batch, as_dataset, load_data
from onnxcomp.engine.job import Job
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.errors import RecipeError
from onnxcomp.maths.procrustes import rotations, spans
from onnxcomp.methods.repair import sequential
from onnxcomp.passes.group_heads import GroupHeads
from onnxcomp.passes.lower import Lower
from onnxcomp.runtime.sessions import Session
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


def put_images(g, a, x, share, maps):
    """Make each `share` heads of a projection images of their first one."""
    for v in (x.weight, x.bias):
        if v is not None:
            w = g.array(v).reshape(-1, a.kv_heads, a.head_dim)
            w = np.stack([w[:, h - h % share] @ maps[h] for h in range(a.kv_heads)], 1)
            g.put(v, w.reshape(g.array(v).shape).astype(np.float32))


def twins(g, share, aligned=True):
    """Make each `share` key and value heads equal up to a rotation, which queries and outputs do not notice."""
    rng = np.random.default_rng(0)
    for a in blocks.attentions(g):
        for x, rotary in ((a.k, bool(a.rotary)), (a.v, False)):
            turns = [turn(rng, a.head_dim, rotary) if aligned else np.eye(a.head_dim) for _ in range(a.kv_heads)]
            put_images(g, a, x, share, turns)
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
    new = grouped(g, align=False, repair="none").model
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
    for repair in ("none", "least-squares"):
        drift = [grouped(g, align=a, repair=repair).report.validation.values()["rel-l2"] for a in (True, False)]
        assert drift[0] < drift[1]


def test_without_repair_keys_and_values_are_means_of_turned_heads():
    g = tiny.encoder(heads=4)
    new = grouped(g, repair="none").model
    for a, b in zip(blocks.attentions(g), blocks.attentions(new), strict=True):
        with Session(g, taps=[str(a.k.source.name)]) as s:
            runs = [(batch.feeds, s.run(batch.feeds)) for batch in data(g)]
        rows = [out[str(a.k.source.name)][feeds["attention_mask"].astype(bool)] for feeds, out in runs]
        x = np.concatenate(rows).astype(np.float64)
        for old, held in ((a.k, b.k), (a.v, b.v)):
            w = g.array(old.weight).astype(np.float64).reshape(-1, 4, a.head_dim).transpose(1, 0, 2)
            turns = [rotations(w[i : i + 2], x.T @ x, (), range(a.head_dim)) for i in (0, 2)]
            want = [(w[i : i + 2] @ t).mean(0) for i, t in zip((0, 2), turns, strict=True)]
            np.testing.assert_allclose(new.array(held.weight), np.concatenate(want, 1), atol=2e-4)


def test_turning_alone_changes_nothing():
    rng = np.random.default_rng(1)
    heads, x = rng.standard_normal((3, 8, 4)), rng.standard_normal((50, 8))
    for pairs, free in (((), range(4)), (((0, 2), (1, 3)), ()), (((0, 1),), (2, 3))):
        r = rotations(heads, x.T @ x, pairs, free)
        np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-12)
        before, after = heads, heads @ r
        spread = [float(sum(np.sum((x @ (h - hs.mean(0))) ** 2) for h in hs)) for hs in (before, after)]
        assert spread[1] < spread[0]


def moved(x, maps, back):
    """What each head is given back, the heads side by side."""
    count, d = maps.shape[:2]
    heads = x.reshape(len(x), count, d)
    mean = np.einsum("rhd,hde->rhe", heads, maps).mean(1)
    return np.einsum("re,hde->rhd", mean, back).reshape(x.shape)


FORMS = [((), range(4)), (((0, 2), (1, 3)), ()), (((0, 1),), (2, 3))]


def loss(x, reads, maps, back):
    off = (moved(x, maps, back) - x).reshape(len(x), *maps.shape[:2])
    return float(np.einsum("rhd,hde,rhe->", off, reads, off))


def problem(seed, pairs, rows=200, count=3, width=4):
    """Heads that have much in common, and how they are read; a plane's moments are those of complex numbers."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, width))
    x = np.concatenate([common @ rng.standard_normal((width, width)) for _ in range(count)], 1)
    x += rng.standard_normal(x.shape)
    reads = np.stack([(a := rng.standard_normal((width, 9))) @ a.T * rng.uniform(0.2, 3) for _ in range(count)])
    if pairs:  # positions turn planes all the way round, so that only what turning leaves alone is left
        reads = np.stack([np.diag(np.diag(r)) for r in reads])
        for a, b in pairs:
            reads[:, a, a] = reads[:, b, b] = (reads[:, a, a] + reads[:, b, b]) / 2
    return x, reads


@pytest.mark.parametrize(("pairs", "free"), FORMS)
@given(seed=st.integers(0, 10**6), empty=st.booleans())
@settings(max_examples=25, deadline=None)
def test_spans_lose_no_more_than_the_mean_of_turned_heads(pairs, free, seed, empty):
    x, reads = problem(seed, pairs)
    if empty:
        x[:, 4:8] = 0
    gram = x.T @ x
    maps, back = spans(gram, reads, pairs, list(free))
    assert np.isfinite(maps).all()
    assert np.isfinite(back).all()
    pick = np.stack([np.eye(12)[:, 4 * h : 4 * h + 4] for h in range(3)])
    turns = rotations(pick, gram, pairs, free)
    assert loss(x, reads, maps, back) <= loss(x, reads, turns, turns) * (1 + 1e-9) + 1e-9
    for a, b in pairs:  # what commutes with a rotary embedding
        for m in (maps, back):
            np.testing.assert_array_equal(m[:, a, a], m[:, b, b])
            np.testing.assert_array_equal(m[:, a, b], -m[:, b, a])
            rest = [i for i in range(4) if i not in (a, b)]
            assert not m[:, [a, b]][:, :, rest].any()
            assert not m[:, rest][:, :, [a, b]].any()


def test_spans_are_the_best_of_lower_rank():
    x, reads = problem(5, ())
    inner = np.linalg.cholesky(x.T @ x)
    outer = np.zeros((12, 12))
    for h in range(3):
        outer[4 * h : 4 * h + 4, 4 * h : 4 * h + 4] = np.linalg.cholesky(reads[h])
    best = (np.linalg.svd(inner.T @ outer, compute_uv=False)[4:] ** 2).sum()
    np.testing.assert_allclose(loss(x, reads, *spans(x.T @ x, reads, (), list(range(4)))), best, rtol=1e-9)


def images(g, share):
    """Make each `share` key and value heads images of one, by any map that the positions allow."""
    rng = np.random.default_rng(4)
    for a in blocks.attentions(g):
        for x, rotary in ((a.k, bool(a.rotary)), (a.v, False)):
            maps = [turn(rng, a.head_dim, rotary) * rng.uniform(0.3, 3) for _ in range(a.kv_heads)]
            if not rotary:
                maps = [m @ np.diag(rng.uniform(0.3, 3, a.head_dim)) for m in maps]
            put_images(g, a, x, share, maps)
    return g


BUILDS = {
    "encoder": lambda: tiny.encoder(heads=4),
    "pre-norm": lambda: tiny.encoder(heads=4, norm="pre"),
    "no-bias": lambda: tiny.encoder(heads=4, bias=False),
    "decoder": lambda: tiny.decoder(heads=4, kv_heads=4),
    "grouped": lambda: tiny.decoder(heads=8, kv_heads=4),
}


@pytest.mark.parametrize("share", [2, 4])
@pytest.mark.parametrize("kind", BUILDS)
def test_heads_that_are_images_of_one_are_merged_without_loss_by_repair_alone(kind, share):
    g = images(BUILDS[kind](), share)
    drift = [grouped(g, share=share, repair=r).report.validation.values()["rel-l2"] for r in ("least-squares", "none")]
    assert drift[0] < 1e-3
    assert drift[1] > 20 * drift[0]


def held_out(g, repair, **options):
    manager = PassManager([GroupHeads(repair=repair, **options)])
    return manager.run(g, samples(g, 0), samples(g, 100))


def samples(g, seed):
    return as_dataset([Batch(tiny.feeds(g, 8, 16, seed=seed + i, padding="right")) for i in range(24)], g)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_repair_brings_held_out_samples_closer(kind):
    g = BUILDS[kind]()
    with_repair, without = (held_out(g, r).report.validation.values()["rel-l2"] for r in ("least-squares", "none"))
    assert with_repair < 0.9 * without


@pytest.mark.slow
def test_repair_lowers_the_divergence_of_a_language_model():
    g = tiny.decoder(heads=4, kv_heads=4)
    kl = [held_out(g, r, share=4).report.validation.values()["kl"] for r in ("least-squares", "none")]
    assert kl[0] < kl[1]


@pytest.mark.parametrize("kind", BUILDS)
def test_no_output_projection_ends_further_from_the_stream_for_being_fitted(kind, monkeypatch):
    g = BUILDS[kind]()
    fit, seen = sequential._fit, []

    def watched(work, uncut, env, reader):
        out = next(iter(reader.linears)).output
        add = residual_add(reader.linears[0])
        name = str((out if add is None else add.outputs[0]).name)
        before = far(g, work, name)
        fit(work, uncut, env, reader)
        seen.append((before, far(g, work, name)))

    monkeypatch.setattr(sequential, "_fit", watched)
    held_out(g, "least-squares")
    assert len(seen) == len(blocks.attentions(g))
    assert all(after <= before * (1 + 1e-5) for before, after in seen)


def far(original, work, name):
    """Squared distance of a value on the calibration data, without padding."""
    total = 0.0
    with Session(original, taps=[name]) as a, Session(work, taps=[name]) as b:
        for batch in samples(original, 0):
            rows = batch.feeds["attention_mask"].astype(bool)
            total += float(np.square(a.run(batch.feeds)[name][rows] - b.run(batch.feeds)[name][rows]).sum())
    return total


def test_a_dry_run_needs_no_data_unless_an_attention_may_stay(tmp_path):
    tiny.external(tiny.encoder(heads=4), tmp_path)
    sizes = []
    for recipe in ({}, {"repair": "none"}):
        result = Job(tmp_path / "model.onnx", Recipe((GroupHeads(**recipe),))).plan()
        assert result.report.plan.needs_data == ()
        sizes.append(result.report.plan.parameters)
    g = tiny.encoder(heads=4)
    assert sizes == [(parameters(g), parameters(grouped(g).model))] * 2
    assert GroupHeads(max_loss=0.5).planning() is None


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
