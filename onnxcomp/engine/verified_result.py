"""Whether a result folder is as it was published, and runs here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxcomp.data.arguments import path_of
from onnxcomp.engine.host import host_of
from onnxcomp.engine.smoke import runs
from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.files import storage
from onnxcomp.files.switch import finish
from onnxcomp.reports.manifest import MANIFEST, Entry, Manifest, read
from onnxcomp.target import CPU, TARGETS

__all__ = ["Verified", "verify"]


@dataclass(frozen=True)
class Verified:
    """What was compared and run, what is wrong, and `unlisted` files, of which the manifest says nothing."""

    files: int
    models: tuple[str, ...]
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(folder: str | Path) -> Verified:
    """Compare all files of a result folder with its manifest, then load its models and run them on made-up inputs.

    Raises `ModelError` for a folder that is not there. The source is not needed, nor the target: where that is not
    here, models run on the CPU.
    """
    place = path_of("folder", folder) or Path()
    if not place.is_dir():
        raise ModelError(f"{place}: no such folder; verify takes the folder of a result, which holds a {MANIFEST}")
    finish(place)
    try:
        manifest = read(place)
    except ModelError as e:
        return Verified(0, (), (str(e),), ())
    if manifest is None:
        return Verified(0, (), (f"{MANIFEST} is missing, so nothing says what the files were",), ())
    problems = [p for name, entry in sorted(manifest.files.items()) if (p := _differs(place / name, entry))]
    there = {p.name for p in place.iterdir()} - manifest.files.keys() - {MANIFEST}
    models = tuple(sorted(manifest.models))
    if not problems:  # what was changed is not run
        problems += [p for name in models if (p := _trouble(place / name, manifest))]
    return Verified(len(manifest.files), models, tuple(problems), tuple(sorted(there)))


def _differs(path: Path, entry: Entry) -> str:
    """What is wrong with a file, empty if nothing is."""
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        found = Entry.of(path)
    except OSError as e:
        return f"{path.name} cannot be read: {e.strerror or e}"
    if found.bytes != entry.bytes:
        return f"{path.name} has {found.bytes:,} bytes, not {entry.bytes:,}"
    return "" if found == entry else f"{path.name} was changed: its SHA-256 is {found.sha256}, not {entry.sha256}"


def _trouble(path: Path, manifest: Manifest) -> str:
    """Why a model does not run, empty if it does."""
    host = host_of(TARGETS.get(manifest.models[path.name].target, CPU))[0]
    try:
        found = runs(storage.read(path), host)
    except OnnxcompError as e:
        return f"{path.name} does not load: {e}"
    return f"{path.name} does not run: {found}" if found else ""
