"""The worker process of the benchmark, and a watch on the CPU use of other processes.

A worker holds one model: it answers `ready`, `load`, then any number of `run`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from onnxcomp.errors import OnnxcompError, TargetError
from onnxcomp.machine import peak_mib, status
from onnxcomp.runtime import child
from onnxcomp.runtime.encoder_source import cross_caches
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.runtime.installed import installed_runtimes
from onnxcomp.runtime.sessions import Session, check_target

__all__ = ["Child", "Watch", "busy_seconds", "serve"]

_STAT = Path("/proc/stat")


class Child(child.Child):
    """The handle of a worker process, which ends with the `with` statement."""

    def __init__(self, name: str, command: Sequence[str] = ()) -> None:
        ours = [sys.executable, "-P", "-m", "onnxcomp.benchmarking.worker"]
        super().__init__(name, command or ours, "the benchmark's process")

    def ask(self, do: str, seconds: float | None = None, /, **message: Any) -> dict[str, Any]:
        """As for any worker; loading, with its first run, must come to an end."""
        if do in ("load", "decoder") and "model" in message:
            files = Path(message["model"]).parent.iterdir()  # with the model's data, of whatever name
            seconds = child.patience(sum(p.stat().st_size for p in files if p.is_file()))
        return super().ask(do, seconds, **message)


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


class _Worker:
    """The state of the worker process between two requests."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.feeds: dict[str, Any] = {}
        self.text: Decoder | None = None
        self.prompt = np.zeros((1, 1), np.int64)
        self.encoder: Session | None = None

    def ready(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Load the runtime's library, which is no part of loading the model."""
        check_target(child.target_of(m["target"]))
        return {}

    def load(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Create the session, read the inputs, and run once."""
        target = child.target_of(m["target"])
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
        begun = time.perf_counter()
        self.session.run(self.feeds)
        first = time.perf_counter() - begun
        threads = m["threads"] or _started(threads_before, threads_after)
        return {
            "load_s": loaded - started,
            "first_s": first,
            "base_mib": base,
            "provider": self.session.provider,
            "threads": threads,
            "runtime": installed_runtimes(),
        }

    def decoder(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Load a decoder, and the encoder that it is behind, if any; read the prompt, or the encoder's inputs, once."""
        threads_before, base = status("Threads"), peak_mib()
        started, target, given = time.perf_counter(), child.target_of(m["target"]), None
        if m.get("encoder"):
            self.encoder = Session(Path(m["encoder"]), target, threads=m["threads"], prepack=True)
            self.feeds = dict(np.load(m["prompt"], allow_pickle=False))
            given = self._encoded()
        else:
            self.prompt = np.load(m["prompt"], allow_pickle=False)
        self.text = Decoder(Path(m["model"]), target, threads=m["threads"], given=given)
        loaded = time.perf_counter()
        threads = m["threads"] or _started(threads_before, status("Threads")) // (1 + bool(given))
        self.text.read(self.prompt)
        return {
            "load_s": loaded - started,
            "base_mib": base,
            "cached": self.text.cached,
            "provider": self.text.provider,
            "threads": threads,
            "runtime": installed_runtimes(),
        }

    def generate(self, m: Mapping[str, Any]) -> dict[str, Any]:
        """Read the prompt and go on with the likeliest tokens: seconds of the first and of each further one.

        The first is behind a run of the encoder, where there is one.
        """
        if self.text is None:
            raise OnnxcompError("the benchmark's worker was asked to generate before it had a decoder")
        watch, seconds = Watch(), []
        begin = time.perf_counter()
        self.text.reset(self._encoded() if self.encoder is not None else None)
        for _ in generated(self.text, self.prompt, m["new"]):
            now = time.perf_counter()
            seconds.append(now - begin)
            begin = now
        return {"first": seconds[0], "others": seconds[1:], "foreign": watch.foreign(), "peak_mib": peak_mib()}

    def _encoded(self) -> dict[str, Any]:
        """What the decoder is given: caches of the encoder's states."""
        assert self.encoder is not None, "only asked for behind an encoder"
        return cross_caches(self.feeds, self.encoder.run(self.feeds), {"mask": "attention_mask"})

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


def _started(before: int | None, after: int | None) -> int:
    """Threads of a session; ONNX Runtime counts the calling one as one of its own."""
    return 0 if before is None or after is None else 1 + after - before


def serve(lines: TextIO, replies: TextIO) -> None:
    """Answer every line."""
    worker = _Worker()
    child.serve(
        lines,
        replies,
        {
            "ready": worker.ready,
            "load": worker.load,
            "run": worker.run,
            "decoder": worker.decoder,
            "generate": worker.generate,
        },
    )


if __name__ == "__main__":
    child.work(serve)
