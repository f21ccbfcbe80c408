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
    assert inlining.check_growth(doubling(5)) == sum(4**i for i in range(5))


def test_functions_that_are_called_thousands_of_times_are_inlined(tmp_path: Path) -> None:
    """In linear time, with the same result; where that is impossible the reason is one line."""
    m = doubling(1, calls=3)
    f, g = m.functions[0], m.graph
    f.node[1].op_type = "Abs"
    g.node[0].output[0] = "y0"
    g.node.extend(
        onnx.NodeProto(op_type="f0", domain="d", input=[f"y{i}"], output=[f"y{i + 1}" if i < 2998 else "y"])
        for i in range(2999)
    )
    onnx.save(m, tmp_path / "m.onnx")
    assert inlining.check_growth(m) == 3000**2 * 3 // 2 > inlining.MAX_NAMES
    loaded = storage.load(tmp_path)
    assert [n.op_type for n in loaded.nodes()] == ["Neg", "Abs", "Neg"] * 3000
    loaded.verify()
    deep = doubling(200, calls=1)
    deep.functions[0].node.extend([onnx.NodeProto(op_type="Neg", input=["v0"], output=[f"w{i}"]) for i in range(6000)])
    deep.graph.node.extend([onnx.NodeProto(op_type="f0", domain="d", input=["x"], output=[f"z{i}"]) for i in range(18)])
    with pytest.raises(ModelError, match=r"cannot be inlined: .*depth exceeds limit"):
        inlining.expanded(deep)


def test_a_file_of_many_nodes_may_have_them() -> None:
    """The limit is for growth: what the file spells out is in it."""
    m = doubling(1)
    m.graph.node.extend([onnx.NodeProto(op_type="Neg", input=["x"], output=["z"])] * 30_000)
    inlining.check_growth(m)
