"""A folder for onnxruntime-genai: model, tokenizer and genai_config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.inputs import word_count
from onnxcomp.data.texts import tokenizer
from onnxcomp.data.untrusted import plain_file
from onnxcomp.engine.consumers.source import Source
from onnxcomp.errors import DataError, ModelError, OnnxcompError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering.coded_caches import as_floats
from onnxcomp.lowering.grouped_decoder import group_attentions
from onnxcomp.runtime.generation import Decoder
from onnxcomp.validation.drift import decibel

__all__ = ["write"]

# Types that onnxruntime-genai 0.18 knows; every other decoder is its generic type. `gpt2` is not here: under that name
# it wants keys and values of a layer in one tensor.
TYPES = (
    *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gptoss", "granite"),
    *("granitemoehybrid", "hunyuandensev1", "internlm2", "lfm2", "llama", "mistral", "nemotron", "olmo", "phi"),
    *("phimoe", "phi3", "phi3small", "qwen2", "qwen3", "smollm3"),
)
GENERIC = "decoder"
FEEDABLE = ("input_ids", "attention_mask", "position_ids")  # what a decoder of genai is fed, besides its caches
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "length_penalty")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
PROMPT, MORE = 9, 3  # tokens that both forms of a graph are compared on
LEAST_DB = 30.0  # products of few bits round their inputs to 8 bits: what is added in another order may round otherwise
LONGEST = 4096  # tokens of a sequence where the configuration does not tell its context


def write(source: Source, folder: Path) -> None:
    """Write the model, the files beside it and genai_config.json; raises `ModelError` where genai cannot run it."""
    if not (file := source.path.parent / "tokenizer.json").is_file():
        raise ModelError(f"{source.path.parent}: has no tokenizer.json, which genai reads")
    try:
        plain_file(file)
        added = [int(x) for x in tokenizer(file.read_text("utf-8")).encode("").ids]
    except (DataError, ValueError) as e:
        raise ModelError(f"{file}: genai could not load it: {e}") from e
    if added:
        why = "genai's own tokenizer may leave them out (0.18 does), so give them with the prompt"
        source.notes.append(f"tokenizer.json puts the tokens {added} around a text; {why}")
    configuration(source)  # refuses what genai cannot load, before any work
    source = with_caches_in_place(source)
    config = configuration(source)
    storage.save(source.graph, folder)
    storage.copy_companions(source.path.parent, folder)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def with_caches_in_place(source: Source) -> Source:
    """The model with attentions that write into genai's own caches, where it gives the same; a note says what was done.

    genai runs several new tokens behind others for a single sample only, which is all that the operator takes.
    """
    graph = source.graph.clone()
    why = (
        "its caches differ by layer"
        if len(set(source.cache_sizes())) > 1
        else group_attentions(graph, _context(source))
    )
    try:
        db = -math.inf if why else _sameness(source.graph, graph, _context(source))
    except OnnxcompError as e:
        why = str(e)
    if not why and db < LEAST_DB:
        why = f"it would give other scores ({db:.0f} dB)"
    if why:
        source.notes.append(f"caches are copied for each token, as GroupQueryAttention does not fit: {why}")
        return source
    source.notes.append(f"attentions are GroupQueryAttention, which keeps caches in place: scores agree to {db:.0f} dB")
    return dataclasses.replace(source, graph=graph)


def _sameness(before: Graph, after: Graph, context: int) -> float:
    """The agreement of both forms, where caches hold codes that of their attentions on floats as well.

    Positions of the operator count padding. Attention does not see it, but keys turned by other angles round to other
    codes, so that padded rows differ by as much as rounding adds: padding is compared on floats.
    """
    plain = before.clone()
    if not as_floats(plain):
        return _agreement(before, after)
    grouped = plain.clone()
    if group_attentions(grouped, context):
        return -math.inf
    return min(_agreement(before, after, padded=False), _agreement(plain, grouped))


def _agreement(before: Graph, after: Graph, *, padded: bool = True) -> float:
    """The worst SQNR in dB of the scores of random prompts, one padded on the left, and of single tokens behind."""
    rng, worst = np.random.default_rng(0), math.inf
    tokens = rng.integers(0, word_count(before), (2, PROMPT + MORE))
    mask = np.ones_like(tokens)
    if padded:
        mask[1, : PROMPT // 2] = 0
    steps = [slice(0, PROMPT), *(slice(i, i + 1) for i in range(PROMPT, PROMPT + MORE))]
    given = [list[np.ndarray]() for _ in (before, after)]
    for graph, scores in zip((before, after), given, strict=True):
        with Decoder(graph) as decoder:
            for s in steps:
                made = decoder.read(tokens[:, s], mask[:, s])
                scores.append(made[mask[:, s][:, -made.shape[1] :] > 0])  # all tokens', or the last one's alone
    for x, y in zip(*given, strict=True):
        db = decibel(float((x.astype(np.float64) ** 2).sum()), float(((y.astype(np.float64) - x) ** 2).sum()))
        worst = min(worst, -math.inf if math.isnan(db) else db)  # a comparison with NaN would pass as agreement
    return worst


def _context(source: Source) -> int:
    return next((source.config[n] for n in CONTEXT if isinstance(source.config.get(n), int)), LONGEST)


def configuration(source: Source) -> dict[str, Any]:
    """What genai_config.json says of a model."""
    context = _context(source)
    bos, eos, pad = (source.token(kind) for kind in ("bos", "eos", "pad"))
    words = source.number("vocab_size")
    for name, given in (("bos", bos), ("eos", eos), ("pad", pad)):
        for token in given if isinstance(given, list) else [given]:
            if isinstance(token, int) and not 0 <= token < words:
                raise ModelError(
                    f"{source.path.parent}: {name}_token_id is {token}, of {words} words: genai refuses it"
                )
    family = str(source.config.get("model_type", GENERIC))
    return {
        "model": {
            "type": family if family in TYPES else GENERIC,
            "context_length": context,
            "vocab_size": words,
            **({} if bos is None else {"bos_token_id": bos}),
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else eos[0] if isinstance(eos, list) else eos,
            "decoder": _decoder(source),
        },
        "search": {
            **{k: source.generation[k] for k in SEARCH if source.generation.get(k) is not None},
            "max_length": context,
            # Only this operator writes new keys into the buffer of the old ones.
            "past_present_share_buffer": _in_place(source) and len(set(source.cache_sizes())) == 1,
        },
    }


def _decoder(source: Source) -> dict[str, Any]:
    """The part about the graph: its file, sizes, inputs and outputs."""
    past, present, sizes = source.past, source.present, source.cache_sizes()
    caches = {t % i for t in (past.key, past.value) for i in past.layers}
    if other := [name for name in source.inputs if name not in {*FEEDABLE, *caches}]:
        raise ModelError(f"{source.path}: genai feeds no input '{other[0]}'")
    # Of its own genai takes one thread.
    options = {"log_id": "onnxruntime-genai", "intra_op_num_threads": source.threads or os.cpu_count() or 1}
    return {
        "session_options": options | {"provider_options": []},
        "filename": "model.onnx",
        "head_size": sizes[0][1],
        "hidden_size": source.number("hidden_size", "n_embd", "d_model"),
        "inputs": {
            **{name: name for name in FEEDABLE if name in source.inputs},
            "past_key_names": past.key,
            "past_value_names": past.value,
        },
        "outputs": {
            "logits": _logits(source),
            "present_key_names": present.key,
            "present_value_names": present.value,
        },
        "num_attention_heads": source.number("num_attention_heads", "n_head"),
        "num_hidden_layers": len(past.layers),
        "num_key_value_heads": sizes[0][0],
    }


def _logits(source: Source) -> str:
    if not any(v.name == "logits" and v.shape is not None and len(v.shape) == 3 for v in source.graph.outputs):
        raise ModelError(f"{source.path}: has no output 'logits' of a score for each token and word")
    return "logits"


def _in_place(source: Source) -> bool:
    """Whether all that reads a cache is GroupQueryAttention."""
    return all(u.op_type == "GroupQueryAttention" for v in source.caches for u in v.consumers())
