"""The installed ONNX Runtime: the only file that imports it; what it provides, and what is missing on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

from onnxcomp.errors import TargetError
from onnxcomp.machine import installed_runtimes
from onnxcomp.target import Target

__all__ = ["available", "failures", "installed_runtimes", "ort_module", "preload", "short", "unavailable"]

LIBRARIES = {
    "CUDAExecutionProvider": ("libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcudnn.so.9"),
    "TensorrtExecutionProvider": ("libcuda.so.1", "libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10"),
}
INSTALL = {
    "CUDAExecutionProvider": "an NVIDIA driver and "
    "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.28' (the extra onnxcomp[gpu])",
    "TensorrtExecutionProvider": "an NVIDIA driver, pip install 'onnxruntime-gpu[cuda,cudnn]>=1.28' and "
    "pip install 'tensorrt-cu13>=10.13,<11' (the extra onnxcomp[tensorrt])",
}


@functools.cache
def ort_module() -> Any:
    """The module onnxruntime; raises `TargetError` where it is missing, an empty package, or installed twice."""
    installed = installed_runtimes()
    if len(installed) > 1:
        both = " and ".join(f"{n} {v}" for n, v in installed.items())
        raise TargetError(
            f"{both} are installed together and overwrite each other's files: "
            f"pip uninstall -y {' '.join(installed)}, then install one: pip install 'onnxcomp[cpu]' or 'onnxcomp[gpu]'"
        )
    try:
        import onnxruntime as ort  # noqa: TID251
    except ImportError as e:
        raise TargetError(f"ONNX Runtime is not installed or does not load ({e}): pip install 'onnxcomp[cpu]'") from e
    if not hasattr(ort, "InferenceSession"):
        raise TargetError("package onnxruntime is empty: pip uninstall -y onnxruntime, pip install 'onnxcomp[cpu]'")
    return ort


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:2])


def available(target: Target) -> Any:
    """The module onnxruntime, if it is new enough and built with the target's provider; raises `TargetError`."""
    ort = ort_module()
    if _version(ort.__version__) < _version(target.min_runtime):
        need = f"needs ONNX Runtime {target.min_runtime} or newer, {ort.__version__} is installed"
        raise TargetError(f"target '{target.name}' {need}: pip install -U '{target.package}'")
    if target.provider not in ort.get_available_providers():
        have = " ".join(installed_runtimes()) or "onnxruntime"
        raise TargetError(
            f"target '{target.name}' needs {target.provider}, which {have} {ort.__version__} does not have: "
            f"pip uninstall -y {have}, then pip install '{target.package}'"
        )
    return ort


def preload(ort: Any, provider: str) -> None:
    """Load NVIDIA's libraries from their Python packages, which the dynamic loader does not search."""
    if provider not in LIBRARIES:
        return
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    spec = importlib.util.find_spec("tensorrt_libs") if provider == "TensorrtExecutionProvider" else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(folder) / name), mode=ctypes.RTLD_GLOBAL)


def _missing(provider: str) -> list[str]:
    """Shared libraries that the provider needs and that cannot be loaded."""
    missing = []
    for name in LIBRARIES.get(provider, ()):
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing


def unavailable(target: Target, otherwise: str) -> TargetError:
    """The error for a target that does not run: missing libraries where there are any, else the reason given."""
    missing = _missing(target.provider)
    why = f"not found: {', '.join(missing)}" if missing else otherwise
    need = INSTALL.get(target.provider, target.package)
    return TargetError(f"target '{target.name}' does not run on this machine ({why}); it needs {need}")


def short(e: Exception) -> str:
    """The runtime's error message without its source paths, at most 300 characters."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(e).strip())
    text = re.sub(r"\S*onnxruntime\S*\.(cc|h|cpp):\d+ ?\S*\([^)]*\) ?", "", text)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


@functools.cache
def failures() -> tuple[type[Exception], ...]:
    """The exceptions that the runtime raises; its own ones have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: TID251

    runtime_errors = [c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception)]
    return (*runtime_errors, RuntimeError, ValueError, TypeError)
