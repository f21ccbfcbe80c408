"""The pages: code blocks run as they stand, in order, in a fresh folder; links, paths, options and tables hold."""

import functools
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from onnxcomp.benchmarking import benchmark
from onnxcomp.cli import app, main
from onnxcomp.engine import catalog
from onnxcomp.engine.recipe import Recipe, parse_pass, presets
from onnxcomp.graph import Graph
from onnxcomp.lowering import race
from onnxcomp.pipeline import Env
from onnxcomp.stats.statistic import kinds
from tests.test_house import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "models/README.md", "onnxcomp/README.md", "passes/README.md", "tools/README.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"# (\w+\.(?:py|toml))\n")
MADE = ("models/cache",)  # folders that commands make
whole = pytest.mark.skipif(not (ROOT / "passes").is_dir(), reason="the tests run beside an installed package")


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str = "README.md") -> list[tuple[str, str]]:
    return BLOCK.findall(text_of(page))


def prose(page: str) -> str:
    return BLOCK.sub("", text_of(page))


def spans(page: str) -> list[str]:
    return [" ".join(s.split()) for s in SPAN.findall(prose(page))]


def section(page: str, heading: str) -> str:
    """What stands under a heading, down to the next one."""
    return re.split(r"^#+ ", text_of(page).split(f"\n{heading}\n")[1], maxsplit=1, flags=re.M)[0]


# ---- blocks ----------------------------------------------------------------------------------------------------------


def run(language: str, text: str, folder: Path, environment: dict[str, str]) -> None:
    """Run one block; one that starts with the name of a file is written there, and a test in it is run."""
    named = FILE.match(text)
    if named:
        (folder / named[1]).write_text(text)
    if language == "toml":
        return install(folder, tomllib.loads(text))
    if named and not named[1].startswith("test_"):
        return None
    if not named and not list(folder.glob("*.dist-info")) and run_here(language, text):
        return None
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", named[1]] if named else ["-c", text]
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return None


def run_here(language: str, text: str) -> bool:
    """Run a block in this process, which has imported all libraries, where it is Python or only commands of ours."""
    if language == "python":
        exec(compile(text, "block", "exec"), {"__name__": "__main__"})
        return True
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    if not all(words[0] == "onnxcomp" and not {"|", ">", "2>", "&&"} & {*words} for words in lines):
        return False
    for words in lines:
        assert main(words[1:]) == 0, words
    return True


