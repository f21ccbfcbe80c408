"""What pipelines read: JUnit XML with a case for each gate, and a summary in Markdown for the page of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree as Xml

from onnxcomp.reports.card import checked, made
from onnxcomp.reports.json_report import headline
from onnxcomp.reports.markdown import code, text
from onnxcomp.reports.outcome import Report

__all__ = ["junit", "summary"]

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(command: str, reports: Mapping[str, Report], trouble: str = "", *, refused: bool = False) -> str:
    """JUnit XML of a command: a suite for each graph, in it a case for each gate and one for the command itself.

    `trouble` is why there is no result: a failure where a gate or a check `refused` it, else an error. Names do not
    depend on the outcome, and a gate that refused is one failure: the command's own case fails for other reasons only.
    """
    whole = Xml.Element("testsuites", name=f"onnxcomp {command}")
    for name, report in (reports or {"": Report()}).items():
        of_several = len(reports) > 1 or refused  # of several graphs the first that is refused is the only one
        suite = Xml.SubElement(
            whole, "testsuite", name=f"onnxcomp.{command}" + (f".{name}" if name and of_several else "")
        )
        for v in report.verdicts:
            _case(suite, v.gate, 0.0, "" if v.passed else str(v), "failure")
        seconds = sum(s.seconds for s in report.steps if not s.cached)
        told = refused and any(not v.passed for v in report.verdicts)
        _case(suite, command, seconds, "" if told else trouble, "failure" if refused else "error")
        for kind in ("failure", "error"):
            suite.set(f"{kind}s", str(len(suite.findall(f"testcase/{kind}"))))
        suite.set("tests", str(len(suite)))
        suite.set("time", f"{seconds:.3f}")
    Xml.indent(whole)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(whole, "unicode") + "\n"


def _case(suite: Xml.Element, name: str, seconds: float, trouble: str, kind: str) -> None:
    case = Xml.SubElement(suite, "testcase", name=_NOT_XML.sub("?", name), classname=str(suite.get("name")))
    case.set("time", f"{seconds:.3f}")
    if trouble:
        said = _NOT_XML.sub("?", trouble)
        Xml.SubElement(case, kind, message=said.splitlines()[0]).text = said


def summary(command: str, reports: Mapping[str, Report], trouble: str = "", *, refused: bool = False) -> str:
    """What came of a command in Markdown: the verdict, what was checked, and what was done."""
    end = ("refused" if refused else "failed") if trouble else "done"
    parts = [f"### onnxcomp {command}: {end}", *map(text, trouble.splitlines())]
    for name, report in reports.items():
        parts += [f"{f'{code(name)}: ' if len(reports) > 1 else ''}{text(headline(report))}.", checked(report)]
        if report.steps:
            done = "\n\n".join(made(report))
            parts.append(f"<details><summary>How it was made</summary>\n\n{done}\n\n</details>")
        parts += ["\n".join(f"- {text(w)}" for w in report.warnings)] if report.warnings else []
    return "\n\n".join(parts) + "\n"
