"""Tables of experts' weights as int8, with a scale for each expert and output channel, shared by every quantizer.

Weights that are gathered for each row are stored in int8 and multiplied in float: `y[r, n] = s[e_r, n] sum_k x[r, k]
q[e_r, k, n]`, scales behind the product. CPUs have no kernel for integers on the left, where exporters put the weights
(loading fails once the runtime fuses the scales), and their DequantizeLinear of blocks, element by element, takes
several times as long as the product. Where every expert has rows of its own the product runs in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import BatchedLinear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, formats, saturation
from onnxcomp.maths.formats import FORMATS
from onnxcomp.methods.quantize.linears import FLOATS, HALVES, LAZY_BYTES, in_float32, lazy_codes
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.target import Target, resolved

__all__ = ["TableCodes", "chosen", "quantizable", "run_time", "store"]


def quantizable(g: Graph) -> list[BatchedLinear]:
    """Products with tables of experts that are stored in a float type."""
    return [x for x in blocks.batched_linears(g) if x.table.dtype in FLOATS]


def chosen(g: Graph, skip: Iterable[str], min_size: int, target: Target) -> Iterator[BatchedLinear]:
    """Those that become int8; the others are declined by name."""
    patterns = tuple(skip)
    for x in quantizable(g):
        e, k, n = x.sizes
        hit = skipped(patterns, x.name, str(x.table.name))
        if hit is not None:
            g.decline(x.site, f"skipped by the pattern '{hit}'")
        elif e * k * n < min_size:
            g.decline(x.site, f"its {e}x{k}x{n} weights are smaller than min_size={min_size}: nothing to gain")
        elif not target.provider.startswith("CPU"):
            g.decline(x.site, f"weights of {e} experts in one table stay float on '{target.name}'")
        elif x.gather is None and x.left:
            g.decline(x.site, "its weights are on the left, where the runtime has no integer kernel")
        else:
            yield x


class TableCodes:
    """Int8 forms of tables, one per stored tensor and axis of summation, and of the inputs of integer products."""

    def __init__(self, g: Graph, target: Target, quantize: Callable[[Graph, ir.Value], Sequence[ir.Value]]) -> None:
        self.g, self.saturates, self._quantize = g, resolved(target).quantized.saturates, quantize
        self._made: dict[tuple[ir.Value, int, bool], tuple[ir.Value, ir.Value]] = {}
        self._inputs: dict[ir.Value, Sequence[ir.Value]] = {}

    def input(self, v: ir.Value) -> Sequence[ir.Value]:
        """Codes of an input, their scale and zero point: the same for all products that read it."""
        if v not in self._inputs:
            self._inputs[v] = self._quantize(self.g, v)
        return self._inputs[v]

    def __call__(self, x: BatchedLinear, *, integers: bool) -> tuple[ir.Value, ir.Value]:
        """Symmetric codes in the table's layout and scales with one element along the fan-in.

        For products of `integers` scales are as large as `maths.saturation` asks for where sums saturate.
        """
        limited = integers and self.saturates
        key = (x.table, x.fan_in, limited)
        if key not in self._made:
            self._made[key] = self._make(x, limited)
        return self._made[key]

    def _make(self, x: BatchedLinear, limited: bool) -> tuple[ir.Value, ir.Value]:
        tensor, fmt, summed = self.g.tensor(x.table), FORMATS["int8"], x.fan_in
        assert tensor is not None

        def experts() -> Iterator[Array]:
            return (w if summed == 1 else w.T for w in tensor.numpy())

        zero = np.zeros(x.sizes[2], np.int8)
        scales = np.stack([_scale(w, limited, tensor.dtype.numpy()) for w in experts()])

        def codes() -> Array:
            made = (formats.quantize(w, s, zero, fmt, axis=1) for w, s in zip(experts(), scales, strict=True))
            return np.stack([q if summed == 1 else q.T for q in made])

        eager = tensor.nbytes < LAZY_BYTES or isinstance(tensor, ir.Tensor)
        content = codes() if eager else lazy_codes(codes, tuple(tensor.shape.numpy()))
        scale = self.g.constant(np.expand_dims(scales, summed), f"{x.table.name}_scale")
        return self.g.constant(content, f"{x.table.name}_int8"), scale


def _scale(w: Array, limited: bool, dtype: Any) -> Array:
    """Scales `[N]` of the columns of one expert's weights `[K, N]`."""
    if limited:
        return saturation.scales(w, FORMATS["int8"], axis=1, scale_type=dtype)[0]
    limit = np.abs(w).max(axis=0)
    return formats.affine(-limit, limit, FORMATS["int8"], symmetric=True, scale_type=dtype)[0]


