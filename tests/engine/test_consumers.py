"""Folders for other engines: what their configurations say, and models that they could not load."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, models

from onnxcomp import blocks
from onnxcomp.cli import main
from onnxcomp.data.narrowed import KEPT
from onnxcomp.engine.consumers import genai, package
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.lowering.grouped_decoder import group_attentions
from onnxcomp.methods.quantize import cache_codes
from onnxcomp.passes.last_logits import LastLogits
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.generation import Decoder, generated
from tests.lowering.test_grouped_decoder import decoder as rotary_decoder

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "vocab_size": 5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
NAMES = ("past_key_values.{}.{}", "present.{}.{}")


def value(name: str, shape: list | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))


def decoder(layers=(0, 1), heads=(2, 2), names=NAMES, batch="b") -> ir.Model:
    """A graph with the interface of a decoder; caches are passed on, scores are token numbers."""
    ids, logits = value("input_ids", [batch, "s"], ir.DataType.INT64), value("logits", [batch, "s", 5])
    inputs, outputs, nodes = [ids], [logits], []
    for i, n in zip(layers, heads, strict=True):
        for kind in ("key", "value"):
            old, new = (value(name.format(i, kind), [batch, n, "past", 2]) for name in names)
            inputs.append(old)
            outputs.append(new)
            nodes.append(ir.Node("", "Identity", [old], outputs=[new]))
    constants = [ir.Value(name=n, const_value=ir.tensor(x, name=n)) for n, x in (("last", [2]), ("times", [1, 1, 5]))]
    column = ir.Node("", "Unsqueeze", [ids, constants[0]])
    scores = ir.Node("", "Cast", column.outputs, {"to": ir.AttrInt64("to", int(ir.DataType.FLOAT))})
    nodes += [column, scores, ir.Node("", "Tile", [scores.outputs[0], constants[1]], outputs=[logits])]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 18}, name="decoder")
    return ir.Model(graph, ir_version=9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "model", decoder())


def written(place: Path, model: ir.Model, **config) -> Path:
    place.mkdir()
    ir.save(model, place / "model.onnx")
    (place / "config.json").write_text(json.dumps(CONFIG | config))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(place / "tokenizer.json"))
    return place


def test_genai_is_told_names_sizes_and_special_tokens(folder: Path, tmp_path: Path) -> None:
    out = package(folder, tmp_path / "out", "genai", threads=3)
    told = json.loads((out / "genai_config.json").read_text())
    of = told["model"]
    assert (of["type"], of["context_length"], of["vocab_size"]) == ("llama", 64, 5)
    assert (of["bos_token_id"], of["eos_token_id"], of["pad_token_id"]) == (1, [2, 3], 2)
    assert of["decoder"]["inputs"] == {
        "input_ids": "input_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert of["decoder"]["outputs"]["present_value_names"] == "present.%d.value"
    assert (of["decoder"]["head_size"], of["decoder"]["num_key_value_heads"]) == (2, 2)
    assert of["decoder"]["session_options"]["intra_op_num_threads"] == 3
    assert told["search"] == {"max_length": 64, "past_present_share_buffer": False}
    assert {p.name for p in out.iterdir()} == {"model.onnx", "config.json", "tokenizer.json", "genai_config.json"}


def test_genai_takes_any_family_dropped_layers_and_other_names(tmp_path: Path) -> None:
    model = decoder(layers=(0, 3), heads=(2, 1), names=("past_{1}.{0}", "out_{1}.{0}"))
    source = written(tmp_path / "m", model, model_type="newest", eos_token_id=2, pad_token_id=0)
    told = json.loads((package(source, tmp_path / "out", "genai") / "genai_config.json").read_text())["model"]
    assert (told["type"], told["pad_token_id"], told["decoder"]["num_hidden_layers"]) == ("decoder", 0, 2)
    assert told["decoder"]["inputs"]["past_key_names"] == "past_key.%d"
    assert told["decoder"]["outputs"]["present_key_names"] == "out_key.%d"


def test_special_tokens_that_are_no_words_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "m", decoder(), eos_token_id=[2, 5])
    with pytest.raises(ModelError, match="eos_token_id is 5, of 5 words"):
        package(source, tmp_path / "out", "genai")
    (source / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}')
    with pytest.raises(ModelError, match="must be a number or a list"):
        package(source, tmp_path / "out", "genai")


def test_optimum_gets_the_files_and_special_tokens(folder: Path, tmp_path: Path) -> None:
    out = package(folder, tmp_path / "out", "optimum")
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert (out / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("changed", "config", "why"),
    [
        ({"heads": (2, 1)}, {}, "layer 1 has caches of 1 heads of 2, config.json says 2 of 2"),
        ({"layers": (0, 2)}, {}, "caches of all 2 layers, numbered from 0"),
        ({"names": ("past.{}.{}", "present.{}.{}")}, {}, "knows caches by the names"),
        ({}, {"num_key_value_heads": None}, "config.json says 4 of 2"),
    ],
)
def test_caches_that_the_configuration_cannot_tell_are_refused(changed, config, why, tmp_path: Path) -> None:
    source = written(tmp_path / "m", decoder(**changed), **config)
    for consumer in ("optimum", "transformers.js"):
        with pytest.raises(ModelError, match=why):
            package(source, tmp_path / "out", consumer)
        assert not (tmp_path / "out").exists()


def test_transformers_js_gets_its_layout_and_the_name_of_its_batch_axis(folder: Path, tmp_path: Path) -> None:
    out = package(folder, tmp_path / "out", "transformers.js")
    assert json.loads((out / "config.json").read_text()) == CONFIG | {"transformers.js_config": {"dtype": "fp32"}}
    first = {str(v.name): v.shape[0].value for v in ir.load(out / "onnx" / "model.onnx").graph.inputs}
    assert {name for name, axis in first.items() if axis != "batch_size"} == {"input_ids"}
    assert ir.load(folder / "model.onnx").graph.inputs[1].shape[0].value == "b"


@pytest.mark.parametrize(("bits", "dtype"), [(4, "q4"), (8, "q8")])
def test_transformers_js_is_told_the_type(bits: int, dtype: str, tmp_path: Path) -> None:
    model = decoder()
    ones = ir.Value(name="w", const_value=ir.tensor(np.zeros((1, 1, 2 * bits), np.uint8), name="w"))
    scales = ir.Value(name="c", const_value=ir.tensor(np.ones((1, 1), np.float32), name="c"))
    sizes = {k: ir.AttrInt64(k, n) for k, n in (("K", 2), ("N", 1), ("bits", bits), ("block_size", 16))}
    y = value("y", None)
    cache = model.graph.inputs[1]
    model.graph.append(ir.Node("com.microsoft", "MatMulNBits", [cache, ones, scales], sizes, outputs=[y]))
    model.graph.initializers.update({"w": ones, "c": scales})
    model.graph.opset_imports["com.microsoft"] = 1
    model.graph.outputs.append(y)
    out = package(written(tmp_path / "m", model), tmp_path / "out", "transformers.js")
    assert json.loads((out / "config.json").read_text())["transformers.js_config"]["dtype"] == dtype


def test_what_no_consumer_can_load_is_refused_in_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    plain = decoder(layers=(), heads=())
    with pytest.raises(ModelError, match="takes no caches"):
        package(written(tmp_path / "plain", plain), tmp_path / "out", "genai")
    with pytest.raises(ModelError, match=r"no consumer; there are genai, optimum, transformers\.js"):
        package(folder, tmp_path / "out", "llama.cpp")
    with pytest.raises(ModelError, match="is not empty"):
        package(folder, folder, "genai")
    with pytest.raises(ModelError, match="is a file"):
        package(folder, folder / "config.json", "genai")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: genai could not load it"):
        package(folder, tmp_path / "out", "genai")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        package(folder, tmp_path / "out", "genai")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(DataError, match="is not a JSON object"):
        package(folder, tmp_path / "out", "optimum")
    (folder / "config.json").unlink()
    assert main(["package", str(folder), "-o", str(tmp_path / "out"), "--for", "optimum"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_that_are_no_numbers_are_no_agreement() -> None:
    g, broken = rotary_decoder(), rotary_decoder()
    head = next(n for n in broken.nodes("MatMul") if n.outputs[0].name == "logits").inputs[1]
    broken.put(head, np.full_like(broken.array(head), np.nan))
    assert genai._agreement(g, g.clone()) == np.inf
    assert genai._agreement(g, broken) == -np.inf


@pytest.mark.parametrize("last", [False, True])
def test_genai_writes_the_same_tokens_of_both_forms_and_of_last_logits(last: bool, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    passes = [QuantizeWeights(method="nearest", min_size=1, block=16), *[LastLogits()] * last, Lower(prefill="int8")]
    g = PassManager(passes, measure=False).run(rotary_decoder()).model
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 32, "vocab_size": 11}
    folder = written(tmp_path / "model", g.model, **sizes, eos_token_id=10)
    notes: list[str] = []
    out = package(folder, tmp_path / "out", "genai", tell=notes.append)
    assert any("keeps caches in place" in n for n in notes)
    prompt = np.arange(2, 14)[None] % 10
    with Decoder(g) as d:
        ours = [int(x[0]) for x in generated(d, prompt, 8)]
    assert _texts_of(og, out, prompt, 8) == ours


@pytest.mark.parametrize("bits", [8, 4])
def test_genai_keeps_caches_of_codes_in_place(bits: int, tmp_path: Path) -> None:
    """Behind padding keys round to other codes, which is no reason to copy caches; without it the scores are equal."""
    og = pytest.importorskip("onnxruntime_genai")
    g = rotary_decoder()
    for a in blocks.attentions(g):
        scales = np.full((a.kv_heads, a.head_dim), 4 / cache_codes.LARGEST[bits])
        cache_codes.store_codes(g, a, cache_codes.CacheScales(scales, scales), bits)
    cache_codes.declare(g)
    g.sort()
    grouped = g.clone()
    assert group_attentions(grouped, 32) == ""
    assert genai._agreement(g, grouped, padded=False) > 100 > genai._agreement(g, grouped)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 32, "vocab_size": 11}
    folder = written(tmp_path / "model", g.model, **sizes, eos_token_id=10)
    notes: list[str] = []
    out = package(folder, tmp_path / "out", "genai", tell=notes.append)
    assert any("keeps caches in place" in n for n in notes)
    node = next(n for n in storage.load(out).nodes("GroupQueryAttention"))
    assert node.attributes.get_int("kv_cache_bit_width", 0) == bits
    prompt = np.arange(2, 14)[None] % 10
    with Decoder(g) as d:
        ours = [int(x[0]) for x in generated(d, prompt, 8)]
    assert _texts_of(og, out, prompt, 8) == ours


def _texts_of(og, folder: Path, prompt: np.ndarray, new: int) -> list[int]:
    """What genai writes behind a prompt, greedily."""
    params = og.GeneratorParams(model := og.Model(str(folder)))
    params.set_search_options(max_length=prompt.shape[1] + new, min_length=prompt.shape[1] + new, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt.astype(np.int32))
    made = []
    for _ in range(new):
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    return made


@pytest.mark.parametrize("consumer", ["genai", "optimum", "transformers.js"])
def test_caches_that_slide_are_for_no_consumer(consumer: str, tmp_path: Path) -> None:
    model = decoder()
    for v in model.graph.outputs[1:]:
        v.shape = ir.Shape([*list(v.shape)[:2], KEPT, v.shape[3]])
    with pytest.raises(ModelError, match=rf"fewer tokens than were read, which {consumer} does not know"):
        package(written(tmp_path / "model", model), tmp_path / "out", consumer)
    assert not (tmp_path / "out").exists()
