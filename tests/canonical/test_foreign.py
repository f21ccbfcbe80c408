"""int8 graphs made by ONNX Runtime's quantizers are left whole: raised around their Q/DQ, equal to the last bit."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize, sites
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import matrix, zoo

INTEGERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul")
INTEGERS += ("QLinearAdd", "QLinearMul", "QLinearSoftmax")
BERT = zoo.BY_NAME["bert"]


def quantized(tmp_path, how: str) -> Graph:
    """A kept BERT through `quantize_dynamic` or `quantize_static` of the runtime."""
    import logging

    from onnxruntime import quantization as tool  # noqa: TID251  the tool whose output is tested

    source = matrix.load("bert.dynamo-sdpa-18")
    ir.save(source.model, tmp_path / "float.onnx")
    files = str(tmp_path / "float.onnx"), str(tmp_path / "int8.onnx")

    class Reader(tool.CalibrationDataReader):
        feeds = iter([matrix.taken(source, zoo.feeds(BERT, 2, 9))])

        def get_next(self):
            return next(self.feeds, None)

    logging.disable(logging.WARNING)
    try:
        if how == "dynamic":
            tool.quantize_dynamic(*files)
        else:
            form = tool.QuantFormat.QDQ if how == "qdq" else tool.QuantFormat.QOperator
            tool.quantize_static(*files, Reader(), quant_format=form, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
    return Graph(ir.load(tmp_path / "int8.onnx"))


def integers(g: Graph) -> Counter:
    return Counter(n.op_type for n in g.nodes() if n.op_type in INTEGERS)


@pytest.mark.parametrize("how", ["dynamic", "qdq", "operators"])
def test_graphs_of_the_runtimes_quantizers(tmp_path, how):
    source = quantized(tmp_path, how)
    new = source.clone()
    canonicalize(new)
    before, after = integers(source), integers(new)
    dequantized = before.pop("DequantizeLinear", 0), after.pop("DequantizeLinear", 0)  # constants are folded
    assert after == before
    assert dequantized[1] <= dequantized[0]
    assert {s.name for s in sites(new)} == {d.site for d in new.declined}
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0
    x = matrix.taken(source, zoo.feeds(BERT, 2, 12, "right"))
    with Session(source) as a, Session(new) as b:
        for want, have in zip(a.run(x).values(), b.run(x).values(), strict=True):
            assert np.abs(want - have).max() <= 1e-6 * np.abs(want).max()
    if how == "dynamic":
        assert [n.op_type for n in new.nodes("Attention", "Gelu", "Softmax")] == ["Attention", "Gelu"] * 2
    if how == "qdq":
        assert integers(new) == integers(source)
        assert all(x.quantized for x in blocks.linears(new))
        assert {d.why for d in new.declined} == {"attention: its scores are quantized"}
    if how == "operators":
        assert any("stay as they were written" in d.why for d in new.declined)
