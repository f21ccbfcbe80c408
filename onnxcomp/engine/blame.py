"""Whose fault it is: an exception inside a pass names the pass, its file and its line; what a pass must have done."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from onnxcomp.blocks.inner import inner_linears
from onnxcomp.errors import ModelError, OnnxcompError, RecipeError
from onnxcomp.graph import Declined, Graph, Site
from onnxcomp.pipeline import Fidelity, Pass, PassFault
from onnxcomp.runtime.integer import quantized_linears
from onnxcomp.stats import Need
from onnxcomp.target import Target

__all__ = ["blaming", "described", "left_in_branches", "listed", "needs_of", "nothing_found", "settled", "unmatched"]

T = TypeVar("T")


@contextlib.contextmanager
def blaming(p: Pass | type[Pass]) -> Iterator[None]:
    """Raise `PassFault` for an exception that is no error on purpose (`OnnxcompError`) and comes from the pass's files.

    Of a pass that did not come with onnxcomp every such exception is one, wherever the engine tripped over it.
    """
    try:
        yield
    except (OnnxcompError, MemoryError):
        raise
    except Exception as e:
        at = _place(p if isinstance(p, type) else type(p), e)
        if not at:
            raise  # the engine's own fault
        raise PassFault(f"pass '{p.name}' failed at {at}: {described(e)}") from e


def described(e: BaseException) -> str:
    """The kind of an exception with what it says, on one line."""
    return f"{type(e).__name__}: {e}".removesuffix(": ").replace("\n", " ")


def listed(p: Pass, method: str, given: object, kind: type[T]) -> list[T]:
    """What a method of a pass returned, as a list of `kind`; raises `PassFault` for anything else."""
    if not isinstance(given, Iterable):
        raise PassFault(f"pass '{p.name}': {method} must give values of {kind.__name__}, not {type(given).__name__}")
    values = list(given)
    for x in values:
        if not isinstance(x, kind):
            raise PassFault(f"pass '{p.name}': {method} must give values of {kind.__name__}, not {x!r}")
    return values


def _place(cls: type[Pass], e: Exception) -> str:
    """File and line of the innermost code of the pass that was running; for a pass of others at least its file."""
    files = {getattr(sys.modules.get(c.__module__), "__file__", None) for c in cls.__mro__ if issubclass(c, Pass)}
    files.discard(getattr(sys.modules[Pass.__module__], "__file__", None))
    others = cls.__module__.partition(".")[0] != Pass.__module__.partition(".")[0]
    homes = {str(Path(f).parent) for f in files if f and others and "." in cls.__module__}
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if f.filename in files or str(Path(f.filename).parent) in homes]
    if own:
        return f"{own[-1].filename}:{own[-1].lineno}"
    return (inspect.getsourcefile(cls) or cls.__module__) if others else ""


def nothing_found(g: Graph) -> str:
    """That a pass found no site, and that linears are integers already where that may be why."""
    done = quantized_linears(g.model)
    whose = f", whose {done} quantized linears stay as they are" if done else ""
    return "found nothing to change in it" + "".join([whose, *(f"; {note}" for note in left_in_branches(g))])


def unmatched(p: Pass, declined: Iterable[Declined]) -> list[str]:
    """A sentence for each pattern of an option that named nothing: it would be missed among the declined sites."""
    options = {f.name for f in dataclasses.fields(p)}
    return [f"{p.name}: {d.site} {d.why}" for d in declined if d.site.partition(": ")[0] in options and ": " in d.site]


def left_in_branches(g: Graph) -> list[str]:
    """A sentence for each node whose branches hold linears, which no pass changes."""
    return [f"'{x.node}' is left alone: {x.why}" for x in inner_linears(g)]


def needs_of(p: Pass, work: Graph, exact: Graph, target: Target) -> list[Need]:
    """The statistics a pass asks for, of the graph or of the original; raises `PassFault` for a value that is not."""
    needs = listed(p, "needs", p.needs(work, target), Need)
    for need in needs:
        try:
            (work if need.of == "current" else exact).value(need.value)
        except ModelError as e:
            raise PassFault(f"pass '{p.name}' asks for a statistic of a value that is not there: {e}") from e
    return needs


def settled(p: Pass, work: Graph, sites: list[Site], allow_unchanged: bool = False) -> int:
    """Count changed sites; one neither changed nor declined is a fault, a lossy pass must change one."""
    declined = {d.site for d in work.declined}
    changed = [s for s in sites if s.name not in declined and work.touched.intersection(s.nodes)]
    lost = [s.name for s in sites if s.name not in declined and not work.touched.intersection(s.nodes)]
    if lost and not _idle(p, work):
        raise PassFault(
            f"pass '{p.name}' neither changed nor declined {len(lost)} of {len(sites)} sites, such as '{lost[0]}'"
        )
    if p.fidelity is Fidelity.LOSSY and not changed and not allow_unchanged and not _idle(p, work):
        why = f"; it declined '{work.declined[0].site}': {work.declined[0].why}" if work.declined else ""
        found = f"changed none of the {len(sites)} sites it found" if sites else nothing_found(work)
        raise RecipeError(f"pass '{p.name}' {found}{why}. Say allow_unchanged: true in the recipe if that is fine")
    return len(changed)


def _idle(p: Pass, work: Graph) -> bool:
    """An exact pass may have nothing to do; so may one that mends others or says it is at its identity setting."""
    return work.edits == 0 and (p.fidelity is Fidelity.EXACT or p.is_identity or p.mends)
