"""A few lines of Python that run a model, for the runtimes that it fits."""

from __future__ import annotations

import json
from pathlib import Path

from onnxcomp.data.inputs import specs
from onnxcomp.data.open_axes import shapes_of
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.reports.markdown import fenced
from onnxcomp.reports.outcome import Report
from onnxcomp.target import TARGETS

__all__ = ["snippet"]

TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids"))
MOST = 4  # inputs that are written out one by one
SIZES = {"batch": 1, "sequence": 8}


def snippet(g: Graph, path: Path, report: Report) -> str:
    """Run a model where its folder is the current one: on a text or an image where it takes one, else on numbers."""
    names, folder = [s.name for s in specs(g)], path.parent
    target = TARGETS.get(report.origin.target) if report.origin is not None else None
    provider = target.provider if target is not None else "CPUExecutionProvider"
    start = f'session = ort.InferenceSession({json.dumps(path.name)}, providers=["{provider}"])'
    run = "outputs = session.run(None, feeds)"
    if set(names) <= TEXT and (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file():
        lines = [
            "import onnxruntime as ort",
            "from transformers import AutoTokenizer",
            start,
            'tokens = AutoTokenizer.from_pretrained(".")("A sentence to try.", return_tensors="np")',
            "outputs = session.run(None, {i.name: tokens[i.name] for i in session.get_inputs()})",
        ]
        return _block("With ONNX Runtime and the tokenizer beside the model:", lines)
    if names == ["pixel_values"] and (folder / "preprocessor_config.json").is_file():
        lines = [
            "import onnxruntime as ort",
            "from PIL import Image",
            "from transformers import AutoImageProcessor",
            start,
            'image = AutoImageProcessor.from_pretrained(".")(Image.open("image.png"), return_tensors="np")',
            "outputs = session.run(None, dict(image))",
        ]
        return _block("With ONNX Runtime and the image processor beside the model:", lines)
    return _block("With ONNX Runtime:", ["import numpy as np", "import onnxruntime as ort", start, *_feeds(g), run])


def _feeds(g: Graph) -> list[str]:
    """Lines that make inputs of ones, in sizes that the model takes."""
    ports = specs(g)
    try:
        shapes = shapes_of(g, SIZES)
    except OnnxcompError:
        try:
            shapes = shapes_of(g, {})
        except OnnxcompError:
            return [
                "feeds = {}  # arrays by input name: "
                + ", ".join(f"{json.dumps(p.name)} {list(p.shape)}" for p in ports)
            ]
    made = [f'{json.dumps(p.name)}: np.ones({shapes[p.name]}, "{p.dtype.name}")' for p in ports]
    if len(made) <= MOST:
        return [f"feeds = {{{', '.join(made)}}}"]
    return ["feeds = {", *(f"    {x}," for x in made), "}"]


def _block(title: str, lines: list[str]) -> str:
    return f"{title}\n\n{fenced('python', chr(10).join(lines))}"
