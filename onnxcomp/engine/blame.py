"""Whose fault an exception is: one inside a pass names the pass, its file and its line."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

from onnxcomp.errors import OnnxcompError
from onnxcomp.pipeline import Pass, PassFault

__all__ = ["blaming", "described"]


@contextlib.contextmanager
def blaming(p: Pass | type[Pass]) -> Iterator[None]:
    """Raise `PassFault` for an exception from the pass's own files that is no error on purpose (`OnnxcompError`)."""
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


def _place(cls: type[Pass], e: Exception) -> str:
    """File and line of the innermost code of the pass that was running, empty if none was."""
    files = {getattr(sys.modules.get(c.__module__), "__file__", None) for c in cls.__mro__ if issubclass(c, Pass)}
    files.discard(getattr(sys.modules[Pass.__module__], "__file__", None))
    own = [f for f in traceback.extract_tb(e.__traceback__) if f.filename in files]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
