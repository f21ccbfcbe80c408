"""Decoders of standard operators only: the same tokens, fast products where the runtime joins them, or refused."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.cli import main
from onnxcomp.engine.compress import compress
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.files.storage import load, save
from onnxcomp.graph import Graph
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.runtime.sessions import Session, integer_check
from tests import tiny
from tests.hand import f32, graph
from tests.lowering.test_grouped_decoder import WORDS, decoder

RNG = np.random.default_rng(4)


def made(standard: bool, **options) -> Graph:
    passes = [QuantizeWeights(method="nearest", min_size=1, **options), Lower(standard=standard)]
    return PassManager(passes, measure=False).run(decoder()).model


def texts(g: Graph) -> np.ndarray:
    with Decoder(g) as d:
        return np.stack(list(generated(d, np.arange(WORDS)[:, None], 12))).T


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_decoder_of_4_bits_writes_the_same_tokens(symmetric: bool) -> None:
    options = {"block": 16, "symmetric": symmetric, "embeddings": 8, "head": 8}
    own, standard = made(False, **options), made(True, **options)
    assert "MatMulNBits" in {n.op_type for n in own.nodes()}
    assert {n.domain for n in standard.nodes()} == {""}
    stored = {v.dtype for v in standard.model.graph.initializers.values()}
    assert (ir.DataType.INT4 if symmetric else ir.DataType.UINT4) in stored
    np.testing.assert_array_equal(texts(standard), texts(own))
    assert len(np.unique(texts(own))) > 2
    assert integer_check(standard).ok  # the runtime joins codes and products, and looks up codes


@pytest.mark.parametrize("zero", [True, False])
def test_rows_of_a_table_in_blocks_are_dequantized_after_they_are_looked_up(zero: bool) -> None:
    codes = RNG.integers(0, 256, (40, 64)).astype(np.uint8)
    scale, zeros = f32(RNG.random((40, 4)) + 0.1), RNG.integers(100, 150, (40, 4)).astype(np.uint8)
    g = graph(21, ids=("b", "s", int))
    more = [g.constant(zeros, "zeros")] if zero else []
    table = g.op(
        "DequantizeLinear", g.constant(codes, "codes"), g.constant(scale, "scale"), *more, axis=1, block_size=16
    )
    y = g.op("Gather", table, g.inputs[0], name="look_up")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "s", 64])
    g = tiny.finish(g, y, "y", ["b", "s", 64])
    lowered = PassManager([Lower(standard=True)], measure=False).run(g).model
    assert [n.op_type for n in lowered.nodes()] == [*["Gather"] * (3 if zero else 2), "DequantizeLinear"]
    ids = RNG.integers(0, 40, (2, 5))
    with Session(lowered) as s:
        found = s.run({"ids": ids})["y"]
    whole = (codes.astype(int) - (zeros.repeat(16, 1) if zero else 0.0)) * scale.repeat(16, 1)
    np.testing.assert_allclose(found, whole[ids], rtol=1e-6)


def test_an_operator_without_a_standard_form_is_refused_by_name() -> None:
    g = graph(21, x=("r", 32))
    y = g.op("MatMulBnb4", g.inputs[0], np.zeros(128, np.uint8), f32(np.ones(8)), domain="com.microsoft", name="bnb",
             K=32, N=8, block_size=32, quant_type=0, transB=1)  # fmt: skip
    with pytest.raises(ModelError, match=r"'bnb' has no form of standard operators \(MatMulBnb4\)"):
        PassManager([Lower(standard=True)], measure=False).run(tiny.finish(g, y, "y", ["r", 8]))
    passes = [QuantizeWeights(method="nearest", min_size=1, block=16), Lower(prefill="int8")]
    both = PassManager(passes, measure=False).run(decoder()).model
    with pytest.raises(ModelError, match=r"has no form of standard operators \(MatMulIntegerToFloat, MatMulNBits\)"):
        PassManager([Lower(standard=True)], measure=False).run(both)  # its products stand in branches


def test_the_command_line_sets_it_and_says_what_is_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(decoder(), tmp_path / "m")
    passes = ["canonicalize", "quantize-weights: {method: nearest, min_size: 1, embeddings: 4, block: 16}", "lower"]
    words = [x for p in passes for x in ("--pass", p)]
    rest = ["--standard", "--eval", "random", "--samples", "2", "--gate", "sqnr>=1", "--no-measure", "--json"]
    assert main(["compress", str(tmp_path / "m"), "-o", str(tmp_path / "out"), *words, *rest]) == 0
    report = json.loads(capsys.readouterr().out)["graphs"]["model"]
    assert report["steps"][-1]["spec"] == "lower: {standard: true}"
    notes = " ".join(report["warnings"])
    assert "standard operators dequantize weights before a product" in notes
    assert "not all standard forms have a fast kernel on this CPU" in notes  # its table of 4 bits
    assert {n.domain for n in load(tmp_path / "out").nodes()} == {""}
    with pytest.raises(RecipeError, match="standard is an option of lower, which this recipe does not run"):
        compress(tmp_path / "m", tmp_path / "no", passes=["canonicalize"], standard=True)
