"""Activations recognized by numerical fingerprint: a cone of elementwise nodes is evaluated on a grid and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.graph import Graph
from onnxcomp.maths import Float64

__all__ = ["find_activations", "raise_activations"]

# Dense where the functions bend; far points tell apart a polynomial that agrees near zero only.
GRID: Float64 = np.concatenate([np.linspace(-9, 9, 181), np.array([-1e3, -40.0, -17.0, 17.0, 40.0, 1e3])])
# Largest deviation from a reference, relative to 1 + |x|: constants of half types are rounded to these.
TOLERANCE, HALF_TOLERANCE = 1e-6, 3e-4
DEPTH = 8  # elementwise nodes on the way from the transcendental one to the input, and to the output


def _erf(x: Float64) -> Float64:
    return np.array([math.erf(t) for t in x.reshape(-1)]).reshape(x.shape)


def _sigmoid(x: Float64) -> Float64:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)), np.float64)


def _gelu_erf(x: Float64) -> Float64:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))), np.float64)


def _gelu_tanh(x: Float64) -> Float64:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), np.float64)


REFERENCES: dict[str, Float64] = {
    "gelu": _gelu_erf(GRID),
    "gelu-tanh": _gelu_tanh(GRID),
    "silu": GRID * _sigmoid(GRID),
    "quick-gelu": GRID * _sigmoid(1.702 * GRID),
}
ELEMENTWISE: dict[str, Callable[..., Float64]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Exp": np.exp,
    "Tanh": np.tanh,
    "Erf": _erf,
    "Sigmoid": _sigmoid,
    "Identity": lambda x: x,
}


class Cone:
    """Values that are functions of one value `x`, evaluated on the grid."""

    def __init__(self, f: Facts, x: ir.Value) -> None:
        self.f = f
        self.samples: dict[ir.Value, Float64 | None] = {x: GRID}

    def on_grid(self, v: ir.Value | None, depth: int = 2 * DEPTH) -> Float64 | None:
        """The value on the grid, or None where it is not a function of `x` alone."""
        if v is None:
            return None
        if v not in self.samples:
            self.samples[v] = self._evaluate(v, depth)
        return self.samples[v]

    def _evaluate(self, v: ir.Value, depth: int) -> Float64 | None:
        number = self.f.scalar(v)
        if number is not None:
            return np.full(GRID.shape, number)
        node = v.producer()
        if node is None or node.domain or node.op_type not in ELEMENTWISE or depth == 0:
            return None
        parts = [self.on_grid(x, depth - 1) for x in node.inputs]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        with np.errstate(all="ignore"):
            return np.asarray(ELEMENTWISE[node.op_type](*known), np.float64)


@dataclass(frozen=True)
class Activation:
    """`y = factor * kind(x)`; a factor other than 1 remains where a tool folded a constant into the weights behind."""

    kind: str
    x: ir.Value
    y: ir.Value
    factor: float = 1.0


def find_activations(g: Graph, f: Facts) -> Iterator[tuple[ir.Node, Activation]]:
    """The transcendental node of each activation that is not in canonical form, and the match."""
    for seed in g.nodes("Erf", "Tanh", "Sigmoid"):
        match = next((a for c in (1.0, 2.0) if (a := _recognise(f, seed, c)) is not None), None)
        if match is not None and not _canonical(match):
            yield seed, match


def raise_activations(g: Graph, f: Facts) -> None:
    """Rewrite decomposed activations: Gelu, `x * Sigmoid(c * x)` for SiLU and quick-GELU, `r * r` for ReLU^2."""
    for _, a in find_activations(g, f):
        new = _standard_form(g, a.kind, a.x, a.y)
        if a.factor != 1 and not _scale_consumers(g, a.y, a.factor):
            new = g.op("Mul", new, np.array(a.factor, (a.x.dtype or ir.DataType.FLOAT).numpy()), like=a.y)
        g.replace(a.y, new)
    for node in g.nodes("Pow"):
        rectified = node.inputs[0]
        producer = rectified.producer() if rectified is not None else None
        if producer is not None and producer.op_type == "Relu" and f.scalar(node.inputs[1]) == 2:
            g.replace(node.outputs[0], g.op("Mul", rectified, rectified, like=node.outputs[0]))


def _scale_consumers(g: Graph, y: ir.Value, factor: float) -> bool:
    """Multiply the weights of all users of `y` lazily; False without an edit if not all are linears or convolutions.

    Exact: the factor is a power of two.
    """
    uses = list(y.uses())
    weights = [g.tensor(u.inputs[1]) for u, i in uses if i == 0 and u.op_type in ("MatMul", "Conv") and not u.domain]
    constants = [t for t in weights if t is not None and t.dtype.is_floating_point()]
    if y.is_graph_output() or len(constants) < len(uses) or not all(_has_one_user(u.inputs[1]) for u, _ in uses):
        return False
    for (user, _), t in zip(uses, constants, strict=True):
        scaled = ir.LazyTensor(
            lambda t=t: ir.tensor((t.numpy() * t.dtype.numpy().type(factor)), dtype=t.dtype),  # type: ignore[misc]
            dtype=t.dtype,
            shape=ir.Shape(list(t.shape.numpy())),
        )
        g.set_input(user, 1, g.constant(scaled, str(user.inputs[1].name if user.inputs[1] is not None else "")))
    return True


def _has_one_user(w: ir.Value | None) -> bool:
    return w is not None and len(list(w.uses())) == 1


def _recognise(f: Facts, seed: ir.Node, factor: float) -> Activation | None:
    """The activation around a transcendental node, times a factor."""
    for x in _inputs_upstream(f, seed):
        cone = Cone(f, x)
        if cone.on_grid(seed.outputs[0]) is None:
            continue
        for y in _outputs_downstream(cone, seed.outputs[0]):
            samples = cone.on_grid(y)
            kind = _kind(None if samples is None else samples / factor, x.dtype)
            if kind is not None:
                return Activation(kind, x, y, factor)
    return None


def _kind(samples: Float64 | None, dtype: ir.DataType | None) -> str | None:
    """The reference nearest to the samples, if it is near enough for the element type."""
    if samples is None or not np.isfinite(samples).all():
        return None
    deviation = {name: float(np.max(np.abs(samples - r) / (1 + np.abs(GRID)))) for name, r in REFERENCES.items()}
    nearest = min(deviation, key=lambda name: deviation[name])
    tolerance = HALF_TOLERANCE if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else TOLERANCE
    return nearest if deviation[nearest] <= tolerance else None


def _inputs_upstream(f: Facts, seed: ir.Node) -> Iterator[ir.Value]:
    """Values that the seed may be a function of, nearest first."""
    layer, visited = [seed.inputs[0]], set()
    for _ in range(DEPTH):
        upstream: list[ir.Value | None] = []
        for v in layer:
            if v is None or v in visited or f.scalar(v) is not None:
                continue
            visited.add(v)
            yield v
            node = v.producer()
            if node is not None and node.domain == "" and node.op_type in ELEMENTWISE:
                upstream.extend(node.inputs)
        layer = upstream


def _outputs_downstream(cone: Cone, start: ir.Value) -> Iterator[ir.Value]:
    """Values after `start` that are functions of the cone's input, nearest first."""
    layer, visited = [start], {start}
    for _ in range(DEPTH):
        downstream = []
        for v in layer:
            for user, _ in v.uses():
                out = user.outputs[0]
                if out not in visited and user.op_type in ELEMENTWISE and cone.on_grid(out) is not None:
                    visited.add(out)
                    downstream.append(out)
                    yield out
        layer = downstream


def _canonical(a: Activation) -> bool:
    """Whether `y` is already `x * Sigmoid(c * x)`."""
    kind, x = a.kind, a.x
    product = a.y.producer()
    if kind not in ("silu", "quick-gelu") or product is None or product.op_type != "Mul" or x not in product.inputs:
        return False
    gate = product.inputs[1 - product.inputs.index(x)]
    sigmoid = gate.producer() if gate is not None else None
    if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is None:
        return False
    inner = sigmoid.inputs[0].producer()
    return (
        sigmoid.inputs[0] is x if kind == "silu" else inner is not None and inner.op_type == "Mul" and x in inner.inputs
    )


def _standard_form(g: Graph, kind: str, x: ir.Value, y: ir.Value) -> ir.Value:
    if kind == "gelu":
        return g.op("Gelu", x, like=y)
    if kind == "gelu-tanh":
        return g.op("Gelu", x, approximate="tanh", like=y)
    inner = x
    if kind == "quick-gelu":
        dtype = (x.dtype or ir.DataType.FLOAT).numpy()
        inner = g.op("Mul", x, np.array(1.702, dtype), like=y)
    return g.op("Mul", x, g.op("Sigmoid", inner, like=y), like=y)
