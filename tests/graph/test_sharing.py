"""Equal matrices become one constant: in memory, in data files, and lazy ones by how they are made."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.graph.mapped import MappedTensor
from onnxcomp.graph.sharing import share_equal
from tests import hand, tiny

A = np.arange(256, dtype=np.float32).reshape(16, 16)
OTHER = np.where(np.arange(256).reshape(16, 16) == 255, 0, A).astype(np.float32)  # differs at its very end


def chain(*weights) -> Graph:
    """`x` times each of the matrices in turn."""
    g = hand.graph(x=("s", 16))
    y = g.model.graph.inputs[0]
    for w in weights:
        y = g.op("MatMul", y, g.constant(w, "w"))
    return tiny.finish(g, y, "y", ["s", 16])


def count(g: Graph) -> int:
    """Constants that are read."""
    return sum(1 for v in g.model.graph.initializers.values() if list(v.uses()))


def lazy(t: ir.TensorProtocol, axes: tuple[int, ...] = (1, 0)) -> ir.LazyTensor:
    """`t` transposed, which must not be read."""

    def read() -> ir.TensorProtocol:
        pytest.fail(f"a lazy weight was read with axes {axes} of {t.name}")

    return ir.LazyTensor(read, dtype=t.dtype, shape=ir.Shape([16, 16]))


def test_equal_matrices_are_stored_once_and_others_stay():
    g = chain(A, A.copy(), OTHER, A.astype(np.float64).astype(np.float32))
    assert share_equal(g) == 2
    assert count(g) == 2
    assert share_equal(g) == 0


def test_the_same_of_matrices_in_a_data_file(tmp_path):
    tiny.external(chain(A, A.copy(), OTHER), tmp_path)
    g = storage.load(tmp_path / "model.onnx")
    assert any(isinstance(v.const_value, MappedTensor) for v in g.model.graph.initializers.values())
    share_equal(g)
    assert count(g) == 2


def test_lazy_weights_are_compared_by_how_they_are_made_and_not_read():
    a, b = ir.tensor(A, name="a"), ir.tensor(A, name="b")
    g = chain(lazy(a), lazy(a), lazy(b), lazy(a, (0, 1)))
    share_equal(g)
    assert count(g) == 3


def test_equal_rows_stay_apart():
    g = hand.graph(x=("s", 16))
    y = g.model.graph.inputs[0]
    for _ in range(2):
        y = g.op("Add", y, g.constant(np.zeros(16, np.float32), "b"))
    g = tiny.finish(g, y, "y", ["s", 16])
    assert share_equal(g) == 0


def test_a_weight_that_a_graph_transposes_for_each_use_is_canonically_one():
    g = hand.graph(x=("s", 16))
    y, w = g.model.graph.inputs[0], g.constant(A, "w")
    for copy in (w, g.constant(A.copy(), "w"), w):
        y = g.op("Relu", g.op("Gemm", y, copy, transB=1))
    g = tiny.finish(g, y, "y", ["s", 16])
    canonicalize(g)
    assert count(g) == 1
