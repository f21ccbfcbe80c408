"""`sensitivity`: ranks by the error in the model's outputs, edits nothing, and its entry can be pasted."""

import json

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.cli import main
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.files import storage
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.sensitivity import Sensitivity
from tests import tiny
from tests.passes.test_mixed_precision import loud

SMALL = {"min_size": 1, "block": 16}


def ranked(**options):
    g = loud()
    data = as_dataset([tiny.feeds(g, 5, 7, seed=i) for i in range(2)], g)
    return g, PassManager([Sensitivity(**{**SMALL, **options})]).run(g, data, data)


def losses(result) -> dict[str, dict[str, float]]:
    return {n.site: dict(n.values) for n in result.report.steps[-1].noted[:-1]}


def test_the_linear_that_is_felt_most_is_first_fewer_bits_lose_more_and_nothing_is_edited():
    g, result = ranked()
    found = losses(result)
    assert next(iter(found)) == blocks.mlps(g)[-1].down.name
    assert len(found) == len(blocks.linears(g))
    assert [x["4 bits"] for x in found.values()] == sorted((x["4 bits"] for x in found.values()), reverse=True)
    for x in found.values():
        assert x["8 bits"] < x["4 bits"] < x["3 bits"] < x["2 bits"]
        assert 0 < x["int8"] < x["2 bits"]
    assert result.report.steps[-1].edits == 0
    entry = parse_pass(result.report.steps[-1].noted[-1].what)
    assert next(iter(entry.overrides)) == next(iter(found))


def test_the_loss_at_the_base_is_what_the_model_loses_with_that_weight_rounded(tmp_path):
    g, result = ranked(int8=False, bits=(4,))
    name, loss = next(iter(losses(result).items()))
    data = [tiny.feeds(g, 5, 7, seed=i) for i in range(2)]
    others = [x.name for x in blocks.linears(g) if x.name != name]
    alone = PassManager([QuantizeWeights(**SMALL, method="nearest", skip=tuple(others))]).run(g, (), data).report
    assert 0.5 < loss["4 bits"] / alone.validation.values()["rel-l2"] ** 2 < 2  # ranges there know no inputs


@pytest.mark.parametrize(
    ("by", "start"), [("int8", "qdq: {skip: ["), ("8 bits", "quantize-weights: {bits: 8, skip: [")]
)
def test_the_entry_is_of_the_form_that_is_asked_for(by, start):
    _, result = ranked(by=by, bits=(8,), int8=by == "int8")
    entry = result.report.steps[-1].noted[-1].what
    assert entry.startswith(start)
    assert parse_pass(entry).skip


def test_the_command_prints_the_ranking_and_the_entry(tmp_path, capsys):
    g = tiny.encoder(1, 64, 4, 64)
    path = storage.save(g, tmp_path)
    data = tmp_path / "data.npz"
    np.savez(data, **tiny.feeds(g, 10, 7))
    given = ["sensitivity", str(path), "--calibration", str(data)]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == len(blocks.linears(g))
    assert set(found["sites"][0]["losses"]) == {"int8", "8 bits", "4 bits", "3 bits", "2 bits"}
    assert found["recipe"].startswith("- quantize-weights: {bits: 4, overrides: {")
    assert main([*given, "--by", "9 bits"]) == 2
    assert "by" in capsys.readouterr().err
    small = storage.save(tiny.linear(), tmp_path / "small")
    assert main(["sensitivity", str(small), "--calibration", "random"]) == 2
    assert "no float linears" in capsys.readouterr().err
