"""The onnx package's tests judged: what the runtime gets right must stay right, or be refused in one line."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper
from onnx.backend.test.case import node as cases

from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import OnnxcompError
from onnxcomp.files import storage
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.lower import Lower

VERDICTS = {
    "right": "equal outputs after load, canonicalize, cleanup and lower",
    "refused": "one clear error that names the reason",
    "wrong": "other outputs",
    "fails": "the result does not load or run",
    "raw": "an exception that is none of ours",
    "crash": "the process died, or took longer than the limit",
    "unjudged": "the runtime has no kernel, gives other outputs than the test, or cannot be fed from numpy",
}
RTOL, ATOL = 1e-4, 1e-6  # against the runtime's own outputs: float noise of a rewritten graph
LOOSE = 1e-5  # least absolute difference from the test's outputs, which other code computed


@dataclass(frozen=True)
class Case:
    """One test: a model, what it is fed, and what it gives."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, Any]
    expected: list[Any]
    rtol: float
    atol: float


def modules() -> list[str]:
    """The modules of the onnx package that make node tests, in order; each makes those of one operator."""
    found = pkgutil.iter_modules(cases.__path__, f"{cases.__name__}.")
    return sorted(m.name for m in found if not m.ispkg)


def collect(names: Iterable[str] | None = None) -> Iterator[Case]:
    """The tests of all modules; with `names` only those of the modules imported so far, these ones included."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name in names or ():
            importlib.import_module(name)
        made = cases.collect_testcases() if names is None else cases._NodeTestCases
    for test in made:
        inputs, outputs = test.data_sets[0]
        feeds = {v.name: _array(x) for v, x in zip(test.model.graph.input, inputs, strict=False)}
        yield Case(test.name, test.model, feeds, [_array(y) for y in outputs], test.rtol, test.atol)


def stored(names: Iterable[str] = ("simple", "pytorch-operator", "pytorch-converted")) -> Iterator[Case]:
    """The tests that the onnx package holds as files: small models of several nodes, old operator sets among them."""
    root = Path(next(iter(onnx.backend.test.__path__))) / "data"
    for folder in sorted(p.parent for name in names for p in (root / name).glob("*/model.onnx")):
        model = onnx.load(folder / "model.onnx")
        data = folder / "test_data_set_0"
        inputs, outputs = (
            [_read(data / f"{what}_{i}.pb", v) for i, v in enumerate(ports)]
            for what, ports in (("input", _fed(model)), ("output", model.graph.output))
        )
        feeds = {v.name: x for v, x in zip(_fed(model), inputs, strict=True)}
        yield Case(f"{folder.parent.name}/{folder.name}", model, feeds, outputs, 1e-3, 1e-7)


def _fed(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    known = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in known]


def _read(file: Path, port: onnx.ValueInfoProto) -> Any:
    """A tensor, or a sequence of tensors."""
    content = file.read_bytes()
    if port.type.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def every() -> Iterator[Case]:
    """All tests of the onnx package: of each operator, and the stored ones."""
    yield from collect()
    yield from stored()


def _array(x: Any) -> Any:
    if isinstance(x, onnx.TensorProto):
        return numpy_helper.to_array(x)
    return np.asarray(x) if isinstance(x, np.generic) else x


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge(case: Case, folder: Path) -> tuple[str, str]:
    """The verdict on one test and the reason; files go to `folder`."""
    source = folder / "source.onnx"
    source.write_bytes(case.model.SerializeToString())
    try:
        original = _run(source, case.feeds)
    except Exception as e:  # noqa: BLE001  the runtime's exceptions have no common class
        return "unjudged", _line(e)
    if not _same(original, case.expected, case.rtol, max(case.atol, LOOSE)):
        return "unjudged", "the runtime gives other outputs than the test"
    try:
        result = PassManager([Canonicalize(), Cleanup(), Lower()]).run(storage.load(source))
        written = storage.save(result.model, folder / "result.onnx")
    except OnnxcompError as e:
        return "refused", _line(e).replace(f"{source}: ", "")
    except Exception as e:  # noqa: BLE001  a verdict
        return "raw", f"{type(e).__name__}: {_line(e)}"
    try:
        found = _run(written, case.feeds)
    except Exception as e:  # noqa: BLE001  a verdict
        return "fails", _line(e)
    return ("right", "") if _same(found, original, RTOL, ATOL) else ("wrong", "")


def _run(path: Path, feeds: Mapping[str, Any]) -> list[Any]:
    import onnxruntime as ort  # noqa: TID251  sequences and optionals are fed too, which a Session does not do

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]


def _same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two outputs are equal: arrays, strings, maps, or sequences of these."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k], rtol, atol) for k in a)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return isinstance(b, Sequence) and len(a) == len(b) and all(map(_same, a, b, [rtol] * len(a), [atol] * len(a)))
    if a is None or b is None:
        return a is b
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        return False
    if x.dtype.kind in "OSU":
        return bool((x.astype(str) == y.astype(str)).all())
    if x.dtype != y.dtype:
        return False
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    return bool(np.allclose(x.astype(wide), y.astype(wide), rtol, atol, equal_nan=True))
