"""Laws that every pass in the catalogue keeps, on models of every kind."""

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Fidelity
from onnxcomp.runtime.sessions import Session
from tests import tiny

ZOO = {
    "encoder-post-norm": functools.partial(tiny.encoder),
    "encoder-pre-norm-no-bias": functools.partial(tiny.encoder, norm="pre", bias=False),
    "encoder-classifier": functools.partial(tiny.encoder, classes=3),
    "encoder-static": functools.partial(tiny.encoder, batch=2, sequence=7),
    "encoder-exported": functools.partial(tiny.encoder, spelled="dynamo"),
    "decoder-grouped": functools.partial(tiny.decoder),
    "decoder-tied": functools.partial(tiny.decoder, tied=True),
    "decoder-exported": functools.partial(tiny.decoder, spelled="dynamo"),
    "mlp-gated": functools.partial(tiny.mlp, hidden=32, ffn=64, gated=True),
    "linear-rank-2": functools.partial(tiny.linear, 64, 64, rank=2),
}
# The setting at which a lossy pass must change nothing. A new lossy pass adds its own.
IDENTITY = {"qdq": {"skip": ("*",)}, "dynamic-quant": {"skip": ("*",)}}
IDENTITY |= {"prune-vocab": {"min_count": 0}}
IDENTITY |= {"merge-tokens": {"ratio": 0.0}, "drop-tokens": {"keep": 1.0}}
IDENTITY |= {"half": {"skip": ("*",)}}
IDENTITY |= {"drop-layers": {"ratio": 0}, "group-heads": {"share": 1}}
IDENTITY |= {"low-rank": {"ratio": 0.0}, "sparsify": {"ratio": 0.0}, "slice": {"ratio": 0.0}}
IDENTITY |= {name: {"ratio": 0.0} for name in ("prune-channels", "prune-ffn", "prune-heads", "prune-hidden")}
IDENTITY |= {"window-attention": {"mass": 1.0}}
IDENTITY |= {"refit": {"outputs": False, "norms": False}}
# Options that make the tiny layers eligible.
OPTIONS = {"qdq": {"min_size": 1}, "dynamic-quant": {"min_size": 1}}
OPTIONS |= {"merge-tokens": {"ratio": 0.05}, "drop-tokens": {"keep": 0.99}}
OPTIONS |= {"prune-ffn": {"ratio": 0.05, "multiple_of": 1}, "prune-heads": {"floor": 3}}
OPTIONS |= {"prune-hidden": {"ratio": 0.04, "multiple_of": 1}}
OPTIONS |= {"low-rank": {"min_size": 1, "multiple": 1, "margin": 1.0, "ratio": 0.05}}
OPTIONS |= {"slice": {"ratio": 0.04, "multiple": 1}}
OPTIONS |= {"sparsify": {"min_size": 1, "ratio": 0.1, "head": True}}
OPTIONS |= {"window-attention": {"mass": 0.9}}
# A model in which a lossy pass finds nothing to change; most find nothing in a linear this small.
NOTHING = {"half": tiny.copy}
# Relative error up to which a lossy pass may go where random weights have nothing that could be spared.
BOUNDS = {"low-rank": 0.9, "slice": 0.5, "prune-heads": 0.9}
BOUNDS |= {"group-heads": 0.6, "prune-hidden": 0.3, "window-attention": 0.6}
EXACT = [n for n in catalog.names() if catalog.load(n).fidelity is Fidelity.EXACT]


def model(name: str) -> Graph:
    return ZOO[name]()


def batches(g: Graph, count: int = 10) -> list[Batch]:
    sizes = (
        [(2, 7)] * count
        if "static" in str(g.inputs[0].shape) or isinstance(g.inputs[0].shape[0], int)
        else [(2, 7), (1, 5), (3, 9)]
    )
    return [Batch(tiny.feeds(g, b, s, seed=i, padding="right")) for i, (b, s) in enumerate(sizes)]


def content(g: Graph) -> bytes:
    return ir.to_proto(g.model).SerializeToString(deterministic=True)


def outputs(g: Graph, batch: Batch) -> list[np.ndarray]:
    with Session(g) as session:
        return list(session.run(batch.feeds).values())


def prepared(name: str, pass_name: str) -> Graph:
    """The model as the pass meets it in a recipe: canonical, except for the passes that make it so."""
    g = model(name)
    if pass_name not in ("canonicalize", "cleanup"):
        canonicalize(g)
    return g


def apply(pass_name: str, g: Graph, **options):
    cls = catalog.load(pass_name)
    manager = PassManager([cls(**(OPTIONS.get(pass_name, {}) | options))], allow_unchanged=True)
    return manager.run(g, as_dataset(batches(g), g))


