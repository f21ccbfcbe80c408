"""The file that `--report` names: never over an input or the result, and there only if the result is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxcomp.errors import OnnxcompError
from onnxcomp.files.atomic import replacing
from onnxcomp.files.storage import COMPANIONS
from onnxcomp.reports.json_report import text
from onnxcomp.reports.outcome import Report

__all__ = ["check_report_file", "report_file"]

LARGEST = 256 << 20  # bytes of a report; a larger file is none


def check_report_file(path: Path | None) -> None:
    """Raise `OnnxcompError` where a report cannot be written, or would take the place of a file that is no report."""
    if path is None:
        return
    if path.suffix in (".onnx", ".data") or path.name in COMPANIONS:
        raise OnnxcompError(f"{path}: is named like a file of a model; name the report otherwise, such as report.json")
    if path.exists() and not (path.is_file() and _is_report(path)):
        raise OnnxcompError(f"{path}: is there and is no report, so the report does not replace it; name another file")
    place = next(p for p in path.absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OnnxcompError(f"{path}: cannot write the report: {place} is no folder that can be written")


def _is_report(path: Path) -> bool:
    try:
        raw = json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and {"schema_version", "steps"} <= raw.keys()


@contextmanager
def report_file(path: Path | None) -> Iterator[Callable[[Report], None]]:
    """A function that writes the report; the file appears when the `with` ends without an error."""
    with contextlib.ExitStack() as stack:

        def put(report: Report) -> None:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(replacing(path)).write_text(text(report), encoding="utf-8")

        try:
            yield put
            stack.close()
        except OSError as e:
            raise OnnxcompError(f"{path}: cannot write the report: {e.strerror or e}") from e
