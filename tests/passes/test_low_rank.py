"""`low-rank`: losses against numpy's singular values, where it pays, what it declines, and that sharing is kept."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import blocks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.maths import lowrank
from onnxcomp.passes.low_rank import LowRank
from onnxcomp.runtime.sessions import Session
from tests import tiny

SHAPES = st.tuples(st.integers(2, 20), st.integers(2, 20))


def problem(k, n, rows=200, seed=0):
    r = np.random.default_rng(seed)
    x = r.standard_normal((rows, k)) @ r.standard_normal((k, k))
    return x, r.standard_normal((k, n))


@given(SHAPES, st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_loss_on_the_data_is_the_tail_of_the_singular_values(shape, rank, seed):
    k, n = shape
    x, w = problem(k, n, seed=seed)
    f = lowrank.factor(w, rank, x.T @ x, damp=0.0)
    rank = min(rank, k, n)
    left, right = f.cut(rank)
    assert left.shape == (k, rank)
    assert right.shape == (rank, n)
    whole = np.linalg.svd(x @ w, compute_uv=False) ** 2
    np.testing.assert_allclose(((x @ w - x @ left @ right) ** 2).sum(), whole[rank:].sum(), atol=1e-8 * whole.sum())
    np.testing.assert_allclose(f.loss(rank), whole[rank:].sum(), atol=1e-8 * whole.sum())
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-6)


@given(SHAPES, st.integers(1, 8), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_plain_and_scaled_losses_are_tails_too_and_data_never_favours_them(shape, rank, scaled, seed):
    k, n = shape
    x, w = problem(k, n, seed=seed)
    rank = min(rank, k, n)
    d = np.diag(x.T @ x) ** 0.5 if scaled else None
    f = lowrank.factor(w, rank, d)
    s = np.ones(k) if d is None else np.sqrt(d)
    want = np.linalg.svd(s[:, None] * w, compute_uv=False)[rank:] ** 2
    left, right = f.cut(rank)
    np.testing.assert_allclose(((s[:, None] * (w - left @ right)) ** 2).sum(), want.sum(), atol=1e-8 * f.energies.sum())
    total = ((x @ w) ** 2).sum()
    plain = ((x @ (w - left @ right)) ** 2).sum()
    fitted = ((x @ (w - left @ lowrank.refit(x.T @ x, w, left, right))) ** 2).sum()
    best = lowrank.factor(w, rank, x.T @ x, damp=0.0).loss(rank)
    assert best <= fitted + 1e-7 * total
    assert fitted <= plain + 1e-7 * total


@pytest.mark.parametrize("n", [40, 60, 90])  # decomposed on the side of the outputs, and of the inputs
def test_what_the_data_never_shows_is_kept_by_the_weights(n):
    rank, rows, k = 30, 20, 60
    r = np.random.default_rng(3)
    x = r.standard_normal((rows, k)).astype(np.float32)
    gram, w = (x.T @ x).astype(np.float64), r.standard_normal((k, n))
    f = lowrank.factor(w, rank, gram)
    left, right = f.cut(rank)
    rest = w - left @ right
    total = ((x @ w) ** 2).sum()
    assert ((x @ rest) ** 2).sum() < 1e-8 * total
    # Twenty directions of the outputs are what the data needs; the other ten are the best of the rest of the weights.
    needed = np.linalg.svd(x @ w)[2][:rows]
    hidden = w - w @ needed.T @ needed
    best = (np.linalg.svd(hidden, compute_uv=False)[rank - rows :] ** 2).sum()
    assert (rest**2).sum() == pytest.approx(best, rel=1e-3)


def test_full_rank_is_the_matrix_itself():
    _, w = problem(9, 14)
    for metric in (None, np.arange(1.0, 10.0), np.eye(9) * 3):
        left, right = lowrank.factor(w, 9, metric).cut(9)
        np.testing.assert_allclose(left @ right, w, atol=1e-6)


@given(st.lists(SHAPES, min_size=1, max_size=6), st.floats(0.05, 0.9), st.sampled_from(["energy", "uniform"]))
@settings(max_examples=60, deadline=None)
def test_shared_ranks_pay_and_keep_to_the_budget(sizes, ratio, how):
    r = np.random.default_rng(0)
    energies = [np.sort(r.random(min(s)) ** 4)[::-1] for s in sizes]
    ranks = lowrank.share(energies, sizes, ratio, 1, how)
    assert all(rank < lowrank.break_even(*s) for rank, s in zip(ranks, sizes, strict=True))
    weights = sum(rank * sum(s) if rank else s[0] * s[1] for rank, s in zip(ranks, sizes, strict=True))
    floor = sum(sum(s) if rank else s[0] * s[1] for rank, s in zip(ranks, sizes, strict=True))
    assert weights <= max(floor, (1 - ratio) * sum(k * n for k, n in sizes) + sum(map(sum, sizes)) * (how == "uniform"))


def test_energy_goes_where_it_is():
    flat, steep = np.ones(32), 0.5 ** np.arange(32.0)
    assert lowrank.share([flat, steep], [(64, 32), (64, 32)], 0.5) == sorted(
        lowrank.share([flat, steep], [(64, 32), (64, 32)], 0.5), reverse=True
    )


# ---- the pass --------------------------------------------------------------------------------------------------------


def data(g, count=6):
    return as_dataset([Batch(tiny.feeds(g, 2, 9, seed=i, padding="right")) for i in range(count)], g)


def thin(g, rank=6):
    """The model with weights that do have a low rank."""
    for x in blocks.linears(g):
        u, s, v = np.linalg.svd(g.array(x.weight), full_matrices=False)
        g.put(x.weight, ((u[:, :rank] * s[:rank]) @ v[:rank]).astype(np.float32))
    return g


def outputs(g, batch):
    with Session(g) as s:
        return next(iter(s.run(batch).values()))


@pytest.mark.parametrize("method", ["svd-llm", "asvd", "svd"])
@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder])
def test_what_has_a_low_rank_is_cut_without_loss(method, build):
    g = thin(build(hidden=64, ffn=128))
    options = {"method": method, "min_size": 1, "multiple": 4, "ratio": 0.4, "skip": ("*head*",)}
    result = PassManager([LowRank(**options, repair=method == "svd-llm")]).run(g, data(g))
    step = result.report.steps[0]
    assert step.changed > 8
    assert result.model.nbytes < 0.75 * g.nbytes
    batch = tiny.feeds(g, 2, 7)
    want, got = outputs(g, batch), outputs(result.model, batch)
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_the_step_loses_what_the_spectrum_says():
    g = tiny.linear(64, 48, bias=True)
    rows = np.random.default_rng(1).standard_normal((8, 32, 64)).astype(np.float32) * np.linspace(0.1, 3, 64)
    feeds = as_dataset({"x": rows.astype(np.float32)}, g)
    losses = {}
    for method in ("svd-llm", "asvd", "svd"):
        for repair in (True, False):
            p = LowRank(method=method, min_size=1, ratio=0.5, allocation="uniform", repair=repair)
            model = PassManager([p]).run(g, feeds, feeds).model
            first, second = blocks.linears(model)
            assert first.sizes == (64, 8)
            assert second.sizes == (8, 48)
            delta = outputs(model, {"x": rows.astype(np.float32)}) - outputs(g, {"x": rows.astype(np.float32)})
            losses[method, repair] = float((delta.astype(np.float64) ** 2).sum())
    x = rows.reshape(-1, 64).astype(np.float64)
    tail = np.linalg.svd(x @ g.array(blocks.linears(g)[0].weight).astype(np.float64), compute_uv=False)[8:]
    np.testing.assert_allclose(losses["svd-llm", True], (tail**2).sum(), rtol=1e-4)
    for method in ("asvd", "svd"):
        assert losses["svd-llm", True] <= losses[method, True] * (1 + 1e-5)
        assert losses[method, True] < losses[method, False]


def test_what_does_not_pay_is_declined_with_its_reason():
    g = tiny.encoder(hidden=64, ffn=128)
    p = LowRank(ratio=0.001, min_size=1, multiple=1)
    result = PassManager([p], allow_unchanged=True).run(g, data(g))
    step = result.report.steps[0]
    assert step.edits == step.changed == 0
    assert len(step.declined) == step.eligible
    assert all("stops paying" in d.why for d in step.declined)
    with pytest.raises(RecipeError, match="allow_unchanged"):
        PassManager([p]).run(g, data(g))


def test_a_shared_weight_is_cut_once_for_all_its_users():
    g = thin(tiny.encoder(hidden=64, ffn=128))
    first, second = (m.up for m in blocks.mlps(g))
    g.set_input(second.node, 1, first.weight)
    g.sweep()
    model = PassManager([LowRank(min_size=1, multiple=4, ratio=0.4)]).run(g, data(g)).model
    users = [n for n in model.nodes("MatMul") if n.name and n.name.endswith("_left") and "up" not in str(n.name)]
    tables = {id(n.inputs[1]): n for n in users}
    assert len(users) == len(tables) + 1


def test_a_weight_that_is_also_an_embedding_is_declined():
    g = tiny.decoder(hidden=64)
    head = next(x for x in blocks.linears(g) if x.sizes[1] == 50)
    g.op("Identity", head.weight)
    result = PassManager([LowRank(min_size=1, ratio=0.5)]).run(thin(g), data(g))
    assert result.report.steps[0].changed > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_keeps_its_bias(transposed):
    g = tiny.linear(32, 24, rank=2)
    old = blocks.linears(g)[0]
    weight = g.array(old.weight)
    w = g.constant(np.ascontiguousarray(weight.T) if transposed else weight, "w")
    g.replace(old.output, g.op("Gemm", old.input, w, old.bias, transB=int(transposed), like=old.output))
    g.sweep()
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    feeds = as_dataset({"x": x}, g)
    p = LowRank(min_size=1, ratio=0.3, allocation="uniform", multiple=1, margin=1.0)
    model = PassManager([p]).run(g, feeds, feeds).model
    assert not list(model.nodes("Gemm"))
    want, got = outputs(g, {"x": x}), outputs(model, {"x": x})
    tail = np.linalg.svd(x.astype(np.float64) @ weight, compute_uv=False)[int(0.7 * 32 * 24 / 56) :]
    np.testing.assert_allclose(((got - want) ** 2).sum(), (tail**2).sum(), rtol=1e-3)


def test_half_precision_stays():
    g = tiny.linear(32, 24, bias=False)
    x = g.model.graph.inputs[0]
    x.type = ir.TensorType(ir.DataType.FLOAT16)
    linear = blocks.linears(g)[0]
    g.put(linear.weight, g.array(linear.weight).astype(np.float16))
    g.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    g.interface = type(g)(g.model).interface
    feeds = as_dataset({"x": np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float16)}, g)
    model = PassManager([LowRank(min_size=1, ratio=0.3, allocation="uniform")]).run(g, feeds, feeds).model
    assert {x.weight.dtype for x in blocks.linears(model)} == {ir.DataType.FLOAT16}
