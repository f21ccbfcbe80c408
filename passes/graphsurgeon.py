"""A script of the user's for onnx-graphsurgeon as one step of a recipe, verified and judged like any pass."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.hashing import same_content
from onnxcomp.graph.interface import same_interface
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["Graphsurgeon"]

MODULE = "onnxcomp_graphsurgeon_script"  # the name of the script's module while it runs


@dataclass(frozen=True)
class Graphsurgeon(Pass):
    """Run a function of a Python file that takes and returns an `onnx_graphsurgeon.Graph`, with --allow-code.

    It may also change the graph it is given and return nothing. Inputs and outputs must stay as they are. A change of
    the file (not of what it imports) makes a new step for `--cache`. May stand anywhere in a recipe.
    """

    stage: ClassVar[Stage] = Stage.CANONICALIZE
    any_place: ClassVar[bool] = True
    runs_code: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    script: str
    """The Python file; a path in a recipe file is relative to the recipe."""
    function: str = ""
    """The function to run; by default the only one of the file whose name does not begin with an underscore."""
    exact: bool = False
    """The function promises equal outputs (to float noise); otherwise gates judge the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact:
            object.__setattr__(self, "fidelity", Fidelity.EXACT)

    def beside(self, folder: Path) -> Pass:
        """The pass of a recipe in a folder."""
        return replace(self, script=str(folder / self.script))

    @property
    def content(self) -> str:
        """The hash of the script; raises `RecipeError` where it cannot be read or has no such function."""
        source, name = self._source(), self._name
        return f"{name} {hashlib.sha256(source).hexdigest()}"

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """The whole graph."""
        return [Site(self.script, tuple(str(n.name) for n in g.nodes()), "graph")]

    def run(self, g: Graph, env: Env) -> None:
        """Convert the graph, run the function, check what it made."""
        given = g.to_graphsurgeon()
        before, ops = Graph.from_graphsurgeon(given), Counter(n.op_type for n in g.nodes())
        before.verify()  # which sorts the nodes
        made = self._call(given)
        try:
            new = Graph.from_graphsurgeon(given if made is None else made)
            new.verify()
            same_interface(g.interface, new.interface)
        except ModelError as e:
            raise RecipeError(f"{self.script}: what {self._name} returned cannot be used: {e}") from e
        if same_content(new, before):
            return g.decline(self.script, f"{self._name} changed nothing")
        new.model.metadata_props.update(g.model.metadata_props)
        g.adopt(new)
        g.touched.update(str(n.name) for n in g.nodes())
        now = Counter(n.op_type for n in g.nodes())
        changes = [f"{op} {ops[op]} > {now[op]}" for op in sorted(ops | now) if ops[op] != now[op]]
        return g.note(self.script, ", ".join(changes) or "the same operators, with other values or attributes")

    # ---- the script ----------------------------------------------------------------------------------------------

    def _source(self) -> bytes:
        try:
            return Path(self.script).read_bytes()
        except OSError as e:
            raise RecipeError(f"{self.name}: cannot read the script {self.script}: {e.strerror or e}") from e

    @property
    def _name(self) -> str:
        """The name of the function; found without running the script."""
        try:
            tree = ast.parse(self._source(), self.script)
        except (SyntaxError, ValueError) as e:
            line = getattr(e, "lineno", None) or 1
            raise RecipeError(f"{self.script}:{line}: the script is not valid Python: {e}") from e
        there = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        public = [n for n in there if not n.startswith("_")]
        if self.function in there or (len(public) == 1 and not self.function):
            return self.function or public[0]
        has = f"it has {', '.join(there)}" if there else "it has none"
        if self.function:
            raise RecipeError(f"{self.script}: there is no function '{self.function}'; {has}")
        raise RecipeError(f"{self.script}: say which function to run with function: NAME; {has}")

    def _call(self, graph: Any) -> Any:
        with self._blamed(), _module(Path(self.script)) as module:
            exec(compile(self._source(), self.script, "exec"), module.__dict__)
            function: Callable[[Any], Any] = module.__dict__[self._name]
            return function(graph)

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Turn whatever the script raises into a `RecipeError` with its file and line."""
        try:
            yield
        except (Exception, SystemExit) as e:
            lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == self.script]
            at = f"{self.script}:{lines[-1]}" if lines else self.script
            raise RecipeError(f"{at}: the script failed: {type(e).__name__}: {e}".replace("\n", " ")) from e


@contextlib.contextmanager
def _module(path: Path) -> Iterator[types.ModuleType]:
    """An empty module for the script, which may import files that lie beside it; nothing is written there."""
    module, folder = types.ModuleType(MODULE), str(path.resolve().parent)
    module.__file__ = str(path)
    sys.modules[MODULE] = module
    sys.path.insert(0, folder)
    try:
        yield module
    finally:
        sys.path.remove(folder)
        del sys.modules[MODULE]
