"""The house rules that a machine can check: who imports whom, how light importing is, how long things are."""

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxcomp

ROOT = Path(onnxcomp.__file__).parent
PASSES = Path(importlib.import_module("onnxcomp.passes").__path__[0])
HEAVY = {"onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "onnxscript", "pydantic", "ml_dtypes", "yaml"}

# Layer by layer, lowest first: a module imports its own layer and those below. A name with a slash is a package.
LAYERS = [
    {"__init__", "errors"},
    {"stats", "groups", "target", "maths/"},
    {"checks", "content", "cutting", "graph", "storage", "external", "datafile", "handover", "spool"},
    {
        "structure/",
        "blocks",
        "coupling/",
        "counterparts",
        "quantize",
        "integer",
        "branches",
        "ports",
        "tensorrt",
        "tokens",
        "vocabulary",
        "windows",
        "forms/",
        "micro",
        "choices",
    },
    {"runtime", "data", "axes", "samples", "sources", "text", "images"},
    {
        "accumulate",
        "bench_worker",
        "benchmark",
        "calibrate",
        "lowering",
        "masks",
        "metrics",
        "outputs",
        "placement",
        "race",
        "resplit",
        "rows",
        "runner",
        "statcache",
        "tune",
        "validation",
        "variants",
        "walk",
    },
    {
        "pipeline",
        "gaps",
        "gate",
        "outcome",
        "manager",
        "steps",
        "budgets",
        "convolutions",
        "feedforward",
        "logits",
        "projections",
        "pruning",
        "readers",
        "repairs",
        "sensitivity",
        "sharing",
        "trial",
    },
    {"passes/"},
    {"catalog", "recipe", "recipes/"},
    {
        "report",
        "report_parts",
        "settings",
        "job",
        "smoke",
        "confirm",
        "tuner",
        "inspection",
        "comparison",
        "doctor",
        "tables",
    },
    {"console", "failures", "cli", "__main__"},
]
# They stand beside the layers: what they may import of ours.
APART = {"export": {"errors", "storage", "runtime", "graph", "target", "structure/opset"}}


def files() -> list[tuple[str, Path]]:
    """Module names inside onnxcomp, with their files."""
    own = [
        (p.relative_to(ROOT).with_suffix("").as_posix(), p) for p in ROOT.rglob("*.py") if "passes" not in p.parts[-2:]
    ]
    return sorted([*own, *((f"passes/{p.stem}", p) for p in PASSES.glob("*.py"))])


def layer(module: str) -> int | None:
    """Index of the module's layer, None for one that stands apart; a module without a layer fails the test."""
    if module.startswith(tuple(APART)):
        return None
    found = [i for i, names in enumerate(LAYERS) if module in names or module.partition("/")[0] + "/" in names]
    assert found, f"{module}: add it to LAYERS in {__name__}"
    return found[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules imported when the code runs, at the top or inside functions."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{a.name}" for a in node.names)
        yield from imports(node)


def ours(name: str, known: set[str]) -> str | None:
    """The module of ours that an import reaches: `onnxcomp.structure.norm.Norm` gives `structure/norm`."""
    parts = name.split(".")[1:]
    while parts and "/".join(parts) not in known and f"{'/'.join(parts)}/__init__" not in known:
        parts.pop()
    if not parts:
        return None
    path = "/".join(parts)
    return path if path in known else f"{path}/__init__"


MODULES = dict(files())


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    own = layer(module)
    for name in imports(ast.parse(MODULES[module].read_text())):
        target = ours(name, set(MODULES)) if name.split(".")[0] == "onnxcomp" else None
        if target is None:
            continue
        below = layer(target)
        if own is None:
            home = next(a for a in APART if module.startswith(a))
            assert target.startswith(home) or target in APART[home], f"{module} imports {target}"
        else:
            assert below is not None, f"{module} imports {target}, which stands apart"
            assert below <= own, f"{module} (layer {own}) imports {target} (layer {below})"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("passes/")])
