"""`repair: block-tune` in graphs: closer than least squares on other data, and what it leaves alone."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from onnxcomp import blocks
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.maths import block_tune
from onnxcomp.methods.repair import mlp_gauss_newton
from tests import repairs, tiny

TUNED = "tuned: squared error of the layer's output -"
CASES = {
    "gated, norms before": (lambda: tiny.decoder(layers=2), "prune-ffn", {"ratio": 0.4}),
    "norms behind": (lambda: tiny.encoder(layers=2, norm="post"), "prune-ffn", {"ratio": 0.4}),
    "norms before": (lambda: tiny.encoder(layers=2, norm="pre"), "prune-ffn", {"ratio": 0.4}),
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_tune, "STEPS", 60)


def cut(g: Graph, name: str, options: dict, how: str):
    return repairs.cut(g, name, repairs.batches(g, 8), ranking="layer", repair=how, **options)


@pytest.mark.parametrize("case", CASES)
def test_tuned_parts_bring_held_out_outputs_closer_than_least_squares(case: str) -> None:
    make, name, options = CASES[case]
    g = make()
    plain, _, before = cut(g, name, options, "least-squares")
    tuned, said, after = cut(g, name, options, "block-tune")
    assert after < before
    assert tuned.nbytes == plain.nbytes
    assert [n.op_type for n in tuned.nodes()] == [n.op_type for n in plain.nodes()]
    assert any(s.startswith(TUNED) for s in said)


def test_the_norm_behind_is_tuned_with_its_part() -> None:
    g = tiny.encoder(layers=1, norm="post")
    model, said, _ = cut(g, "prune-ffn", {"ratio": 0.4}, "block-tune")
    pairs = zip(blocks.norms(g), blocks.norms(model), strict=True)
    assert sum(not np.array_equal(g.array(a.gain), model.array(b.gain)) for a, b in pairs) == 1
    assert sum(s.startswith(TUNED) for s in said) == 1


def test_the_samples_that_judge_are_read_by_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = block_tune.tune
    monkeypatch.setattr("onnxcomp.methods.repair.block_tune.tune", lambda *a: seen.append(a[1:]) or real(*a))
    cut(tiny.encoder(layers=1, norm="pre"), "prune-ffn", {"ratio": 0.4}, "block-tune")
    ((fitted, unseen),) = seen
    assert len(fitted) == 7 * len(unseen)
    rows = {r.tobytes() for r in fitted.x}
    assert not any(r.tobytes() in rows for r in unseen.x)


def test_what_a_repair_will_cost_is_told_before_it_starts() -> None:
    g, told = tiny.decoder(layers=2), []
    data = as_dataset(repairs.batches(g, 3), g)
    for how in ("block-tune", "gauss-newton", "least-squares"):
        cut = catalog.load("prune-ffn")(ratio=0.4, ranking="layer", repair=how)
        PassManager([cut], watch=lambda *a: told.append(a)).run(g, data)
    steps = [a for a in told if a[0].startswith("repair by")]
    assert {a[0] for a in steps} == {
        "repair by block-tune, at most some 1 min on one core",
        "repair by gauss-newton, at most some 1 min on one core",
        "repair by least-squares",
    }
    assert [a[1:] for a in steps if a[0] == "repair by least-squares"] == [(0, 2), (1, 2)]


def test_gauss_newton_fits_wide_parts_on_fewer_rows() -> None:
    class Wide:
        linears = (type("Linear", (), {"sizes": (384, 1536)}), type("Linear", (), {"sizes": (1536, 384)}))

    narrow = type("Narrow", (), {"linears": (type("Linear", (), {"sizes": (32, 64)}),)})
    assert mlp_gauss_newton._rows(narrow) == mlp_gauss_newton.ROWS
    assert mlp_gauss_newton._rows(Wide) == 8876
    assert mlp_gauss_newton.work_of(Wide) <= mlp_gauss_newton.WORK
