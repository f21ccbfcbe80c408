"""A user's script for onnx-graphsurgeon as a pass: what it may do, how it is judged, and what is said when it fails."""

import json
import textwrap

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe, parse_pass
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.graph.hashing import same_content
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.graphsurgeon import Graphsurgeon
from onnxcomp.passes.qdq import Qdq
from onnxcomp.pipeline import PassFault
from onnxcomp.runtime.sessions import Session
from tests import tiny

gs = pytest.importorskip("onnx_graphsurgeon")

# Removes one bias; the way existing scripts are written: look for a node, rewire, clean up.
CUT = """
    import onnx_graphsurgeon as gs

    def cut(graph: gs.Graph) -> gs.Graph:
        add = next(n for n in graph.nodes if n.op == "Add" and isinstance(n.inputs[1], gs.Constant))
        product = add.inputs[0].inputs[0]
        product.outputs = add.outputs
        add.outputs.clear()
        return graph.cleanup().toposort()
"""
SCALE = """
    def scale(graph):
        for name, tensor in graph.tensors().items():
            if type(tensor).__name__ == "Constant" and tensor.values.ndim == 2:
                tensor.values = tensor.values * 0.5
                return  # the graph was changed in place
"""
SAME = """
    def same(graph):
        graph.toposort()
        [t.values for t in graph.tensors().values() if hasattr(t, "values")]
        return graph
"""


@pytest.fixture
def script(tmp_path):
    def write(text: str, name: str = "surgery.py") -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def run(g, *passes, allow_code=True, **options):
    data = as_dataset([tiny.feeds(g, 2, 5, seed=i) for i in range(6)], g)
    return PassManager(passes, allow_code=allow_code, **options).run(g, data)


def test_a_graph_comes_back_as_it_went(tmp_path):
    g = tiny.decoder(layers=1)
    g = storage.load(tiny.external(g, tmp_path))
    surgeon = g.to_graphsurgeon()
    assert isinstance(surgeon, gs.Graph)
    assert [t.name for t in surgeon.inputs] == [v.name for v in g.inputs]
    again = Graph.from_graphsurgeon(surgeon)
    stored = {n: v.const_value for n, v in g.model.graph.initializers.items()}
    assert all(v.const_value is stored[n] for n, v in again.model.graph.initializers.items())  # nothing was read
    assert (again.opset, again.model.ir_version) == (g.opset, g.model.ir_version)
    again.verify()
    feeds = tiny.feeds(g, 2, 5)
    np.testing.assert_equal(Session(again).run(feeds), Session(g).run(feeds))


def test_element_types_that_numpy_lacks_come_back():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="types"), ir_version=10))
    parts = [x]
    for dtype in (ir.DataType.INT4, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN):
        codes = g.constant(ir.tensor(np.arange(4).astype(dtype.numpy()), dtype=dtype), dtype.name)
        parts.append(g.op("Cast", codes, to=1))
    tiny.finish(g, g.op("Sum", *parts), "y", ["n", 4])
    again = Graph.from_graphsurgeon(g.to_graphsurgeon())
    assert {n: v.dtype for n, v in again.model.graph.initializers.items()} == {
        n: v.dtype for n, v in g.model.graph.initializers.items()
    }
    assert same_content(again, Graph.from_graphsurgeon(again.to_graphsurgeon()))


