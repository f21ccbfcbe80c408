"""Where a model that is compressed for a target really runs on this machine."""

from __future__ import annotations

from onnxcomp.errors import TargetError
from onnxcomp.runtime import sessions
from onnxcomp.target import CPU, Target, resolved

__all__ = ["host_of"]


def host_of(target: Target) -> tuple[Target, str]:
    """Where calibration and comparison run: the target, or the CPU where it is not on this machine, with a note."""
    try:
        sessions.check_target(target)
    except TargetError as e:
        sessions.check_target(CPU)
        return CPU, f"calibrated and compared on this machine's CPU, speed not measured: {e}"
    if not target.here:
        note = f"calibrated and compared on this machine, speed not measured: '{target.name}' is another one"
        if resolved(CPU).quantized.saturates and not target.quantized.saturates:
            note += "; int8 sums saturate here and not there, so an int8 result is better there than these figures say"
        return target, note
    return target, ""
