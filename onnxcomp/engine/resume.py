"""Steps of a pipeline on disk: an interrupted or edited recipe resumes where it differs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.reports.outcome import Step

__all__ = ["StepCache"]


class StepCache:
    """Finished steps by the hash of everything before them; a damaged entry counts as absent.

    `variants` is the folder for numbers of variants on the same model and data.
    """

    def __init__(self, folder: Path | None, *parts: Any) -> None:
        self.folder = folder / "steps" if folder else None
        self._key = hashlib.sha256(repr(parts).encode()).hexdigest() if folder else ""
        self.variants = folder / "variants" / self._key if folder else None

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
