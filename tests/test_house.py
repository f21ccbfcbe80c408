"""The house rules that a machine can check: who imports whom, how light importing is, how long things are."""

import ast
import functools
import graphlib
import importlib
import re
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

# The rooms, lowest first: a room imports only rooms on lines above its own, and inside a room there are no circles.
ROOMS = """
errors version machine
maths target
graph
analysis data files
canonical runtime
blocks stats validation benchmarking exporter
coupling lowering
pipeline reports
methods engine
passes
cli
__init__ __main__
"""
LEVELS = {room: level for level, line in enumerate(ROOMS.split("\n")) for room in line.split()}
# Besides the law of the lines: rooms that a room may not import from.
CLOSED = {"passes": {"engine", "runtime", "files", "benchmarking"}}


def files() -> list[tuple[str, Path]]:
    """Module names inside onnxcomp, with their files."""
    own = [
        (p.relative_to(ROOT).with_suffix("").as_posix(), p) for p in ROOT.rglob("*.py") if "passes" not in p.parts[-2:]
    ]
    return sorted([*own, *((f"passes/{p.stem}", p) for p in PASSES.glob("*.py"))])


def room(module: str) -> str:
    """The room of a module: its folder at the top of onnxcomp, or the file itself where it stands there."""
    name = module.partition("/")[0]
    assert name in LEVELS, f"{module}: '{name}' is no room; the rooms are listed in {__name__}"
    return name


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
    """The module of ours that an import reaches: `onnxcomp.canonical.norm.Norm` gives `structure/norm`."""
    parts = name.split(".")[1:]
    while parts and "/".join(parts) not in known and f"{'/'.join(parts)}/__init__" not in known:
        parts.pop()
    if not parts:
        return None
    path = "/".join(parts)
    return path if path in known else f"{path}/__init__"


MODULES = dict(files())


@functools.cache
def trees() -> dict[str, ast.Module]:
    """All modules, parsed when the first test asks: what is done at import, every worker does."""
    return {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


@functools.cache
def arrows() -> list[tuple[str, str]]:
    """Which module imports which other of ours when it runs."""
    known = set(MODULES)
    found = {
        (module, target)
        for module, tree in trees().items()
        for name in imports(tree)
        if name.split(".")[0] == "onnxcomp" and (target := ours(name, known)) is not None and target != module
    }
    return sorted(found)


def test_imports_point_to_rooms_below() -> None:
    assert [f"{a} imports {b}" for a, b in arrows() if room(a) != room(b) and LEVELS[room(b)] >= LEVELS[room(a)]] == []


def test_some_rooms_are_closed_to_others() -> None:
    assert [f"{a} imports {b}" for a, b in arrows() if room(b) in CLOSED.get(room(a), ())] == []
    assert [f"{a} imports {b}" for a, b in arrows() if room(a) == room(b) == "passes"] == [], "a pass imports another"


def test_there_are_no_circles_and_few_levels() -> None:
    modules = graphlib.TopologicalSorter[str]()
    below: dict[str, set[str]] = {}
    for a, b in arrows():
        modules.add(a, b)
        if room(a) != room(b):
            below.setdefault(room(a), set()).add(room(b))
    modules.prepare()  # raises CycleError, which names the circle
    height: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[x] for x in below.get(name, ())), default=0)
    assert max(height.values()) <= 12


def test_heavy_libraries_enter_in_one_place() -> None:
    home = {"onnxruntime": "runtime", "torch": "exporter", "transformers": "exporter"}
    for module, tree in trees().items():
        for library in home.keys() & {name.split(".")[0] for name in imports(tree)}:
            assert room(module) == home[library], f"{module} imports {library}"
        at_import = {name.split(".")[0] for node in tree.body if not is_type_checking(node) for name in at_top(node)}
        assert not at_import & home.keys(), f"{module}: import it inside the functions"


def at_top(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from imports(ast.Module([node], []))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_files_and_functions_stay_small() -> None:
    for module, path in MODULES.items():
        lines, most = path.read_text().count("\n"), 150 if room(module) == "passes" else 400
        assert lines <= most, f"{module}: {lines} lines; if a pass grows, the engine is missing a verb"
        long = [f"{module}.{f.name}: {length(f)} lines" for f in functions(trees()[module]) if length(f) > 40]
        assert not long


def length(f: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and its parameters."""
    body = f.body[1:] if ast.get_docstring(f) is not None else f.body
    return (f.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_most_functions_are_much_smaller() -> None:
    sizes = sorted(length(f) for tree in trees().values() for f in functions(tree))
    assert sizes[len(sizes) // 2] <= 10


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
    names = ("engine.compress", "engine.recipe", "cli.diagnosis")
    code = f"import {', '.join(f'onnxcomp.{n}' for n in names)}; onnxcomp.engine.catalog.load('qdq')"
    assert not loaded_by(code) & {"torch", "transformers"}


def test_public_names_are_importable() -> None:
    for name in onnxcomp.__all__:
        assert getattr(onnxcomp, name) is not None, name
    assert set(onnxcomp.__all__) <= set(dir(onnxcomp))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = onnxcomp.no_such_name


def test_listed_names_exist() -> None:
    for module in MODULES:
        found = importlib.import_module(f"onnxcomp.{module.replace('/', '.').removesuffix('.__init__')}")
        missing = [name for name in getattr(found, "__all__", ()) if not hasattr(found, name)]
        assert not missing, f"{module}.__all__ names {missing}"


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


# ---- the engine knows no pass ----------------------------------------------------------------------------------------

ENGINE = {"pipeline", "engine", "validation", "reports", "lowering", "stats", "benchmarking", "runtime"}
NAMES = sorted(
    m.removeprefix("passes/").replace("_", "-") for m in MODULES if m.startswith("passes/") and "__" not in m
)
SPELLED = re.compile(rf"(?<![\w.-])({'|'.join(NAMES)})(?![\w(-])")  # as a word, not as a part of another or a call


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that stand alone: documentation of modules, classes, functions and fields."""
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ENGINE])
def test_the_engine_knows_no_pass(module: str) -> None:
    classes = {importlib.import_module(f"onnxcomp.passes.{n.replace('-', '_')}").__all__[0] for n in NAMES}
    tree = ast.parse(MODULES[module].read_text())
    known, skipped = [], docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            known += [f"line {node.lineno}: {name!r} in a string" for name in SPELLED.findall(node.value)]
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            known += [f"line {node.lineno}: {name}"] if name in classes else []
    known += [f"imports {name}" for name in imports(tree) if name.startswith("onnxcomp.passes.")]
    assert known == []
