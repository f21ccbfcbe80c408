"""The presets: recipes that come with onnxcomp, one file each. Light, since the command line's help names them."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["names", "text"]


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def text(name: str) -> str:
    """The file of one preset."""
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
