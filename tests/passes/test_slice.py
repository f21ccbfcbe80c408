"""`slice`: rotation alone is exact, what is cut is the least of the stream, post-norm models are declined."""

import functools

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.blocks.stream import basis_values, streams
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph, scratch
from onnxcomp.methods.repair.stream_projection import duals
from onnxcomp.methods.rotate_stream import rotate
from onnxcomp.passes import slice as slice_pass
from onnxcomp.passes.slice import Slice
from onnxcomp.runtime.sessions import Session
from tests import tiny

MODELS = {
    "encoder": functools.partial(tiny.encoder, norm="pre", layers=3),
    "encoder-no-bias": functools.partial(tiny.encoder, norm="pre", bias=False),
    "encoder-classifier": functools.partial(tiny.encoder, norm="pre", classes=3),
    "encoder-exported": functools.partial(tiny.encoder, norm="pre", spelled="dynamo"),
    "decoder": functools.partial(tiny.decoder, layers=3),
    "decoder-tied": functools.partial(tiny.decoder, tied=True),
    "decoder-bias": functools.partial(tiny.decoder, bias=True),
    "decoder-exported": functools.partial(tiny.decoder, spelled="dynamo"),
}


def outputs(g, batch):
    with Session(g) as s:
        return list(s.run(batch).values())


def data(g, count=6):
    return as_dataset([Batch(tiny.feeds(g, 2, 9, seed=i, padding="right")) for i in range(count)], g)


def close(g, other, tolerance=3e-6):
    for seed, padding in ((0, "none"), (1, "right")):
        batch = tiny.feeds(g, 2, 7, seed=seed, padding=padding)
        for want, got in zip(outputs(g, batch), outputs(other, batch), strict=True):
            assert want.shape == got.shape
            rows = batch["attention_mask"].astype(bool) if want.ndim == 3 else ...
            assert np.linalg.norm(got[rows] - want[rows]) <= tolerance * np.linalg.norm(want[rows])


def orthogonal(d, rng, kept=None):
    return ir.tensor(np.ascontiguousarray(np.linalg.qr(rng.standard_normal((d, d)))[0][:, :kept]))


