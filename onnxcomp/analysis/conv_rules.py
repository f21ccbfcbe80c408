"""Shape rules of convolutions and pooling."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxcomp.analysis.known import Known, require
from onnxcomp.analysis.sizes import Shape, Size, add, floor

__all__ = ["CONV_RULES"]


def _conv(f: Known, node: ir.Node) -> Shape | None:
    s, w = f.shape(node.inputs[0]), f.shape(node.inputs[1])
    if s is None or w is None or len(s) != len(w):
        return None
    kernel = [d for d in w[2:] if isinstance(d, int)]
    return _windows(node, s, w[0], kernel) if len(kernel) == len(s) - 2 else None


def _pool(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    kernel = list(node.attributes.get_ints("kernel_shape", []))
    return _windows(node, s, s[1], kernel) if s is not None and len(kernel) == len(s) - 2 else None


def _windows(node: ir.Node, s: Shape, channels: Size, kernel: list[int]) -> Shape | None:
    """`floor((d + pads - dilation * (kernel - 1) - 1) / stride) + 1` on every spatial axis."""
    attrs, n = node.attributes, len(kernel)
    strides, dilations = attrs.get_ints("strides", [1] * n), attrs.get_ints("dilations", [1] * n)
    pads, auto = attrs.get_ints("pads", [0] * 2 * n), attrs.get_string("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID") or attrs.get_int("ceil_mode", 0) == 1:
        return None
    require(len(strides) == len(dilations) == n and len(pads) == 2 * n and min([1, *strides, *dilations]) > 0)
    dims: list[Size] = []
    for i, d in enumerate(s[2:]):
        padding = pads[i] + pads[i + n] if auto == "NOTSET" else 0
        # The 1 is added before the division, so that an axis that keeps its length keeps its symbol.
        last = add(d, padding - dilations[i] * (kernel[i] - 1) - 1 + strides[i])
        dims.append(floor(last, strides[i]))
    return (s[0], channels, *dims)


def _global(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(node.inputs[0])
    return None if s is None else (*s[:2], *(1 for _ in s[2:]))


CONV_RULES: dict[str, Callable[[Known, ir.Node], Shape | None]] = {
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
}