def store(g: Graph, x: BatchedLinear, codes: TableCodes) -> None:
    """Quantize the weights of one product, and its input where it runs in integers."""
    if x.gather is not None:
        weights_only(g, x, codes)
    else:
        integers(g, x, codes)


def run_time(g: Graph, v: ir.Value) -> Sequence[ir.Value]:
    """Codes of a value, their scale and zero point, with the range at run time."""
    q = g.op("DynamicQuantizeLinear", in_float32(g, v), outputs=3, name=f"{v.name}_quantize").producer()
    assert q is not None
    return q.outputs


def weights_only(g: Graph, x: BatchedLinear, codes: TableCodes) -> None:
    """Gather int8 weights instead of float ones; scales come behind the product, in half types before it.

    Sums of codes would leave the range of half types.
    """
    assert x.gather is not None
    assert x.table.dtype is not None
    q, scale = codes(x, integers=False)
    index, options = x.gather.inputs[1], {k: a.value for k, a in x.gather.attributes.items()}
    rows = g.op(x.gather.op_type, q, index, name=f"{x.name}_codes", **options)
    w = g.op("Cast", rows, to=x.table.dtype.value, name=f"{x.name}_weight", like=x.gather.outputs[0])
    s = g.op(x.gather.op_type, scale, index, name=f"{x.name}_scale", **options)
    half = x.table.dtype in HALVES
    w = g.op("Mul", w, s, name=f"{x.name}_rescale", like=x.gather.outputs[0]) if half else w
    out = x.node.outputs[0]
    y = g.op("MatMul", *((w, x.input) if x.left else (x.input, w)), name=f"{x.name}_product", like=out)
    g.replace(out, y if half else g.op("Mul", y, s, name=f"{x.name}_rescale", like=out))
    g.note(x.site, f"int8 weights, float products (the runtime has no integer kernel for gathered weights), {_size(x)}")


def integers(g: Graph, x: BatchedLinear, codes: TableCodes) -> None:
    """`MatMulInteger` of the input's codes with the weights of every expert."""
    q, scale, zero = codes.input(x.input)
    weights, scales = codes(x, integers=True)
    out = x.node.outputs[0]
    total = g.op("MatMulInteger", q, weights, zero, name=f"{x.name}_int8")
    wide = g.op("Cast", total, to=ir.DataType.FLOAT.value, name=f"{x.name}_float")
    factor = g.op("Mul", scale, in_float32(g, scales), name=f"{x.name}_scale")
    narrow = out.dtype if out.dtype in HALVES else None
    y = g.op("Mul", wide, factor, name=f"{x.name}_rescale", like=None if narrow else out)
    g.replace(out, g.op("Cast", y, to=narrow.value, name=f"{x.name}_narrow", like=out) if narrow else y)
    g.note(x.site, f"integer products with the weights of every expert, {_size(x)}")


def _size(x: BatchedLinear) -> str:
    """Bytes of the weights before and after, with their scales."""
    e, k, n = x.sizes
    assert x.table.dtype is not None
    width = x.table.dtype.itemsize
    before, after = e * k * n * width, e * k * n + e * n * width
    return f"{before / 1e6:.3g} > {after / 1e6:.3g} MB"