@functools.lru_cache(maxsize=4)
def applied(pass_name: str, zoo_name: str):
    """The prepared model, its bytes before the pass, and what came of it; the laws read one run of each pair."""
    g = prepared(zoo_name, pass_name)
    before = content(g)
    return g, before, apply(pass_name, g)


# Lines are counted on these two; on the others the same code runs again, and counting would cost a third more time.
COUNTED = ("encoder-exported", "decoder-grouped")
COST = pytest.mark.no_cover


@pytest.fixture(params=[pytest.param(n, marks=() if n in COUNTED else COST) for n in ZOO], scope="module")
def zoo_name(request):
    return request.param


@pytest.fixture(params=catalog.names(), scope="module")
def pass_name(request):
    return request.param


def test_valid_after_and_source_untouched(pass_name, zoo_name):
    g, before, result = applied(pass_name, zoo_name)
    assert content(g) == before
    result.model.verify()
    assert [v.name for v in result.model.outputs] == [v.name for v in g.outputs]
    assert [v.name for v in result.model.inputs] == [v.name for v in g.inputs]


def test_runs_at_every_shape_and_keeps_outputs(pass_name, zoo_name):
    g, _, result = applied(pass_name, zoo_name)
    exact = catalog.load(pass_name).fidelity is Fidelity.EXACT
    for batch in batches(g):
        for want, got in zip(outputs(g, batch), outputs(result.model, batch), strict=True):
            assert want.shape == got.shape
            rows = (
                batch.feeds["attention_mask"].astype(bool)
                if want.ndim == 3 and "attention_mask" in batch.feeds
                else ...
            )
            error = np.linalg.norm(got[rows] - want[rows]) / np.linalg.norm(want[rows])
            assert error < (2e-6 if exact else BOUNDS.get(pass_name, 0.2))


def test_every_site_is_changed_or_declined(pass_name, zoo_name):
    step = applied(pass_name, zoo_name)[2].report.steps[0]
    declined = len({d.site for d in step.declined})
    assert step.changed <= step.eligible
    assert step.eligible <= step.changed + declined


@pytest.mark.parametrize("name", EXACT)
def test_exact_pass_has_nothing_left_to_do(name, zoo_name):
    once = applied(name, zoo_name)[2].model
    again = apply(name, once).report.steps[0]
    assert (again.edits, again.changed) == (0, 0)


def test_lossy_pass_at_identity_makes_no_edit(pass_name):
    if catalog.load(pass_name).fidelity is Fidelity.EXACT:
        assert pass_name not in IDENTITY
        return
    g = prepared("encoder-post-norm", pass_name)
    result = apply(pass_name, g, **IDENTITY[pass_name])
    assert result.report.steps[0].edits == 0
    assert content(result.model) == content(g)


def test_lossy_pass_that_changes_nothing_is_an_error(pass_name):
    if catalog.load(pass_name).fidelity is Fidelity.EXACT:
        assert apply(pass_name, tiny.linear(2, 2)).report.steps[0].changed == 0
        return
    from onnxcomp.errors import RecipeError

    g = NOTHING.get(pass_name, functools.partial(tiny.linear, 2, 2))()
    with pytest.raises(RecipeError, match="allow_unchanged"):
        PassManager([catalog.load(pass_name)()]).run(g, as_dataset(batches(g), g))


def test_same_input_same_bytes(pass_name):
    first, second = (content(apply(pass_name, prepared("decoder-grouped", pass_name)).model) for _ in range(2))
    assert first == second


def test_external_data_gives_the_same_result(pass_name, tmp_path: Path):
    g = prepared("encoder-post-norm", pass_name)
    path = tiny.external(g, tmp_path)
    stored = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    a, b = apply(pass_name, g), apply(pass_name, storage.load(path))
    batch = batches(g)[0]
    for x, y in zip(outputs(a.model, batch), outputs(b.model, batch), strict=True):
        np.testing.assert_array_equal(x, y)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == stored


def test_an_independent_reader_understands_the_result(pass_name, zoo_name):
    gs = pytest.importorskip("onnx_graphsurgeon")
    result = applied(pass_name, zoo_name)[2].model
    read = gs.import_onnx(ir.to_proto(result.model))
    before = len(read.nodes)
    again = ir.from_proto(gs.export_onnx(read.cleanup().toposort()))
    assert len(read.nodes) == before == result.model.graph.num_nodes()
    again.ir_version = result.model.ir_version
    batch = batches(result)[0]
    for want, got in zip(outputs(result, batch), outputs(Graph(again), batch), strict=True):
        np.testing.assert_array_equal(want, got)
