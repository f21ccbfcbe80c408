"""Laws that every pass in the catalogue keeps, on models of every kind."""

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog, config_file
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.graph.interface import interface, removed_ports, same_interface
from onnxcomp.pipeline import Fidelity, Stage
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation.last_token import gives_last
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
NAMES = [n for n in catalog.names() if not catalog.load(n).runs_code]  # what others do is up to the code of a user


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


def outputs(g: Graph, *feeds: Batch) -> list[dict[str, np.ndarray]]:
    with Session(g) as session:
        return [session.run(batch.feeds) for batch in feeds]


def kept(g: Graph, result: Graph, pass_name: str) -> tuple[list[str], list[str]]:
    """Inputs and outputs that a result must have, in this order; one that changes them may add to them."""
    lost = removed_ports(result.model.metadata_props) if catalog.load(pass_name).changes_interface else ()
    return tuple([str(v.name) for v in values if v.name not in lost] for values in (g.inputs, g.outputs))


def prepared(name: str, pass_name: str) -> Graph:
    """The model as the pass meets it in a recipe: canonical, except for the passes that make it so."""
    return canonical(name).clone() if catalog.load(pass_name).stage is not Stage.CANONICALIZE else model(name)


@functools.cache
def canonical(name: str) -> Graph:
    g = model(name)
    canonicalize(g)
    return g


def apply(pass_name: str, g: Graph, **options):
    cls = catalog.load(pass_name)
    manager = PassManager([cls(**{**cls.example, **options})], allow_unchanged=True)
    return manager.run(g, as_dataset(batches(g), g))


@functools.cache
def applied(pass_name: str, zoo_name: str):
    """The prepared model, its bytes before the pass, and what came of it; the laws read one run of each pair."""
    g = prepared(zoo_name, pass_name)
    before = content(g)
    return g, before, apply(pass_name, g)


# Lines are counted on these two; on the others the same code runs again, and counting would cost a third more time.
COUNTED = ("encoder-post-norm", "decoder-grouped")
COST = pytest.mark.no_cover


def meets(pass_name: str, zoo_name: str) -> bool:
    """Whether a pass is judged on a model: exact ones on all, lossy ones on those two and, by turns, half of the rest.

    Only passes that make models canonical see the spelling of an exporter; the others would find the same graph twice.
    """
    cls, turn = catalog.load(pass_name), NAMES.index(pass_name) + [*ZOO].index(zoo_name)
    if zoo_name.endswith("-exported"):
        return cls.stage is Stage.CANONICALIZE
    return cls.fidelity is Fidelity.EXACT or zoo_name in COUNTED or turn % 2 == 0


PAIRS = [(p, z) for z in ZOO for p in NAMES if meets(p, z)]


@pytest.fixture(
    params=[pytest.param(x, marks=() if x[1] in COUNTED else COST, id="-".join(x)) for x in PAIRS], scope="module"
)
def pair(request):
    return request.param


@pytest.fixture(params=NAMES, scope="module")
def pass_name(request):
    return request.param


def test_valid_after_and_source_untouched(pair):
    (pass_name, _), (g, before, result) = pair, applied(*pair)
    assert content(g) == before
    result.model.verify()
    inputs, names = kept(g, result.model, pass_name)
    assert [v.name for v in result.model.inputs] == inputs
    assert [v.name for v in result.model.outputs][: len(names)] == names
    if not catalog.load(pass_name).changes_interface:
        same_interface(g.interface, interface(result.model.model.graph))  # raises where types or axes differ


def test_runs_at_every_shape_and_keeps_outputs(pair):
    (pass_name, _), (g, _, result) = pair, applied(*pair)
    cls = catalog.load(pass_name)
    bound = 2e-6 if cls.fidelity is Fidelity.EXACT else cls.example_error
    data = batches(g)
    for batch, before, after in zip(data, outputs(g, *data), outputs(result.model, *data), strict=True):
        for name in kept(g, result.model, pass_name)[1]:
            want, got = before[name], after[name]
            last = gives_last(g, result.model, name)
            want = want[:, -1:] if last else want
            assert want.shape == got.shape
            rows = (
                batch.feeds["attention_mask"].astype(bool)
                if not last and want.ndim == 3 and "attention_mask" in batch.feeds
                else ...
            )
            error = np.linalg.norm(got[rows] - want[rows]) / np.linalg.norm(want[rows])
            assert error < bound


def test_every_site_is_changed_or_declined(pair):
    step = applied(*pair)[2].report.steps[0]
    declined = len({d.site for d in step.declined})
    assert step.changed <= step.eligible
    assert step.eligible <= step.changed + declined


@pytest.mark.parametrize(
    "pair", [x for x in PAIRS if catalog.load(x[0]).fidelity is Fidelity.EXACT], ids="-".join, scope="module"
)
def test_exact_pass_has_nothing_left_to_do(pair):
    again = apply(pair[0], applied(*pair)[2].model).report.steps[0]
    assert (again.edits, again.changed) == (0, 0)


def test_lossy_pass_at_identity_makes_no_edit(pass_name):
    cls = catalog.load(pass_name)
    if cls.fidelity is Fidelity.EXACT:
        assert not cls.identity
        return
    assert cls.identity, "declare the options at which nothing changes"
    assert cls(**{**cls.example, **cls.identity}).is_identity
    assert not cls(**cls.example).is_identity
    g = prepared("encoder-post-norm", pass_name)
    result = apply(pass_name, g, **cls.identity)
    assert result.report.steps[0].edits == 0
    assert content(result.model) == content(g)


def test_lossy_pass_that_changes_nothing_is_an_error(pass_name):
    cls, g = catalog.load(pass_name), tiny.copy()
    if cls.fidelity is Fidelity.EXACT or cls.mends:
        assert apply(pass_name, tiny.linear(2, 2)).report.steps[0].changed == 0
        return
    with pytest.raises(RecipeError, match="allow_unchanged"):
        PassManager([cls()]).run(g, as_dataset(batches(g), g))


def test_sizes_change_only_where_that_is_declared(pass_name):
    cls, (g, _, result) = catalog.load(pass_name), applied(pass_name, "decoder-grouped")
    before, after = (config_file.sizes(x) for x in (g, result.model))
    if not cls.changes_sizes:  # a pass may leave what is no longer recognised, such as quantized attention
        assert {*after.heads} <= {*before.heads}
        assert {*after.kv_heads} <= {*before.kv_heads}


def test_same_input_same_bytes_wherever_its_weights_are(pass_name, tmp_path: Path):
    """A second run, on weights in a file: the same model, and nothing is written to the source."""
    g = prepared("decoder-grouped", pass_name)
    path = tiny.external(g, tmp_path)
    stored = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    again = apply(pass_name, storage.load(path)).model
    ir.external_data.load_to_model(again.model)
    assert content(applied(pass_name, "decoder-grouped")[2].model) == content(again)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == stored


def test_an_independent_reader_understands_the_result(pair):
    gs = pytest.importorskip("onnx_graphsurgeon")
    result = applied(*pair)[2].model
    read = gs.import_onnx(ir.to_proto(result.model))
    before = len(read.nodes)
    again = ir.from_proto(gs.export_onnx(read.cleanup().toposort()))
    assert len(read.nodes) == before == result.model.graph.num_nodes()
    again.ir_version = result.model.ir_version
    batch = batches(result)[0]
    np.testing.assert_equal(outputs(result, batch), outputs(Graph(again), batch))
