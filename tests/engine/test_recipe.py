"""Recipes: one grammar for the command line and files, equal after a round trip, and nothing unsafe read."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.engine import catalog, recipe
from onnxcomp.engine.recipe import Recipe, RecipeData, parse_pass
from onnxcomp.errors import RecipeError, UnknownPass
from onnxcomp.pipeline import Pass
from onnxcomp.validation.gates import Gate


def values(shape: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Legal values of an option, from its JSON schema."""
    if "enum" in shape or "const" in shape:
        return st.sampled_from(shape.get("enum", [shape.get("const")]))
    if "anyOf" in shape:
        return st.one_of([values(s) for s in shape["anyOf"]])
    low, high = shape.get("minimum", shape.get("exclusiveMinimum")), shape.get("maximum", shape.get("exclusiveMaximum"))
    if shape["type"] == "integer":
        return st.integers(low, high if high is not None else 10**6)
    if shape["type"] == "number":
        return st.floats(
            low,
            high,
            allow_nan=False,
            allow_infinity=False,
            exclude_min="exclusiveMinimum" in shape,
            exclude_max="exclusiveMaximum" in shape,
        )
    if shape["type"] == "array":
        return st.lists(values(shape["items"]), max_size=4)
    if shape["type"] == "object":
        return st.dictionaries(st.text(max_size=12), values(shape["additionalProperties"]), max_size=3)
    if "pattern" in shape:
        return st.from_regex(shape["pattern"].removesuffix("$") + r"\Z", alphabet=st.characters(max_codepoint=127))
    return {"boolean": st.booleans(), "null": st.none(), "string": st.text(max_size=12)}[shape["type"]]


NAMES = [name for name in catalog.names() if not catalog.load(name).runs_code]  # others name files that must be there


@functools.cache
def options(name: str) -> dict[str, Any]:
    """The options of a pass with their schemas."""
    return catalog.options_schema(catalog.load(name))["properties"]


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    """Any pass of the catalogue with any legal options."""
    cls = catalog.load(draw(st.sampled_from(NAMES)))
    shapes = options(cls.name)
    chosen = draw(st.lists(st.sampled_from(sorted(shapes)), unique=True)) if shapes else []
    return cls(**{name: draw(values(shapes[name])) for name in chosen})


@given(passes())
@settings(deadline=None, max_examples=60)
def test_a_pass_reads_back_as_it_prints(p: Pass) -> None:
    assert parse_pass(str(p)) == p
    assert parse_pass({p.name: p.options}) == p


@given(st.lists(passes(), min_size=1, max_size=4), st.booleans(), st.text(max_size=30))
@settings(deadline=None, max_examples=60)
def test_a_recipe_reads_back_as_it_is_written(found: list[Pass], any_order: bool, advice: str) -> None:
    data = RecipeData(calibration="calib.jsonl", samples=7)
    r = Recipe(tuple(found), "mine", gates=("sqnr>=20", "size<=30%"), any_order=any_order, advice=advice, data=data)
    again = Recipe.from_yaml(r.to_yaml())
    assert again == r
    assert again.hash() == r.hash()


@pytest.mark.parametrize("entry", ["cleanup", "cleanup:", "{cleanup: {}}", {"cleanup": None}, {"cleanup": {}}])
def test_spellings_of_one_entry(entry: Any) -> None:
    assert parse_pass(entry) == catalog.load("cleanup")()


