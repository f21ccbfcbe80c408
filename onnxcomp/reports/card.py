"""README.md of a result folder, in the form of a model card: what it is, how it was made, what was checked and lost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from onnxcomp.files.pooling import pooling
from onnxcomp.machine import size_text
from onnxcomp.reports.consumer_snippets import more_snippets
from onnxcomp.reports.json_report import headline
from onnxcomp.reports.markdown import code, fenced, text
from onnxcomp.reports.outcome import Report, Result
from onnxcomp.reports.run_snippet import snippet
from onnxcomp.version import __version__

__all__ = ["CARD", "SourceCard", "card", "checked", "made", "source_card"]

CARD = "README.md"
LARGEST = 1 << 20  # bytes of a source's card; a larger one is not copied
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "base_model")
_FRONT = re.compile(r"\A---\r?\n(.*?)^---\r?\n", re.M | re.S)
_HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
# Tags by the element types that weights are stored in.
_TAGS = {"int8": ("8-bit", "int8"), "int4": ("4-bit", "int4"), "int2": ("2-bit",), "float16": ("fp16",)}
_TAGS |= {"uint8": _TAGS["int8"], "uint4": _TAGS["int4"], "uint2": _TAGS["int2"], "bfloat16": ("bf16",)}


@dataclass(frozen=True)
class SourceCard:
    """The card of the source's folder: the entries of its front matter, and the text below it."""

    front: Mapping[str, Any] = field(default_factory=dict)
    body: str = ""


def source_card(folder: Path) -> SourceCard:
    """The card in a folder; an empty one where there is none that can be read."""
    path = folder / CARD
    try:
        if path.stat().st_size > LARGEST:
            return SourceCard()
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return SourceCard()
    match = _FRONT.match(text)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return SourceCard({}, text)  # the text is not lost for what stands above it
    if not isinstance(front, dict):
        return SourceCard({}, text)
    return SourceCard(front, text[match.end() :] if match else text)


def card(results: Mapping[str, Result], source: Path, folder: Path, *, quantized: bool) -> str:
    """The card of results by the names of their files in `folder`, made of models in the folder `source`.

    `quantized` says that nothing was cut: all that was lost went into fewer bits.
    """
    original = source_card(source)
    title = f"# {text(source.resolve().name or 'model')}, compressed by onnxcomp"
    parts = [_front(results, original, source, quantized=quantized), title, *_parts(results)]
    parts += ["## How to run it", *(snippet(r.model, folder / file, r.report) for file, r in results.items())]
    if len(results) == 1:  # other libraries load one model with its files
        parts += [x for file, r in results.items() for x in more_snippets(r, folder / file, pooling(source))]
    parts += ["`onnxcomp verify .` compares all files with `manifest.json`, loads the model and runs it."]
    if original.body.strip():
        parts += ["---", "The card of the model that this was made of follows, as it was.", original.body.strip()]
    return "\n\n".join(parts) + "\n"


def _parts(results: Mapping[str, Result]) -> list[str]:
    shown = []
    for whole in (r.whole for r in results.values() if r.whole is not None):
        shown += [f"Both graphs together: {text(headline(whole))}.", "## What was checked of both", checked(whole)]
    for file, result in results.items():
        shown += [f"{code(file)}: {text(headline(result.report))}."]
        shown += [f"## How {text(file)} was made", *made(result.report)]
        shown += [f"## What was checked of {text(file)}", checked(result.report)]
        shown += [f"## Known losses of {text(file)}", _losses(result.report)]
    return shown


def _front(results: Mapping[str, Result], original: SourceCard, source: Path, *, quantized: bool) -> str:
    """The front matter, with what the source's says of licence, language, task and data."""
    entries = {k: original.front[k] for k in CARRIED if k in original.front}
    exported = _hub_name(source / "export.json", "source")
    if name := exported or entries.get("base_model") or _hub_name(source / "config.json", "_name_or_path"):
        entries["base_model"] = name
    # Else the source may have been trained from its base model, of which the result is no quantized form then.
    certain = bool(exported) or original.front.get("base_model_relation") == "quantized"
    types = {p.dtype for r in results.values() if r.report.size for p in r.report.size.parts}
    if name and certain and quantized and types & _TAGS.keys():
        entries["base_model_relation"] = "quantized"
    entries["library_name"] = "onnx"
    tags = original.front.get("tags")
    own = ["onnx", "onnxruntime", "onnxcomp", *sorted({t for k in types for t in _TAGS.get(k, ())})]
    entries["tags"] = list(dict.fromkeys([*(t for t in (tags if isinstance(tags, list) else ())), *own]))
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---"


