"""Recognition does not read weights: constants above the limit for folding are never asked for their content."""

import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize
from tests import tiny

LARGE = 1 << 14


def unreadable(t: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        raise AssertionError(f"the weight {name} was read")

    return ir.LazyTensor(read, dtype=t.dtype, shape=ir.Shape(t.shape.numpy()), name=name)


@pytest.mark.parametrize("build", [tiny.decoder, tiny.encoder])
def test_canonicalize_reads_no_large_weight(build):
    g = build(layers=2, hidden=160, heads=4, ffn=320, spelled="dynamo")
    hidden = 0
    for v in g.model.graph.initializers.values():
        if v.const_value is not None and v.const_value.size > LARGE:
            v.const_value, hidden = unreadable(v.const_value, str(v.name)), hidden + 1
    assert hidden >= 10
    canonicalize(g)
    assert g.edits > 0
    assert sum(n.op_type == "Attention" for n in g.nodes()) == 2
