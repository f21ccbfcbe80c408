"""Shape inference of single operators; a rule returns None where it does not know (the recorded shape is used then)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.conv_rules import CONV_RULES
from onnxcomp.analysis.known import Content, Known, checked_axes, given, require
from onnxcomp.analysis.sizes import Dim, Shape, Size, add, difference_of, divide, multiply, product

__all__ = ["SHAPE_RULES", "axes_of", "axis_of", "present_shape", "split_shape", "total_length"]

Rule = Callable[[Known, ir.Node], Shape | None]
MAX_RANK = 64  # axes of a value; runtimes allow fewer


def axis_of(node: ir.Node, rank: int, default: int = -1) -> int:
    """The attribute `axis` as a non-negative number."""
    axis = node.attributes.get_int("axis", default)
    return axis % rank if rank else 0


def _axis(node: ir.Node, rank: int, default: int) -> int:
    return checked_axes([node.attributes.get_int("axis", default)], rank)[0]


def _first(f: Known, node: ir.Node) -> Shape | None:
    return f.shape(given(node, 0))


def _broadcast(f: Known, node: ir.Node) -> Shape | None:
    shapes = [f.shape(x) for x in node.inputs if x is not None]
    known = [s for s in shapes if s is not None]
    return f.broadcast(known) if len(known) == len(shapes) else None


def _matmul(f: Known, node: ir.Node) -> Shape | None:
    a, b = f.shape(given(node, 0)), f.shape(given(node, 1))
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    f.equal.assume(a[-1], b[-2])
    return (*f.broadcast([a[:-2], b[:-2]]), a[-2], b[-1])


def _gemm(f: Known, node: ir.Node) -> Shape | None:
    a, b = f.shape(given(node, 0)), f.shape(given(node, 1))
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    turned = [node.attributes.get_int(name, 0) != 0 for name in ("transA", "transB")]
    return (a[1 if turned[0] else 0], b[0 if turned[1] else 1])


def _transpose(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    if s is None:
        return None
    perm = node.attributes.get_ints("perm", list(reversed(range(len(s)))))
    require(sorted(perm) == list(range(len(s))))
    return tuple(s[p] for p in perm)


def axes_of(f: Known, node: ir.Node) -> list[int] | None:
    """Axes given as attribute or as second input; None when computed, empty when absent."""
    if "axes" in node.attributes:
        return list(node.attributes.get_ints("axes"))
    axes = given(node, 1)
    if axes is None:
        return []
    c = f.content(axes)
    if c is None or not all(isinstance(x, int) for x in c.reshape(-1)):
        return None
    return [int(x) for x in c.reshape(-1)]


def _unsqueeze(f: Known, node: ir.Node) -> Shape | None:
    s, axes = f.shape(node.inputs[0]), axes_of(f, node)
    if s is None or axes is None:
        return None
    rank = len(s) + len(axes)
    added, old = set(checked_axes(axes, rank)), iter(s)
    return tuple(1 if i in added else next(old) for i in range(rank))


def _squeeze(f: Known, node: ir.Node) -> Shape | None:
    s, axes = f.shape(node.inputs[0]), axes_of(f, node)
    if s is None or axes is None or (not axes and any(isinstance(d, Dim) for d in s)):
        return None
    removed = set(checked_axes(axes, len(s))) if axes else {i for i, d in enumerate(s) if d == 1}
    return tuple(d for i, d in enumerate(s) if i not in removed)


def _reduce(f: Known, node: ir.Node) -> Shape | None:
    s, axes = f.shape(node.inputs[0]), axes_of(f, node)
    if s is None or axes is None:
        return None
    none = node.attributes.get_int("noop_with_empty_axes", 0)
    removed = set(checked_axes(axes, len(s))) if axes else set() if none else set(range(len(s)))
    keep = node.attributes.get_int("keepdims", 1)
    return tuple(1 if i in removed else d for i, d in enumerate(s) if keep or i not in removed)


def _reshape(f: Known, node: ir.Node) -> Shape | None:
    out, s, target = node.outputs[0], f.shape(node.inputs[0]), f.content(given(node, 1))
    if target is None or s is None:
        return _rank_only(f, node)
    zero = node.attributes.get_int("allowzero", 0)
    dims: list[Size] = []
    open_axis = None
    for i, t in enumerate(target.reshape(-1)):
        if t == 0 and not zero:
            dims.append(s[i] if i < len(s) else f.fresh(out, i))
        elif t == -1:
            open_axis = i
            dims.append(1)
        else:
            dims.append(t if isinstance(t, int | Dim) else f.fresh(out, i))
    if open_axis is not None:
        inferred = f.quotient(product(s), product(dims))
        inferred = _one_batch(f, s, dims, open_axis) if inferred is None else inferred
        dims[open_axis] = inferred if inferred is not None else f.fresh(out, open_axis)
    return tuple(dims)


def _one_batch(f: Known, s: Shape, dims: list[Size], open_axis: int) -> Size | None:
    """The size that -1 stands for where a value with one input's batch is viewed with another input's batch.

    Decoders view the encoder's states so. The two batches are assumed equal: otherwise the view would mix samples.
    """
    batches = [x for x in (*s[:1], *dims[:1]) if isinstance(x, Dim) and x.factor == 1 and len(x.names) == 1]
    batch_roots = {f.roots[x.names[0]] for x in batches if x.names[0] in f.roots}
    inferred = f.quotient(product(s[1:]), product(dims[1:]))
    if (
        open_axis == 0
        or len(batch_roots) < 2
        or any(axis != 0 for _, axis in batch_roots)
        or not isinstance(inferred, int)
    ):
        return None
    f.equal.assume(s[0], dims[0])
    return inferred


def _rank_only(f: Known, node: ir.Node) -> Shape | None:
    """The shape after a computed target of known length: the recorded shape (None), or one new unknown per axis."""
    out, length = node.outputs[0], f.shape(given(node, 1))
    if out.shape is not None or length is None or len(length) != 1 or not isinstance(length[0], int):
        return None
    require(length[0] <= MAX_RANK)
    return tuple(f.fresh(out, i) for i in range(length[0]))


def _expand(f: Known, node: ir.Node) -> Shape | None:
    s, target = f.shape(node.inputs[0]), f.content(node.inputs[1])
    if s is None or target is None:
        return _rank_only(f, node)
    target_shape = tuple(
        t if isinstance(t, int | Dim) else f.fresh(node.outputs[0], i) for i, t in enumerate(target.reshape(-1))
    )
    return f.broadcast([target_shape, s])


def _tile(f: Known, node: ir.Node) -> Shape | None:
    s, repeats = f.shape(node.inputs[0]), f.content(node.inputs[1])
    if s is None or repeats is None or repeats.size != len(s) or len(node.inputs) > 2:  # three below opset 6
        return None
    pairs = zip(s, repeats.reshape(-1), strict=True)
    return tuple(
        multiply(d, n) if isinstance(n, int | Dim) else f.fresh(node.outputs[0], i) for i, (d, n) in enumerate(pairs)
    )


def _concat(f: Known, node: ir.Node) -> Shape | None:
    shapes = [f.shape(x) for x in node.inputs]
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes) or not known:
        return None
    require(all(len(s) == len(known[0]) for s in known))
    axis = _axis(node, len(known[0]), 1)
    total: Size = 0
    for s in known:
        total = add(total, s[axis])
    others = f.broadcast([(*s[:axis], 1, *s[axis + 1 :]) for s in known])
    return (*others[:axis], total, *others[axis + 1 :])


def _slice(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    parts = [f.content(x) if x is not None else None for x in node.inputs[1:]]
    if s is None or len(parts) < 2:
        return None
    starts, ends = parts[0], parts[1]
    axes = (
        parts[2]
        if len(parts) > 2 and node.inputs[3] is not None
        else np.arange(starts.size if starts is not None else 0)
    )
    steps = parts[3] if len(parts) > 3 and node.inputs[4] is not None else None
    if (
        starts is None
        or ends is None
        or axes is None
        or (len(parts) > 3 and node.inputs[4] is not None and steps is None)
    ):
        return None
    numbered = checked_axes(list(axes.reshape(-1)), len(s))
    by = [1] * len(numbered) if steps is None else list(steps.reshape(-1))
    require(len(numbered) == starts.size == ends.size == len(by) and all(isinstance(x, int) and x for x in by))
    dims = list(s)
    for axis, start, end, step in zip(numbered, starts.reshape(-1), ends.reshape(-1), by, strict=True):
        dims[axis] = _sliced(f, node.outputs[0], axis, s[axis], start, end, step)
    return tuple(dims)


def _sliced(f: Known, out: ir.Value, axis: int, d: Size, start: object, end: object, step: int) -> Size:
    if isinstance(d, int) and isinstance(start, int) and isinstance(end, int):
        first, last, _ = slice(start, end if end > -(2**62) else None, step).indices(d)
        return max(0, -((first - last) // step))  # `len` of a range holds 63 bits only
    from_first = start == 0 or (isinstance(start, Dim) and f.same(start, multiply(d, -1)))
    if from_first and step == 1 and isinstance(end, int) and end >= 2**31 - 1:
        return d
    to_last = step == 1 and isinstance(end, int) and end >= 2**31 - 1
    if to_last and isinstance(start, Dim) and (count := difference_of(start)) is not None and count[0] == d:
        return count[1]  # the last ones, as many as are subtracted from the length
    if start == 0 and step == 1 and isinstance(end, Dim) and isinstance(d, int | Dim) and f.same(d, end):
        return d
    recorded = f.recorded(out)
    return recorded[axis] if recorded is not None else f.fresh(out, axis)


def split_shape(f: Known, node: ir.Node, index: int) -> Shape | None:
    """Shape of one output of a Split."""
    s = f.shape(node.inputs[0])
    if s is None:
        return None
    axis = _axis(node, len(s), 0)
    stated = node.attributes.get_ints("split", [])  # below opset 13
    lengths = f.content(given(node, 1))
    if lengths is not None or stated:
        sizes = list(stated) if lengths is None else list(lengths.reshape(-1))
        require(len(sizes) == len(node.outputs))
        part = sizes[index]
    elif given(node, 1) is not None:
        return None
    else:
        part = divide(s[axis], len(node.outputs))
    return (*s[:axis], part, *s[axis + 1 :]) if isinstance(part, int | Dim) else None


def _gather(f: Known, node: ir.Node) -> Shape | None:
    s, i = f.shape(node.inputs[0]), f.shape(node.inputs[1])
    if s is None or i is None:
        return None
    axis = _axis(node, len(s), 0)
    return s[:axis] + i + s[axis + 1 :]


def _second(f: Known, node: ir.Node) -> Shape | None:
    return f.shape(node.inputs[1])


def _gather_nd(f: Known, node: ir.Node) -> Shape | None:
    s, i = f.shape(node.inputs[0]), f.shape(node.inputs[1])
    batch = node.attributes.get_int("batch_dims", 0)
    if s is None or not i or not isinstance(i[-1], int):
        return None
    return i[:-1] + s[batch + i[-1] :]


def _range(f: Known, node: ir.Node) -> Shape | None:
    start, limit, step = (f.content(x) for x in node.inputs)
    if limit is None or start is None or step is None:
        return None
    require(start.size == limit.size == step.size == 1)
    n = limit.reshape(-1)[0]
    if start.reshape(-1)[0] != 0 or step.reshape(-1)[0] != 1 or not isinstance(n, int | Dim):
        return None
    return (max(0, n) if isinstance(n, int) else n,)


def _shape(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    if s is None:
        return None
    return (len(s[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(s))]),)


def _of_shape(f: Known, node: ir.Node) -> Shape | None:
    c = f.content(node.inputs[0])
    if c is None:
        return None
    return tuple(x if isinstance(x, int | Dim) else f.fresh(node.outputs[0], i) for i, x in enumerate(c.reshape(-1)))


def _flatten(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    if s is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    axis += len(s) if axis < 0 else 0
    require(0 <= axis <= len(s))
    return (product(s[:axis]), product(s[axis:]))


def _pad(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    if len(node.inputs) < 2:  # an attribute, below opset 11; called otherwise below opset 2
        stated = node.attributes.get_ints("pads", node.attributes.get_ints("paddings", []))
        pads: Content | None = np.array(stated, object)
    else:
        pads = f.content(node.inputs[1])
    axes_input = f.content(given(node, 3))
    if s is None or pads is None or (axes_input is None and given(node, 3) is not None):
        return None
    axes = list(range(len(s))) if axes_input is None else checked_axes(list(axes_input.reshape(-1)), len(s))
    require(pads.size == 2 * len(axes))
    before, after = pads.reshape(-1)[: len(axes)], pads.reshape(-1)[len(axes) :]
    dims = list(s)
    for axis, b, a in zip(axes, before, after, strict=True):
        known = isinstance(b, int | Dim) and isinstance(a, int | Dim)
        dims[axis] = add(add(dims[axis], b), a) if known else f.fresh(node.outputs[0], axis)
    return tuple(dims)


def _attention(f: Known, node: ir.Node) -> Shape | None:
    q, v = f.shape(node.inputs[0]), f.shape(node.inputs[2])
    if q is None or v is None:
        return None
    require(len(q) in (3, 4) and len(v) == len(q))
    mask = f.shape(given(node, 3))
    if mask is not None and len(mask) > 1:
        f.equal.assume(mask[-2], q[-2])
        f.equal.assume(mask[-1], total_length(f, node))
    if len(q) == 4:
        return (*q[:3], v[-1])
    width = divide(v[-1], node.attributes.get_int("kv_num_heads", 1))
    return None if width is None else (q[0], q[1], multiply(width, node.attributes.get_int("q_num_heads", 1)))


def total_length(f: Known, node: ir.Node) -> Size:
    """How many keys an Attention sees, those of its cache included."""
    new, past = f.shape(given(node, 1)) or (), f.shape(given(node, 4))
    length = new[-2] if len(new) > 1 else 1
    return add(past[-2], length) if past is not None and len(past) > 1 else length


def present_shape(f: Known, node: ir.Node, index: int) -> Shape | None:
    """Shape `[batch, heads, total, head size]` of keys (1) or values (2) in the cache that an Attention returns."""
    x = f.shape(node.inputs[index])
    if x is None or len(x) not in (3, 4):
        return None
    if len(x) == 4:
        return (x[0], x[1], total_length(f, node), x[3])
    heads = node.attributes.get_int("kv_num_heads", 1)
    width = divide(x[-1], heads)
    return None if width is None else (x[0], heads, total_length(f, node), width)


def _words(text: str) -> list[str]:
    return text.split()


ELEMENTWISE = _words("""
    Add Sub Mul Div Pow Mod Max Min Sum And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Where PRelu
    BitwiseAnd BitwiseOr
""")
UNARY = _words("""
    Abs Ceil Clip Cast CastLike Cos Sin Erf Exp Floor Gelu Identity IsInf IsNaN LeakyRelu Log LogSoftmax Neg Not
    Reciprocal Relu Round Sigmoid Sign Softmax Softplus Sqrt Tanh Trilu CumSum LayerNormalization RMSNormalization
    RotaryEmbedding Elu HardSigmoid HardSwish Mish Dropout QuantizeLinear DequantizeLinear ScatterND ScatterElements
    BatchNormalization InstanceNormalization GroupNormalization Swish
""")
SHAPE_RULES: dict[str, Rule] = {
    **CONV_RULES,
    **dict.fromkeys(ELEMENTWISE, _broadcast),
    **dict.fromkeys(UNARY, _first),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"), _reduce),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _second,
    "GatherND": _gather_nd,
    "Range": _range,
    "Shape": _shape,
    "ConstantOfShape": _of_shape,
    "Flatten": _flatten,
    "Pad": _pad,
    "Tile": _tile,
    "Attention": _attention,
}
