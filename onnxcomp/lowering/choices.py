"""Choices among equivalent forms: measured times, the chosen form and the reason, stored in a portable JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.files.atomic import replacing
from onnxcomp.files.seal import seal
from onnxcomp.lowering.forms import FORMS_VERSION

__all__ = ["Candidate", "Choice", "Choices", "Header"]


LARGEST = 64 << 20  # bytes of a file of choices; those of a model of 1,000 sites have one


@dataclass(frozen=True)
class Candidate:
    """One form of a site: milliseconds per shape, and how many times faster than the default with its interval."""

    form: str
    ms: tuple[float, ...] = ()
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """The form chosen for all sites of one signature; `source` is measured, remembered, file or table."""

    kind: str
    site: str
    form: str
    default: str
    reason: str
    source: str
    sites: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Header:
    """What the times of a file hold for: target, machine, runtime, threads and version of the forms."""

    target: str
    machine: str
    runtime: str
    threads: int = 0
    forms: int = FORMS_VERSION

    @property
    def digest(self) -> str:
        """A short name for files."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Choices:
    """Choices by signature and measured numbers by key, for one header; `pinned` ones are never measured again.

    `notes` say that a cached file was left out and why.
    """

    header: Header
    sites: dict[str, Choice] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    pinned: bool = False
    proven: bool = True  # the file holds what was written
    path: Path | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, header: Header) -> Choices:
        """A file that `onnxcomp tune` wrote; raises `RecipeError` where it is for another target or other forms."""
        choices = _read(path)
        if choices is None:
            raise RecipeError(f"{path}: is not a file of choices; make one with: onnxcomp tune MODEL -o {path.name}")
        if choices.header.target != header.target:
            raise RecipeError(f"{path}: was measured for target '{choices.header.target}', this is '{header.target}'")
        if choices.header.forms != header.forms:
            raise RecipeError(f"{path}: was made by another version of onnxcomp's forms; run onnxcomp tune again")
        choices.pinned = choices.header != header
        return choices

    @classmethod
    def cached(cls, folder: Path, header: Header) -> Choices:
        """The choices of earlier runs on this machine in a cache folder; none where the file is damaged or foreign."""
        path = folder / f"choices-{header.digest}.json"
        choices = _read(path) if path.exists() else None
        if choices is None or choices.header != header or not choices.proven:
            notes = [f"the cached choices {path.name} are not those that were written; made again"]
            choices = cls(header, notes=notes if path.exists() else [])
        choices.path = path
        return choices

    def save(self, path: Path | None = None) -> None:
        """Write the file atomically; nothing where no path is known. Raises `OnnxcompError`."""
        target = path or self.path
        if target is None:
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                plain = {**self.json(), "seal": self._seal()}
                temporary.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as e:
            raise OnnxcompError(f"{target}: cannot write the choices: {e}") from e

    def _seal(self) -> str:
        return seal([json.dumps(self.json(), sort_keys=True)])

    def json(self) -> dict[str, Any]:
        """Plain values."""
        sites = {key: dataclasses.asdict(c) for key, c in self.sites.items()}
        head = dataclasses.asdict(self.header)
        return {"header": head, "sites": sites, "numbers": self.numbers}


def _read(path: Path) -> Choices | None:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, Mapping):
            return None
        header = TypeAdapter(Header).validate_python(raw.get("header"))
        sites = TypeAdapter(dict[str, Choice]).validate_python(raw.get("sites", {}))
        numbers = TypeAdapter(dict[str, float]).validate_python(raw.get("numbers", {}))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None
    choices = Choices(header, sites, numbers)
    choices.proven = raw.get("seal") == choices._seal()
    return choices
