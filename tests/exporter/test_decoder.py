"""Decoders exported with their caches: one graph for the prompt and each token, equal to transformers' generate."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import specs
from onnxcomp.data.inputs import vocabulary
from onnxcomp.engine.compress import compress
from onnxcomp.engine.consumers import package
from onnxcomp.errors import ExportError
from onnxcomp.files import storage
from onnxcomp.runtime.generation import Decoder, generated

pytestmark = [pytest.mark.export]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from tokenizers import Tokenizer, models  # noqa: E402

from onnxcomp.exporter import export, routes  # noqa: E402
from tests import decoders  # noqa: E402

NEW, PAST = "sequence_length", "past_sequence_length"
# Rotary with grouped heads; learnt positions; windows, eager attention, tied weights; rotary pairs side by side.
FAMILIES = {"llama": 0, "gpt2": 0, "gemma2": 1, "cohere": 0}  # seeds of weights whose text does not repeat itself


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    done: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in done:
            model = decoders.build(decoders.causal()[name], FAMILIES[name])
            done[name] = model, export(model, tmp_path_factory.mktemp("decoder") / name)
        return done[name]

    return get


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(exported: Any, name: str, tmp_path: Path) -> None:
    """Also behind padding on the left, and in the canonical form, whose attentions have their caches."""
    model, folder = exported(name)
    g = storage.load(folder)
    assert vocabulary(g)["input_ids"] == model.config.vocab_size  # else no perplexity is told
    canonicalize(g)
    attentions = blocks.attentions(g)
    assert [a.past is not None and a.present is not None for a in attentions] == [True, True]
    storage.save(g, tmp_path)
    for batch in decoders.BATCHES:
        found = decoders.greedy(model, folder, batch)
        assert found.distinct >= decoders.VARIED
        np.testing.assert_array_equal(found.ours, found.theirs)
    np.testing.assert_array_equal(decoders.ours(tmp_path, *decoders.prompts(model, batch)), found.theirs)


def test_names_and_axes_are_those_of_optimum(exported: Any) -> None:
    _, folder = exported("llama")
    g = storage.load(folder)
    states = ("batch_size", 2, PAST, 4)
    assert {s.name: s.shape for s in specs(g)} == {
        "input_ids": ("batch_size", NEW),
        "attention_mask": ("batch_size", f"{PAST} + {NEW}"),
        "position_ids": ("batch_size", NEW),
        **{f"past_key_values.{i}.{x}": states for i in range(2) for x in ("key", "value")},
    }
    assert [v.name for v in g.outputs] == ["logits", *(f"present.{i}.{x}" for i in range(2) for x in ("key", "value"))]
    assert all(s.cache == 2 for s in specs(g) if s.name.startswith("past"))
    found = record(folder)
    assert (found["past"], found["task"]) == (True, "text-generation")
    assert {(x["past"], x["inputs"]["input_ids"][1]) for x in found["verification"]["differences"]} == {
        (0, 6),
        (6, 1),
        (7, 5),
    }
    products = [str(n.name) for n in g.nodes("MatMul")]
    assert any("layers.1.self_attn.q_proj/MatMul" in n for n in products)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_tied_weights_are_stored_once(exported: Any) -> None:
    """The embedding table of Gemma is its head."""
    model, folder = exported("gemma2")
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    shapes = [tuple(v.shape) for v in storage.load(folder).model.graph.initializers.values()]
    assert shapes.count(tuple(table.shape)) + shapes.count(tuple(table.shape)[::-1]) == 1


def test_positions_are_asked_for_only_where_the_model_reads_them(tmp_path: Path) -> None:
    folder = export(decoders.build(decoders.causal()["bloom"]), tmp_path / "out", static={"batch": 2})
    assert [s.shape for s in specs(storage.load(folder)) if s.cache is None] == [(2, NEW), (2, f"{PAST} + {NEW}")]


def test_another_operator_set_and_half_precision(tmp_path: Path) -> None:
    model = decoders.causal()["llama"].build()
    folder = export(model, tmp_path / "out", opset=23, dtype="fp16", task="text-generation-with-past")
    found = record(folder)
    assert (storage.load(folder).opset, found["converted_from_opset"], found["dtype"]) == (23, 20, "fp16")
    assert {s.dtype for s in specs(storage.load(folder)) if s.cache is not None} == {np.dtype(np.float16)}


def test_logits_of_the_last_token_only(exported: Any, tmp_path: Path) -> None:
    model, whole = exported("llama")
    folder = export(model, tmp_path / "last", last_logits=True)
    assert record(folder)["verification"]["done"]
    g = storage.load(folder)
    assert list(g.value("logits").shape)[1] == 1
    ids, mask = decoders.prompts(model, 3)
    texts = []
    for place in (whole, folder):
        with Decoder(storage.load(place)) as d:
            texts.append(np.stack(list(generated(d, ids, 8, mask=mask))))
            d.reset()
            assert d.read(ids, mask).shape[1] == (1 if place == folder else 6)
    np.testing.assert_array_equal(*texts)
    validation = compress(
        folder, tmp_path / "out", preset="optimize", measure=False, evaluation="random"
    ).report.validation
    assert validation is not None
    assert validation.outputs["logits"].decibels > 80


def test_what_does_not_go_with_caches_is_one_error(tmp_path: Path) -> None:
    model = decoders.build(decoders.causal()["llama"])
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="'text-generation-with-past' asks for caches"):
        export(model, out, task="text-generation-with-past", past=False)
    with pytest.raises(ExportError, match=r"a fixed 'sequence' does not go with caches.*past=False"):
        export(model, out, static={"sequence": 8})
    with pytest.raises(
        ExportError, match=r"last_logits=True is for models with caches, past=False is for models without"
    ):
        export(model, out, past=False, last_logits=True)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(ExportError, match=r"MambaForCausalLM .*keys and values.*past=False"):
        export(mamba, out)
    assert not out.exists()


def test_a_trace_that_holds_only_for_its_sample_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder keeps whatever Python computed: here positions counted from the five tokens of the sample's cache."""
    model = decoders.build(decoders.causal()["llama"])
    forward = model.forward

    def fixed(*args: Any, position_ids: Any = None, past_key_values: Any = None, **options: Any) -> Any:
        count = past_key_values.get_seq_length() if past_key_values is not None else 0
        if torch.jit.is_tracing():
            position_ids = position_ids * 0 + int(count)
        return forward(*args, position_ids=position_ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(routes, "CACHED_ROUTES", {"torch.jit.trace": routes.CACHED_ROUTES["torch.jit.trace"]})
    fixed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", fixed)
    with pytest.raises(ExportError, match="output 'logits' differs from PyTorch"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize("name", FAMILIES)
def test_packages_run_in_onnxruntime_genai(exported: Any, name: str, tmp_path: Path) -> None:
    """The folder for it, by its own loop; and ours by ours."""
    genai = pytest.importorskip("onnxruntime_genai")
    model, folder = exported(name)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # tokens are given as numbers
    words.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}')
    engine = genai.Model(str(package(folder, tmp_path / "genai", "genai", threads=1)))
    tokens, _ = decoders.prompts(model, decoders.BATCHES[0])
    params = genai.GeneratorParams(engine)
    params.set_search_options(max_length=tokens.shape[1] + 12, do_sample=False)
    text = genai.Generator(engine, params)
    text.append_tokens(tokens[0])
    while not text.is_done():
        text.generate_next_token()
    found = [int(x) for x in text.get_sequence(0)][tokens.shape[1] :]
    with Decoder(folder, threads=1) as decoder:
        assert found == [int(x[0]) for x in generated(decoder, tokens[:1], len(found), ends=[2])]
    assert len(found) >= 1
