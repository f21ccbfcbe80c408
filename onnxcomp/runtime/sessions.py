"""Sessions that really run where they were asked to; the only file that imports onnxruntime."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcomp.errors import DataError, ModelError, OnnxcompError, TargetError
from onnxcomp.graph import Graph
from onnxcomp.graph.interface import gone
from onnxcomp.maths import Array
from onnxcomp.runtime.bf16_twin import stand_in
from onnxcomp.runtime.integer import dequantized_weights, integer_products, quantized_linears
from onnxcomp.runtime.payload import Model, graph_of, payload, prepacks, tap, write_optimized
from onnxcomp.target import CPU, CUDA, Target

__all__ = ["IntegerCheck", "Port", "Session", "check_target", "installed_runtimes", "integer_check", "optimized"]

FLAVOURS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
LIBRARIES = {
    "CUDAExecutionProvider": ("libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcudnn.so.9"),
    "TensorrtExecutionProvider": ("libcuda.so.1", "libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10"),
}
INSTALL = {
    "CUDAExecutionProvider": "an NVIDIA driver and "
    "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.28' (the extra onnxcomp[gpu])",
    "TensorrtExecutionProvider": "an NVIDIA driver, pip install 'onnxruntime-gpu[cuda,cudnn]>=1.28' and "
    "pip install 'tensorrt-cu13>=10.13,<11' (the extra onnxcomp[tensorrt])",
}
FOLDER_KEY = "session.model_external_initializers_file_folder_path"
DTYPES: dict[str, Any] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "bool": np.bool_,
    "string": np.object_,
    **{f"{u}int{b}": np.dtype(f"{u}int{b}") for u in ("", "u") for b in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Port:
    """An input of a session: name, numpy type, and shape with names for dynamic axes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class IntegerCheck:
    """The clock-free check: as many integer products as quantized linears, and no weight dequantized on every run."""

    quantized_linears: int
    integer_products: int
    dequantized_weights: int
    ok: bool
    detail: str = ""


# ---- what is installed ---------------------------------------------------------------------------------------------


def installed_runtimes() -> dict[str, str]:
    """Installed distributions that bring the module onnxruntime, by name; more than one is a broken setup."""
    found = {}
    for name in FLAVOURS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def _ort() -> Any:
    """The module onnxruntime; raises `TargetError` where it is missing, hollow, or installed twice."""
    found = installed_runtimes()
    if len(found) > 1:
        both = " and ".join(f"{n} {v}" for n, v in found.items())
        raise TargetError(
            f"{both} are installed together and overwrite each other's files: "
            f"pip uninstall -y {' '.join(found)}, then install one: pip install 'onnxcomp[cpu]' or 'onnxcomp[gpu]'"
        )
    try:
        import onnxruntime as ort  # noqa: TID251
    except ImportError as e:
        raise TargetError(f"ONNX Runtime is not installed or does not load ({e}): pip install 'onnxcomp[cpu]'") from e
    if not hasattr(ort, "InferenceSession"):
        raise TargetError("onnxruntime is an empty shell: pip uninstall -y onnxruntime, pip install 'onnxcomp[cpu]'")
    return ort


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:2])


def _available(target: Target) -> Any:
    """The runtime, if its build holds the target's provider and is new enough; raises `TargetError`."""
    ort = _ort()
    if _version(ort.__version__) < _version(target.min_runtime):
        need = f"needs ONNX Runtime {target.min_runtime} or newer, {ort.__version__} is installed"
        raise TargetError(f"target '{target.name}' {need}: pip install -U '{target.package}'")
    if target.provider not in ort.get_available_providers():
        have = " ".join(installed_runtimes()) or "onnxruntime"
        raise TargetError(
            f"target '{target.name}' needs {target.provider}, which {have} {ort.__version__} does not have: "
            f"pip uninstall -y {have}, then pip install '{target.package}'"
        )
    return ort


def _preload(ort: Any, provider: str) -> None:
    """Load NVIDIA's libraries from their Python packages, where the provider would not find them by itself."""
    if provider not in LIBRARIES:
        return
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    spec = importlib.util.find_spec("tensorrt_libs") if provider == "TensorrtExecutionProvider" else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(folder) / name), mode=ctypes.RTLD_GLOBAL)


def _missing(provider: str) -> list[str]:
    lost = []
    for name in LIBRARIES.get(provider, ()):
        try:
            ctypes.CDLL(name)
        except OSError:
            lost.append(name)
    return lost


def _not_there(target: Target, got: str) -> TargetError:
    lost = _missing(target.provider)
    why = f"not found: {', '.join(lost)}" if lost else got
    need = INSTALL.get(target.provider, target.package)
    return TargetError(f"target '{target.name}' does not run on this machine ({why}); it needs {need}")