def test_a_pass_imports_neither_the_runtime_nor_another_pass(module: str) -> None:
    allowed = {
        "trial",
        "pipeline",
        "gaps",
        "pruning",
        "projections",
        "repairs",
        "sharing",
        "blocks",
        "branches",
        "convolutions",
        "counterparts",
        "coupling",
        "quantize",
        "tokens",
        "vocabulary",
        "windows",
        "graph",
        "stats",
        "groups",
        "target",
        "errors",
        "gate",
    }
    for name in imports(ast.parse(MODULES[module].read_text())):
        top = name.split(".")[0]
        assert top not in ("onnxruntime", "torch", "transformers"), name
        target = ours(name, set(MODULES)) if top == "onnxcomp" else None
        assert (
            target is None or target in allowed or target.startswith(("structure/", "maths/", "forms/", "coupling/"))
        ), f"{module}: {name}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_enter_in_one_place(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    top = {name.split(".")[0] for name in imports(tree)}
    assert "onnxruntime" not in top or module == "runtime", f"{module} imports onnxruntime"
    if not module.startswith("export"):
        assert not top & {"torch", "transformers"}, f"{module} imports {top & {'torch', 'transformers'}}"
    at_import = {name.split(".")[0] for node in tree.body if not is_type_checking(node) for name in at_top(node)}
    assert not at_import & {"torch", "transformers", "onnxruntime"}, f"{module}: import it inside the functions"


def at_top(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from imports(ast.Module([node], []))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module: str) -> None:
    text = MODULES[module].read_text()
    lines = text.count("\n")
    assert lines < 400, f"{module}: {lines} lines"
    if module.startswith("passes/"):
        assert lines < 150, f"{module}: {lines} lines; if a pass grows, the engine is missing a verb"
    for f in functions(ast.parse(text)):
        assert length(f) <= 50, f"{module}.{f.name}: {length(f)} lines"


def length(f: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and its parameters."""
    body = f.body[1:] if ast.get_docstring(f) is not None else f.body
    return (f.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_most_functions_are_much_smaller() -> None:
    sizes = sorted(length(f) for path in MODULES.values() for f in functions(ast.parse(path.read_text())))
    long = sum(n > 40 for n in sizes)
    assert sizes[len(sizes) // 2] <= 10
    assert long <= len(sizes) // 100, f"{long} of {len(sizes)} functions are longer than 40 lines"


def loaded_by(code: str, *args: str) -> set[str]:
    """Top-level modules in memory after the code has run in a fresh interpreter."""
    end = "\nimport sys; sys.stderr.write('@' + ' '.join({m.partition('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code + end, *args], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.rpartition("@")[2].split())


def test_importing_is_light() -> None:
    assert not loaded_by("import onnxcomp; onnxcomp.DataError") & (HEAVY | {"numpy", "typer", "rich"})


def test_help_is_light() -> None:
    assert not loaded_by("from onnxcomp.cli import main; assert main() == 0", "--help") & (HEAVY | {"numpy"})


def test_core_does_not_need_torch() -> None:
    code = "import onnxcomp.job, onnxcomp.recipe, onnxcomp.doctor; onnxcomp.catalog.load('qdq')"
    assert not loaded_by(code) & {"torch", "transformers"}


def test_public_names_are_importable() -> None:
    for name in onnxcomp.__all__:
        assert getattr(onnxcomp, name) is not None, name
    assert set(onnxcomp.__all__) <= set(dir(onnxcomp))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = onnxcomp.no_such_name


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("passes/")])
def test_listed_names_exist(module: str) -> None:
    found = importlib.import_module(f"onnxcomp.{module.replace('/', '.').removesuffix('.__init__')}")
    for name in getattr(found, "__all__", ()):
        assert hasattr(found, name), f"{module}.__all__ names {name}"


def test_there_is_no_package_called_passes() -> None:
    code = f"import sys; sys.path.insert(0, {str(PASSES.parent)!r})\nimport passes"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "import onnxcomp.passes" in run.stderr


def test_every_package_is_installed() -> None:
    project = Path(__file__).parents[1]
    if not (project / "onnxcomp").is_dir():
        pytest.skip("the tests run beside an installed package, not in a checkout")
    listed = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(project).as_posix() for p in (project / "onnxcomp").rglob("__init__.py")}
    assert {p.replace(".", "/") for p in listed} == folders | {"onnxcomp/passes"}
