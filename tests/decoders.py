"""Tiny causal language models with caches: how they are built, and whether exports write what transformers writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import OnnxcompError
from onnxcomp.exporter import export
from onnxcomp.runtime.generation import Decoder
from onnxcomp.runtime.sessions import Session
from tests import wider
from tests.zoo import Architecture

NEW, BATCHES = 32, (1, 3)  # tokens that are compared, and prompts at once
VARIED = 6  # different tokens that a text must have to prove anything
SEEDS = 40  # weights that are tried
LOUD, QUIET = 4.0, 0.1  # factors on matrices and tables: else the last token decides alone, and repeats itself


def causal() -> dict[str, Architecture]:
    """All causal language models of the coverage tables, by name."""
    languages = [a for a in wider.ALL if "CausalLM" in a.model or "LMHead" in a.model]
    return {a.name: a for a in languages if not a.past and a.experts != "looped"}


def build(a: Architecture, seed: int = 0) -> Any:
    """The module with other weights for each seed, in whatever attention it has."""
    import torch

    try:
        model = a.build("sdpa")
    except ValueError:  # the library has no other attention for it
        model = a.build("eager")
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * p.std() * (QUIET if id(p) in tables else LOUD))
    return model


def varied(name: str) -> Any:
    """The module of a family, of the first seed whose texts do not repeat themselves at once."""
    for seed in range(SEEDS):
        if name in PAIRS:
            model = build_pair(name, seed)
            texts = [theirs_pair(model, sources(model, batch)) for batch in BATCHES]
        else:
            model = build(causal()[name], seed)
            texts = [theirs(model, *prompts(model, batch)) for batch in BATCHES]
        if all(len(set(row.tolist())) >= VARIED for text in texts for row in text):
            break
    return model


def task_of(name: str) -> str:
    """What a family is exported for, so that it generates."""
    pair = "automatic-speech-recognition" if name == "whisper" else "text2text-generation"
    return pair if name in PAIRS else "text-generation"


def generates(name: str, work: Path) -> str:
    """`equal / tried` of the texts that a family writes after it was exported; empty where it writes none."""
    if name not in PAIRS and name not in causal():
        return ""
    model = varied(name)
    try:
        folder = export(model, work / name, task=task_of(name))
    except OnnxcompError:
        return f"0/{len(BATCHES)}"
    write = greedy_pair if name in PAIRS else greedy
    return f"{sum(write(model, folder, batch).equal for batch in BATCHES)}/{len(BATCHES)}"


@dataclass(frozen=True)
class Greedy:
    """Tokens of transformers and ours for the same prompts `[batch, new]`, left-padded where the batch has several."""

    theirs: Any
    ours: Any

    @property
    def equal(self) -> bool:
        return bool((self.theirs == self.ours).all())

    @property
    def distinct(self) -> int:
        """Different tokens in the least varied row."""
        return min(len(set(row.tolist())) for row in self.theirs)


def prompts(model: Any, batch: int) -> tuple[Any, Any]:
    """Random prompts of 6 tokens, of which every second row has 2 of padding, and their mask."""
    ids = np.random.default_rng(batch).integers(3, model.config.vocab_size, (batch, 6))
    mask = np.ones_like(ids)
    mask[1::2, :2] = 0
    ids[mask == 0] = 0
    return ids, mask


def theirs(model: Any, ids: Any, mask: Any, new: int = NEW) -> Any:
    """The tokens `[batch, new]` that transformers' generate writes."""
    import torch

    model.generation_config.eos_token_id = None
    with torch.no_grad():
        whole = model.generate(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=new,
            do_sample=False, pad_token_id=0, use_cache=True,
        )  # fmt: skip
    return whole.numpy()[:, ids.shape[1] :]


def greedy(model: Any, folder: Path, batch: int, new: int = NEW) -> Greedy:
    """What both write after the same prompts."""
    ids, mask = prompts(model, batch)
    return Greedy(theirs(model, ids, mask, new), ours(folder, ids, mask, new))


def ours(folder: Path, ids: Any, mask: Any, new: int = NEW) -> Any:
    """The likeliest tokens `[batch, new]` by the exported graph, its caches handed on."""
    with Decoder(folder) as decoder:
        assert decoder.cached
        tokens = [decoder.read(ids, mask)[:, -1].argmax(-1)]
        while len(tokens) < new:
            tokens.append(decoder.read(tokens[-1][:, None])[:, -1].argmax(-1))
    return np.stack(tokens, 1)


# ---- encoder-decoders ------------------------------------------------------------------------------------------------

PAIRS = ("t5", "t5-gated", "bart", "marian", "pegasus", "mbart", "mt5", "longt5", "whisper")


def build_pair(name: str, seed: int = 0) -> Any:
    """An encoder-decoder of the coverage tables with the head that writes text."""
    a = wider.BY_NAME[name]
    head = "MarianMTModel" if name == "marian" else a.model.replace("Model", "ForConditionalGeneration")
    model = build(dataclasses.replace(a, model=head), seed)
    for setting in ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        setattr(model.generation_config, setting, None)
    model.generation_config.decoder_start_token_id = 1
    return model


def sources(model: Any, batch: int) -> dict[str, Any]:
    """What the encoder reads: texts of 7 tokens, of which every second ends with padding, or sound."""
    rng = np.random.default_rng(batch)
    if model.config.model_type == "whisper":
        sizes = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": rng.standard_normal(sizes).astype(np.float32)}
    ids = rng.integers(3, model.config.vocab_size, (batch, 7))
    mask = np.ones_like(ids)
    mask[1::2, 5:] = 0
    ids[mask == 0] = model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


def greedy_pair(model: Any, folder: Path, batch: int, new: int = NEW) -> Greedy:
    """What transformers' generate and both graphs write for the same sources."""
    fed = sources(model, batch)
    return Greedy(theirs_pair(model, fed, new), ours_pair(folder, fed, new))


def theirs_pair(model: Any, fed: dict[str, Any], new: int = NEW) -> Any:
    """The tokens `[batch, new]` that transformers' generate writes."""
    import torch

    tensors = {k: torch.from_numpy(v) for k, v in fed.items()}
    options = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        write = super(type(model), model).generate if model.config.model_type == "whisper" else model.generate
        return write(**tensors, **options).numpy()[:, -new:]


def ours_pair(folder: Path, fed: dict[str, Any], new: int) -> Any:
    """The likeliest tokens `[batch, new]` by the exported graphs: one run of the encoder, then a token at a time."""
    with Session(folder / "encoder_model.onnx") as encoder, Session(folder / "decoder_model.onnx") as decoder:
        found = encoder.run(fed)
        ports = {p.name: p for p in decoder.inputs}
        feeds = {n: found[n.replace("past_key_values", "present")] for n in ports if ".encoder." in n}
        if "encoder_attention_mask" in ports:
            feeds["encoder_attention_mask"] = fed["attention_mask"]
        batch, tokens = len(next(iter(fed.values()))), []
        own = {n: np.zeros((batch, p.shape[1], 0, p.shape[3]), p.dtype) for n, p in ports.items() if ".decoder." in n}
        feeds["input_ids"] = np.ones((batch, 1), np.int64)
        while len(tokens) < new:
            out = decoder.run(feeds | own)
            tokens.append(out["logits"][:, -1].argmax(-1))
            feeds["input_ids"] = tokens[-1][:, None]
            own = {n: out[n.replace("past_key_values", "present")] for n in own}
    return np.stack(tokens, 1)