def install(folder: Path, project: dict) -> None:
    """What an installer leaves of a package beside its modules: a name, a version and entry points."""
    name, version = project["project"]["name"], project["project"]["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    [(group, points)] = project["project"]["entry-points"].items()
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


@whole
@pytest.mark.export
def test_blocks_run_in_order(tmp_path, monkeypatch):
    """In this process as far as it goes; what is timed is not judged here, so a few runs of each are enough."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "bench", functools.partial(benchmark.bench, window=0.01))
    monkeypatch.setattr(race, "ROUNDS", 3)
    (tmp_path / "models").symlink_to(ROOT / "models")
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)])),
        "HF_HUB_OFFLINE": "1",
    }
    assert shutil.which("onnxcomp", path=environment["PATH"]), "the command line is not installed"
    for page in PAGES:  # README.md first: it exports the model that the others use
        for language, text in blocks(page):
            if language in ("bash", "python", "toml"):
                run(language, text, tmp_path, environment)
    assert (tmp_path / "my-int8" / "report.json").exists()
    assert (tmp_path / "my-int8" / "tokenizer.json").exists()
    assert (tmp_path / "my-clipped" / "model.onnx").exists()


@whole
def test_languages_of_blocks():
    found = {language for page in PAGES for language, _ in blocks(page)}
    assert found == {"bash", "python", "text", "toml", "yaml"}  # anything else would be neither run nor checked


def test_recipe_block_is_a_recipe():
    [text] = [t for language, t in blocks() if language == "yaml"]
    recipe = Recipe.from_yaml(text)
    assert [p.name for p in recipe.passes] == ["canonicalize", "cleanup", "qdq", "lower"]
    assert yaml.safe_load(text)["on_fail"] == recipe.on_fail


# ---- commands that are not run ---------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[list[str]]:
    """Commands of `text` blocks and of code spans, comments removed."""
    lines = [line for language, text in blocks(page) if language == "text" for line in text.splitlines()]
    for line in [*lines, *(s for s in spans(page) if " " in s or s.startswith("tools/"))]:
        if re.match(r"(\w+=\S+ )?(onnxcomp|tools/|python -m )", line):
            yield [w for w in shlex.split(line, comments=True) if not re.fullmatch(r"\w+=\S+", w)]


@whole
@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_they_are_given(page):
    known = typer.main.get_command(app).commands
    for program, *words in commands(page):
        if program != "onnxcomp":
            file = ROOT / (f"{words.pop(1).replace('.', '/')}.py" if program == "python" else program)
            text = file.read_text("utf-8")
            missing = [w for w in words if w.startswith("--") and not re.search(f'"(--)?{w[2:]}"', text)]
        else:
            assert words[0] in known, words
            options = {o for p in known[words[0]].params for o in p.opts}
            missing = [w for w in words if w.startswith("-") and w not in options]
            for flag, value in itertools.pairwise(words):
                assert flag != "--pass" or parse_pass(value)
                assert flag != "--preset" or value in presets()
        assert not missing, f"{page}: {program} {words} has no {missing}"


# ---- links and names -------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@whole
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = LINK.findall(prose(page))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT).as_posix()), f"{page}: {link}"


@whole
def test_every_page_is_reached_from_the_readme():
    pages = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("*/README.md") if not p.parts[-2].startswith(".")}
    assert {"README.md", *pages} == set(PAGES)
    assert pages <= {link.partition("#")[0] for link in LINK.findall(text_of("README.md"))}


@whole
@pytest.mark.parametrize("page", PAGES)
def test_paths_in_the_text_exist(page):
    """Paths in code spans: from the root or from the page's folder, whatever options follow."""
    for span in spans(page):
        path = re.match(r"([\w-]+/[\w./-]*)( |$)", span)
        if path and not path[1].startswith(MADE):
            assert (ROOT / path[1]).exists() or ((ROOT / page).parent / path[1]).exists(), f"{page}: {span}"


@whole
def test_the_rooms_on_the_page_are_those_of_the_import_law():
    page = "onnxcomp/README.md"
    rows = re.findall(r"^\| ([^|]+) \|", section(page, "## Rooms"), re.M)[2:]
    described = [name.rstrip("/") for row in rows for name in SPAN.findall(row)]
    [listed] = BLOCK.findall(section(page, "## The import law"))
    assert listed[1].split() == ROOMS.split()
    assert described == [room for room in ROOMS.split() if not room.startswith("__")]


@whole
def test_the_table_of_passes_is_the_catalogue():
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|(.*)$", section("README.md", "## Passes"), re.M)
    assert [name for name, _, _ in rows] == list(dict.fromkeys(name for name, _, _ in rows))
    assert {name for name, _, _ in rows} == set(catalog.names())
    for name, stage, line in rows:
        info = catalog.describe(name)
        assert (stage, line.rstrip(" |").endswith("exact")) == (info.stage, info.fidelity == "exact"), name


@whole
def test_verbs_and_statistics_exist():
    page = "passes/README.md"
    verbs = set(re.findall(r"`g\.(\w+)", prose(page)))
    asked = set(re.findall(r"`env\.(\w+)", prose(page)))
    needs = set(re.findall(r"`(\w+)\(x", section(page, "### Statistics")))
    assert {"op", "put", "replace", "decline"} <= verbs <= {"model", *dir(Graph)}
    assert {"stats", "collect"} <= asked <= {*Env.__dataclass_fields__, *dir(Env)}
    assert needs == {k for k, x in kinds().items() if x.__module__.startswith("onnxcomp.stats.")}


# ---- the shape of the pages ------------------------------------------------------------------------------------------


@whole
def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 155


def writer():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@whole
def test_each_measured_table_has_a_place_on_one_page():
    written = writer().PAGES
    marked = [(name, page) for page in PAGES for name in re.findall(r"^<!-- ([\w-]+) -->$", text_of(page), re.M)]
    assert sorted(marked) == sorted(written.items())
    for name in written:  # after the tool, and the part where a tool has several tables
        assert (ROOT / "tools" / name.partition("-")[0]).is_file()


@whole
def test_every_tool_is_on_the_page_of_tools():
    tools = {f"tools/{p.name}" for p in (ROOT / "tools").iterdir() if p.is_file() and not p.suffix}
    assert tools
    assert tools <= {span.partition(" ")[0] for span in spans("tools/README.md")}


@whole
def test_a_table_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "passes").mkdir()
    page = tmp_path / "passes" / "README.md"
    page.write_text("before\n<!-- cnn -->\nold\n<!-- /cnn -->\n<!-- cuts -->\nkept\n<!-- /cuts -->\n")
    writer().write_table("cnn", "new", tmp_path)
    assert page.read_text() == "before\n<!-- cnn -->\nnew\n<!-- /cnn -->\n<!-- cuts -->\nkept\n<!-- /cuts -->\n"
    with pytest.raises(ValueError, match="substring"):
        writer().write_table("curves", "new", tmp_path)
