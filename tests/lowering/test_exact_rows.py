"""`--exact-rows`: rows whose mask hides every key keep the original's values, through raising and lowering."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.engine.manager import PassManager
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering import race
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.lower import Lower
from onnxcomp.pipeline import Pass
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import tiny
from tests.hand import LOWEST, f32, graph, i64, ops, weight

B, N, S, H = 2, 4, 6, 8
WIDTH = N * H
# What is in the rows without a key: zeros by either guard, the mean of all values, or NaN.
SPELLINGS = ("nan guard", "zeros", "mean", "nan")
OLD = dataclasses.replace(CPU, name="old", max_opset=20)


def model(spelling: str) -> Graph:
    """Self-attention with projections over `x`, masked by `seen`, and a linear behind it."""
    g = graph(x=["batch", "sequence", WIDTH], seen=["batch", 1, "sequence", "sequence", bool])
    x, seen = g.inputs
    q, k, v = (_heads(g, _linear(g, x)) for _ in range(3))
    scores = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), f32(H**-0.5))
    fill = LOWEST if spelling in ("zeros", "mean") else -np.inf
    p = g.op("Softmax", g.op("Where", seen, scores, f32(fill)), axis=-1)
    if spelling == "nan guard":
        p = g.op("Where", g.op("IsNaN", p), f32(0), p)
    mixed = g.op("MatMul", p, v)
    if spelling == "zeros":
        some = g.op("ReduceSum", g.op("Cast", seen, to=int(ir.DataType.FLOAT)), i64(-1), keepdims=1)
        mixed = g.op("Where", g.op("Less", some, f32(1)), f32(0), mixed)
    y = _linear(g, g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1, 3]), i64(0, 0, WIDTH)))
    return tiny.finish(g, y, "y", ["batch", "sequence", WIDTH])


def _linear(g: Graph, x: ir.Value) -> ir.Value:
    return g.op("Add", g.op("MatMul", x, weight(WIDTH, WIDTH)), weight(WIDTH))


def _heads(g: Graph, x: ir.Value) -> ir.Value:
    return g.op("Transpose", g.op("Reshape", x, i64(0, 0, N, H)), perm=[0, 2, 1, 3])


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    seen = rng.random((B, 1, S, S)) > 0.4
    seen[0, 0, 2] = seen[1, 0, -1] = False
    return {"x": f32(rng.standard_normal((B, S, WIDTH))), "seen": seen}


def same(source: Graph, new: Graph | Path) -> None:
    """Equal on all rows, those without a key among them."""
    with Session(source) as a, Session(new) as b:
        want, got = a.run(feeds())["y"], b.run(feeds())["y"]
    np.testing.assert_array_equal(np.isnan(want), np.isnan(got))
    assert np.nanmax(np.abs(want - got)) <= 2e-6 * np.nanmax(np.abs(want))


def lowered(g: Graph, target=CPU, exact: bool = True, **options) -> Graph:
    passes: list[Pass] = [Canonicalize(exact_rows=exact), Lower(exact_rows=exact)]
    return PassManager(passes, target=target, **options).run(g).model


@pytest.mark.parametrize("target", [CPU, OLD, CUDA, TENSORRT], ids=lambda t: t.name)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rows_without_a_key_stay_on_every_target(spelling, target):
    source = model(spelling)
    same(source, lowered(source, target))


@pytest.mark.parametrize("spelling", ["nan guard", "zeros"])
def test_rows_without_a_key_stay_in_whatever_form_is_fastest(monkeypatch, spelling):
    """A clock that likes each form in turn: the ones that would change such rows are not among them."""
    source, raced = model(spelling), set()

    def lap(entry, target, threads, *, fetch):
        raced.add(entry.form)
        outputs = {}
        if fetch:
            with Session(entry.model) as session:
                outputs = session.run(entry.feeds[0])
        entry.laps.append(tuple(0.5 if entry.form == fast else 1.0 for _ in entry.feeds))
        return outputs

    monkeypatch.setattr(race, "_lap", lap)
    for fast in ("decomposed", "scale merged", "joined"):
        new = lowered(source, measure=True, shapes=[{"batch": B, "sequence": S}])
        same(source, new)
        assert ops(new)["Attention"] == (fast == "joined")
    assert not {f for f in raced if "Head" in f or "Query" in f or f in ("packed", "bias inside")}


def test_without_the_option_forms_may_change_them():
    """What the option is for: this target's own operator fills such rows otherwise."""
    source = model("zeros")
    with pytest.raises(AssertionError):
        same(source, lowered(source, CUDA, exact=False))


@pytest.mark.parametrize("opset", [None, 20])
@pytest.mark.parametrize("spelling", ["nan guard", "zeros", "mean"])
def test_the_option_reaches_both_passes_from_outside(tmp_path: Path, spelling, opset):
    source = model(spelling)
    path = storage.save(source, tmp_path / "source")
    options = {"exact_rows": True, "measure": False, "opset": opset, "evaluation": [feeds()]}
    result = oc.compress(path, tmp_path / "out", preset="optimize", **options)
    assert [s.spec for s in result.report.steps if "exact_rows" in s.spec] == [
        "canonicalize: {exact_rows: true}",
        "lower: {exact_rows: true}",
    ]
    same(source, tmp_path / "out" / "model.onnx")
