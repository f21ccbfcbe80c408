"""Constant folding of small values with symbols: shapes and scales that exporters compute at run time."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.known import Content, Known, cast_type, checked_axes, require
from onnxcomp.analysis.shape_rules import axes_of
from onnxcomp.analysis.sizes import Dim, Size, add, divide, floor, multiply, product, subtract

__all__ = ["CONTENT_RULES", "constant_content", "small"]

NEAR_INTEGER = 1e-5  # relative; about 80 units in the last place of float32
LEAST, MOST = -(1 << 63), (1 << 63) - 1  # of int64
MAX_EXPONENT = 63  # of two: the powers that int64 holds
MAX_ELEMENTS = 64  # of a value whose content is tracked: shape vectors and scalars, not tables
Rule = Callable[[Known, ir.Node], Content | None]


def small(c: Content | None) -> Content | None:
    """The content if it is small enough to track."""
    return c if c is not None and c.size <= MAX_ELEMENTS else None


def constant_content(t: ir.TensorProtocol) -> Content | None:
    """Elements of a small number or bool constant; a large one is not read."""
    if t.size > MAX_ELEMENTS or t.dtype == ir.DataType.STRING:
        return None
    a = t.numpy()
    if a.dtype.kind not in "iubf":
        a = a.astype(np.float32)
    c = np.empty(a.shape, object)
    c.reshape(-1)[:] = a.reshape(-1).tolist()
    return c


# ---- elementwise -------------------------------------------------------------------------------------------------


def _is_size(x: object) -> bool:
    return isinstance(x, int | Dim) and not isinstance(x, bool)


def _arithmetic(on_sizes: Callable[[Size, Size], Size | None], on_floats: Callable[[float, float], float]) -> Any:
    def f(x: Any, y: Any) -> Any:
        if _is_size(x) and _is_size(y):
            return on_sizes(x, y)
        if isinstance(x, float) and isinstance(y, float):
            try:
                return float(on_floats(x, y))
            except (ZeroDivisionError, OverflowError, ValueError):
                return None
        return _scaled(x, y) if on_floats is operator.mul else None

    return f


def _scaled(x: Any, y: Any) -> Any:
    """The product of a size that was cast to float and the number one."""
    return x if y == 1.0 and isinstance(x, Dim) else None


def _numbers(op: Callable[[Any, Any], Any]) -> Any:
    def f(x: Any, y: Any) -> Any:
        if isinstance(x, int | float) and isinstance(y, int | float):
            return op(x, y)
        return None

    return f


def _equal(x: Any, y: Any) -> Any:
    """Equality; sizes are not negative, so an unknown one never equals -1."""
    if isinstance(x, Dim) or isinstance(y, Dim):
        if x == y:
            return True
        other = y if isinstance(x, Dim) else x
        return False if isinstance(other, int | float) and other < 0 else None
    return x == y if x is not None and y is not None else None


def _extreme(op: Callable[..., Any]) -> Any:
    def f(x: Any, y: Any) -> Any:
        if x == y:
            return x
        return op(x, y) if isinstance(x, int | float) and isinstance(y, int | float) else None

    return f


def _unary(op: Callable[[float], float | None]) -> Any:
    def f(x: Any) -> Any:
        try:
            return op(x) if isinstance(x, int | float) else None
        except (ValueError, ZeroDivisionError, OverflowError):
            return None

    return f


def _negated(x: Any) -> Any:
    """`-x` of a number or a size, as in slices that count from the end."""
    return multiply(x, -1) if _is_size(x) else -x if isinstance(x, float) else None


def _rounded(op: Callable[[float], int], x: float) -> float | None:
    """A float rounded by `op`; None so near to an integer that the runtime's float32 may round otherwise."""
    nearest = round(x)
    if x != nearest and abs(x - nearest) < NEAR_INTEGER * max(1.0, abs(x)):
        return None
    return type(x)(op(x))


def _logic(op: Callable[[bool, bool], bool]) -> Any:
    def f(x: Any, y: Any) -> Any:
        return op(x, y) if isinstance(x, bool) and isinstance(y, bool) else None

    return f


def _each(f: Any, arity: int) -> Rule:
    ufunc = np.frompyfunc(lambda *xs: _in_range(f(*xs)), arity, 1)

    def rule(facts: Known, node: ir.Node) -> Content | None:
        parts = [facts.content(x) for x in node.inputs]
        known = [p for p in parts if p is not None]
        if len(known) != arity or len(parts) != arity:
            return None
        try:
            with np.errstate(invalid="ignore"):  # a comparison of NaN
                result = ufunc(*known)
        except ValueError:  # shapes that do not broadcast: an invalid graph, reported elsewhere
            return None
        return _boxed(result)

    return rule


