"""What makes logits, fitted to the original's probabilities: the linear system, and what a fit may do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onnxcomp import blocks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.maths import newton, newton_softmax
from onnxcomp.maths.newton import Fitted
from onnxcomp.maths.newton_softmax import Classes, fit
from onnxcomp.methods.repair import output_head as fitting
from onnxcomp.runtime.sessions import Session
from tests import tiny, zoo

RNG = np.random.default_rng


def problem(seed=0, rows=400, dtype=np.float64):
    """Rows of five channels, of which seven more made others; eleven classes behind four channels."""
    r = RNG(seed)
    x = r.normal(size=(rows, 12)).astype(dtype)
    x[:, 5:] *= 0.5
    there = Classes(r.normal(size=(12, 4)).astype(dtype), r.normal(size=(4, 11)).astype(dtype), np.zeros(11, dtype))
    start = Classes(there.turn[:5].copy(), there.table, r.normal(size=11).astype(dtype) * 0.1)
    return start, x[:, :5], there, x


def divergence(start, z, there, x):
    """`KL(p | q)` summed over rows, as a function of the matrix, written with PyTorch."""
    table, shift, rows = (torch.from_numpy(a) for a in (start.table, start.shift, z))
    p = torch.log_softmax(torch.from_numpy(there.scores(x)), -1)

    def of(turn):
        q = torch.log_softmax(rows @ turn @ table + shift, -1)
        return (p.exp() * (p - q)).sum()

    return of


def test_the_way_down_and_the_hessian_are_torchs():
    start, z, there, x = problem()
    of, turn = divergence(start, z, there, x), torch.from_numpy(start.turn)
    system = newton_softmax._System(start, there, z, x, 0.0)
    np.testing.assert_allclose(system.gradient, -torch.func.grad(of)(turn).numpy(), atol=1e-9)
    change = RNG(1).normal(size=start.turn.shape)
    want = torch.func.jvp(torch.func.grad(of), (turn,), (torch.from_numpy(change),))[1].numpy()
    np.testing.assert_allclose(system.product([change])[0], want, atol=1e-8)
    damped = newton_softmax._System(start, there, z, x, 0.1)
    more = damped.product([change])[0] - want
    assert np.vdot(change, more) > 0
    np.testing.assert_allclose(more, 0.1 * np.square(z).sum() / 5 * change @ damped.outer, atol=1e-8)


def test_rows_in_pieces_give_the_same(monkeypatch):
    start, z, there, x = problem()
    whole = fit(start, z, there, x)
    monkeypatch.setattr(newton, "CHUNK", 11 * 7)
    np.testing.assert_allclose(fit(start, z, there, x).part.turn, whole.part.turn, atol=1e-9)


def test_a_fit_finds_the_least_divergence():
    start, z, there, x = problem(rows=4000)
    found = fit(start, z, there, x)
    seen = np.arange(len(z)) % 8 != 7
    of = divergence(start, z[seen], there, x[seen])
    turn = torch.from_numpy(start.turn.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS([turn], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = of(turn) / seen.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    least, begin, ours = (float(of(torch.as_tensor(t).detach())) for t in (turn, start.turn, found.part.turn))
    assert least < 0.9 * begin
    assert ours - least < 0.05 * (begin - least)
    assert found.after < found.before


@pytest.mark.parametrize("seed", range(8))
def test_no_fit_raises_the_divergence_of_rows_left_out(seed):
    start, z, there, x = problem(seed, rows=24)  # as many rows as numbers to fit
    found = fit(start, z, there, x)
    out = np.arange(len(z)) % 8 == 7
    of = divergence(start, z[out], there, x[out])
    before, after = (float(of(torch.from_numpy(t))) for t in (start.turn, found.part.turn))
    assert after <= before
    assert np.isclose(found.before, before / 3)
    assert np.isclose(found.after, after / 3)


def test_what_gives_the_same_is_left_alone():
    start, _, there, x = problem()
    assert fit(there, x, there, x).part is there
    assert fit(start, x[:0, :5], there, x[:0]).part is start


def kl(g, model, feeds):
    total = 0.0
    for f in feeds:
        there, here = (torch.from_numpy(run(m, f)).double() for m in (g, model))
        p, q = (torch.log_softmax(x, -1) for x in (there, here))
        total += float((p.exp() * (p - q)).sum())
    return total


def run(g, feeds):
    with Session(g) as s:
        return next(iter(s.run(feeds).values()))


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("name", "tied"), [("slice", False), ("slice", True), ("prune-ffn", False), ("drop-layers", True)]
)
def test_logits_come_closer_on_other_data(name, tied, tmp_path, monkeypatch):
    g = tiny.decoder(tied=tied, layers=2)
    data = as_dataset([Batch(tiny.feeds(g, 8, 9, seed=i)) for i in range(40)], g)
    cuts = {"slice": {"ratio": 0.25, "multiple": 1}, "drop-layers": {"ratio": 0.5, "protect": 0}}
    options = {"repair": "gauss-newton", **cuts.get(name, {"ratio": 0.25})}
    fitted = PassManager([catalog.load(name)(**options)]).run(g, data, data)
    monkeypatch.setattr(fitting, "fit", lambda start, *_: Fitted(start, 1.0, 1.0))
    plain = PassManager([catalog.load(name)(**options)]).run(g, data, data)
    held = [tiny.feeds(g, 8, 9, seed=100 + i) for i in range(6)]
    fits = name == "slice" or not tied
    said = [n for n in fitted.report.step(name).noted if "probabilities" in n.what]
    assert len(said) == fits
    if fits:
        assert "divergence from them -" in said[0].what
        assert kl(g, fitted.model, held) < kl(g, plain.model, held)
    else:
        assert not any(
            np.any(fitted.model.array(a.weight) != plain.model.array(b.weight))
            for a, b in zip(blocks.linears(fitted.model), blocks.linears(plain.model), strict=True)
        )


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_what_is_fitted_is_what_gives_the_logits(name):
    """In a model with LayerNorm and a tied table, a shift lies between the fitted matrix and the table."""
    if name == "gpt2":
        g = Graph(zoo.load_graph("gpt2.dynamo-sdpa-18"))
        feeds = [zoo.feeds(zoo.kept()["gpt2.dynamo-sdpa-18"][0], 2, 7)]
    else:
        g = tiny.decoder(tied=name == "tied")
        feeds = [tiny.feeds(g, 2, 7)]
    passes = [catalog.load("canonicalize")(), catalog.load("slice")(ratio=0.25, multiple=1, repair="none")]
    model = PassManager(passes).run(g, feeds, feeds).model
    linears = {x.output.name: x for x in blocks.linears(model, tied=True)}
    last = next(linears[o.name] for o in model.outputs if o.name in linears)
    first = next((x for x in linears.values() if x.output is last.source), last)
    assert (first is last) == (name == "untied")
    start = fitting._start(model, last, first)
    with Session(model, taps=[str(first.source.name)]) as s:
        z = s.run(feeds[0])[str(first.source.name)]
    rows = z.reshape(-1, z.shape[-1])
    np.testing.assert_allclose(start.scores(rows).reshape(*z.shape[:-1], -1), run(model, feeds[0]), atol=1e-4)


def test_another_vocabulary_is_not_compared():
    g, original = tiny.decoder(vocabulary=40), tiny.decoder(vocabulary=50)
    fitting.fit_logits(g, SimpleNamespace(original=original, memory=None))  # collects nothing
    assert g.edits == 0


def test_too_many_classes_for_the_memory_are_named():
    g = tiny.decoder()
    fitting.fit_logits(g, SimpleNamespace(original=g.clone(), memory=1 << 14))
    assert g.edits == 0
    assert "too much work or memory for 50 classes" in g.noted[0].what
