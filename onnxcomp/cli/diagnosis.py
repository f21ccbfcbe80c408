"""What this machine and this installation can do, and what to repair."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.engine import catalog
from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph
from onnxcomp.machine import MEMORY, cpu_features, machine, size_text
from onnxcomp.reports.json_report import versions
from onnxcomp.runtime import installed, sessions
from onnxcomp.target import CPU, CUDA, TENSORRT, Target

__all__ = ["Check", "diagnose"]

Status = Literal["ok", "info", "warning", "broken"]
EXTRAS = {
    "export": (("torch", "transformers", "safetensors"), "onnxcomp export"),
    "text": (("tokenizers",), "text data (.jsonl, .txt)"),
    "image": (("PIL",), "image folders"),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `advice` says what to do about it."""

    status: Status
    check: str
    detail: str
    advice: str = ""


def diagnose() -> dict[str, Any]:
    """All checks with the machine and versions; `ok` is False when something is broken."""
    found = [
        _python(),
        *_runtimes(),
        *(_provider(t) for t in (CPU, CUDA, TENSORRT)),
        _integers(),
        _threads(),
        _memory(),
    ]
    found += _passes()
    found += [_extra(name, modules, what) for name, (modules, what) in EXTRAS.items()]
    return {
        "ok": all(c.status != "broken" for c in found),
        "checks": [asdict(c) for c in found],
        "machine": machine(),
        "versions": versions(),
    }


def _python() -> Check:
    text = ", ".join(f"{name} {v}" for name, v in versions().items())
    return Check("ok", "versions", text)


def _runtimes() -> list[Check]:
    found = installed.installed_runtimes()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return [Check("broken", "runtime", "ONNX Runtime is not installed", "pip install 'onnxcomp[cpu]'")]
    if len(found) > 1:
        advice = f"pip uninstall -y {' '.join(found)}, then pip install 'onnxcomp[cpu]' or 'onnxcomp[gpu]'"
        return [Check("broken", "runtime", f"{text} overwrite each other's files", advice)]
    return [Check("ok", "runtime", text)]


def probe() -> Graph:
    """The smallest model: y = x + x, two floats."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Add", [x, x], name="add")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 18}, name="probe")
    return Graph(ir.Model(graph, ir_version=8))


def _provider(target: Target) -> Check:
    """Whether a model really runs there; only a CPU that does not work is broken."""
    name = f"target {target.name}"
    try:
        with sessions.Session(probe(), target) as session:
            session.run({"x": np.ones(2, np.float32)})
    except TargetError as e:
        return Check("broken" if target is CPU else "info", name, str(e))
    return Check("ok", name, f"{target.provider} runs models")


def _integers() -> Check:
    """What the instruction set means for int8."""
    features = cpu_features()
    named = ", ".join(sorted(features)) or "unknown"
    if "vnni" in features or "dotprod" in features:
        return Check("ok", "int8", f"{named}: integer dot products, int8 is fast and exact")
    if "avx2" in features:
        text = f"{named}, no VNNI: u8 x s8 sums saturate at 16 bits and int8 gains less speed"
        advice = "target cpu limits pairs of weights here so that sums cannot saturate; a CPU with VNNI is faster"
        return Check("warning", "int8", text, advice)
    if features:
        return Check(
            "warning", "int8", f"{named}: no integer dot products", "expect smaller files, little speed from int8"
        )
    text = f"the instruction set of this {platform.machine()} CPU is not known"
    return Check("info", "int8", text, "measure with onnxcomp bench")


def _threads() -> Check:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS")
    text = f"{allowed} of {os.cpu_count()} logical cores" + (f", OMP_NUM_THREADS={limit}" if limit else "")
    return Check("ok", "threads", text)


def _memory() -> Check:
    total, free = memory()
    if total is None or free is None:
        return Check("info", "memory", "unknown on this system")
    text = f"{size_text(free)} free of {size_text(total)}"
    if free < MEMORY:
        return Check("warning", "memory", text, "limit calibration with --memory 1GB")
    return Check("ok", "memory", text)


def memory() -> tuple[int | None, int | None]:
    """Total and free bytes of memory, within the limit of the container if there is one; None where unknown."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None, None
    rows = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return total, free


def _passes() -> list[Check]:
    """The available passes, and packages whose passes cannot be used."""
    known = catalog.listing()
    advice = "update or uninstall the package that provides it; the others work"
    broken = [Check("warning", "passes", problem, advice) for problem in known.problems]
    return [Check("ok", "passes", f"{len(known.passes)} passes"), *broken]


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def _extra(name: str, modules: tuple[str, ...], what: str) -> Check:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if not missing:
        return Check("ok", f"extra {name}", f"{', '.join(modules)} installed")
    return Check(
        "info", f"extra {name}", f"{', '.join(missing)} missing, needed for {what}", f"pip install 'onnxcomp[{name}]'"
    )
