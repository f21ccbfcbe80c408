"""All available passes: named from their files without importing any, loaded one module at a time."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pkgutil
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import TypeAdapter

from onnxcomp.engine.blame import described
from onnxcomp.errors import OnnxcompError, RecipeError, UnknownPass
from onnxcomp.pipeline import Fidelity, Pass, PassFault, Stage, default_of, plain

__all__ = [
    "GROUP",
    "Listing",
    "Option",
    "PassInfo",
    "describe",
    "listing",
    "load",
    "names",
    "nearest",
    "options_schema",
]

GROUP = "onnxcomp.passes"  # the package of our passes, and the entry points of others: `name = "module:Class"`
passes = import_module(GROUP)  # by name: passes stand above this room


@dataclass(frozen=True)
class Option:
    """One option of a pass, as text for people; `default` is the plain value, `required` when there is none."""

    name: str
    type: str
    default: Any
    range: str
    doc: str
    required: bool = False


@dataclass(frozen=True)
class PassInfo:
    """What `onnxcomp passes NAME` shows."""

    name: str
    stage: str
    fidelity: str
    doc: str
    options: tuple[Option, ...]
    origin: str = "onnxcomp"


@dataclass(frozen=True)
class Listing:
    """All passes that load, by name, and what is wrong with those that were left out."""

    passes: dict[str, type[Pass]]
    problems: list[str]


def names() -> list[str]:
    """Names of all passes, sorted, without importing any; names that two packages claim are left out."""
    return sorted({*_built_in(), *_third_party()[0]})


def load(name: str) -> type[Pass]:
    """The class of one pass, importing only its module.

    Raises `UnknownPass` with the nearest name, `PassFault` for one that is broken, `RecipeError` where two packages
    provide one of that name.
    """
    if name in _built_in():
        return _only_pass(f"{passes.__name__}.{name.replace('-', '_')}")
    others, clashes = _third_party()
    if name in clashes:
        raise RecipeError(clashes[name])
    if name not in others:
        raise UnknownPass(f"unknown pass '{name}'{nearest(name, names())}")
    return _from_entry_point(others[name])


def listing() -> Listing:
    """Load every pass; one that is broken is a line in `problems`, so that no package can spoil the rest."""
    found, problems = dict[str, type[Pass]](), list(_third_party()[1].values())
    for name in names():
        try:
            cls = load(name)
            options_schema(cls)
        except (Exception, SystemExit) as e:  # noqa: BLE001 - whatever a third-party package raises
            problems.append(str(e) if isinstance(e, OnnxcompError) else f"the pass '{name}' is broken: {described(e)}")
        else:
            found[name] = cls
    return Listing(found, problems)


def describe(name: str) -> PassInfo:
    """Stage, fidelity, documentation and options of one pass; raises `UnknownPass`."""
    cls = load(name)
    origin = "onnxcomp" if name in _built_in() else _owner(_third_party()[0][name])
    stage = "any" if cls.any_place else cls.stage.name.lower()
    return PassInfo(name, stage, cls.fidelity.value, inspect.getdoc(cls) or "", _options(cls), origin)


def options_schema(cls: type[Pass]) -> dict[str, Any]:
    """JSON schema of a pass's options; definitions are named after the pass, so that schemas can be put together."""
    return copy.deepcopy(_schema(cls))


@functools.cache
def _schema(cls: type[Pass]) -> dict[str, Any]:
    """Made once for each class: pydantic reads and parses the source of the whole class for the docs of its fields."""
    schema = TypeAdapter(cls).json_schema(ref_template=f"#/$defs/{cls.name}.{{model}}")
    for base in cls.__mro__[1:]:  # pydantic reads the docs of fields from the source of the last class only
        if base is not Pass and issubclass(base, Pass) and is_dataclass(base):
            for key, option in TypeAdapter(base).json_schema()["properties"].items():
                schema["properties"][key].setdefault("description", option.get("description", ""))
    if "$defs" in schema:
        schema["$defs"] = {f"{cls.name}.{key}": value for key, value in schema["$defs"].items()}
    return schema


