"""A few lines that run a result in other libraries, only where its files say that these load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxcomp.files.pooling import Pooling
from onnxcomp.reports.markdown import fenced
from onnxcomp.reports.outcome import Result
from onnxcomp.target import CPU, TARGETS

__all__ = ["more_snippets"]

TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids", "position_ids"))
# Optimum's classes by the last words of an architecture's name, with the outputs that they read.
CLASSES = {
    "ForSequenceClassification": ("ORTModelForSequenceClassification", "logits"),
    "ForTokenClassification": ("ORTModelForTokenClassification", "logits"),
    "ForQuestionAnswering": ("ORTModelForQuestionAnswering", "start_logits"),
    "ForMaskedLM": ("ORTModelForMaskedLM", "logits"),
    "ForImageClassification": ("ORTModelForImageClassification", "logits"),
    "Model": ("ORTModelForFeatureExtraction", "last_hidden_state"),
}
OPTIMUM = "With Optimum (`pip install optimum-onnx[onnxruntime]`), by the classes of transformers:"
SENTENCES = (
    "With sentence-transformers (`pip install sentence-transformers[onnx]`), which takes the mean of the tokens:"
)
PACKAGED = (
    "For engines that generate text with this model's caches, `onnxcomp package . -o FOLDER --for NAME` writes what "
    "they load; NAME is `genai`, `optimum` or `transformers.js`."
)


def more_snippets(result: Result, path: Path, pooled: Pooling | None) -> list[str]:
    """Parts of a page for Optimum, sentence-transformers and engines that generate text; `path` is in its folder."""
    g, origin, config = result.model, result.report.origin, _config(path.parent)
    target = TARGETS.get(origin.target, CPU) if origin is not None else CPU
    if target.provider != CPU.provider:  # these libraries run on the CPU unless they are told
        return []
    inputs, outputs = ({str(v.name) for v in ports} for ports in (g.inputs, g.outputs))
    if any("past" in name for name in inputs):
        return [PACKAGED] if config else []
    known = _class(config, inputs, outputs)
    if known is None:
        return []
    file = json.dumps(path.name)
    if inputs == {"pixel_values"}:
        return [_block(OPTIMUM, _images(known, file))] if _has(path, "preprocessor_config.json") else []
    if not _has(path, "tokenizer.json"):
        return []
    parts = [_block(OPTIMUM, _texts(known, file))]
    if known == "ORTModelForFeatureExtraction" and pooled is not None and pooled.mode == "mean":
        parts.append(_block(SENTENCES, _sentences(file, normalized=pooled.normalized)))
    return parts


def _class(config: dict[str, Any], inputs: set[str], outputs: set[str]) -> str | None:
    """Optimum's class for a model of these inputs and outputs."""
    listed = config.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    if config.get("is_encoder_decoder") or not isinstance(config.get("model_type"), str):
        return None
    images = inputs == {"pixel_values"}
    if not images and not {"input_ids"} <= inputs <= TEXT:
        return None
    found = next((c for end, c in CLASSES.items() if name.endswith(end)), None)
    if found is None or found[1] not in outputs or images is not (found[0] == "ORTModelForImageClassification"):
        return None
    return found[0]


def _texts(name: str, file: str) -> list[str]:
    return [
        f"from optimum.onnxruntime import {name}",
        "from transformers import AutoTokenizer",
        f'model = {name}.from_pretrained(".", file_name={file})',
        'tokens = AutoTokenizer.from_pretrained(".")("A sentence to try.", return_tensors="pt")',
        "outputs = model(**tokens)",
    ]


def _images(name: str, file: str) -> list[str]:
    return [
        f"from optimum.onnxruntime import {name}",
        "from PIL import Image",
        "from transformers import AutoImageProcessor",
        f'model = {name}.from_pretrained(".", file_name={file})',
        'pixels = AutoImageProcessor.from_pretrained(".")(Image.open("image.png"), return_tensors="pt")',
        "outputs = model(**pixels)",
    ]


def _sentences(file: str, *, normalized: bool) -> list[str]:
    scaled = ", normalize_embeddings=True" if normalized else ""
    return [
        "from sentence_transformers import SentenceTransformer",
        f'model = SentenceTransformer(".", backend="onnx", model_kwargs={{"file_name": {file}}})',
        f'outputs = model.encode(["A sentence to try."]{scaled})',
    ]


def _has(path: Path, name: str) -> bool:
    return (path.parent / name).is_file()


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _block(title: str, lines: Sequence[str]) -> str:
    return f"{title}\n\n{fenced('python', chr(10).join(lines))}"
