"""What a command leaves for pipelines: JUnit XML and a Markdown summary, also where the result is refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import GateFailed, OnnxcompError

if TYPE_CHECKING:
    from onnxcomp.reports.outcome import Report

__all__ = ["ForPipelines"]

LONGEST = 4096  # bytes that tell a file of JUnit from others
Tell = Callable[..., None]


@dataclass(frozen=True)
class ForPipelines:
    """The files that a command writes for pipelines: `junit` is replaced, `summary` is added to."""

    command: str
    junit: Path | None = None
    summary: Path | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[Tell]:
        """Takes reports by graph name (and why they are refused); writes the files then, or on an error of ours."""
        self._check()
        try:
            yield self.write
        except GateFailed as e:
            from onnxcomp.reports.outcome import Report

            reports = {e.graph: e.report} if isinstance(e.report, Report) else {}
            self.write(reports, str(e), refused=True)
            raise
        except OnnxcompError as e:
            self.write({}, str(e))
            raise

    def write(self, reports: Mapping[str, Report], trouble: str = "", *, refused: bool = False) -> None:
        """Write what was asked for; raises `OnnxcompError` where a file cannot be written."""
        if self.junit is None and self.summary is None:
            return
        from onnxcomp.files.atomic import replacing
        from onnxcomp.reports import junit

        told: Any = (self.command, reports, trouble)
        path = self.junit or self.summary
        try:
            if self.junit is not None:
                path = self.junit
                with replacing(path) as temporary:
                    temporary.write_text(junit.junit(*told, refused=refused), "utf-8")
            if self.summary is not None:
                path = self.summary
                with path.open("a", encoding="utf-8") as f:
                    f.write(junit.summary(*told, refused=refused))
        except OSError as e:
            raise OnnxcompError(f"{path}: cannot be written: {e.strerror or e}") from e

    def _check(self) -> None:
        """Refuse files that cannot be written, or would take the place of something else, before minutes of work."""
        for option, path in (("--junit", self.junit), ("--summary", self.summary)):
            if path is None:
                continue
            if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
                raise OnnxcompError(f"{option} {path}: {path.absolute().parent} is no folder that can be written")
            if path.exists() and not path.is_file():
                raise OnnxcompError(f"{option} {path}: is no file")
        if self.junit is not None and self.junit.exists() and not _is_junit(self.junit):
            raise OnnxcompError(f"--junit {self.junit}: is there and is no JUnit file, so it is not replaced")


def _is_junit(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            start = f.read(LONGEST)
    except OSError:
        return False
    return not start.strip() or b"<testsuite" in start
