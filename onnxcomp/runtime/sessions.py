"""ONNX Runtime sessions that refuse to fall back to another provider.

Also here: whether a target can run on this machine, and how many quantized linears run as integer products.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcomp.errors import DataError, ModelError, OnnxcompError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.graph import Graph
from onnxcomp.graph.interface import removed_ports
from onnxcomp.maths import Array
from onnxcomp.runtime import half_arrays
from onnxcomp.runtime.bf16_twin import float32_twin
from onnxcomp.runtime.installed import available, failures, preload, short, unavailable
from onnxcomp.runtime.integer import dequantized_weights, integer_products, quantized_linears
from onnxcomp.runtime.payload import Model, graph_of, payload, prepacks, write_optimized
from onnxcomp.target import CPU, CUDA, Target

__all__ = ["IntegerCheck", "Port", "Session", "check_target", "integer_check", "rewritten"]

FOLDER_KEY = "session.model_external_initializers_file_folder_path"
THREADS = 0  # of a session for which none are asked; 0 = as the runtime likes, one for each core
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
    """Whether quantized linears run as integer products, counted in the runtime's optimized graph instead of timed.

    `ok` with at least as many integer products as quantized linears and no weight that is dequantized on every run.
    """

    quantized_linears: int
    integer_products: int
    dequantized_weights: int
    ok: bool
    detail: str = ""


def check_target(target: Target) -> None:
    """Run a one-node model on the target; raises `TargetError` that says what is missing and what to install."""
    available(target)
    if target.provider == "CPUExecutionProvider":
        return
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Add", [x, x], name="add")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 18}, name="probe")
    with Session(Graph(ir.Model(graph, ir_version=8)), target) as s:
        s.run({"x": np.ones(2, np.float32)})


# ---- sessions ------------------------------------------------------------------------------------------------------


class Session:
    """A model ready to run on a target, for use in a `with` statement.

    `taps` are names of intermediate values to return as additional outputs; `prepack` copies weights into the layout
    of the kernels (faster, more memory; default: only for small models); `profile` is the file that `close` writes the
    profile to; `optimized_path` the file that gets the graph after the runtime's own optimizations, which are left out
    where it is not `optimized`. Raises `TargetError` where the runtime falls back to another provider, `ModelError`
    where it rejects the model.
    """

    def __init__(
        self,
        model: Model,
        target: Target = CPU,
        *,
        threads: int = 0,
        taps: Sequence[str] = (),
        prepack: bool | None = None,
        profile: Path | None = None,
        optimized_path: Path | None = None,
        optimized: bool = True,
    ) -> None:
        ort = self._ort = available(target)
        preload(ort, target.provider)
        self._name = str(model if not isinstance(model, Graph) else model.path or "the model")
        self._input_taps: set[str] = set()
        self._profile = profile
        options = _options(ort, target, threads, prepack=prepacks(model, prepack))
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile.with_suffix(""))
        if optimized_path is not None:
            write_optimized(options, optimized_path)
        self._buffers: list[Any] = []  # memory that the runtime reads and does not own
        twin = float32_twin(model, target.provider)
        try:
            source = self._source(ort, twin or model, taps, options)
            self._session: Any = _create(ort, source, options, target, self._name)
        except ModelError:  # a file is parsed for bfloat16 only where the runtime rejects it
            twin = float32_twin(model, target.provider, files=True)
            if twin is None:
                raise
            self._session = _create(ort, self._source(ort, twin, taps, options), options, target, self._name)
        self.emulated = twin is not None
        self.provider: str = self._session.get_providers()[0]
        if self.provider != target.provider:
            self.close()
            raise unavailable(target, f"the session fell back to {self.provider}")
        self.inputs = [_port(i) for i in self._session.get_inputs()]
        self.outputs: list[str] = [*(o.name for o in self._session.get_outputs()), *sorted(self._input_taps)]
        self._by_name = {p.name: p for p in self.inputs}
        self._optional = {i.name for i in self._session.get_overridable_initializers()}
        self._removed = removed_ports(self._session.get_modelmeta().custom_metadata_map) - set(self._by_name)

    def _source(self, ort: Any, model: Model, taps: Sequence[str], options: Any) -> bytes | str:
        """What the runtime loads: the file itself, or a serialized graph that refers to its large constants."""
        if not isinstance(model, Graph):
            path = Path(model)
            if not taps and path.is_file():
                return str(path)
            model = graph_of(model)
        model.sort()  # passes append new nodes at the end; the runtime needs topological order
        # Inputs that are asked for need no run.
        self._input_taps = set(taps) & {str(v.name) for v in model.inputs} - {str(v.name) for v in model.outputs}
        load = payload(model.model, taps)
        if load.folder is not None:
            options.add_session_config_entry(FOLDER_KEY, str(load.folder))
        if load.shared:
            made = [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(a, int(kind)) for a, kind in load.shared.values()]
            options.add_external_initializers(list(load.shared), made)
            self._buffers = [made, load.shared]
        return load.message

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the asked outputs (or all) by name; raises `DataError` for feeds that do not fit."""
        if self._session is None:
            raise OnnxcompError(f"{self._name}: the session is closed")
        names = list(self.outputs if outputs is None else outputs)
        self._check(feeds)
        fetched = [n for n in names if n not in self._input_taps]
        known = {n: a for n, a in feeds.items() if n not in self._removed}
        try:
            arrays = half_arrays.run(self._ort, self._session, fetched, known) if fetched else []
        except failures() as e:
            raise self._explain(e, feeds) from e
        results = dict(zip(fetched, arrays, strict=True))
        return {n: results[n] if n in results else feeds[n] for n in names}

    def value(self, a: Array) -> Any:
        """An array in the runtime's memory, for `run_values`."""
        return half_arrays.as_value(self._ort, a)

    def run_values(
        self, feeds: Mapping[str, Array], values: Mapping[str, Any], outputs: Sequence[str]
    ) -> dict[str, Any]:
        """Run on arrays and on `values` that an earlier call gave; the outputs stay in the runtime's own memory."""
        if self._session is None:
            raise OnnxcompError(f"{self._name}: the session is closed")
        given = {n: half_arrays.as_value(self._ort, a) for n, a in feeds.items() if n not in self._removed} | dict(
            values
        )
        try:
            return dict(zip(outputs, self._session.run_with_ort_values(list(outputs), given), strict=True))
        except failures() as e:
            raise self._explain(e, feeds) from e

    def _explain(self, e: Exception, feeds: Mapping[str, Array]) -> OnnxcompError:
        shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in feeds.items())
        if "out of data bounds" in str(e):
            why = (
                "an id is outside its embedding table: the data was not made for this model, or its sequences are "
                "longer than the positions that the model has (--sequence and --shape make them shorter)"
            )
            return DataError(f"{self._name} on {shapes}: {why}: {short(e)}")
        return ModelError(f"{self._name} failed to run on {shapes}: {short(e)}")

    def _check(self, feeds: Mapping[str, Array]) -> None:
        if missing := [p.name for p in self.inputs if p.name not in feeds]:
            raise DataError(f"{self._name} needs input '{missing[0]}'; the data has {', '.join(feeds) or 'nothing'}")
        for name, a in feeds.items():
            if (port := self._by_name.get(name)) is None and name in self._optional | self._removed:
                continue
            if port is None:
                raise DataError(f"{self._name} has no input '{name}'; it has {', '.join(self._by_name)}")
            if a.dtype != port.dtype:
                raise DataError(f"input '{name}' of {self._name} is {port.dtype}, the data has {a.dtype}")
            fits = all(isinstance(d, str) or d == n for d, n in zip(port.shape, a.shape, strict=False))
            if port.shape and (len(port.shape) != a.ndim or not fits):  # () may be an unknown rank as well
                want, have = list(port.shape), list(a.shape)
                raise DataError(f"input '{name}' of {self._name} has shape {want}, the data has {have}")

    def close(self) -> None:
        """Free the runtime's memory and write the requested profile."""
        if getattr(self, "_session", None) is None:
            return
        if self._profile is not None:
            shutil.move(self._session.end_profiling(), self._profile)
        self._session = None
        self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _options(ort: Any, target: Target, threads: int, *, prepack: bool) -> Any:
    options = ort.SessionOptions()
    debug = logging.getLogger("onnxcomp").isEnabledFor(logging.DEBUG)
    options.log_severity_level = 2 if debug else 4
    if target.provider != "CPUExecutionProvider" and not debug:
        ort.set_default_logger_severity(4)  # a provider that cannot load logs there; `_unavailable` says it better
    options.intra_op_num_threads = threads or THREADS
    entries = {
        # Threads of an idle session must not spin on the cores of the one that runs: rates were off by a factor of two.
        "session.force_spinning_stop": "1",
        "session.intra_op.allow_spinning": "1",
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
    except failures() as e:
        if target.provider != "CPUExecutionProvider" and re.search(r"(?i)cuda|cudnn|cublas|nvinfer|provider", str(e)):
            raise unavailable(target, short(e)) from e
        raise ModelError(f"ONNX Runtime {ort.__version__} rejects {name}: {short(e)}") from e


def _port(i: Any) -> Port:
    match = re.fullmatch(r"tensor\((\w+)\)", i.type)
    if match is None or match[1] not in DTYPES:
        raise ModelError(f"input '{i.name}' has type {i.type}, which cannot be fed from numpy")
    shape = tuple(d if isinstance(d, int) else str(d or "?") for d in i.shape)
    return Port(i.name, np.dtype(DTYPES[match[1]]), shape)


# ---- what the runtime makes of a graph -----------------------------------------------------------------------------


@contextlib.contextmanager
def rewritten(model: Model, target: Target = CPU) -> Iterator[ir.Model]:
    """The graph after the runtime's own optimizations; its weights are readable only inside the `with`."""
    with scratch_folder() as folder:
        path = folder / "optimized.onnx"
        Session(model, target, prepack=False, optimized_path=path).close()
        yield ir.load(path)


def integer_check(model: Model, target: Target = CPU) -> IntegerCheck:
    """Compare the quantized linears of a model with the integer products in the runtime's optimized graph.

    Exact counts, so nothing is timed; products of two activations (attention) count on neither side.
    """
    model = graph_of(model)
    quantized = quantized_linears(model.model)
    if quantized == 0:
        return IntegerCheck(0, 0, 0, True)
    with rewritten(model, target) as optimized:
        products, dequantized = integer_products(optimized), dequantized_weights(optimized)
    if products >= quantized and not dequantized:
        return IntegerCheck(quantized, products, 0, True)
    detail = f"{products} of {quantized} quantized linears multiply by their codes"
    if dequantized:
        detail += f"; {len(dequantized)} weights are dequantized on every run, such as {', '.join(dequantized[:3])}"
    return IntegerCheck(quantized, products, len(dequantized), False, detail)
