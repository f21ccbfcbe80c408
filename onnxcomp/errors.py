"""The exceptions of this package; every message says what is wrong, where, and what to do."""

import re
from typing import ClassVar

# What options of the command line are called in Python, where that is not the same word.
_IN_PYTHON = {"eval": "evaluation", "shape": "shapes", "gate": "gates", "metric": "metrics", "pass": "passes"}
_FLAGS = {"no-measure": "measure=False", "allow-code": "allow_code=True", "exact-rows": "exact_rows=True"}
_FLAGS |= {
    "plan": "plan=True",
    "allow-pickle": "allow_pickle=True",
    "standard": "standard=True",
    "last-logits": "last_logits=True",
    "no-past": "past=False",
}


class OnnxcompError(Exception):
    """Base class of all errors that this package raises deliberately.

    Messages name options as the command line does (`--eval`); to callers from Python they say `evaluation=`.
    """

    on_command_line: ClassVar[bool] = False

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.on_command_line else re.sub(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)", _in_python, text)


def _in_python(option: re.Match[str]) -> str:
    name = option[1]
    return _FLAGS.get(name, f"{_IN_PYTHON.get(name, name.replace('-', '_'))}=")


class ModelError(OnnxcompError):
    """A model file or graph is broken, unsafe or unsupported."""


class NotConstant(OnnxcompError):
    """A value that must be a constant is computed at run time."""


class RecipeError(OnnxcompError):
    """A recipe, pass option or gate expression is wrong."""


class UnknownPass(RecipeError):
    """A pass name that no file and no entry point provides."""


class DataError(OnnxcompError):
    """Calibration or evaluation data is missing, malformed or does not fit the model."""


class TargetError(OnnxcompError):
    """The target cannot run on this machine, or the graph is not legal on it."""


class ExportError(OnnxcompError):
    """A checkpoint could not be turned into an ONNX model."""


class GateFailed(OnnxcompError):
    """A gate refused the result, so nothing was written; `report` is what was measured, of one `graph` of several."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report, self.graph = report, ""
