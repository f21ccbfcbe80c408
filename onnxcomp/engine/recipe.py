"""Recipes: passes with their options, target, gates and data, as one value that is also a YAML file.

A file is a list of entries, or a mapping with `passes:` and the other fields of `Recipe`. An entry is a pass name, or
`{name: {option: value}}`; the command line's `--pass` takes the same entry. Law: `parse_pass(str(p)) == p`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from onnxcomp.engine import recipes
from onnxcomp.engine.blame import blaming
from onnxcomp.engine.catalog import listing, load, nearest, options_schema
from onnxcomp.errors import RecipeError
from onnxcomp.pipeline import Pass, plain
from onnxcomp.validation.gates import Gate

__all__ = ["VERSION", "Recipe", "RecipeData", "parse_pass", "presets", "schema", "with_option"]

VERSION = 1
LARGEST = 256 << 10  # characters of a recipe file
DEEPEST = 16  # levels of nesting
_FILE_NAME = re.compile(r"\w[\w .+-]{0,63}")
LISTS = ("passes", "rungs", "__pydantic_config__")  # what holds passes, which pydantic knows nothing of
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class RecipeData:
    """Where data comes from, as on the command line (which wins); paths are relative to the current folder."""

    __pydantic_config__ = _STRICT

    calibration: str | None = None
    """What statistics are collected on: .npz, .jsonl, .txt, an image folder, package.module:function or random."""
    evaluation: str | None = None
    """What the result is judged on; without it one fifth of the calibration data is held out."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """How many samples of each are used at most."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Samples per batch."""
    sequence: Annotated[int, Field(ge=1)] | None = None
    """Tokens per sample at most."""
    text_column: str | None = None
    """The field of .jsonl that holds the text, of two texts a,b; by default text and text_pair."""
    label_column: str | None = None
    """The field of .jsonl that holds the label; by default label."""


