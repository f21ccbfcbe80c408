"""What a package is made of: a model, its configuration, and the names and sizes of its caches."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.data.arrays import read_json
from onnxcomp.data.narrowed import KEPT
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.graph import Graph

__all__ = ["Source", "Template"]

_NUMBER = re.compile(r"\d+")
PAIR = ("key", "value")


@dataclass(frozen=True)
class Template:
    """Names of the caches of all layers, `past.%d.key` and `past.%d.value`, with the numbers of the layers."""

    key: str
    value: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A model file with the configuration beside it; `threads` as many as its user asks for, or 0.

    `notes` tell what was done to the graph for its consumer, and what not.
    """

    path: Path
    graph: Graph
    config: dict[str, Any]
    generation: dict[str, Any]
    threads: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, threads: int = 0) -> Source:
        """Read the model; raises `ModelError` where its folder has no config.json, or one that cannot be read."""
        if not (path.parent / "config.json").is_file():
            raise ModelError(f"{path.parent}: has no config.json, which every consumer reads; copy the checkpoint's")
        config, generation = (read_json(path.parent / name) for name in ("config.json", "generation_config.json"))
        return cls(path, storage.load(path), config, generation, threads)

    @property
    def inputs(self) -> list[str]:
        """Names of the model's inputs."""
        return [str(v.name) for v in self.graph.inputs]

    @property
    def caches(self) -> list[ir.Value]:
        """Inputs that are keys or values of earlier tokens, `[batch, heads, tokens, channels]`."""
        return [v for v in self.graph.inputs if v.shape is not None and len(v.shape) == 4 and "past" in str(v.name)]

    @property
    def slides(self) -> bool:
        """Whether its caches hold fewer tokens than were read."""
        return any(str(d) == KEPT for v in self.graph.outputs for d in v.shape or ())

    @cached_property
    def past(self) -> Template:
        """The cache inputs; raises `ModelError` where there are none, or their names follow no pattern."""
        return self._template(self.caches, "takes")

    @cached_property
    def present(self) -> Template:
        """The cache outputs, as `past`."""
        ports = [v for v in self.graph.outputs if v.shape is not None and len(v.shape) == 4]
        return self._template(ports, "gives")

    def _template(self, ports: list[ir.Value], does: str) -> Template:
        caches = [str(v.name) for v in ports]
        numbered: dict[str, list[int]] = {}
        for name in caches:
            if len(found := list(_NUMBER.finditer(name))) == 1:
                at = found[0]
                numbered.setdefault(f"{name[: at.start()]}%d{name[at.end() :]}", []).append(int(at[0]))
        key, value = (next((t for t in numbered if part in t.replace("past_key_values", "")), "") for part in PAIR)
        if not caches:
            raise ModelError(f"{self.path}: {does} no caches, so it cannot go on from token to token; export it anew")
        if not key or not value or numbered[key] != numbered[value] or sum(map(len, numbered.values())) != len(caches):
            raise ModelError(f"{self.path}: the names of caches follow no pattern with one number: {caches[0]}, ...")
        return Template(key, value, tuple(sorted(numbered[key])))

    def cache_sizes(self) -> list[tuple[int, int]]:
        """Key-value heads and size of a head, of every layer; raises `ModelError` where the inputs do not tell."""
        by_name, sizes = {str(v.name): v for v in self.graph.inputs}, list[tuple[int, int]]()
        for layer in self.past.layers:
            v = by_name[self.past.key % layer]
            heads, width = (v.shape[1], v.shape[3]) if v.shape is not None else (None, None)
            if not isinstance(heads, int) or not isinstance(width, int):
                raise ModelError(f"{self.path}: input '{v.name}' has no fixed numbers of heads and channels")
            sizes.append((heads, width))
        return sizes

    def number(self, *names: str) -> int:
        """An entry of the configuration that goes by one of several names; raises `ModelError`."""
        found = next((self.config[n] for n in names if isinstance(self.config.get(n), int)), None)
        if found is None:
            raise ModelError(f"{self.path.parent / 'config.json'}: has no '{names[0]}', which the consumer needs")
        return int(found)

    def token(self, kind: str) -> Any:
        """A special token by its kind (`eos`), a number, a list of numbers or None."""
        name = f"{kind}_token_id"
        given = self.generation.get(name, self.config.get(name))
        for x in given if isinstance(given, list) else [given]:
            if x is not None and (not isinstance(x, int) or isinstance(x, bool)):
                raise ModelError(
                    f"{self.path.parent}: {name} is {str(given)[:40]}; it must be a number or a list of them"
                )
        return given