def test_branches_read_the_constants_around_them():
    feeds = {"x": np.ones((2, 3), np.float32), "c": np.array(True)}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 3]))
    c = ir.Value(name="c", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    g = Graph(ir.Model(ir.Graph([x, c], [], nodes=[], opset_imports={"": 21}, name="if"), ir_version=10))
    w = g.constant(np.arange(3, dtype=np.float32), "w")

    def branch(op):
        node = ir.node(op, [x, w])
        node.outputs[0].name, node.outputs[0].type = f"{op}_out", x.type
        return ir.Graph([], [node.outputs[0]], nodes=[node], name=op)

    y = g.op("If", c, then_branch=branch("Mul"), else_branch=branch("Add"))
    y.type = x.type
    g = tiny.finish(g, y, "y", ["n", 3])
    again = Graph.from_graphsurgeon(g.to_graphsurgeon())
    np.testing.assert_equal(Session(again).run(feeds), Session(g).run(feeds))


def test_what_is_no_graph_is_refused():
    with pytest.raises(ModelError, match="is expected, not list"):
        Graph.from_graphsurgeon([])


def test_a_script_is_a_lossy_step_that_is_counted_and_compared(script):
    g = tiny.encoder(layers=1)
    canonicalize(g)
    result = run(g, Graphsurgeon(script=script(CUT)))
    (step,) = result.report.steps
    assert (step.fidelity, step.eligible, step.changed) == ("lossy", 1, 1)
    adds = sum(n.op_type == "Add" for n in g.nodes())
    assert step.noted[0].what == f"Add {adds} > {adds - 1}"
    assert result.report.validation.values()["sqnr"] < 60
    assert result.model.model.metadata_props == g.model.metadata_props
    before, after = ({n.op_type for n in x.nodes()} for x in (g, result.model))
    assert before == after


def test_weights_may_be_changed_in_place_and_other_passes_go_on(script):
    g = tiny.encoder(layers=1)
    passes = [Canonicalize(), Graphsurgeon(script=script(SCALE)), Qdq(min_size=1), Graphsurgeon(script=script(CUT))]
    result = run(g, *passes)
    assert [s.changed > 0 for s in result.report.steps] == [True] * 4 or result.report.steps[1].changed == 1
    assert [s.name for s in result.report.steps] == ["canonicalize", "graphsurgeon", "qdq", "graphsurgeon"]


def test_a_script_that_says_exact_must_be(script):
    g = tiny.encoder(layers=1)
    canonicalize(g)
    result = run(g, Graphsurgeon(script=script(SAME), exact=True))
    assert result.report.steps[0].edits == 0
    assert "changed nothing" in result.report.steps[0].declined[0].why
    with pytest.raises(RecipeError, match=r"changed none .* changed nothing"):
        run(g, Graphsurgeon(script=script(SAME)))
    with pytest.raises(PassFault, match="promised equal outputs"):
        run(g, Graphsurgeon(script=script(SCALE), exact=True))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, r"cannot read the script .*nothing\.py"),
        ("def f(g)\n    return g", {}, r"surgery\.py:1: the script is not valid Python"),
        ("x = 1", {}, "it has none"),
        ("def f(g): pass\ndef h(g): pass", {}, "say which function to run .* it has f, h"),
        ("def f(g): pass\ndef h(g): pass", {"function": "k"}, "there is no function 'k'; it has f, h"),
        ("def f(g): return 3", {}, r"surgery\.py: what f returned cannot be used: .* not int"),
        ("def f(g):\n    x = 1\n    return x / 0", {}, r"surgery\.py:3: the script failed: ZeroDivisionError"),
        ("import nothing_like_it\ndef f(g): pass", {}, r"surgery\.py:1: .*ModuleNotFoundError"),
        ("import sys\ndef f(g): sys.exit(0)", {}, r"surgery\.py:2: .*SystemExit"),
        ("def f(g): g.outputs = []", {}, r"surgery\.py: what f returned cannot be used: .*outputs changed"),
        ("def f(g): g.nodes[0].op = 'Nope'", {}, r"surgery\.py: what f returned cannot be used: .*Nope"),
        ("def f(g): g.outputs[0].name = 'other'", {}, "outputs changed"),
    ],
)
def test_faults_of_a_script_are_told_with_file_and_line(script, tmp_path, text, options, message):
    path = script(text) if text else str(tmp_path / "nothing.py")
    with pytest.raises(RecipeError, match=message):
        run(tiny.encoder(layers=1), Graphsurgeon(script=path, **options))
    assert not list(tmp_path.glob("**/__pycache__"))


def test_code_needs_leave_before_anything_is_done(script):
    with pytest.raises(RecipeError, match="allow_code=True"):
        PassManager([Graphsurgeon(script=script("raise SystemExit"))])


def test_the_script_may_import_what_lies_beside_it(script):
    script("FACTOR = 0.5", "beside.py")
    path = script(
        "from beside import FACTOR\ndef f(g):\n    g.nodes[-1].attrs['note'] = 1; del g.nodes[-1].attrs['note']"
    )
    result = run(tiny.encoder(layers=1), Graphsurgeon(script=path), allow_unchanged=True)
    assert result.report.steps[0].edits == 0


def test_a_recipe_finds_its_script_beside_it_and_hashes_its_content(script, tmp_path):
    path = script(CUT, "cut.py")
    (tmp_path / "recipe.yaml").write_text("passes: [canonicalize, {graphsurgeon: {script: cut.py}}]")
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.passes[1] == Graphsurgeon(script=path)
    assert parse_pass(str(recipe.passes[1])) == recipe.passes[1]
    before = recipe.hash()
    script(SCALE, "cut.py")
    assert recipe.hash() != before
    cold = Recipe(passes=("canonicalize",))
    assert "code" not in cold.plain()


def test_a_changed_script_is_a_new_step(script, tmp_path):
    g = tiny.encoder(layers=1)
    storage.save(g, tmp_path / "model.onnx")
    cached = []
    for text in (SCALE, SCALE, CUT.replace("Add", "Add")):
        path = script(text, "surgery.py")
        report = oc.compress(
            tmp_path / "model.onnx", tmp_path / "out", passes=["canonicalize", {"graphsurgeon": {"script": path}}],
            calibration=[tiny.feeds(g, 2, 5, seed=i) for i in range(5)], allow_code=True, measure=False,
            cache=tmp_path / "cache",
        ).report  # fmt: skip
        cached.append(report.steps[1].cached)
    assert cached == [False, True, False]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"][1]["name"] == "graphsurgeon"
