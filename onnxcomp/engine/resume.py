"""Steps of a pipeline on disk: an interrupted or edited recipe resumes where it differs."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.files import storage
from onnxcomp.files.seal import file_seals, seal
from onnxcomp.graph import Graph
from onnxcomp.graph.interface import same_interface
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Step

__all__ = ["StepCache"]

RECORD = "step.json"


@functools.cache
def _steps() -> TypeAdapter[Step]:
    return TypeAdapter(Step)


class StepCache:
    """Finished steps by the hash of everything before them; an entry that is damaged or changed counts as absent.

    `variants` is the folder for numbers of variants on the same model and data; `notes` tell which entries were left
    out and why.
    """

    def __init__(self, folder: Path | None, *parts: Any) -> None:
        self.folder = folder / "steps" if folder else None
        self._key = hashlib.sha256(repr(parts).encode()).hexdigest() if folder else ""
        self.variants = folder / "variants" / self._key if folder else None
        self.notes: list[str] = []

    def enter(self, spec: str) -> None:
        """Move on to the next step, described by the pass as recipe text."""
        self._key = hashlib.sha256(f"{self._key} {spec}".encode()).hexdigest()

    def load(self, p: Pass, before: Graph) -> tuple[Graph, Step] | None:
        """The graph after the current step, a pass on the graph `before`, and what it did, or None.

        The interface must be that of the graph before, unless the pass changes it.
        """
        if self.folder is None or not (here := self.folder / self._key).is_dir():
            return None
        try:
            step = self._record(here)
            g = storage.load(here / "model.onnx")
            if not p.changes_interface:
                same_interface(before.interface, g.interface)
        except (OnnxcompError, OSError, ValidationError, ValueError, KeyError, TypeError) as e:
            why = "its record cannot be read" if isinstance(e, (ValueError, KeyError, TypeError)) else str(e)
            self.notes.append(f"the cached step '{p.name}' does not fit and was computed again: {why}")
            return None
        step.cached = True
        return g, step

    def _record(self, here: Path) -> Step:
        """What an entry says, after a check that it is the one that was written under this key."""
        record = json.loads((here / RECORD).read_bytes())
        text, files = json.dumps(record["step"]), file_seals(here)
        files.pop(RECORD)
        if record["seal"] != seal([self._key, text, json.dumps(files, sort_keys=True)]):
            raise ModelError("its files are not those that were written")
        step = _steps().validate_json(text)
        return step

    def save(self, g: Graph, step: Step) -> None:
        """Keep a finished step."""
        if self.folder is None:
            return
        here = self.folder / self._key
        old = [p.name for p in here.iterdir()] if here.is_dir() else []
        with storage.publish(here, old) as staging:
            storage.save(g, staging)
            plain = json.loads(_steps().dump_json(step))
            text = json.dumps(plain)
            sealed = seal([self._key, text, json.dumps(file_seals(staging), sort_keys=True)])
            (staging / RECORD).write_text(json.dumps({"seal": sealed, "step": plain}), encoding="utf-8")
