"""Choices among equivalent forms: what was timed, what was taken and why, kept in a portable file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.lowering.forms import FORMS_VERSION

__all__ = ["Candidate", "Choice", "Choices", "Header"]


@dataclass(frozen=True)
class Candidate:
    """One form of a site: milliseconds per shape, how many times faster than the default with its interval, remarks."""

    form: str
    ms: tuple[float, ...] = ()
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """What was taken for all sites of one signature; `source` is measured, remembered, file or table."""

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
    """What the times of a file are of."""

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
    """Choices by signature and measured numbers by key, for one header; `pinned` ones are taken as they are."""

    header: Header
    sites: dict[str, Choice] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    pinned: bool = False
    path: Path | None = None

    @classmethod
    def load(cls, path: Path, header: Header) -> Choices:
        """A file that `onnxcomp tune` wrote, taken as it is; raises `RecipeError` where it is for something else."""
        found = _read(path)
        if found is None:
            raise RecipeError(f"{path}: is not a file of choices; make one with: onnxcomp tune MODEL -o {path.name}")
        if found.header.target != header.target:
            raise RecipeError(f"{path}: was measured for target '{found.header.target}', this is '{header.target}'")
        if found.header.forms != header.forms:
            raise RecipeError(f"{path}: was made by another version of onnxcomp's forms; run onnxcomp tune again")
        found.pinned = found.header != header
        return found

    @classmethod
    def cached(cls, folder: Path, header: Header) -> Choices:
        """What an earlier run on this machine left in a cache folder; a damaged or foreign file counts as absent."""
        path = folder / f"choices-{header.digest}.json"
        found = _read(path) if path.exists() else None
        if found is None or found.header != header:
            found = cls(header)
        found.path = path
        return found

    def save(self, path: Path | None = None) -> None:
        """Write the file whole or not at all; nothing where no path is known. Raises `OnnxcompError`."""
        to = path or self.path
        if to is None:
            return
        temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
            temporary.replace(to)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise OnnxcompError(f"{to}: cannot write the choices: {e}") from e

    def json(self) -> dict[str, Any]:
        """Plain values."""
        sites = {key: dataclasses.asdict(c) for key, c in self.sites.items()}
        head = dataclasses.asdict(self.header)
        return {"header": head, "sites": sites, "numbers": self.numbers}


def _read(path: Path) -> Choices | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, Mapping):
            return None
        header = TypeAdapter(Header).validate_python(raw.get("header"))
        sites = TypeAdapter(dict[str, Choice]).validate_python(raw.get("sites", {}))
        numbers = TypeAdapter(dict[str, float]).validate_python(raw.get("numbers", {}))
    except (OSError, ValueError, ValidationError):
        return None
    return Choices(header, sites, numbers)