def parallel():
    """Attention and feed-forward read one norm and are added together; the stream is a graph output as well."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", 16]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="parallel"), ir_version=10))
    b = tiny.Build(g, np.random.default_rng(0), 16, 1, 1, 32, True, "canonical", decoder=True)
    h = x
    for i in range(2):
        n = b.norm(h, f"n{i}")
        first, second = (
            b.linear(n, f"a{i}", 16, 16),
            b.linear(g.op("Tanh", b.linear(n, f"u{i}", 16, 24)), f"d{i}", 24, 16),
        )
        h = g.op("Add", g.op("Add", h, first), second)
    raw = g.op("Mul", h, np.array(2, np.float32))
    out = b.linear(b.norm(h, "last"), "head", 16, 5)
    raw.name, raw.type, raw.shape = "raw", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", 16])
    g.model.graph.outputs.append(raw)
    return tiny.finish(g, out, "y", ["batch", "sequence", 5])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [False, True])
def test_rotation_alone_changes_nothing(name, shared):
    g = MODELS[name]()
    canonicalize(g)
    turned = g.clone()
    (stream,) = [s for s in streams(turned) if not s.why]
    rng = np.random.default_rng(0)
    one = orthogonal(stream.width, rng)
    bases = {v: one if shared else orthogonal(stream.width, rng) for v in dict.fromkeys(basis_values(stream).values())}
    rotate(turned, stream, {v: bases[leader] for v, leader in basis_values(stream).items()})
    turned.sweep()
    turned.infer_shapes()
    turned.verify()
    close(g, turned)
    skips = [n for n in turned.nodes("MatMul") if "_skip" in str(n.name)]
    assert len(skips) == (0 if shared else len({id(v) for v in bases}) - 1)


def test_parallel_branches_and_raw_readers_are_turned_too():
    g = parallel()
    turned = g.clone()
    (stream,) = streams(turned)
    rng = np.random.default_rng(1)
    bases = {v: orthogonal(16, rng) for v in dict.fromkeys(basis_values(stream).values())}
    rotate(turned, stream, {v: bases[leader] for v, leader in basis_values(stream).items()})
    turned.verify()
    batch = tiny.feeds(g)
    for want, got in zip(outputs(g, batch), outputs(turned, batch), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("basis", "name"), [*(("norm", n) for n in MODELS), ("shared", "encoder"), ("shared", "decoder-tied")]
)
def test_a_stream_that_lies_in_fewer_dimensions_is_cut_without_loss(name, basis):
    g = MODELS[name]()
    canonicalize(g)
    r, keep = np.random.default_rng(0), 20
    inside = np.linalg.qr(r.standard_normal((32, keep)))[0]
    inside = inside @ inside.T if "decoder" in name else np.diag(np.arange(32) < keep).astype(float)
    sums = [v.producer() for s in streams(g) for v in s.values]
    for x in blocks.linears(g):
        if any(u in sums for u in x.users):
            g.put(x.weight, (g.array(x.weight) @ inside).astype(np.float32))
            if x.bias is not None:
                g.put(x.bias, (g.array(x.bias) @ inside).astype(np.float32))
    for norm in blocks.norms(g)[: "encoder" in name]:  # what starts the stream of the encoders
        for v in (norm.gain, norm.bias):
            g.put(v, g.array(v) * inside.diagonal().astype(np.float32))
    for e in blocks.embeddings(g):
        g.put(e.table, (g.array(e.table) @ inside).astype(np.float32))
    result = PassManager([Slice(ratio=0.3, multiple=2, basis=basis)]).run(g, data(g))
    step = result.report.steps[0]
    widths = {n.gain.shape.numpy()[0] for n in blocks.norms(result.model)}
    # The mean of LayerNorm adds one direction to the span; 22 of 32 channels hold it.
    assert 22 in widths
    assert step.changed >= 2 * 2
    close(g, result.model, 2e-3)
    skips = [n for n in result.model.nodes("MatMul") if "_skip" in str(n.name)]
    assert bool(skips) == (basis == "norm")  # one basis for all needs no change of basis


def test_bases_of_a_large_model_lie_in_files_and_change_nothing(monkeypatch):
    monkeypatch.setattr(scratch, "SCRATCH_FROM", 1 << 12)
    given = []
    monkeypatch.setattr(slice_pass, "rotate", lambda g, s, *of: given.extend(of) or rotate(g, s, *of))
    g = tiny.decoder(layers=2)
    held, spooled = (PassManager([Slice(ratio=0.3)], memory=m).run(g, data(g)).model for m in (None, 1 << 14))
    in_files = [{isinstance(t.numpy(), np.memmap) for t in bases.values()} for bases in given]
    assert in_files == [{False}, {False}, {True}, {True}]
    close(held, spooled, 1e-5)


def test_what_is_cut_is_the_least_of_the_stream():
    g = tiny.decoder(layers=2)
    drift = {}
    for ratio in (0.1, 0.3, 0.5):
        result = PassManager([Slice(ratio=ratio, multiple=1)]).run(g, data(g), data(g, 3))
        drift[ratio] = result.report.validation.values()["rel-l2"]
        # One width everywhere, parameters as predicted: no weight keeps a side of 32 that was the stream's.
        width = round(0.5 + (1 - ratio) * 32 - 0.5)
        assert {n.gain.shape.numpy()[0] for n in blocks.norms(result.model)} == {width}
    assert drift[0.1] < drift[0.3] < drift[0.5]
    random = g.clone()
    (stream,) = streams(random)
    rng = np.random.default_rng(0)
    bases = {v: orthogonal(32, rng, 22) for v in dict.fromkeys(basis_values(stream).values())}
    rotate(random, stream, {v: bases[leader] for v, leader in basis_values(stream).items()})
    random.sweep()
    batch = tiny.feeds(g, seed=99)
    want, got = outputs(g, batch)[0], outputs(random, batch)[0]
    assert drift[0.3] < 0.9 * np.linalg.norm(got - want) / np.linalg.norm(want)


def test_post_norm_is_declined_and_left_as_it_was():
    g = tiny.encoder(norm="post")
    before = ir.to_proto(g.model).SerializeToString(deterministic=True)
    result = PassManager([Slice(ratio=0.3, multiple=1)], allow_unchanged=True).run(g, data(g))
    step = result.report.steps[0]
    assert step.eligible == 5
    assert step.edits == 0
    assert {d.why.split(":")[0] for d in step.declined} == {"post-norm", "no residual stream leads to it"}
    assert ir.to_proto(result.model.model).SerializeToString(deterministic=True) == before


def test_a_stream_too_narrow_for_the_multiple_is_declined():
    g = tiny.decoder()
    result = PassManager([Slice(ratio=0.1, multiple=32)], allow_unchanged=True).run(g, data(g))
    assert all("in multiples of 32, is all of them" in d.why for d in result.report.steps[0].declined)


def test_the_mean_of_a_layer_norm_that_is_read_raw_is_not_folded():
    g = tiny.encoder(norm="pre")
    stream = streams(g)[-1]
    assert not stream.why
    y = g.op("ReduceMax", stream.values[-1], np.array([-1], np.int64), name="raw")
    y.name, y.type = "top", ir.TensorType(ir.DataType.FLOAT)
    g.model.graph.outputs.append(y)
    assert "read without a norm" in streams(g)[-1].why


def test_sums_of_embeddings_before_a_norm_are_no_residual_stream():
    g = tiny.encoder(norm="post")
    start = blocks.norms(g)[0].input
    users = [u for u, _ in start.uses()]
    g.replace(start, g.op("Add", start, np.ones((1, 1, 32), np.float32), like=start), users=users)
    g.sort()
    assert all(s.why for s in streams(g))


def canonicalized(g):
    canonicalize(g)
    return g


@pytest.mark.parametrize("name", ["encoder", "decoder-tied"])
def test_duals_are_the_projection_that_readers_weights_tell_least_from_none(name):
    g = canonicalized(MODELS[name]())
    (stream,) = [s for s in streams(g) if not s.why]
    outs = {n.output: g.array(n.gain).reshape(-1, 1) for n in stream.norms}
    read = [x for x in blocks.linears(g, tied=True) if x.source in outs]
    weights = [(g.array(x.weight).T if x.transposed else g.array(x.weight)) * outs[x.source] for x in read]
    weights += [np.diag(gain.ravel()) for out, gain in outs.items() if out.is_graph_output()]
    r = np.concatenate(weights, axis=1).astype(np.float64)
    q = orthogonal(32, np.random.default_rng(0), 20)
    dual = np.asarray(duals(g, stream, {read[0].source: q})[read[0].source].numpy())
    basis = q.numpy()
    np.testing.assert_allclose(basis.T @ dual, np.eye(20), atol=1e-4)
    want = np.linalg.lstsq(r.T @ basis, r.T, rcond=None)[0].T
    np.testing.assert_allclose(dual, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("basis", ["norm", "shared"])
def test_what_is_written_along_duals_is_read_as_with_bases_where_nothing_is_cut(basis):
    g = canonicalized(MODELS["decoder"]())
    turned = g.clone()
    (stream,) = streams(turned)
    rng = np.random.default_rng(0)
    one = orthogonal(32, rng)
    bases = {v: one if basis == "shared" else orthogonal(32, rng) for v in {n.input for n in stream.norms}}
    lead = basis_values(stream)
    written = duals(turned, stream, bases)
    assert all(np.allclose(written[v].numpy(), q.numpy(), atol=1e-3) for v, q in bases.items())
    rotate(turned, stream, *({v: of[lead[v]] for v in stream.values} for of in (bases, written)))
    turned.verify()
    close(g, turned, 1e-4)