def nearest(name: object, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest one, or all there are."""
    there = list(known)
    near = get_close_matches(str(name).strip().lower().replace("_", "-"), there, 1)
    near = near or get_close_matches(str(name), there, 1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(there) or 'none'}"


# ---- where passes come from ------------------------------------------------------------------------------------------


def _built_in() -> frozenset[str]:
    return frozenset().union(*(_in_folder(p, os.path.getmtime(p) if os.path.exists(p) else 0) for p in passes.__path__))


@functools.cache
def _in_folder(path: str, changed: float) -> frozenset[str]:
    """Names of the passes in a folder as it was when it changed last."""
    found = (m.name for m in pkgutil.iter_modules([path]))
    return frozenset(n.replace("_", "-") for n in found if not n.startswith("_"))


def _third_party() -> tuple[dict[str, EntryPoint], dict[str, str]]:
    """Entry points by pass name, and why others are left out: a recipe must mean the same thing everywhere."""
    found, clashes = dict[str, EntryPoint](), dict[str, str]()
    built_in = _built_in()
    for point in entry_points(group=GROUP):
        name, first = point.name, found.setdefault(point.name, point)
        if name in built_in:
            clashes[name] = f"{_owner(point)} provides a pass '{name}', a name onnxcomp has itself; uninstall it"
        elif first.value != point.value:
            clashes[name] = f"{_owner(first)} and {_owner(point)} both provide a pass '{name}'; uninstall one"
    return {name: point for name, point in found.items() if name not in clashes}, clashes


def _owner(point: EntryPoint) -> str:
    return f"the package '{point.dist.name}'" if point.dist is not None else f"the entry point '{point.value}'"


def _from_entry_point(point: EntryPoint) -> type[Pass]:
    try:
        cls: object = point.load()
    except (Exception, SystemExit) as e:  # importing runs third-party code
        why = described(e)
        raise PassFault(f"{_owner(point)}: the pass '{point.name}' cannot be imported from {point.value}: {why}") from e
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PassFault(f"{_owner(point)}: the pass '{point.name}', {point.value}, is not a subclass of onnxcomp.Pass")
    if cls.name != point.name:
        raise PassFault(
            f"{_owner(point)}: the pass is called '{cls.name}', its entry point '{point.name}'; make them equal"
        )
    if why := _lacks(cls):
        raise PassFault(f"{_owner(point)}: the pass '{point.name}', {point.value}, {why}")
    return cls


def _only_pass(module_name: str) -> type[Pass]:
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as e:  # the file may be the user's
        raise PassFault(f"{module_name} cannot be imported: {described(e)}") from e
    found = [
        x
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, Pass) and x.__module__ == module_name and not inspect.isabstract(x)
    ]
    if len(found) != 1:
        raise PassFault(f"{module_name} must define exactly one pass, not {len(found)}")
    if why := _lacks(found[0]):
        raise PassFault(f"{module_name}: the pass '{found[0].name}' {why}")
    return found[0]


def _lacks(cls: type[Pass]) -> str:
    """What a class lacks to be a pass that the engine can call; empty where nothing."""
    if not isinstance(getattr(cls, "stage", None), Stage):
        return "has no `stage`, which is a Stage"
    if not isinstance(getattr(cls, "fidelity", None), Fidelity):
        return "has no `fidelity`, which is a Fidelity"
    if not is_dataclass(cls) or "__dataclass_params__" not in cls.__dict__:
        return "is no dataclass: decorate it with @dataclass(frozen=True)"
    for method in (cls.run, cls.sites, cls.needs):
        try:
            inspect.signature(method).bind(None, None, None)
        except TypeError as e:
            return f"has a method '{method.__name__}' that the engine cannot call with two arguments: {e}"
    return ""


# ---- options as text -------------------------------------------------------------------------------------------------


def _options(cls: type[Pass]) -> tuple[Option, ...]:
    schema = options_schema(cls)
    rows = []
    for f in fields(cls):
        shape = schema["properties"][f.name]
        required = f.default is MISSING and f.default_factory is MISSING
        default = None if required else plain(default_of(f))
        rows.append(
            Option(f.name, _type(shape, schema), default, _range(shape), shape.get("description", ""), required)
        )
    return tuple(rows)


def _type(shape: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in shape:
        return _type(schema["$defs"][shape["$ref"].removeprefix("#/$defs/")], schema)
    if "enum" in shape or "const" in shape:
        return " | ".join(map(str, shape.get("enum", [shape.get("const")])))
    if "anyOf" in shape:
        return " | ".join(_type(s, schema) for s in shape["anyOf"])
    kind = str(shape.get("type", "any"))
    if kind == "array":
        return f"list of {_type(shape['items'], schema)}" if shape.get("items") else "list"
    if kind == "object" and isinstance(shape.get("additionalProperties"), dict):
        return f"mapping to {_type(shape['additionalProperties'], schema)}"
    return {"null": "none", "object": "mapping"}.get(kind, kind)


_BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of ",
    "minItems": "length >=",
    "maxItems": "length <=",
    "pattern": "matches ",
}


def _range(shape: dict[str, Any]) -> str:
    bounds = [f"{text}{shape[key]}" for key, text in _BOUNDS.items() if key in shape]
    return ", ".join([*bounds, *(r for s in shape.get("anyOf", ()) if (r := _range(s)))])
