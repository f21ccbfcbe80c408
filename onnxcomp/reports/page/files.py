"""Reports on disk: the page beside report.json, and made again from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from onnxcomp.errors import OnnxcompError
from onnxcomp.files.atomic import replacing
from onnxcomp.reports.page.render import page
from onnxcomp.reports.schema import ReportPart
from onnxcomp.version import REPORT_SCHEMA

__all__ = ["is_page", "page_file", "read", "reports_in", "write_page"]

LARGEST = 256 << 20  # bytes of a report; a larger file is none
HEAD = 4096  # bytes of a page that say what made it


def page_file(path: Path) -> Path:
    """Where the page of a report.json stands: beside it."""
    return path.with_suffix(".html")


def is_page(path: Path) -> bool:
    """Whether a file is a page that this module wrote."""
    with path.open("rb") as file:
        return b'name="generator" content="onnxcomp ' in file.read(HEAD)


def write_page(report: ReportPart, path: Path) -> Path:
    """Write the page whole or not at all; raises `OnnxcompError` where the place cannot be written."""
    content = page(report)
    try:
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as e:
        raise OnnxcompError(f"{path}: cannot write the page: {e.strerror or e}") from e
    return path


def reports_in(path: Path) -> list[Path]:
    """The reports of a result folder, or the report that a file is; raises `OnnxcompError` where there is none."""
    if path.is_file():
        return [path]
    found = [p for p in sorted(path.glob("*.json")) if p.name == "report.json" or p.name.endswith(".report.json")]
    if not found:
        raise OnnxcompError(f"{path}: there is no report.json; onnxcomp compress writes one, validate with --report")
    return found


def read(path: Path) -> ReportPart:
    """A report.json, checked against its schema; raises `OnnxcompError`."""
    try:
        raw: Any = json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST else None
    except OSError as e:
        raise OnnxcompError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise OnnxcompError(f"{path}: is no JSON: {e}") from e
    if not isinstance(raw, dict) or "schema_version" not in raw:
        raise OnnxcompError(f"{path}: is no report of onnxcomp")
    if raw["schema_version"] != REPORT_SCHEMA:
        raise OnnxcompError(
            f"{path}: is of report schema {str(raw['schema_version'])[:20]}, this onnxcomp reads {REPORT_SCHEMA}: make "
            "the report again, or use the onnxcomp that made it"
        )
    try:
        TypeAdapter(ReportPart).validate_python(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = "/".join(map(str, first["loc"]))
        raise OnnxcompError(f"{path}: is no report of onnxcomp: {where}: {first['msg']}") from e
    return cast(ReportPart, raw)  # as it stands: checking turns whole numbers into others of the same value
