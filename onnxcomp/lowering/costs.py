"""The cost of equivalent forms of a site: timed as micro-models on the target, or estimated from the target's table."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.data.inputs import TensorSpec, specs
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.graph.extract import timing_key
from onnxcomp.lowering.race import median
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, Target, resolved

__all__ = ["Cost", "costs", "forget", "operations"]

ROUNDS = 5  # each form is timed so often, in turns with the others; the median is taken
# Rounds after which timing ends where no form's times come near those of another: two more rounds would have to lie
# beyond all others by this factor to move a median across the 5 % that decisions are made by.
FEW, APART = 3, 1.25
_SECONDS = 0.02  # of timed runs per form and round

_times: dict[str, float] = {}


@dataclass(frozen=True)
class Cost:
    """Seconds per run (None where the table has no rate for it), bytes of constants, and the source of the time."""

    form: str
    seconds: float | None
    nbytes: int
    source: str


def costs(
    forms: Mapping[str, Graph],
    shapes: Mapping[str, Sequence[int]],
    target: Target = CPU,
    *,
    measure: bool = True,
    threads: int = 0,
    known: dict[str, float] | None = None,
) -> list[Cost]:
    """Cost of each form at the given input shapes, in the order of `forms`.

    Measured times are medians over interleaved rounds with one session alive at a time, cached by structure in this
    process or in `known`, so that equal sites are timed once. With `measure=False`, or a target that is not this
    machine, costs are estimated from the target's table. Raises the form's own error, naming the form.
    """
    times = _times if known is None else known
    target = resolved(target)
    keys = {n: _key(g, shapes, target, threads) for n, g in forms.items()}
    untimed = {n: g for n, g in forms.items() if keys[n] not in times}
    if untimed and not (measure and target.here):
        return [Cost(n, _table(g, shapes, target), g.nbytes, "table") for n, g in forms.items()]
    for name, seconds in _time(untimed, shapes, target, threads).items():
        times[keys[name]] = seconds
    return [Cost(n, times[keys[n]], g.nbytes, "measured") for n, g in forms.items()]


def forget() -> None:
    """Clear the times cached in this process."""
    _times.clear()


# ---- by the clock ----------------------------------------------------------------------------------------------------


def _time(
    forms: Mapping[str, Graph], shapes: Mapping[str, Sequence[int]], target: Target, threads: int
) -> dict[str, float]:
    """Median seconds of each form; forms are timed in turns, since clock rates drift more than forms differ."""
    feeds = {name: _feeds(g, shapes) for name, g in forms.items()}
    rounds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(ROUNDS):
        if turn >= FEW and _apart(rounds.values()):
            break
        order = list(forms) if turn % 2 == 0 else list(forms)[::-1]
        for name in order:
            try:
                rounds[name].append(_median(forms[name], feeds[name], target, threads))
            except OnnxcompError as e:
                raise type(e)(f"form '{name}': {e}") from e
    return {name: float(np.median(seconds)) for name, seconds in rounds.items()}


def _apart(times: Iterable[Sequence[float]]) -> bool:
    """Whether there are several forms, and the times of every two of them are wholly apart."""
    ordered = sorted(times, key=min)
    return len(ordered) > 1 and all(min(b) > APART * max(a) for a, b in itertools.pairwise(ordered))


def _median(g: Graph, feeds: Mapping[str, Array], target: Target, threads: int) -> float:
    with Session(g, target, threads=threads, prepack=True) as session:
        return median(session, feeds, _SECONDS)


def _feeds(g: Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in specs(g):
        dims = _dims(spec, shapes)
        if spec.dtype.kind == "b":
            feeds[spec.name] = np.ones(dims, spec.dtype)
        elif spec.dtype in (np.int8, np.uint8):
            feeds[spec.name] = rng.integers(0, 127, dims).astype(spec.dtype)
        elif spec.integer:
            feeds[spec.name] = np.ones(dims, spec.dtype) if "mask" in spec.name else np.zeros(dims, spec.dtype)
        else:
            feeds[spec.name] = rng.standard_normal(dims, np.float32).astype(spec.dtype)
    return feeds


def _dims(spec: TensorSpec, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    if spec.name in shapes:
        return tuple(shapes[spec.name])
    if any(isinstance(d, str) for d in spec.shape):
        raise DataError(f"the shape of input '{spec.name}' {list(spec.shape)} is open; give it in shapes")
    return tuple(int(d) for d in spec.shape)


def _key(g: Graph, shapes: Mapping[str, Sequence[int]], target: Target, threads: int) -> str:
    """Hash of all that a time depends on."""
    dims = {spec.name: _dims(spec, shapes) for spec in specs(g)}
    return hashlib.sha256(f"{timing_key(g, dims)}\n{target!r}\n{threads}".encode()).hexdigest()[:24]


# ---- by the table ----------------------------------------------------------------------------------------------------

# Operator: domain, kind of arithmetic, index of its second matrix.
_PRODUCTS = {
    "MatMulInteger": ("", "int8-dynamic", 1),
    "QLinearMatMul": ("", "int8", 3),
    "DynamicQuantizeMatMul": (CONTRIB, "int8-dynamic", 1),
    "MatMulIntegerToFloat": (CONTRIB, "int8", 1),
    "QGemm": (CONTRIB, "int8", 3),
    "FusedMatMul": (CONTRIB, "fp32", 1),
}


def _table(g: Graph, shapes: Mapping[str, Sequence[int]], target: Target) -> float | None:
    total = 0.0
    for kind, flops in operations(g, shapes).items():
        rate = target.gflops.get(kind)
        if rate is None:
            return None
        total += flops / (rate * 1e9)
    return total


def operations(g: Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Operations of all matrix products by kind of arithmetic (`fp32`, `int8`, ...), two per multiply-add."""
    work = g.clone()
    for v, spec in zip(work.inputs, specs(work), strict=True):
        v.shape = ir.Shape(_dims(spec, shapes))
    work.forget_shapes()
    work.infer_shapes()
    by_kind: dict[str, float] = {}
    for node in work.model.graph:
        if node.op_type in _PRODUCTS and _dims_of(node.outputs[0]) is None:
            _set_output_shape(work, node)
        kind, flops = _work(node)
        if flops:
            by_kind[kind] = by_kind.get(kind, 0.0) + flops
    return by_kind


