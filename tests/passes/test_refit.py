"""`refit`: the fits are least squares, never raise a site's error, and make up for cuts before them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import blocks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.order import check_order
from onnxcomp.maths import affine
from onnxcomp.maths.affine import Means
from onnxcomp.passes.correct import Correct
from onnxcomp.passes.low_rank import LowRank
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.refit import Refit
from onnxcomp.passes.slice import Slice
from onnxcomp.passes.sparsify import Sparsify
from onnxcomp.runtime.sessions import Session
from tests import tiny
from tests.passes.cut_repair import CutRepair


def data(g, count=8, seed=0):
    return as_dataset([Batch(tiny.feeds(g, 4, 9, seed=seed + i, padding="right")) for i in range(count)], g)


def problem(seed, rows=60, k=7, n=4):
    r = np.random.default_rng(seed)
    x = r.standard_normal((rows, k)) + r.standard_normal(k)
    return x, x @ r.standard_normal((k, n)) + 2 + 0.3 * r.standard_normal((rows, n)), r.standard_normal((k, n))


def test_affine_fit_is_the_textbook_solution():
    x, y, w = problem(0)
    means = Means(x.mean(axis=0), y.mean(axis=0), len(x))
    found, bias = affine.linear(x.T @ x, x.T @ y, w, 0.0, means)
    want = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    np.testing.assert_allclose(found, want[:-1], atol=1e-9)
    np.testing.assert_allclose(bias, want[-1], atol=1e-9)
    plain, none = affine.linear(x.T @ x, x.T @ y, w, 0.0)
    np.testing.assert_allclose(plain, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-9)
    assert none is None
    assert np.isclose(affine.count(np.linalg.norm(x, axis=0), x.mean(axis=0), x.var(axis=0)), len(x))


@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(0, 2))
@settings(max_examples=50, deadline=None)
def test_no_fit_raises_the_error(seed, rows, damp):
    x, y, w = problem(seed, rows)
    means = Means(x.mean(axis=0), y.mean(axis=0), len(x))
    found, bias = affine.linear(x.T @ x, x.T @ y, w, damp, means)
    plain = ((x @ w + (y - x @ w).mean(axis=0) - y) ** 2).sum()
    assert ((x @ found + bias - y) ** 2).sum() <= plain * (1 + 1e-9) + 1e-9
    v = x[:, :4]
    for m in (None, Means(v.mean(axis=0), y.mean(axis=0), len(x))):
        a, c = affine.scale((v**2).sum(axis=0), (v * y).sum(axis=0), m)
        ours, before = ((a * v + c - y) ** 2).sum(axis=0), ((v - y) ** 2).sum(axis=0)
        assert (ours <= before * (1 + 1e-6) + 1e-6).all()


def drift(g, passes, held):
    values = PassManager(passes).run(g, data(g), held).report.validation.values()
    return values["rel-l2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "cut"),
    [
        (tiny.encoder, CutRepair(ratio=0.4, repair=False)),
        (tiny.decoder, CutRepair(ratio=0.4, repair=False)),
        (tiny.encoder, LowRank(ratio=0.4, min_size=1, multiple=4, method="svd", repair=False, skip=("*head*",))),
        (tiny.decoder, Sparsify(ratio=0.6, min_size=1, method="magnitude", repair=False)),
    ],
    ids=["cut-encoder", "cut-decoder", "low-rank", "sparsify"],
)
def test_a_cut_model_comes_back_towards_the_original(build, cut):
    g = build(layers=3)
    held = data(g, 4, seed=100)
    plain = drift(g, [cut], held)
    late = cut.stage > Refit.stage
    fitted = {}
    for options in ({}, {"norms": False}, {"outputs": False}):
        result = PassManager([cut, Refit(**options)], any_order=late).run(g, data(g, 12), held)
        fitted[tuple(options)] = result.report.validation.values()["rel-l2"]
    # The channels of a random gated feed-forward part say nothing about each other: there is little to win.
    assert fitted[()] < (0.9 if build is tiny.encoder else 1.0) * plain
    assert fitted["norms",] < 1.02 * plain
    assert fitted["outputs",] < 1.02 * plain


def test_a_layer_is_fitted_to_the_stream_of_the_original():
    g = tiny.encoder(layers=1, bias=True)
    feeds = data(g, 3)  # so few that no sample is left out of the fit
    cut = CutRepair(ratio=0.5, repair=False)
    small = PassManager([cut]).run(g, feeds, feeds).model
    fitted = PassManager([cut, Refit(norms=False, damp=0.0)]).run(g, feeds, feeds).model
    down = blocks.mlps(fitted)[0].down
    add = down.users[0]
    names = [
        str(down.source.name),
        str(add.outputs[0].name),
        str(next(v for v in add.inputs if v is not down.output).name),
    ]
    rows = {n: [] for n in names}
    target = []
    with Session(fitted, taps=names) as s, Session(g, taps=names[1:2]) as t:
        for batch in feeds:
            real = batch.feeds["attention_mask"].astype(bool)
            for n, a in s.run(batch.feeds, names).items():
                rows[n].append(a[real].astype(np.float64))
            target.append(t.run(batch.feeds, names[1:2])[names[1]][real].astype(np.float64))
    x, skip, y = np.concatenate(rows[names[0]]), np.concatenate(rows[names[2]]), np.concatenate(target)
    want = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y - skip, rcond=None)[0]
    np.testing.assert_allclose(fitted.array(down.weight), want[:-1], atol=2e-3)
    np.testing.assert_allclose(fitted.array(down.bias), want[-1], atol=2e-3)
    assert not np.array_equal(small.array(blocks.mlps(small)[0].down.weight), fitted.array(down.weight))


def test_what_has_no_counterpart_in_the_original_is_declined():
    g = tiny.decoder()
    result = PassManager([Slice(ratio=0.2, multiple=1), Refit()], allow_unchanged=True).run(g, data(g))
    step = result.report.step("refit")
    assert step.changed == 0
    assert {d.why.split("'")[0] for d in step.declined} == {"the original has no value "}


def test_norms_that_canonicalize_made_are_fitted_too():
    """The original for statistics is the model as the exact passes before any cut left it, with the same names."""
    g = tiny.decoder(spelled="dynamo")
    assert not list(g.nodes("RMSNormalization"))
    passes = [catalog.load("canonicalize")(), catalog.load("prune-ffn")(multiple_of=1), Refit()]
    step = PassManager(passes).run(g, data(g)).report.step("refit")
    norms = {d.site: d.why for d in step.declined if "orm" in d.site}
    assert not [why for why in norms.values() if "has no value" in why]
    assert step.changed > 0


@pytest.mark.parametrize(
    ("kind", "quantizer"),
    [
        (tiny.encoder, QuantizeWeights(bits=2, method="nearest", min_size=1)),
        (tiny.decoder, Qdq(min_size=1, percentile=90, clip="percentile")),
    ],
)
def test_behind_a_quantizer_norms_and_scales_are_fitted_and_codes_stay(kind, quantizer):
    g = kind(norm="pre")
    samples = data(g)
    check_order([quantizer, Refit(), Correct()])
    plain = PassManager([quantizer]).run(g, samples, samples)
    fitted = PassManager([quantizer, Refit(outputs=False, scales=True)]).run(g, samples, samples)
    assert fitted.report.steps[-1].changed > 0.8 * (len(blocks.linears(g)) + len(blocks.norms(g)))
    codes = [{x.name: r.model.array(x.weight) for x in blocks.linears(r.model)} for r in (plain, fitted)]
    assert all(np.array_equal(a, codes[1][name]) for name, a in codes[0].items())
    before, after = (r.report.validation.values()["rel-l2"] for r in (plain, fitted))
    assert after < 0.97 * before


def test_scales_that_several_places_share_stay():
    g = tiny.encoder(norm="pre")
    first, second = (m.up for m in blocks.mlps(g))
    g.set_input(second.node, 1, first.weight)
    g.sweep()
    passes = [QuantizeWeights(method="nearest", min_size=1), Refit(outputs=False, norms=False, scales=True)]
    step = PassManager(passes).run(g, data(g), data(g)).report.steps[-1]
    assert {d.site for d in step.declined} >= {first.name, second.name}
    assert any("is shared" in d.why for d in step.declined)
