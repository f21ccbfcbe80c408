"""Steps of a pipeline on disk: an interrupted or edited recipe resumes where it differs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from onnxcomp import storage
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.outcome import Step

__all__ = ["StepCache", "content_hash"]


def content_hash(g: Graph) -> str:
    """SHA-256 over structure and weights, hex; weights in files are read once, tensor by tensor."""
    digest = hashlib.sha256()
    bare = g.model.clone()
    for v in bare.graph.initializers.values():
        if v.const_value is not None:
            digest.update(f"{v.name}{v.const_value.dtype}{v.const_value.shape}".encode())
            digest.update(v.const_value.tobytes())
            v.const_value = None
    digest.update(ir.serde.serialize_model(bare).SerializeToString(deterministic=True))
    return digest.hexdigest()


class StepCache:
    """Finished steps by the hash of everything before them; a damaged entry counts as absent."""

    def __init__(self, folder: Path | None, *parts: Any) -> None:
        self.folder = folder / "steps" if folder else None
        self._key = hashlib.sha256(repr(parts).encode()).hexdigest() if folder else ""

    def enter(self, spec: str) -> None:
        """Move on to the next step, described by the pass as recipe text."""
        self._key = hashlib.sha256(f"{self._key} {spec}".encode()).hexdigest()

    def load(self) -> tuple[Graph, Step] | None:
        """The graph after the current step and what the step did, or None."""
        if self.folder is None or not (here := self.folder / self._key).is_dir():
            return None
        try:
            step = TypeAdapter(Step).validate_json((here / "step.json").read_bytes())
            step.cached = True
            return storage.load(here / "model.onnx"), step
        except (ModelError, OSError, ValidationError, json.JSONDecodeError):
            return None

    def save(self, g: Graph, step: Step) -> None:
        """Keep a finished step."""
        if self.folder is None:
            return
        with storage.publish(self.folder / self._key) as staging:
            storage.save(g, staging)
            (staging / "step.json").write_bytes(TypeAdapter(Step).dump_json(step))
