"""First runs of models that nobody has run yet, in one worker process that all jobs of this process share.

A model that hangs or crashes the runtime is then an error of ours; what has run once is run in this process. The
worker reads models from their own files, so that no weight is held twice, and is started by the first run.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from onnxcomp.errors import OnnxcompError
from onnxcomp.files import storage
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.stored import Stored
from onnxcomp.maths import Array
from onnxcomp.runtime.child import Child, WorkerEnded, patience, read_arrays, serve, target_of, work, write_arrays
from onnxcomp.runtime.runner import Runner
from onnxcomp.target import CPU, Target

__all__ = ["answer", "load", "prove", "run", "spawn", "stop"]

START = 300  # seconds until the worker has imported what it needs; a busy machine takes its time
_lock = threading.Lock()
_worker: tuple[int, Child] | None = None  # with the process it belongs to: a fork may not use its parent's
_proven: set[tuple[str, ...]] = set()


def load(model: Stored, target: Target = CPU) -> None:
    """Load a model in the worker for the next `run`; raises what loading it here would, or `WorkerEnded`."""
    fields = {"model": str(model.path.resolve()), "target": dataclasses.asdict(target)}
    with _lock:
        _ask("load", model, fields)


def run(model: Stored, feeds: Mapping[str, Array], target: Target = CPU) -> dict[str, Array]:
    """The outputs of one run in the worker; raises what a run here would, or `WorkerEnded` for a crash or a hang."""
    with _lock, scratch_folder() as folder:
        given, made = folder / "feeds.npz", folder / "outputs.npz"
        try:
            write_arrays(given, feeds)
        except OSError as e:
            raise OnnxcompError(f"{folder}: inputs for a first run cannot be written: {e.strerror or e}") from e
        fields = {"model": str(model.path.resolve()), "target": dataclasses.asdict(target)}
        reply = _ask("run", model, {**fields, "feeds": str(given), "outputs": str(made)})
        return read_arrays(made, {k: _dtype(t) for k, t in reply["types"].items()})


def _ask(do: str, model: Stored, fields: dict[str, Any]) -> dict[str, Any]:
    child = _started()
    child.name = str(model)
    try:
        return child.ask(do, patience(model.nbytes), **fields)
    except WorkerEnded:
        stop()
        raise


def prove(model: Stored, feeds: Mapping[str, Array], target: Target = CPU) -> None:
    """Run a file in the worker before it is run in this process, once for each content of it.

    Raises `WorkerEnded` for a crash or a hang; other errors are left to who runs the model.
    """
    key = (target.name, *(f"{p} {p.stat().st_mtime_ns} {p.stat().st_size}" for p in model.files))
    if key in _proven:
        return
    try:
        run(model, feeds, target)
    except WorkerEnded:
        raise
    except OnnxcompError:
        return
    _proven.add(key)


def _dtype(name: str) -> Any:
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name, None) or name)


def spawn() -> Child:
    """A fresh worker process."""
    return Child("worker", [sys.executable, "-P", "-m", "onnxcomp.runtime.trial"])


def _started() -> Child:
    global _worker
    if _worker is not None and (_worker[0] != os.getpid() or _worker[1].process.poll() is not None):
        stop()
    if _worker is None:
        child = spawn()
        _worker = (os.getpid(), child)
        atexit.register(stop)
        child.ask("start", START)
    return _worker[1]


def stop() -> None:
    """End the worker, if there is one; the next run starts another."""
    global _worker
    worker, _worker = _worker, None
    if worker is not None and worker[0] == os.getpid():
        worker[1].process.kill()
        worker[1].__exit__(None, None, None)


# ---- in the worker ---------------------------------------------------------------------------------------------------


class _Worker:
    """The model that was loaded last, until it has run: no weight is held between runs."""

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None
        self.runner: Runner | None = None

    def load(self, m: Mapping[str, Any]) -> dict[str, Any]:
        self.drop()
        model = storage.read(m["model"])
        self.types = {str(v.name): v.dtype.numpy() for v in model.graph.inputs if v.dtype is not None}
        self.runner, self.key = Runner(model, target_of(m["target"])), (m["model"], str(m["target"]))
        return {}

    def run(self, m: Mapping[str, Any]) -> dict[str, Any]:
        if self.key != (m["model"], str(m["target"])):
            self.load(m)
        assert self.runner is not None
        try:
            outputs = self.runner.run(read_arrays(Path(m["feeds"]), self.types))
        finally:
            self.drop()
        write_arrays(Path(m["outputs"]), outputs)
        return {"types": {k: a.dtype.name for k, a in outputs.items() if hasattr(a, "dtype")}}

    def drop(self) -> None:
        if self.runner is not None:
            self.runner.__exit__(None, None, None)
        self.runner = self.key = None


def answer(lines: TextIO, replies: TextIO) -> None:
    """Answer every line."""
    worker = _Worker()
    serve(lines, replies, {"start": lambda m: {}, "load": worker.load, "run": worker.run})


if __name__ == "__main__":
    work(answer)
