"""The exceptions of this package; every message says what is wrong, where, and what to do."""


class OnnxcompError(Exception):
    """Base class of all errors that this package raises deliberately."""


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
    """A gate refused the result, so nothing was written; `report` holds what was measured."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
