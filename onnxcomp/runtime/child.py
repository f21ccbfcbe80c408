"""Worker processes that run models: what a model does to its process, or how long it takes, is then no harm to ours.

A worker reads and answers one JSON object per line; the end of the input ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self, TextIO

import numpy as np

from onnxcomp import errors
from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.maths import Array
from onnxcomp.target import Quantized, Target

__all__ = ["Child", "WorkerEnded", "patience", "read_arrays", "serve", "target_of", "work", "write_arrays"]

SECONDS = 60  # a small run may take as long, besides the time to read the model
BYTES_PER_SECOND = 10 << 20  # of a model that is read from a slow disk
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class WorkerEnded(ModelError):
    """The model took the worker down, or the worker was ended because the model did not come to an end."""


def patience(nbytes: int) -> float:
    """Seconds that loading a model of so many bytes and running it once on small inputs may take."""
    return SECONDS + nbytes / BYTES_PER_SECOND


class Child:
    """The handle of a worker process, which ends with the `with` statement; `name` is that of its model."""

    def __init__(self, name: str, command: Sequence[str], what: str = "the process that ran it") -> None:
        self.name, self._what = name, what
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH", "")) if p)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    def ask(self, do: str, seconds: float | None = None, /, **message: Any) -> dict[str, Any]:
        """Send one line and wait for the answer; raises the worker's own error, or one that says how it ended."""
        if self.process.stdin is None or self.process.stdout is None:
            raise OnnxcompError(f"{self.name}: {self._what} has no pipes")
        try:
            self.process.stdin.write(json.dumps({"do": do, **message}) + "\n")
            self.process.stdin.flush()
            if seconds is not None and not _readable(self.process.stdout, seconds):
                self.process.kill()
                raise WorkerEnded(f"{self.name}: did not come to an end within {seconds:.0f} s on small inputs")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerEnded(f"{self.name}: {self._ending()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = getattr(errors, reply["error"], OnnxcompError)
            raise kind(reply["message"])
        return reply

    def _ending(self) -> str:
        code = self.process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        if code == -9:
            return f"{self._what} was killed, most likely for using too much memory; try smaller shapes"
        if code < 0:
            return f"crashes the runtime ({signal.strsignal(-code)}): {self._what} was ended by signal {-code}"
        return f"{self._what} ended with code {code}{': ' + last[0] if last else ''}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        if exc[0] is not None:
            self.process.kill()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()


def _readable(stream: IO[str], seconds: float) -> bool:
    """Whether something can be read within a time."""
    if os.name != "posix":  # pipes cannot be waited for there
        return True
    with selectors.DefaultSelector() as waiting:
        waiting.register(stream, selectors.EVENT_READ)
        return bool(waiting.select(seconds))


# ---- in the worker ---------------------------------------------------------------------------------------------------


def serve(
    lines: TextIO, replies: TextIO, commands: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]
) -> None:
    """Answer every line by the command it names; errors of this package are answers too."""
    for line in lines:
        message = json.loads(line)
        try:
            reply = commands[message["do"]](message)
        except OnnxcompError as e:
            reply = {"error": type(e).__name__, "message": str(e)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def work(answer: Callable[[TextIO, TextIO], None]) -> None:
    """Answer stdin with replies on a copy of stdout, since providers print to the real one."""
    _be_expendable()
    OnnxcompError.on_command_line = True  # who reads the answers says it in its own words
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        answer(sys.stdin, replies)


def _be_expendable() -> None:
    """End with the parent, leave no core dump, and be the first to go where the system runs out of memory."""
    with contextlib.suppress(OSError, ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def target_of(fields: Mapping[str, Any]) -> Target:
    """A target from its fields as JSON holds them."""
    return Target(**{**fields, "providers": tuple(fields["providers"]), "quantized": Quantized(**fields["quantized"])})


# ---- arrays between processes ----------------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name; strings as numpy's own, and what is no array is left out."""
    known = {k: a.astype(np.str_) if a.dtype.kind == "O" else a for k, a in arrays.items() if isinstance(a, np.ndarray)}
    np.savez(path, allow_pickle=False, **{str(i): a for i, a in enumerate(known.values())}, names=np.array([*known]))


def read_arrays(path: Path, types: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
    """The arrays of `write_arrays`; npz knows no bfloat16 and gives raw bytes, which `types` tell."""
    with np.load(path, allow_pickle=False) as archive:
        named = {str(k): archive[str(i)] for i, k in enumerate(archive["names"])}
    return {k: _typed(a, types.get(k)) for k, a in named.items()}


def _typed(a: Array, to: np.dtype[Any] | None) -> Array:
    if a.dtype.kind == "V" and to is not None:
        return a.view(to)
    return a.astype(np.object_) if a.dtype.kind == "U" else a
