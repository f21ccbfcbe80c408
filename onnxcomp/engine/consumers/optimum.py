"""A folder for Optimum's `ORTModelForCausalLM` and its other classes: model.onnx, configuration, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from onnxcomp.engine.consumers.source import Source
from onnxcomp.errors import ModelError
from onnxcomp.files import storage

__all__ = ["check_caches", "write"]

PAST, PRESENT = ("past_key_values.%d.key", "past_key_values.%d.value"), ("present.%d.key", "present.%d.value")


def write(source: Source, folder: Path) -> None:
    """Write the model and the files beside it; raises `ModelError` where Optimum would make other caches."""
    if source.caches:
        check_caches(source, "Optimum")
    storage.save(source.graph, folder)
    storage.copy_companions(source.path.parent, folder)
    if source.generation or not (special := _special(source)):
        return
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")


def check_caches(source: Source, consumer: str) -> None:
    """Raise `ModelError` where caches that are made from config.json do not fit the model's inputs."""
    past, present = source.past, source.present
    if (past.key, past.value) != PAST or (present.key, present.value) != PRESENT:
        raise ModelError(f"{source.path}: {consumer} knows caches by the names {', '.join((*PAST, *PRESENT))}")
    config, sizes = source.config, source.cache_sizes()
    heads = source.number("num_attention_heads", "n_head")
    told = (
        source.config.get("num_key_value_heads") or heads,
        config.get("head_dim") or source.number("hidden_size", "n_embd") // heads,
    )
    layers = source.number("num_hidden_layers", "n_layer")
    if past.layers != tuple(range(layers)):
        raise ModelError(f"{source.path}: {consumer} wants caches of all {layers} layers, numbered from 0")
    for layer, size in zip(past.layers, sizes, strict=True):
        if size != told:
            raise ModelError(
                f"{source.path}: layer {layer} has caches of {size[0]} heads of {size[1]}, config.json says {told[0]} "
                f"of {told[1]}; {consumer} makes all caches alike (uniform: true cuts heads so)"
            )


def _special(source: Source) -> dict[str, object]:
    kinds = {f"{k}_token_id": source.token(k) for k in ("bos", "eos", "pad")}
    return {k: v for k, v in kinds.items() if v is not None}
