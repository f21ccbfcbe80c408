"""Files of reports, pages included; `--report` never replaces an input or the result, and is there only if that is."""

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
from onnxcomp.reports.json_report import text, to_json
from onnxcomp.reports.outcome import Report
from onnxcomp.reports.page.files import is_page, page_file
from onnxcomp.reports.page.render import page

__all__ = ["check_report_file", "report_file", "write_report"]

LARGEST = 256 << 20  # bytes of a report; a larger file is none


def check_report_file(path: Path | None, *, html: bool = False) -> None:
    """Raise `OnnxcompError` where a report cannot be written, or would take the place of a file that is no report."""
    if path is None:
        return
    if html and path.suffix == ".html":
        raise OnnxcompError(f"{path}: the report is JSON, and its page stands beside it: name it {path.stem}.json")
    if html and (beside := page_file(path)).exists() and not (beside.is_file() and is_page(beside)):
        raise OnnxcompError(f"{beside}: is there and is no page of a report; name another file, or add --no-html")
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


def _contents(report: Report, path: Path, html: bool) -> dict[Path, str]:
    """The text of the page, with `html`, and of report.json; a page that cannot be made becomes a warning."""
    texts = {}
    if html:
        try:
            texts[page_file(path)] = page(to_json(report))
        except Exception as e:  # noqa: BLE001  whatever is wrong with a page, hours of work are not lost for it
            report.warnings.append(f"{page_file(path).name} was not written: {type(e).__name__}: {e}")
    return {**texts, path: text(report)}


def write_report(report: Report, path: Path, *, html: bool) -> None:
    """Write report.json and, with `html`, the page beside it; raises `OnnxcompError` where they cannot be written."""
    with report_file(path, html=html) as put:
        put(report)


@contextmanager
def report_file(path: Path | None, *, html: bool = False) -> Iterator[Callable[[Report], None]]:
    """A function that writes the report; the files appear when the `with` ends without an error."""
    with contextlib.ExitStack() as stack:

        def put(report: Report) -> None:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                for place, content in _contents(report, path, html).items():
                    stack.enter_context(replacing(place)).write_text(content, encoding="utf-8")

        try:
            yield put
            stack.close()
        except OSError as e:
            raise OnnxcompError(f"{path}: cannot write the report: {e.strerror or e}") from e
