"""config.json beside a result says what its graph has, or the report says that it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.engine import config_file
from onnxcomp.engine.compress import compress_each
from onnxcomp.engine.config_file import Sizes
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from tests import tiny

CONFIG = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
PRUNED = {"score": "magnitude", "repair": "none", "ratio": 0.5}


def model(folder: Path, config: object = CONFIG) -> Path:
    storage.save(tiny.decoder(layers=3, heads=4, kv_heads=2, ffn=64), folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compressed(folder: Path, out: Path, *passes: object) -> tuple[dict, list[str]]:
    (result,) = compress_each(folder, out, passes=["canonicalize", *passes, "lower"], measure=False).values()
    return json.loads((out / "config.json").read_text()), [w for w in result.report.warnings if "config.json" in w]


def raised(g: Graph) -> Sizes:
    canonicalize(g)
    return config_file.sizes(g)


@pytest.mark.parametrize("pass_", ["qdq: {min_size: 1}", "qdq: {min_size: 1, outputs: true}", "half", "sparsify"])
def test_sizes_are_read_through_what_follows_a_cut(pass_, tmp_path):
    passes = ["canonicalize", {"prune-ffn": PRUNED | {"multiple_of": 1}}, pass_, "lower"]
    given = {"calibration": "random", "samples": 10, "measure": False}
    (result,) = compress_each(model(tmp_path / "m"), None, passes=passes, **given).values()
    assert config_file.sizes(result.exact).ffn == (64,)
    assert config_file.sizes(result.unlowered).ffn == (32,)
    assert config_file.sizes(result.unlowered) == raised(result.unlowered.clone())


def test_sizes_of_a_lowered_model_are_those_of_the_canonical_one(tmp_path):
    g = tiny.decoder(layers=3, heads=4, kv_heads=2, ffn=64)
    (lowered,) = compress_each(model(tmp_path / "m"), None, passes=["canonicalize", "lower"], measure=False).values()
    assert raised(lowered.model) == config_file.sizes(g)
    assert config_file.sizes(g).layers == (3,)
    assert (config_file.sizes(g).heads, config_file.sizes(g).kv_heads, config_file.sizes(g).ffn) == ((4,), (2,), (64,))


def test_the_configuration_follows_uniform_cuts(tmp_path):
    config, notes = compressed(
        model(tmp_path / "m"), tmp_path / "out", {"prune-heads": PRUNED}, {"prune-ffn": PRUNED | {"multiple_of": 1}}
    )
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (2, 2, 32)
    assert config["head_dim"] == raised(storage.load(tmp_path / "out")).head_dim[0]
    assert "num_attention_heads 4 > 2" in notes[0]
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == CONFIG


def test_fewer_layers(tmp_path):
    dropped = {"drop-layers": {"ratio": 0.34, "score": "ablation", "repair": "none"}}
    (result,) = compress_each(
        model(tmp_path / "m"), tmp_path / "out", passes=["canonicalize", dropped], calibration="random", samples=8,
        measure=False,
    ).values()  # fmt: skip
    assert result.report.step("drop-layers").changed == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_factors_of_a_low_rank_are_no_sizes(tmp_path):
    low_rank = {"low-rank": {"ratio": 0.4, "min_size": 1, "multiple": 1, "margin": 1}}
    (result,) = compress_each(
        model(tmp_path / "m"), tmp_path / "out", passes=["canonicalize", low_rank], calibration="random", samples=8,
        measure=False,
    ).values()  # fmt: skip
    assert result.report.step("low-rank").changed
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert not any("config.json" in w for w in result.report.warnings)


def test_what_differs_between_layers_is_left_and_told():
    before = Sizes((2,), (8,), (8,), (4,), (64,), (32,))
    after = Sizes((2,), (5, 7), (5, 7), (4,), (48,), (32,))
    config = {"n_head": 8, "intermediate_size": 64, "hidden_size": 32}
    entries, notes = config_file.update(config, before, after)
    assert entries == {"intermediate_size": 48}
    assert notes == ["config.json still says n_head: 8, but the layers have 5 to 7"]


def test_shared_key_and_value_heads_are_named_where_they_were_not():
    before = Sizes((2,), (8,), (8,), (4,), (64,), (32,))
    after = Sizes((2,), (8,), (2,), (4,), (64,), (32,))
    assert config_file.update({"num_attention_heads": 8}, before, after) == ({"num_key_value_heads": 2}, [])


def test_other_numbers_of_the_same_value_stay():
    before = Sizes((4,), (4,), (4,), (8,), (64,), (32,))
    after = Sizes((4,), (2,), (2,), (8,), (64,), (32,))
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 4, "bos_token_id": 4, "head_dim": 8}
    assert config_file.update(config, before, after)[0] == {"num_attention_heads": 2}


@pytest.mark.parametrize("config", ["[]", "{", ""])
def test_a_configuration_that_cannot_be_read_is_left_alone(tmp_path, config):
    folder = model(tmp_path)
    (folder / "config.json").write_text(config)
    assert config_file.follow(folder, tiny.decoder(layers=3), tiny.decoder(layers=2)) == ({}, [])
    config_file.rewrite(folder, {"n_head": 2})
    assert (folder / "config.json").read_text() == config


def test_one_graph_of_several_does_not_speak_for_all(tmp_path):
    folder = model(tmp_path / "m")
    storage.save(tiny.encoder(), folder, name="encoder.onnx")
    (result,) = compress_each(
        folder, tmp_path / "out", graph="model", passes=["canonicalize", {"prune-heads": PRUNED}], measure=False
    ).values()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert any("describes the original" in w for w in result.report.warnings)


def test_sizes_are_those_of_the_cut_where_products_are_quantized_at_run_time(tmp_path):
    passes = ["canonicalize", {"prune-ffn": PRUNED | {"multiple_of": 1}}, "dynamic-quant: {min_size: 1}"]
    given = {"calibration": "random", "samples": 10, "measure": False}
    (result,) = compress_each(model(tmp_path / "m"), tmp_path / "out", passes=passes, **given).values()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 32
    assert [w for w in result.report.warnings if "config.json" in w] == [
        "config.json beside the result: intermediate_size 64 > 32"
    ]
    assert result.cut is None