def check_target(target: Target) -> None:
    """Run a one-node model on the target; raises `TargetError` that says what is missing and what to install."""
    _available(target)
    if target.provider == "CPUExecutionProvider":
        return
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Add", [x, x], name="add")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 18}, name="probe")
    with Session(Graph(ir.Model(graph, ir_version=8)), target) as s:
        s.run({"x": np.ones(2, np.float32)})


def _short(e: Exception) -> str:
    """A message of the runtime without its source paths, at most 300 characters."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(e).strip())
    text = re.sub(r"\S*onnxruntime\S*\.(cc|h|cpp):\d+ ?\S*\([^)]*\) ?", "", text)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """Everything the runtime raises; its own errors have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: TID251

    own = [c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


# ---- sessions ------------------------------------------------------------------------------------------------------


class Session:
    """A model ready to run on a target, for use in a `with` statement.

    `taps` are intermediate values to fetch as well; `spin=False` keeps waiting threads off the cores; `profile`
    names the file that `close` writes; `optimized_path` the file that gets the graph as the runtime has rewritten
    it. Raises `TargetError` where the target's provider does not really run, `ModelError` where the runtime rejects
    the model.
    """

    def __init__(
        self,
        model: Model,
        target: Target = CPU,
        *,
        threads: int = 0,
        taps: Sequence[str] = (),
        prepack: bool | None = None,
        priority_order: bool = False,
        spin: bool = True,
        profile: Path | None = None,
        optimized_path: Path | None = None,
    ) -> None:
        ort = _available(target)
        _preload(ort, target.provider)
        self._name = str(model if not isinstance(model, Graph) else model.path or "the model")
        self._echo: set[str] = set()
        self._profile = profile
        packed = prepacks(model, prepack)
        options = _options(ort, target, threads, prepack=packed, priority_order=priority_order, spin=spin)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile.with_suffix(""))
        if optimized_path is not None:
            write_optimized(options, optimized_path)
        self._keep: list[Any] = []
        twin = stand_in(model, target.provider)
        try:
            source = self._source(ort, twin or model, taps, options)
            self._session: Any = _create(ort, source, options, target, self._name)
        except ModelError:  # only now is a file looked into
            twin = stand_in(model, target.provider, files=True)
            if twin is None:
                raise
            self._session = _create(ort, self._source(ort, twin, taps, options), options, target, self._name)
        self.emulated = twin is not None
        self.provider: str = self._session.get_providers()[0]
        if self.provider != target.provider:
            self.close()
            raise _not_there(target, f"the session fell back to {self.provider}")
        self.inputs = [_port(i) for i in self._session.get_inputs()]
        self.outputs: list[str] = [*(o.name for o in self._session.get_outputs()), *sorted(self._echo)]
        self._by_name = {p.name: p for p in self.inputs}
        self._optional = {i.name for i in self._session.get_overridable_initializers()}
        self._gone = gone(self._session.get_modelmeta().custom_metadata_map) - set(self._by_name)

    def _source(self, ort: Any, model: Model, taps: Sequence[str], options: Any) -> bytes | str:
        """What the runtime loads: a file as it is, or a message with its large constants left where they lie."""
        if not isinstance(model, Graph):
            path = Path(model)
            if not taps and path.is_file():
                return str(path)
            model = graph_of(model)
        model.model.graph.sort()  # nodes that a pass has just added stand at the end; order has no meaning
        copy = model.model.clone()
        self._echo = tap(copy, taps)
        given = payload(copy)
        if given.folder is not None:
            options.add_session_config_entry(FOLDER_KEY, str(given.folder))
        if given.shared:
            self._keep = [ort.OrtValue.ortvalue_from_numpy(a) for a in given.shared.values()]
            options.add_external_initializers(list(given.shared), self._keep)
        if given.files:
            names, arrays = list(given.files), list(given.files.values())
            options.add_external_initializers_from_files_in_memory(names, arrays, [a.nbytes for a in arrays])
            self._keep.append(given.files)
        return given.message

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; returns the asked outputs, or all, by name. Raises `DataError` for feeds that do not fit."""
        if self._session is None:
            raise OnnxcompError(f"{self._name}: the session is closed")
        names = list(self.outputs if outputs is None else outputs)
        self._check(feeds)
        fetched = [n for n in names if n not in self._echo]
        try:
            arrays = self._session.run(fetched, {n: feeds[n] for n in feeds if n not in self._gone}) if fetched else []
        except _failures() as e:
            raise self._explain(e, feeds) from e
        found = dict(zip(fetched, arrays, strict=True))
        return {n: found[n] if n in found else feeds[n] for n in names}

    def _explain(self, e: Exception, feeds: Mapping[str, Array]) -> OnnxcompError:
        shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in feeds.items())
        if "out of data bounds" in str(e):
            why = "an id is outside its table, so the data is not made for this model"
            return DataError(f"{self._name} on {shapes}: {why}: {_short(e)}")
        return ModelError(f"{self._name} failed to run on {shapes}: {_short(e)}")

    def _check(self, feeds: Mapping[str, Array]) -> None:
        if missing := [p.name for p in self.inputs if p.name not in feeds]:
            raise DataError(f"{self._name} needs input '{missing[0]}'; the data has {', '.join(feeds) or 'nothing'}")
        for name, a in feeds.items():
            if (port := self._by_name.get(name)) is None and name in self._optional | self._gone:
                continue
            if port is None:
                raise DataError(f"{self._name} has no input '{name}'; it has {', '.join(self._by_name)}")
            if a.dtype != port.dtype:
                raise DataError(f"input '{name}' of {self._name} is {port.dtype}, the data has {a.dtype}")
            fits = all(isinstance(d, str) or d == n for d, n in zip(port.shape, a.shape, strict=False))
            if len(port.shape) != a.ndim or not fits:
                want, have = list(port.shape), list(a.shape)
                raise DataError(f"input '{name}' of {self._name} has shape {want}, the data has {have}")

    def close(self) -> None:
        """Free the runtime's memory; writes the profile if one was asked for."""
        if getattr(self, "_session", None) is None:
            return
        if self._profile is not None:
            shutil.move(self._session.end_profiling(), self._profile)
        self._session = None
        self._keep.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _options(ort: Any, target: Target, threads: int, *, prepack: bool, priority_order: bool, spin: bool) -> Any:
    options = ort.SessionOptions()
    debug = logging.getLogger("onnxcomp").isEnabledFor(logging.DEBUG)
    options.log_severity_level = 2 if debug else 4
    if target.provider != "CPUExecutionProvider" and not debug:
        ort.set_default_logger_severity(4)  # a provider that cannot load complains there; we say it ourselves
    options.intra_op_num_threads = threads
    if priority_order:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    entries = {
        # Idle sessions must not take cores from the ones that run (engine.md: rates were off by a factor of two).
        "session.force_spinning_stop": "1",
        "session.intra_op.allow_spinning": "1" if spin else "0",
        "session.disable_prepacking": "0" if prepack else "1",
        **target.session_options,
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _create(ort: Any, source: bytes | str, options: Any, target: Target, name: str) -> Any:
    has = ort.get_available_providers()
    extra = {target.provider: dict(target.provider_options)}
    if "CUDAExecutionProvider" in target.providers[1:]:
        extra["CUDAExecutionProvider"] = dict(CUDA.provider_options)
    providers = [(p, extra.get(p, {})) for p in target.providers if p in has]
    try:
        return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except _failures() as e:
        if target.provider != "CPUExecutionProvider" and re.search(r"(?i)cuda|cudnn|cublas|nvinfer|provider", str(e)):
            raise _not_there(target, _short(e)) from e
        raise ModelError(f"ONNX Runtime {ort.__version__} rejects {name}: {_short(e)}") from e


def _port(i: Any) -> Port:
    match = re.fullmatch(r"tensor\((\w+)\)", i.type)
    if match is None or match[1] not in DTYPES:
        raise ModelError(f"input '{i.name}' has type {i.type}, which cannot be fed from numpy")
    shape = tuple(d if isinstance(d, int) else str(d or "?") for d in i.shape)
    return Port(i.name, np.dtype(DTYPES[match[1]]), shape)


# ---- what the runtime makes of a graph -----------------------------------------------------------------------------


@contextlib.contextmanager
def _rewritten(model: Model, target: Target) -> Iterator[ir.Model]:
    """The graph after the runtime's optimizers; its weights are readable only inside the `with`."""
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        path = Path(folder) / "optimized.onnx"
        Session(model, target, prepack=False, optimized_path=path).close()
        yield ir.load(path)


def optimized(model: Model, target: Target = CPU) -> Graph:
    """The graph as the runtime rewrites it for this target, weights in memory."""
    with _rewritten(model, target) as rewritten:
        return Graph(ir.external_data.load_to_model(rewritten))


def integer_check(model: Model, target: Target = CPU) -> IntegerCheck:
    """Compare the quantized linears of a model with the integer products of the graph that the runtime makes of it.

    Counts are exact and need no clock; attention products of two activations count on neither side.
    """
    model = graph_of(model)
    asked = quantized_linears(model.model)
    if asked == 0:
        return IntegerCheck(0, 0, 0, True)
    with _rewritten(model, target) as rewritten:
        made, left = integer_products(rewritten), dequantized_weights(rewritten)
    if made >= asked and not left:
        return IntegerCheck(asked, made, 0, True)
    detail = f"{made} of {asked} quantized linears run as integer products"
    if left:
        detail += f"; {len(left)} weights are dequantized on every run, such as {', '.join(left[:3])}"
    return IntegerCheck(asked, made, len(left), False, detail)