def test_options_are_checked_and_converted() -> None:
    p = parse_pass("qdq: {clip: percentile, percentile: 99, skip: [head]}")
    assert p.options == {"clip": "percentile", "percentile": 99.0, "skip": ("head",)}
    assert parse_pass(p) is p


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("qqdq", "did you mean 'qdq'"),
        ("dynamic_quant", "did you mean 'dynamic-quant'"),
        ("qdq: {clp: mse}", "did you mean 'clip'"),
        ("qdq: {clip: ms}", "option 'clip'"),
        ("qdq: {percentile: 101}", "less than or equal to 100"),
        ("qdq: mse", "options are written as"),
        ("{qdq: {}, lower: {}}", "a pass is written as its name"),
        ("[qdq]", "a pass is written as its name"),
        ("7", "a pass is written as its name"),
        ("", "a pass is written as its name"),
        ("qdq: {", "not valid YAML"),
        ("!!python/name:os.system", "not valid YAML"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(entry: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("(", r"\(")):
        parse_pass(entry)


def test_an_unknown_pass_has_its_own_error() -> None:
    with pytest.raises(UnknownPass, match="cleanup"):
        parse_pass("clean-up")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("passes: [cleanup]\ngate: [sqnr>=1]", "unknown setting 'gate' of a recipe; did you mean 'gates'"),
        ("passes: [cleanup]\ndata: {batchs: 1}", "unknown setting 'data.batchs' of a recipe; did you mean 'batch'"),
        ("passes: [cleanup]\ndata: {batch: 0}", "'data.batch'"),
        ("passes: [cleanup]\ngates: [sqn>=10]", "did you mean 'sqnr'"),
        ("passes: [cleanup]\non_fail: retry", "'raise' or 'rollback'"),
        ("passes: cleanup", "'passes' must be a list"),
        ("passes: []", "at least one pass"),
        ("target: cpu", "a recipe is a list of passes"),
        ("just text", "a recipe is a list of passes"),
        ("", "a recipe is a list of passes"),
        ("version: 2\npasses: [from-the-future]", "format version 2; .* reads up to 1: update"),
        ("version: x\npasses: [cleanup]", "'version'"),
        ("passes: [cleanup]\npasses: [lower]", "'passes' appears twice"),
        ("a: &a [cleanup]\npasses: *a", "aliases"),
        ("[" * 40 + "]" * 40, "nested deeper"),
        ("[" * 5000, "nested deeper"),
        ("- cleanup\n#" + "x" * (300 << 10), "larger than"),
        ("!!python/object/apply:os.system [echo]", "not valid YAML"),
        ("[2024-99-99]", "not valid YAML"),
        ("? [a]\n: 1\n? {b: 1}\n: 2", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.from_yaml(text)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(RecipeError, match=r"mine\.yaml: cannot read"):
        Recipe.from_yaml(path)
    path.write_text("passes: [nope]")
    with pytest.raises(UnknownPass, match=r"mine\.yaml: unknown pass 'nope'"):
        Recipe.from_yaml(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        Recipe.from_yaml(path)
    path.write_text("- cleanup")
    assert Recipe.from_yaml(path).name == "mine"


def test_the_hash_is_of_what_changes_the_result() -> None:
    r = Recipe.from_yaml("[cleanup, lower]")
    spelled_out = Recipe.from_yaml("passes: [cleanup: {}, lower]\nname: other\nadvice: none\ntarget: cpu")
    assert spelled_out.hash() == r.hash()
    others = ["[lower]", "passes: [cleanup, lower]\ngates: [sqnr>=1]", "passes: [cleanup, lower]\ndata: {samples: 4}"]
    assert len({Recipe.from_yaml(t).hash() for t in others} | {r.hash()}) == 4
    one, two = (Recipe((parse_pass(f"qdq: {{clip: {c}}}"),)) for c in ("mse", "entropy"))
    assert one.hash() != two.hash()


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.from_yaml("[cleanup]").target = "cuda"  # type: ignore[misc]


@pytest.mark.parametrize("name", recipe.presets())
def test_presets_are_whole(name: str) -> None:
    r = Recipe.preset(name)
    assert r.name == name
    for tried in r.steps:
        assert [p.stage for p in tried.passes] == sorted(p.stage for p in tried.passes)
    lossy = [p for p in r.every_pass if p.fidelity.value == "lossy"]
    assert bool(r.gates) == bool(lossy) == bool(r.advice)
    # What every task has: a gate on a metric that cannot be measured would refuse every model.
    asked = {c.name for c in Gate(r.gates).conditions if not c.optional}
    assert asked <= {"sqnr", "rel-l2", "max-abs", "cosine"}


def test_the_issue_s_presets_exist() -> None:
    assert {"int8", "int8-dynamic", "int8-small", "optimize"} <= set(recipe.presets())
    with pytest.raises(RecipeError, match="unknown preset 'int9'; did you mean 'int8'"):
        Recipe.preset("int9")
    with pytest.raises(RecipeError, match="unknown preset"):
        Recipe.preset("../recipes/int8")


@given(passes())
@settings(deadline=None, max_examples=30)
def test_the_schema_describes_what_is_written(p: Pass) -> None:
    text = Recipe((p,), gates=("sqnr>=3",), data=RecipeData(samples=2)).to_yaml()
    jsonschema.Draft202012Validator(schema()).validate(json.loads(json.dumps(yaml.safe_load(text))))


@functools.cache
def schema() -> dict:
    return recipe.schema()


@pytest.mark.parametrize(
    "text",
    [
        "[nope]",
        "passes: [cleanup]\ngate: []",
        "passes: []",
        "[qdq: {clip: nope}]",
        "{}",
        "version: 9\npasses: [cleanup]",
    ],
)
def test_the_schema_refuses_what_is_refused(text: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(yaml.safe_load(text))
    with pytest.raises(RecipeError):
        Recipe.from_yaml(text)


@pytest.mark.parametrize("name", recipe.presets())
def test_the_schema_accepts_the_presets(name: str) -> None:
    jsonschema.validate(yaml.safe_load(Recipe.preset(name).to_yaml()), schema())


def test_a_replaced_gate_is_gone():
    assert Recipe(("cleanup",), gates=("sqnr>=20", "kl<=1", "sqnr>=25")).gates == ("sqnr>=25", "kl<=1")
