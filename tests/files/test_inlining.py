"""Laws of local functions: they are inlined, but may not grow without limit, and what they grow to is only counted."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxcomp.errors import ModelError
from onnxcomp.files import inlining, storage


def doubling(levels: int, calls: int = 2) -> onnx.ModelProto:
    """A chain of functions, each of which calls the one before several times."""
    m = onnx.ModelProto(ir_version=10)
    m.opset_import.add(domain="", version=18)
    m.opset_import.add(domain="d", version=1)
    m.graph.name = "g"
    for port, name in ((m.graph.input, "x"), (m.graph.output, "y")):
        kind = port.add(name=name).type.tensor_type
        kind.elem_type = onnx.TensorProto.FLOAT
        kind.shape.dim.add(dim_value=2)
    for i in range(levels):
        f = m.functions.add(name=f"f{i}", domain="d", input=["v0"], output=[f"v{calls}"])
        f.opset_import.add(domain="", version=18)
        f.opset_import.add(domain="d", version=1)
        for c in range(calls):
            f.node.add(
                op_type=f"f{i - 1}" if i else "Neg", domain="d" if i else "", input=[f"v{c}"], output=[f"v{c + 1}"]
            )
    m.graph.node.add(op_type=f"f{levels - 1}", domain="d", input=["x"], output=["y"])
    return m


def test_functions_are_inlined_up_to_a_limit(tmp_path: Path) -> None:
    onnx.save(doubling(6), tmp_path / "m.onnx")
    assert sum(1 for _ in storage.load(tmp_path).nodes("Neg")) == 64
    for levels, nodes in ((15, 2**15), (300, 2**300)):
        onnx.save(doubling(levels), tmp_path / "m.onnx")
        with pytest.raises(ModelError, match=f"functions expand to {nodes} nodes"):
            storage.load(tmp_path)


def test_growth_is_counted_through_subgraphs_and_long_chains() -> None:
    inlining.check_growth(doubling(5000, calls=1))
    m = doubling(14)
    branch = onnx.GraphProto(name="b", node=[m.graph.node[0], m.graph.node[0]])
    m.graph.node[0].op_type, m.graph.node[0].domain = "If", ""
    m.graph.node[0].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(branch)
    with pytest.raises(ModelError, match="expand to 32769 nodes"):
        inlining.check_growth(m)
    with pytest.raises(ModelError, match="'f0' is called 1024 times"):
        inlining.check_growth(doubling(11))


def test_a_file_of_many_nodes_may_have_them() -> None:
    """The limit is for growth: what the file spells out is in it."""
    m = doubling(1)
    m.graph.node.extend([onnx.NodeProto(op_type="Neg", input=["x"], output=["z"])] * 30_000)
    inlining.check_growth(m)
