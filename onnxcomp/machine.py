"""This machine: processor, memory use of the process, and the description that stands beside measurements."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "FLAVOURS",
    "MEMORY",
    "MIB",
    "cpu_features",
    "cpu_kind",
    "installed_runtimes",
    "machine",
    "megabytes",
    "peak_mib",
    "runtime_opset",
    "size_text",
    "status",
]

# The budget of a job in bytes where nobody sets one (`--memory`): what statistics, activations and fits hold at once.
MEMORY = 2 * 10**9
MIB = 1 << 20  # what the system counts memory in; people are told MB of 10^6 and GB of 10^9 bytes everywhere
_STATUS = Path("/proc/self/status")
FLAVOURS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
# The newest operator set that ONNX Runtime loads, from the given version of it on; a test asks the installed one.
_RUNTIME_OPSETS = (((1, 32), 28), ((0, 0), 26))


@cache
def cpu_features() -> frozenset[str]:
    """Instruction sets of this machine that decide int8 speed and saturation: `avx2`, `avx512f`, `vnni`, `dotprod`."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset({"dotprod"} if platform.machine() in ("arm64", "aarch64") else ())
    words = set(info.read_text(errors="replace").lower().split())
    features = words & {"avx2", "avx512f"}
    if words & {"avx512_vnni", "avx_vnni", "avxvnni"}:
        features.add("vnni")
    if "asimddp" in words:
        features.add("dotprod")
    return frozenset(features)


def cpu_kind(features: Collection[str]) -> str:
    """What instruction sets mean for int8, in words."""
    if "vnni" in features:
        return "x86 with VNNI: int8 products run in one instruction"
    if "dotprod" in features:
        return "Arm with dot products: int8 products run in one instruction"
    if wide := next((x for x in ("avx512f", "avx2") if x in features), ""):
        return (
            f"x86 with {'AVX-512' if wide == 'avx512f' else 'AVX2'}, without VNNI: int8 gains less, sums can saturate"
        )
    return "no instruction sets for int8 known"


def installed_runtimes() -> dict[str, str]:
    """Versions of the installed distributions that provide the module onnxruntime; more than one is a broken setup."""
    versions = {}
    for name in FLAVOURS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@cache
def runtime_opset() -> int:
    """The newest operator set of the installed ONNX Runtime; that of the oldest one supported where there is none."""
    installed = min((tuple(map(int, re.findall(r"\d+", v)[:2])) for v in installed_runtimes().values()), default=(0, 0))
    return next(opset for first, opset in _RUNTIME_OPSETS if installed >= first)


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, system and versions: what measured numbers hold for."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "kind": cpu_kind(cpu_features()),
        "cores": cores,
        "features": sorted(cpu_features()),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "onnxcomp": _version("onnxcomp"),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def status(field: str) -> int | None:
    """The number of a field of /proc/self/status (sizes in KiB); None where the system has no such file or field."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return None


def peak_mib() -> float:
    """Peak resident memory of this process so far, MiB."""
    if (kib := status("VmHWM")) is not None:
        return kib / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def size_text(nbytes: float) -> str:
    """Bytes as people read them, such as 58.5 MB or 3.41 GB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{megabytes(nbytes)} MB"


def megabytes(nbytes: float) -> str:
    """Bytes as a number of MB with at least two digits that count."""
    digits = next((d for limit, d in ((1e4, 4), (1e6, 2), (1e8, 1)) if nbytes < limit), 0)
    return f"{nbytes / 1e6:.{digits}f}"
