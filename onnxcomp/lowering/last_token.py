"""Scores of the last token alone: all that a text goes on from, as padding stands on the left."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.data.inputs import roles, specs
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OR_CAST

__all__ = ["is_last", "keep_last"]

# Operators behind the head's product that look at one token at a time.
BEHIND = {*LAYOUT_OR_CAST, "Add", "Sum", "Mul", "Div", "Tanh", "Sub", "Clip", "Where", "DequantizeLinear"} - {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze",
}  # fmt: skip
PRODUCTS = ("MatMul", "MatMulNBits", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "FusedMatMul")


def is_last(g: Graph, v: ir.Value) -> bool:
    """Whether a value is the last token's alone."""
    node = v.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
        return False
    place = g.tensor(node.inputs[1])
    return place is not None and place.size == 1 and int(place.numpy().reshape(-1)[0]) == -1


def keep_last(g: Graph) -> str:
    """Let the product before the scores see the last token of each sample only; returns why not, else "".

    The scores are `[batch, 1, words]` then, declared so.
    """
    out = next((v for v in g.outputs if v.name == "logits"), None)
    if out is None or out.shape is None or len(out.shape) != 3 or "tokens" not in roles(specs(g)):
        return "it takes no tokens, or has no output 'logits' of a score for each token and word"
    if out.shape[1] == 1:
        return "its scores are those of the last token already"
    product = _product(g, out)
    if isinstance(product, str):
        return product
    x = product.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 3:
        return f"the input of '{product.name}' is not known to have an axis of tokens"
    last = g.op("Gather", x, np.array([-1], np.int64), axis=1, name="last_token", like=x)
    last.shape = ir.Shape([x.shape[0], 1, x.shape[2]])
    g.set_input(product, 0, last)
    out.shape = ir.Shape([out.shape[0], 1, out.shape[2]])
    return ""


def _product(g: Graph, out: ir.Value) -> ir.Node | str:
    """The product that makes the scores, behind which each token stays by itself; else why there is none."""
    v = out
    while True:
        node = v.producer()
        if node is None:
            return "no product makes its scores"
        if node.op_type in PRODUCTS:
            return node
        computed = [x for x in node.inputs if x is not None and not g.is_constant(x)]
        if node.op_type not in BEHIND or len(computed) != 1:
            return f"'{node.name}' ({node.op_type}) stands between the product of the head and the scores"
        v = computed[0]
