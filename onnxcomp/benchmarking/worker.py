"""The worker process of the benchmark, its handle, and a watch on the CPU use of other processes.

A worker holds one model. It reads and answers one JSON object per line: `ready`, `load`, then any number of `run`; the
end of the input ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self, TextIO

import numpy as np

from onnxcomp import errors
from onnxcomp.errors import OnnxcompError, TargetError
from onnxcomp.machine import peak_mib, status
from onnxcomp.runtime.installed import installed_runtimes
from onnxcomp.runtime.sessions import Session, check_target
from onnxcomp.target import Quantized, Target

__all__ = ["Child", "Watch", "busy_seconds", "main"]

_STAT = Path("/proc/stat")


class Child:
    """The handle of a worker process, which ends with the `with` statement."""

    def __init__(self, name: str, command: Sequence[str] = ()) -> None:
        self._name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH", "")) if p)
        self.process = subprocess.Popen(
            command or [sys.executable, "-P", "-m", "onnxcomp.benchmarking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        """Send one line and wait for the answer; raises the worker's own error, or one that says how it ended."""
        if self.process.stdin is None or self.process.stdout is None:
            raise OnnxcompError(f"{self._name}: the benchmark's worker has no pipes")
        try:
            self.process.stdin.write(json.dumps({"do": do, **message}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise OnnxcompError(f"{self._name}: {self._ending()}")
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
            return "the benchmark's process was killed, most likely for using too much memory; try smaller shapes"
        return f"the benchmark's process ended with code {code}{': ' + last[0] if last else ''}"

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


def busy_seconds(stat: str, cpus: frozenset[int], ticks: int) -> float:
    """Seconds in which the given cores were not idle, from the text of /proc/stat (user time includes guest time)."""
    total = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _, _, irq, softirq, steal = (int(x) for x in fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / ticks


class Watch:
    """Measures how many cores other processes use since the last `start`."""

    def __init__(self) -> None:
        self._cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
        self._known = _STAT.exists() and bool(self._cpus)
        self.start()

    def _busy(self) -> float:
        return busy_seconds(_STAT.read_text(), self._cpus, os.sysconf("SC_CLK_TCK")) if self._known else 0.0

    def start(self) -> None:
        """Begin a new interval."""
        self._begin = (time.perf_counter(), self._busy(), time.process_time())

    def foreign(self) -> float | None:
        """Average number of cores that other processes used since `start`; None where it is not available."""
        wall, busy, cpu = self._begin
        elapsed = time.perf_counter() - wall
        if not self._known or elapsed <= 0:
            return None
        return max(0.0, (self._busy() - busy - (time.process_time() - cpu)) / elapsed)


def _target(fields: Mapping[str, Any]) -> Target:
    """A target from its fields as JSON holds them."""
    return Target(**{**fields, "providers": tuple(fields["providers"]), "quantized": Quantized(**fields["quantized"])})


class _Worker:
    """The state of the worker process between two requests."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.feeds: dict[str, Any] = {}

    def ready(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Load the runtime's library, which is no part of loading the model."""
        check_target(_target(m["target"]))
        return {}

    def load(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Create the session, read the inputs, and run once."""
        target = _target(m["target"])
        check_target(target)
        threads_before, base = status("Threads"), peak_mib()
        started = time.perf_counter()
        self.session = Session(Path(m["model"]), target, threads=m["threads"], prepack=True)
        loaded = time.perf_counter()
        if self.session.emulated:
            raise TargetError(f"{m['model']}: computes in bfloat16, for which a CPU has no kernels: nothing to time")
        threads_after = status("Threads")
        types = {port.name: port.dtype for port in self.session.inputs}
        with np.load(m["feeds"], allow_pickle=False) as archive:
            for name, a in archive.items():  # npz knows no bfloat16 and gives raw bytes
                self.feeds[name] = a.view(types[name]) if a.dtype.kind == "V" and name in types else a
        self.session.run(self.feeds)
        # ONNX Runtime counts the calling thread as one of its own.
        threads = m["threads"] or (
            1 + threads_after - threads_before if threads_after is not None and threads_before is not None else 0
        )
        return {
            "load_s": loaded - started,
            "base_mib": base,
            "provider": self.session.provider,
            "threads": threads,
            "runtime": installed_runtimes(),
        }

    def run(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Warm up, then `count` timed runs as one block."""
        if self.session is None:
            raise OnnxcompError("the benchmark's worker was asked to run before it had a model")
        for _ in range(m["warmup"]):
            self.session.run(self.feeds)
        watch, samples = Watch(), []
        for _ in range(m["count"]):
            begin = time.perf_counter()
            self.session.run(self.feeds)
            samples.append(time.perf_counter() - begin)
        foreign = watch.foreign()
        return {"samples": samples, "foreign": foreign, "peak_mib": peak_mib()}


def serve(lines: TextIO, replies: TextIO) -> None:
    """Answer every line; errors of this package are answers too."""
    worker = _Worker()
    for line in lines:
        message = json.loads(line)
        try:
            reply = {"ready": worker.ready, "load": worker.load, "run": worker.run}[message["do"]](message)
        except OnnxcompError as e:
            reply = {"error": type(e).__name__, "message": str(e)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Run the worker with replies on a copy of stdout, since providers print to the real one."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
