"""`onnxcomp report`: the page of a report again, from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.cli.console import Output
from onnxcomp.cli.options import Json, Quiet, Verbose

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A result folder, or a report.json.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make report.html again from report.json, one page for each report of the folder."""
    from onnxcomp.engine.report_file import check_report_file
    from onnxcomp.reports.manifest import renew
    from onnxcomp.reports.page.files import page_file, read, reports_in, write_page

    found = reports_in(folder)
    for path in found:
        check_report_file(path, html=True)
    pages = [write_page(read(path), page_file(path)) for path in found]
    renew(found[0].parent, pages)
    Output(json, quiet, verbose).show({"pages": [str(p) for p in pages]}, "\n".join(f"written to {p}" for p in pages))