def _in_range(x: Any) -> Any:
    """An element; None for an integer that int64 does not hold, for which the runtime's wraps around."""
    return None if isinstance(x, int) and not LEAST <= x <= MOST else x


def _boxed(x: Any) -> Content:
    """The content as an object array, also where it is a single element."""
    if isinstance(x, np.ndarray):
        return x
    c = np.empty((), object)
    c[()] = x
    return c


def _where(c: Any, x: Any, y: Any) -> Any:
    return (x if c else y) if isinstance(c, bool) else (x if x == y else None)


def _cast(f: Known, node: ir.Node) -> Content | None:
    c = f.content(node.inputs[0])
    if c is None:
        return None
    to = cast_type(node)
    if to == ir.DataType.STRING:
        return None

    def cast_element(x: Any) -> Any:
        if x is None or isinstance(x, Dim):
            return x if to != ir.DataType.BOOL else None
        if to == ir.DataType.BOOL:
            return bool(x)
        if to.is_floating_point():
            return float(x)
        rounded = _rounded(math.trunc, x) if math.isfinite(x) else None
        return None if rounded is None else int(rounded)

    return _boxed(np.frompyfunc(cast_element, 1, 1)(c))


# ---- shape arithmetic --------------------------------------------------------------------------------------------


def _vector(xs: list[Any]) -> Content:
    c = np.empty(len(xs), object)
    c[:] = xs
    return c


def _shape(f: Known, node: ir.Node) -> Content | None:
    s = f.shape(node.inputs[0])
    if s is None:
        return None
    return _vector(list(s[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(s))]))


def _size(f: Known, node: ir.Node) -> Content | None:
    s = f.shape(node.inputs[0])
    return None if s is None else _boxed(product(s))


def _gather(f: Known, node: ir.Node) -> Content | None:
    c, i = f.content(node.inputs[0]), f.content(node.inputs[1])
    if c is None or i is None or c.ndim == 0 or not all(isinstance(x, int) for x in i.reshape(-1)):
        return None
    (axis,) = checked_axes([node.attributes.get_int("axis", 0)], c.ndim)
    if any(not -c.shape[axis] <= x < c.shape[axis] for x in i.reshape(-1)):
        return None
    return _boxed(np.take(c, i.astype(np.int64), axis=axis))


def _slice(f: Known, node: ir.Node) -> Content | None:
    c = f.content(node.inputs[0])
    parts = [f.content(x) for x in node.inputs[1:] if x is not None]
    if c is None or len(parts) != len(node.inputs) - 1 or len(parts) < 2:
        return None
    numbers = [[x for x in p.reshape(-1) if isinstance(x, int)] if p is not None else [] for p in parts]
    starts, ends = numbers[0], numbers[1]
    if len(starts) != len(ends) or not starts:
        return None
    axes = numbers[2] if len(numbers) > 2 else list(range(len(starts)))
    steps = numbers[3] if len(numbers) > 3 else [1] * len(starts)
    if len(axes) != len(starts) or len(steps) != len(starts) or 0 in steps:
        return None
    checked_axes(axes, c.ndim)
    index = [slice(None)] * c.ndim
    for a, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[a] = slice(start, None if step < 0 and end < -c.shape[a] else end, step)
    return c[tuple(index)]


def _concat(f: Known, node: ir.Node) -> Content | None:
    parts = [f.content(x) for x in node.inputs]
    known = [p for p in parts if p is not None and p.ndim > 0]
    if len(known) != len(parts):
        return None
    (axis,) = checked_axes([node.attributes.get_int("axis", 1)], known[0].ndim)
    others = {(*p.shape[:axis], *p.shape[axis + 1 :]) for p in known if p.ndim == known[0].ndim}
    require(len(others) == 1 and all(p.ndim == known[0].ndim for p in known))
    return np.concatenate(known, axis=axis)


def _reshaped(f: Known, node: ir.Node) -> Content | None:
    """Reshape, Squeeze, Unsqueeze, Flatten: the elements in order, in the output's shape."""
    c, s = f.content(node.inputs[0]), f.shape(node.outputs[0])
    if c is None or s is None or not all(isinstance(d, int) for d in s):
        return None
    shape = tuple(int(d) for d in s if isinstance(d, int))
    return c.reshape(shape) if math.prod(shape) == c.size else None


def _expand(f: Known, node: ir.Node) -> Content | None:
    c, s = f.content(node.inputs[0]), f.shape(node.outputs[0])
    if c is None or s is None or not all(isinstance(d, int) for d in s):
        return None
    shape = tuple(int(d) for d in s if isinstance(d, int))
    if math.prod(shape) > MAX_ELEMENTS or max(shape, default=0) > MAX_ELEMENTS:
        return None
    require(c.ndim <= len(shape) and all(a in (1, b) for a, b in zip(reversed(c.shape), reversed(shape), strict=False)))
    return np.broadcast_to(c, shape)


