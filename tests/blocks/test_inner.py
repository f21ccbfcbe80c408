"""What the branches of an If hold is counted and said, since no pass changes it."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.blocks.describe import describe
from onnxcomp.blocks.inner import inner_linears
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.runtime.sessions import Session
from tests import tiny
from tests.data.test_data import model_of

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL


def two_branches() -> Graph:
    """An If whose branches multiply by one matrix of the main graph, under the same names, at other widths inside."""
    g = model_of(("x", FLOAT, ["b", 8]), ("use_cache_branch", BOOL, [1]))
    x, flag = g.inputs
    w = g.constant(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), "w")

    def branch(parts: int) -> ir.Graph:
        doubled = ir.node("Concat", [x] * parts, {"axis": 0})
        product = ir.node("MatMul", [doubled.outputs[0], w])
        total = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 1})
        for node, name in ((doubled, "wide"), (product, "product"), (total, "total")):
            node.name = node.outputs[0].name = name
        total.outputs[0].type, total.outputs[0].shape = ir.TensorType(FLOAT), ir.Shape([1, 1])
        return ir.Graph([], [total.outputs[0]], nodes=[doubled, product, total], name=f"branch{parts}")

    y = g.op("If", flag, then_branch=branch(2), else_branch=branch(3))
    g.model.graph.name = "merged"
    return tiny.finish(g, y, "y", [1, 1])


def test_linears_in_branches_are_counted_and_listed() -> None:
    g = two_branches()
    (found,) = inner_linears(g)
    assert (found.op, found.linears, found.parameters, found.cached) == ("If", 2, 64, True)
    assert any(x["site"] == found.node and "decoder_model.onnx" in x["why"] for x in describe(g)["not_recognised"])
    assert inner_linears(tiny.encoder()) == []


def test_a_pass_that_finds_nothing_says_what_the_branches_hold() -> None:
    with pytest.raises(RecipeError, match=r"found nothing.*2 linears of 64 parameters, which stay; compress"):
        PassManager([DynamicQuant()]).run(two_branches())


def test_an_exact_run_notes_it() -> None:
    result = PassManager([Canonicalize()]).run(two_branches())
    assert any("2 linears of 64 parameters" in w for w in result.report.warnings)


def test_branches_that_use_the_same_names_get_their_own_at_load(tmp_path) -> None:
    g = two_branches()
    path = storage.save(g, tmp_path)
    back = storage.load(path)
    branches = [a.as_graph() for a in next(back.nodes("If")).attributes.values()]
    names = [{str(v.name) for n in b for v in n.outputs} | {str(n.name) for n in b} for b in branches]
    assert not names[0] & names[1]
    back.infer_shapes()  # by name: sizes of one branch must not reach the other
    (batch,) = as_dataset({"x": np.ones((3, 8), np.float32), "use_cache_branch": np.array([True])}, back)
    with Session(back) as new, Session(g) as old:
        for flag in (True, False):
            feeds = {**batch.feeds, "use_cache_branch": np.array([flag])}
            np.testing.assert_array_equal(new.run(feeds)["y"], old.run(feeds)["y"])