def _hub_name(file: Path, key: str) -> str:
    """The hub's name of a checkpoint, as an entry of a JSON file says; empty where it names none, or a local folder."""
    try:
        found = json.loads(file.read_text("utf-8")).get(key, "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    known = isinstance(found, str) and _HUB_ID.fullmatch(found) is not None
    return found if known and not Path(found).exists() else ""


def made(r: Report) -> list[str]:
    """How a result was made, as parts of a page: recipe, passes, data."""
    rows = ["| pass | sites changed / found | declined | bytes of weights |", "| --- | --- | --- | --- |"]
    for s in r.steps:
        undone = f" (rolled back: {s.rolled_back})" if s.rolled_back else ""
        sizes = f"{size_text(s.nbytes[0])} > {size_text(s.nbytes[1])}"
        rows.append(f"| {code(s.name)}{text(undone)} | {s.changed} / {s.eligible} | {len(s.declined)} | {sizes} |")
    origin = r.origin
    told = [f"By onnxcomp {__version__}, after training, without training it further."]
    if origin is not None:
        made = f"For target {code(origin.target)}, seed {origin.seed}, recipe {code(origin.recipe_name)}:"
        told += [made, fenced("yaml", origin.recipe.strip())]
    data = [f"{what} data: {_data(x.name)}, {x.samples} samples" for what, x in _used(r)]
    return [*told, "\n".join(rows), *(["; ".join(data) + "."] if data else [])]


def _used(r: Report) -> list[tuple[str, Any]]:
    return [(k, x) for k, x in (("calibration", r.calibration), ("evaluation", r.evaluation)) if x is not None]


def _data(name: str) -> str:
    """What data is called, without folders of the machine that had it."""
    return code(Path(name).name or name)


def checked(r: Report) -> str:
    """Gates and measurements as a table."""
    rows = [
        (f"gate {code(v.gate)}", "-" if v.value is None else f"{v.value:.4g}", "passed" if v.passed else "refused")
        for v in r.verdicts
    ]
    if r.size is not None:
        rows.append(("bytes on disk", f"{size_text(r.size.original)} > {size_text(r.size.result)}", "measured"))
    if (v := r.validation) is not None:
        of = f"on {v.samples} {'random' if v.random else 'held-out'} samples"
        rows += [
            (
                text(m.name),
                f"{m.reference:.4g} > {m.candidate:.4g}, change {m.change:+.3g} [{m.low:+.3g}, {m.high:+.3g}]",
                of,
            )
            for m in v.metrics.values()
        ]
        rows += [(text(key), f"{x:.4g}", of) for key, x in v.summary().items() if key != "max-abs" and _first(key)]
    if (b := r.benchmark) is not None:
        cpu = text(f"{b.machine.get('cpu', 'this machine')}, {b.machine.get('cores', '?')} cores")
        for shape in b.shapes:
            x = b.ratio(1, shape)
            rows.append((text(f"times the speed at {shape}"), f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]", cpu))
    if r.integer is not None and r.integer.quantized_linears:
        rows.append(("integer products", f"{r.integer.integer_products} of {r.integer.quantized_linears}", "counted"))
    lines = ["| what | value | how |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _first(key: str) -> bool:
    """Whether a measure is one that cards show: task metrics have rows of their own."""
    return not key.endswith(("-drop", "-rise"))


def _losses(r: Report) -> str:
    lines = []
    if (v := r.validation) is not None and not v.equal:
        far = "" if v.drift.sqnr is None else f", {v.drift.sqnr:.1f} dB of signal to noise"
        lines.append(f"- Outputs differ from the original's; the furthest is {code(v.worst)}{far}.")
    elif v is None:
        lines.append("- The outputs were not compared with the original's.")
    lines += [f"- {text(w)}" for w in r.warnings]
    return "\n".join(lines) or "- None known: the outputs equal the original's on the samples above."