@dataclass(frozen=True)
class Recipe:
    """What is done to a model and what the result must meet; raises `RecipeError` for anything that does not fit."""

    __pydantic_config__ = _STRICT

    passes: tuple[Pass, ...]
    """The passes in order; each is a name or {name: options}."""
    name: str = "custom"
    """What reports call this recipe."""
    version: Annotated[int, Field(ge=1)] = VERSION
    """Version of the recipe format."""
    target: str = "cpu"
    """Where the result will run: a built-in target or a YAML file."""
    gates: tuple[str, ...] = ()
    """What the result must meet, each NAME OP VALUE, such as sqnr>=20 or perplexity-rise<=1%."""
    on_fail: Literal["raise", "rollback"] = "raise"
    """Whether a refused pass ends the run or is undone."""
    any_order: bool = False
    """Allow passes out of the order of their stages."""
    allow_unchanged: bool = False
    """Allow a lossy pass that changes nothing."""
    data: RecipeData = field(default_factory=RecipeData)
    """Where calibration and evaluation data come from."""
    about: str = ""
    """What the recipe is for."""
    advice: str = ""
    """What to try when a gate refuses the result."""
    rungs: Mapping[str, tuple[Pass, ...]] = field(default_factory=dict)
    """Ladder: passes by name that go on from `passes`; the first whose result meets the gates is written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", _passes(self.passes))
        object.__setattr__(self, "rungs", _rungs(self.rungs))
        for name, adapter in _settings().items():
            object.__setattr__(self, name, _checked(adapter, getattr(self, name), name))
        if self.version > VERSION:
            raise RecipeError(_too_new(self.version))
        if not _FILE_NAME.fullmatch(self.name):
            raise RecipeError(
                "recipe: 'name' becomes a part of file names: letters, digits, spaces and -_.+, at most 64, the first "
                f"a letter or digit; not {_shown(self.name)}"
            )
        object.__setattr__(self, "gates", tuple(c.text for c in Gate(self.gates).conditions))  # without replaced ones

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a recipe from a file (a `Path`, or a string ending in .yaml or .yml) or from YAML text."""
        if not isinstance(source, (str, Path)):
            raise RecipeError(f"a recipe is a Recipe, a path or YAML text, not {_shown(source)}")
        is_file = isinstance(source, Path) or ("\n" not in source and source.endswith((".yaml", ".yml")))
        if not is_file:
            return cls._from(read_yaml(str(source), "recipe"), "custom")
        path = Path(source)
        try:
            if path.exists() and not path.is_file():
                raise RecipeError(f"{path}: is not a plain file")
            text = path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else " " * (LARGEST + 1)
            recipe = cls._from(read_yaml(text, str(path)), _file_name(path.stem))
            return recipe.changed(lambda p: p.beside(path.parent))
        except (OSError, UnicodeDecodeError) as e:
            raise RecipeError(f"{path}: cannot read the recipe: {e}") from e
        except RecipeError as e:
            raise type(e)(str(e) if str(e).startswith(str(path)) else f"{path}: {e}") from e

    @classmethod
    def _from(cls, raw: Any, name: str) -> Self:
        raw = {"passes": raw} if isinstance(raw, list) else raw
        if not isinstance(raw, dict) or "passes" not in raw:
            raise RecipeError("a recipe is a list of passes, or a mapping with 'passes:' and other settings")
        if isinstance(raw.get("version"), int) and raw["version"] > VERSION:
            raise RecipeError(_too_new(raw["version"]))
        known = [f.name for f in dataclasses.fields(cls)]
        for key in raw:
            if key not in known:
                raise RecipeError(f"unknown setting '{key}' of a recipe{nearest(key, known)}")
        return cls(**{"name": name, **raw})

    @classmethod
    def preset(cls, name: str) -> Self:
        """One of the recipes that come with onnxcomp; raises `RecipeError` with the nearest name."""
        if name not in presets():
            raise RecipeError(f"unknown preset '{name}'{nearest(str(name), presets())}")
        return cls._from(read_yaml(recipes.text(name), f"preset {name}"), name)

    @property
    def every_pass(self) -> tuple[Pass, ...]:
        """The passes, with those of all rungs."""
        return (*self.passes, *(p for passes in self.rungs.values() for p in passes))

    @property
    def steps(self) -> tuple[Self, ...]:
        """The recipes that are tried in turn: one for each rung, or this one alone."""
        replace = functools.partial(dataclasses.replace, self, rungs={})
        return tuple(replace(passes=(*self.passes, *more)) for more in self.rungs.values()) or (self,)

    def changed(self, change: Callable[[Pass], Pass]) -> Self:
        """This recipe with every pass changed."""
        rungs = {name: tuple(map(change, passes)) for name, passes in self.rungs.items()}
        return dataclasses.replace(self, passes=tuple(map(change, self.passes)), rungs=rungs)

    @property
    def data_needed(self) -> str:
        """Which data it needs: `calibration` (which can judge too), `evaluation` (for its gates only) or `none`."""
        if any(p.wants_data for p in self.every_pass):
            return "calibration"
        return "evaluation" if self.gates else "none"

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values; of the options only those that differ from their defaults."""
        rest = {
            f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in (*LISTS, "data")
        }
        rest["rungs"] = {name: [_entry(p) for p in passes] for name, passes in self.rungs.items()}
        data = {k: v for k, v in dataclasses.asdict(self.data).items() if v is not None}
        return {"passes": [_entry(p) for p in self.passes], **rest, "data": data}

    def to_yaml(self) -> str:
        """The recipe as a file that `from_yaml` reads back to an equal one; settings at their defaults are left out."""
        whole = self.plain()
        defaults = {f.name: plain(f.default) for f in dataclasses.fields(self)} | {"data": {}, "rungs": {}}
        always = ("passes", "name", "version")
        kept = {k: v for k, v in whole.items() if k in always or v != defaults[k]}
        text: str = yaml.dump(kept, Dumper=_Dumper, sort_keys=False, width=100)
        return text

    def hash(self) -> str:
        """SHA-256 of what changes the result: every option with its value, but no words of it.

        Of a pass that runs a file also its content.
        """
        content = {k: v for k, v in self.plain().items() if k not in ("name", "about", "advice")}
        content["passes"] = [_whole(p) for p in self.passes]
        content |= {"rungs": {name: [_whole(p) for p in passes] for name, passes in self.rungs.items()}}
        if not self.rungs:  # hashes of recipes without rungs are those of before
            del content["rungs"]
        if code := [p.content for p in self.every_pass if p.content]:
            content["code"] = code
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def presets() -> list[str]:
    """Names of the recipes that come with onnxcomp."""
    return recipes.names()


def parse_pass(entry: str | Mapping[str, Any] | Pass) -> Pass:
    """One recipe entry: a pass, a name, `{name: options}`, or such an entry as YAML text.

    Raises `UnknownPass` or `RecipeError` with the nearest name, and the range of an option that is out of it.
    """
    if isinstance(entry, Pass):
        return entry
    raw: Any = read_yaml(entry, f"pass '{entry[:80]}'") if isinstance(entry, str) else entry
    if isinstance(raw, str):
        raw = {raw: None}
    if not isinstance(raw, Mapping) or len(raw) != 1 or not all(isinstance(k, str) for k in raw):
        raise RecipeError(f"a pass is written as its name or as 'name: {{option: value}}', not {_shown(raw)}")
    ((name, options),) = raw.items()
    cls = load(name)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise RecipeError(f"{name}: options are written as '{name}: {{option: value}}', not {_shown(options)}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise RecipeError(f"{name}: unknown option '{key}'{nearest(key, known)}")
    for f in known.values():
        if f.name not in options and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{name}: option '{f.name}' must be given; see `onnxcomp passes {name}`")
    with blaming(cls):
        return cls(**options)


def schema() -> dict[str, Any]:
    """JSON schema of a recipe file, with the options of every pass there is."""
    defs: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for name, cls in listing().passes.items():
        options = options_schema(cls)
        defs |= options.pop("$defs", {})
        if not options.get("required"):
            entries.append({"const": name, "description": options.get("description", "")})
        body = {"anyOf": [options, {"type": "null"}]} if not options.get("required") else options
        entries.append(
            {"type": "object", "properties": {name: body}, "required": [name], "additionalProperties": False}
        )
    defs["pass"] = {"anyOf": entries}
    defs["passes"] = {"type": "array", "items": {"$ref": "#/$defs/pass"}, "minItems": 1}
    settings: dict[str, Any] = {"passes": {"$ref": "#/$defs/passes"}}
    settings["rungs"] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/passes"}}
    whole = {"type": "object", "properties": settings, "required": ["passes"], "additionalProperties": False}
    settings |= {key: adapter.json_schema() for key, adapter in _settings().items()}
    settings["version"]["maximum"] = VERSION
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "onnxcomp recipe"}
    return head | {"anyOf": [{"$ref": "#/$defs/passes"}, whole], "$defs": defs}


# ---- reading YAML that is not trusted --------------------------------------------------------------------------------


def read_yaml(text: str, where: str) -> Any:
    """Plain values from YAML: bounded in size and depth, no aliases, no tags, no key twice; raises `RecipeError`."""
    if len(text) > LARGEST:
        raise RecipeError(f"{where}: larger than {LARGEST >> 10} KiB; that is no recipe")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError(f"{where}: YAML aliases (*{event.anchor}) are not allowed; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise RecipeError(f"{where}: nested deeper than {DEEPEST} levels; that is no recipe")
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from e


class _Loader(yaml.SafeLoader):
    """The safe loader that also refuses a key that is no scalar or appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("the key of a mapping must be plain text")
            if key.value in seen:
                raise yaml.YAMLError(f"'{key.value}' appears twice in one mapping")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper without aliases, with long text as a block."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style="|" if "\n" in s.strip() else None)
)


