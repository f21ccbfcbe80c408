"""A folder of Whisper for onnxruntime-genai, which reads caches of the encoder's states as our export gives them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from onnxcomp.data.arrays import read_json
from onnxcomp.data.datasets import specs
from onnxcomp.engine.consumers.genai import SEARCH
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.runtime.encoder_source import PAST, PRESENT, Pair, begins_with, ends_of

__all__ = ["write_whisper"]

FRAMES = 3000  # of sound, the one length that genai takes: 30 s
FEATURES = "audio_features"
SOUND = "audio_processor_config.json"
WINDOW, HOP, SECONDS, MELS = 400, 160, 30, 80  # samples and seconds of Whisper's features, where nobody tells


def write_whisper(pair: Pair, folder: Path, threads: int) -> None:
    """Write both graphs, the files beside them, genai_config.json and how sound becomes features.

    Raises `ModelError` for another model than Whisper, and for sound of another length.
    """
    home = pair.encoder.parent
    config, generation, sound = (read_json(home / f"{x}config.json") for x in ("", "generation_", "preprocessor_"))
    if (family := config.get("model_type")) != "whisper":
        raise ModelError(f"{home}: of encoder-decoders genai has a type for whisper alone (0.18), this is {family}")
    if not pair.fits():
        raise ModelError(f"{home}: its decoder takes no caches from its encoder, as what export writes does")
    encoder, decoder = (storage.load(f) for f in pair)
    frames = specs(encoder)[0].shape[-1]
    if frames != FRAMES:
        raise ModelError(f"{home}: reads {frames} frames of sound, genai gives {FRAMES}")
    encoder.inputs[0].name = FEATURES  # as genai's own processor calls them
    storage.copy_companions(home, folder)
    for g, file in ((encoder, pair.encoder), (decoder, pair.decoder)):
        storage.save(g, folder, name=file.name)
    told = _configuration(pair, decoder, config, generation, threads or os.cpu_count() or 1)
    for name, content in (("genai_config.json", told), (SOUND, _features(sound))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _configuration(
    pair: Pair, decoder: Graph, config: dict[str, Any], generation: dict[str, Any], threads: int
) -> dict[str, Any]:
    home = pair.encoder.parent
    own = [s for s in specs(decoder) if s.cache is not None]
    heads, width = own[0].shape[1], own[0].shape[3]
    sizes = {
        "head_size": width, "hidden_size": _number(config, "d_model", home), "num_attention_heads": heads,
        "num_hidden_layers": len(own) // 2, "num_key_value_heads": heads,
    }  # fmt: skip
    options = {"log_id": "onnxruntime-genai", "intra_op_num_threads": threads, "provider_options": []}
    ends, context = ends_of(home), _number(config, "max_target_positions", home)
    cross, past = _names("cross_present", f"{PRESENT}.%d.encoder"), _names("cross_past", f"{PAST}.%d.encoder")
    return {
        "model": {
            "type": "whisper",
            "context_length": context,
            "vocab_size": _number(config, "vocab_size", home),
            "bos_token_id": begins_with(config, {}, home)[0],
            "decoder_start_token_id": begins_with(config, generation, home)[0],
            "eos_token_id": list(ends),
            "pad_token_id": config.get("pad_token_id", ends[0] if ends else 0),
            "encoder": {
                "filename": pair.encoder.name, "session_options": options, **sizes,
                "inputs": {FEATURES: FEATURES}, "outputs": {"encoder_hidden_states": "last_hidden_state", **cross},
            },
            "decoder": {
                "filename": pair.decoder.name, "session_options": options, **sizes,
                "inputs": {"input_ids": "input_ids", **_names("past", f"{PAST}.%d.decoder"), **past},
                "outputs": {"logits": "logits", **_names("present", f"{PRESENT}.%d.decoder")},
            },
            "speech": {"config_filename": SOUND},
        },
        "search": {
            **{k: generation[k] for k in SEARCH if generation.get(k) is not None},
            "max_length": context,
            "past_present_share_buffer": False,
        },
    }  # fmt: skip


def _number(config: dict[str, Any], name: str, home: Path) -> int:
    if not isinstance(found := config.get(name), int):
        raise ModelError(f"{home / 'config.json'}: has no number '{name}', which genai needs")
    return found


def _names(kind: str, stem: str) -> dict[str, str]:
    return {f"{kind}_{x}_names": f"{stem}.{x}" for x in ("key", "value")}


def _features(sound: dict[str, Any]) -> dict[str, Any]:
    """The steps from a file of sound to features, as onnxruntime-extensions has them, with the processor's sizes."""
    window, hop = sound.get("n_fft", WINDOW), sound.get("hop_length", HOP)
    mels = {"chunk_size": sound.get("chunk_length", SECONDS), "n_mel": sound.get("feature_size", MELS)}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("AudioDecoder", {}),
        ("STFTNorm", {"n_fft": window, "frame_length": window, "hop_length": hop}),
        ("LogMelSpectrum", {**mels, "hop_length": hop, "n_fft": window}),
    ]
    made = [{"operation": {"name": t, "type": t, **({"attrs": a} if a else {})}} for t, a in steps]
    return {"feature_extraction": {"sequence": made}}
