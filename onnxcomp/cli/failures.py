"""How the command line says what went wrong, and its exit codes."""

from __future__ import annotations

import io
import sys
import traceback
from types import TracebackType
from typing import Any

from onnxcomp.cli.console import WIDE, Output, show
from onnxcomp.errors import GateFailed, OnnxcompError

__all__ = ["FAULT", "REFUSED", "USAGE", "as_json", "crash", "explain", "of_the_system"]

FAULT, USAGE, REFUSED = 1, 2, 3
OURS = "this is a fault of ours, please report it"


def explain(e: OnnxcompError, *, json: bool, verbose: bool) -> int:
    """Say on stderr what is wrong (with `--json` also as an object on stdout); returns the exit code."""
    from onnxcomp.pipeline import PassFault

    if verbose:
        sys.stderr.write("".join(traceback.format_exception(e)))
    report: Any = None
    if isinstance(e, GateFailed):
        code, first = REFUSED, "refused"
        report, tail = _refusal(e)
    elif isinstance(e, PassFault):
        code, first, tail = FAULT, "error: a pass is at fault, please report it to its author", ""
    else:
        code, first, tail = USAGE, "error", ""
    sys.stderr.write(f"{first}: {e}\n{tail}")
    if json:
        as_json(type(e).__name__, str(e), code, report)
    return code


def of_the_system(e: OSError | MemoryError) -> OnnxcompError:
    """What the system refuses: a file, or memory."""
    if isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        return OnnxcompError(f"{where}{e.strerror or e}")
    return OnnxcompError(f"there is not enough memory for this: {e or 'use smaller shapes or fewer samples'}")


def _refusal(e: GateFailed) -> tuple[Any, str]:
    """The report as JSON, and what was measured with the recipe's advice as text."""
    from onnxcomp.reports.outcome import Report

    if not isinstance(e.report, Report):
        return None, ""
    from rich.console import Console

    from onnxcomp.reports.json_report import to_json
    from onnxcomp.reports.tables import culprit, remedy, report_tables

    text = io.StringIO()
    console = Console(file=text, width=WIDE, highlight=False)
    for table in report_tables(e.report):
        show(console, table)
    advice = e.report.origin.advice.strip() if e.report.origin is not None else ""
    parts = [text.getvalue(), "Nothing was written."]
    parts += [culprit(c)] if (c := e.report.culprit) is not None else []
    parts += [f"What to try:\n{advice}"] if advice else []
    parts += [remedy(r)] if (r := e.report.remedy) is not None else []  # last, so that its recipe can be copied
    return to_json(e.report), "\n".join([*parts, ""])


def as_json(kind: str, message: str, code: int, report: Any = None) -> None:
    """An error as the one object on stdout; `report` tells what was measured when a gate refused."""
    error = {"type": kind, "message": message, "exit_code": code}
    Output(json=True).show({"error": error} | ({"report": report} if report else {}), "")


def crash(json: bool, verbose: bool, kind: type[BaseException], e: BaseException, trace: TracebackType | None) -> None:
    """The hook for what nobody expected: a traceback only with `-v`; Python exits with 1 after it."""
    if verbose:
        traceback.print_exception(kind, e, trace)
    message = f"{kind.__name__}: {e}"
    sys.stderr.write(f"error: {OURS}: {message}" + ("\n" if verbose else "; -v shows where\n"))
    if json:
        as_json(kind.__name__, message, FAULT)