def _of_shape(f: Known, node: ir.Node) -> Content | None:
    s = f.content(node.inputs[0])
    if s is None or not all(isinstance(d, int) for d in s.reshape(-1)):
        return None
    shape = tuple(int(d) for d in s.reshape(-1))
    require(min(shape, default=0) >= 0)
    if math.prod(shape) > MAX_ELEMENTS or max(shape, default=0) > MAX_ELEMENTS:
        return None
    value = node.attributes.get("value")
    require(value is None or value.as_tensor().size == 1)
    fill = value.as_tensor().numpy().reshape(-1)[0].item() if value is not None else 0.0
    return _boxed(np.full(shape, fill, object))


def _range(f: Known, node: ir.Node) -> Content | None:
    parts = [f.content(x) for x in node.inputs]
    numbers = [p.reshape(-1)[0] for p in parts if p is not None and p.size == 1]
    if len(numbers) != 3 or not all(isinstance(x, int) for x in numbers) or numbers[2] == 0:
        return None
    start, limit, step = numbers
    return _vector(list(range(*numbers))) if (limit - start) // step <= MAX_ELEMENTS else None


def _identity(f: Known, node: ir.Node) -> Content | None:
    return f.content(node.inputs[0])


def _transpose(f: Known, node: ir.Node) -> Content | None:
    c = f.content(node.inputs[0])
    if c is None:
        return None
    perm = node.attributes.get_ints("perm", list(reversed(range(c.ndim))))
    require(sorted(perm) == list(range(c.ndim)))
    return c.transpose(perm)


def _reduce_prod(f: Known, node: ir.Node) -> Content | None:
    c, axes = f.content(node.inputs[0]), axes_of(f, node)
    if c is None or c.ndim != 1 or axes is None or not all(_is_size(x) for x in c):
        return None
    total = product(list(c))
    return _vector([total]) if node.attributes.get_int("keepdims", 1) else _boxed(total)


def _quotient(x: Size, y: Size) -> Size | None:
    if isinstance(x, int) and isinstance(y, int):
        return (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1) if y else None  # ONNX truncates
    exact = divide(x, y)
    return exact if exact is not None else (floor(x, y) if y != 0 else None)


def _power(x: float, y: float) -> float | None:
    """A power of a positive number; None where it is too large, which is asked before it is computed."""
    if not (x > 0 and abs(y * math.log2(x)) < MAX_EXPONENT) or (y < 0 and isinstance(x, int)):
        return None
    return float(x**y) if isinstance(y, float) else x**y


def _remainder(x: Size, y: Size) -> Size | None:
    if isinstance(x, int) and isinstance(y, int):
        return x % y if y else None
    return 0 if divide(x, y) is not None else None


CONTENT_RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshaped),
    "Expand": _expand,
    "ConstantOfShape": _of_shape,
    "Range": _range,
    "Identity": _identity,
    "Transpose": _transpose,
    "Cast": _cast,
    "ReduceProd": _reduce_prod,
    "Add": _each(_arithmetic(add, operator.add), 2),
    "Sub": _each(_arithmetic(subtract, operator.sub), 2),
    "Mul": _each(_arithmetic(multiply, operator.mul), 2),
    "Div": _each(_arithmetic(_quotient, operator.truediv), 2),
    "Mod": _each(_arithmetic(_remainder, math.fmod), 2),
    "Pow": _each(_numbers(_power), 2),
    "Max": _each(_extreme(max), 2),
    "Min": _each(_extreme(min), 2),
    "Equal": _each(_equal, 2),
    "Greater": _each(_numbers(operator.gt), 2),
    "GreaterOrEqual": _each(_numbers(operator.ge), 2),
    "Less": _each(_numbers(operator.lt), 2),
    "LessOrEqual": _each(_numbers(operator.le), 2),
    "And": _each(_logic(operator.and_), 2),
    "Or": _each(_logic(operator.or_), 2),
    "Not": _each(lambda x: (not x) if isinstance(x, bool) else None, 1),
    "Where": _each(_where, 3),
    "Neg": _each(_negated, 1),
    "Sqrt": _each(_unary(math.sqrt), 1),
    "Reciprocal": _each(_unary(lambda x: 1.0 / x), 1),
    "Floor": _each(_unary(lambda x: _rounded(math.floor, x)), 1),
    "Ceil": _each(_unary(lambda x: _rounded(math.ceil, x)), 1),
    "Abs": _each(_unary(abs), 1),
}
