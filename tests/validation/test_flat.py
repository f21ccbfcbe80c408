"""Outputs that are sequences or optional are compared element by element, and by what is there at all."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.flat import SHAPES, flattened
from tests import tiny
from tests.data.test_data import model_of

FLOAT = ir.DataType.FLOAT
DATA = [{"x": np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32)} for i in range(2)]


def parts(factor: float = 1.0, elements: int = 2, tensor: bool = True) -> Graph:
    """A tensor, and a sequence of which the last element is scaled."""
    g = model_of(("x", FLOAT, ["b", 4]))
    (x,) = g.inputs
    last = g.op("Mul", x, np.array(factor, np.float32))
    made = g.op("SequenceConstruct", *[x] * (elements - 1), last)
    g = tiny.finish(g, g.op("Neg", x), "y", ["b", 4])
    made.name, made.type = "parts", ir.SequenceType(ir.TensorType(FLOAT))
    g.model.graph.name = "parts"
    if not tensor:
        g.model.graph.outputs.clear()
    g.model.graph.outputs.append(made)
    return Graph(g.model)


def test_sequences_are_compared_element_by_element():
    reference = Reference(parts(), DATA)
    assert reference.against(parts()).equal
    found = reference.against(parts(factor=0.9))
    assert (found.equal, found.worst, found.uncompared) == (False, "parts", ())
    x = np.concatenate([d["x"] for d in DATA])
    assert found.outputs["parts"].max_abs == pytest.approx(0.1 * np.abs(x).max(), rel=1e-5)
    assert found.outputs["parts"].sqnr == pytest.approx(10 * np.log10(2 / 0.01), abs=0.01)
    assert found.values()["sqnr"] == found.values()["sqnr[parts]"]


def test_a_sequence_of_another_length_is_no_result():
    with pytest.raises(ModelError, match="'parts' have other numbers or shapes"):
        Reference(parts(), DATA).against(parts(elements=3))


def test_a_model_whose_only_output_is_a_sequence_is_compared():
    result = PassManager([Canonicalize()]).run(parts(tensor=False))
    assert list(Reference(parts(tensor=False), DATA).against(result.model).outputs) == ["parts"]


def test_presence_is_part_of_an_optional_value():
    there, absent = (flattened({"o": a}, {"o"}) for a in (np.ones((2, 3)), None))
    assert there["o" + SHAPES].tolist() == [1, 2, 2, 3]
    assert (absent["o" + SHAPES].tolist(), absent["o"].size) == ([-1], 0)
    empty = flattened({"o": []}, {"o"})
    assert empty["o" + SHAPES].tolist() == [0]
    assert flattened({"o": [{1: 0.5}]}, {"o"}) == {}