def _dims_of(v: ir.Value | None) -> tuple[int, ...] | None:
    if v is None or v.shape is None or any(not isinstance(d, int) for d in v.shape):
        return None
    return tuple(d for d in v.shape if isinstance(d, int))


def _set_output_shape(g: Graph, node: ir.Node) -> None:
    """Set the output shape of a contrib product, which ONNX's shape inference does not know, and infer the rest."""
    a, b = _operands(node)
    if a is not None and b is not None:
        node.outputs[0].shape = ir.Shape([*a[:-1], b[-1]])
        if node.outputs[0].type is None:
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        g.infer_shapes()


def _operands(node: ir.Node) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Dimensions of both matrices as they are multiplied, `[..., M, K]` and `[..., K, N]`."""
    second = _PRODUCTS[node.op_type][2] if node.op_type in _PRODUCTS else 1
    a = _dims_of(node.inputs[0])
    b = _dims_of(node.inputs[second]) if second < len(node.inputs) else None
    for name in ("transA", "transB"):
        if node.attributes.get_int(name, 0):
            if name == "transA" and a is not None:
                a = (*a[:-2], a[-1], a[-2])
            if name == "transB" and b is not None:
                b = (*b[:-2], b[-1], b[-2])
    return a, b


def _work(node: ir.Node) -> tuple[str, float]:
    """Kind and operations of one node; zero for what is no matrix product or has no known shape."""
    if node.op_type == "Attention" and node.domain == "":
        return "fp32", _attention(node)
    product = _PRODUCTS.get(node.op_type)
    if node.op_type in ("MatMul", "Gemm") and node.domain == "":
        kind = "int8" if _from_integers(node.inputs[1]) and _from_integers(node.inputs[0]) else "fp32"
    elif product is not None and product[0] == node.domain:
        kind = product[1]
    else:
        return "", 0.0
    a, b = _operands(node)
    if a is None or b is None or not a or not b:
        return kind, 0.0
    columns = b[-1] if len(b) > 1 else 1
    batches = max(math.prod(a[:-2]), math.prod(b[:-2]))
    return kind, 2.0 * batches * (a[-2] if len(a) > 1 else 1) * a[-1] * columns


def _from_integers(v: ir.Value | None) -> bool:
    node = v.producer() if v is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _attention(node: ir.Node) -> float:
    """Both products of `[batch, heads, q, d]` with `[batch, kv heads, k, d]`, or of packed rank-3 inputs."""
    q, k, v = (_dims_of(x) for x in node.inputs[:3])
    if q is None or k is None or v is None:
        return 0.0
    if len(q) == 4:
        return 2.0 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    heads, kv_heads = node.attributes.get_int("q_num_heads", 1), node.attributes.get_int("kv_num_heads", 1)
    return 2.0 * q[0] * q[1] * k[1] * (q[2] + heads * v[2] // max(1, kv_heads))