def _passes(entries: Any) -> tuple[Pass, ...]:
    if not isinstance(entries, (list, tuple)):
        raise RecipeError("recipe: 'passes' must be a list, such as [first-pass, 'second-pass: {option: value}']")
    if not entries:
        raise RecipeError("recipe: a recipe needs at least one pass; `onnxcomp passes` lists them")
    return tuple(parse_pass(p) for p in entries)


def _rungs(rungs: Any) -> dict[str, tuple[Pass, ...]]:
    if not isinstance(rungs, Mapping):
        raise RecipeError("recipe: 'rungs' must map names to lists of passes, such as plain: [first-pass, second-pass]")
    for name in rungs:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise RecipeError(f"recipe: a rung is called by letters, digits, spaces and -_.+, not {_shown(name)}")
    return {name: _passes(entries) for name, entries in rungs.items()}


@functools.cache
def _settings() -> dict[str, TypeAdapter[Any]]:
    """What checks each setting of a recipe, by name, beside those that are lists of passes."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    return {name: TypeAdapter(kind) for name, kind in hints.items() if name not in LISTS}


def _checked(adapter: TypeAdapter[Any], value: Any, name: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = [f.name for f in dataclasses.fields(RecipeData)]
            raise RecipeError(f"unknown setting '{where}' of a recipe{nearest(first['loc'][-1], known)}") from None
        raise RecipeError(f"recipe: '{where}': {first['msg']}, not {_shown(first['input'])}") from None


def _file_name(stem: str) -> str:
    """A name for a recipe file whose own one is not given."""
    return re.sub(r"[^\w .+-]", "-", stem).lstrip("-. +")[:64] or "custom"


def _entry(p: Pass) -> str | dict[str, Any]:
    return {p.name: plain(p.options)} if p.options else p.name


def _whole(p: Pass) -> dict[str, Any]:
    """A pass with every option."""
    return {p.name: plain({f.name: getattr(p, f.name) for f in dataclasses.fields(p)})}


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


def _too_new(version: int) -> str:
    return f"this recipe has format version {version}; this onnxcomp reads up to {VERSION}: update onnxcomp"


def with_option(recipe: Recipe, option: Literal["exact_rows", "standard"]) -> Recipe:
    """The recipe with an option set on the passes that have it; raises `RecipeError` where none has."""
    having = {type(p) for p in recipe.every_pass if any(f.name == option for f in dataclasses.fields(p))}
    if not having:
        known = [n for n, cls in listing().passes.items() if any(f.name == option for f in dataclasses.fields(cls))]
        raise RecipeError(f"{option} is an option of {' and '.join(known)}, which this recipe does not run")
    return recipe.changed(lambda p: dataclasses.replace(p, **{option: True}) if type(p) in having else p)
