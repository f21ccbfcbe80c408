"""What a model's bytes are: every stored constant by the part that reads it and by its element type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.graph.operators import NORMS

__all__ = ["StoredPart", "stored_parts"]

CARRIERS = ("Transpose", "Reshape", "Identity", "Cast", "DequantizeLinear", "Slice", "Split", "Squeeze", "Unsqueeze")
TABLES = ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization")
_INTEGER = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits")
PRODUCTS = frozenset(("MatMul", "Gemm", "FusedMatMul", "Einsum", *_INTEGER))
# At which inputs scales and zero points of codes stand.
SCALED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), (1, 2)),
    **dict.fromkeys(("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul"), (2, 3)),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
}
CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv")
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
MORE_NORMS = ("BatchNormalization", "InstanceNormalization", "GroupNormalization", "SkipSimplifiedLayerNormalization")


@dataclass(frozen=True)
class StoredPart:
    """Bytes of all constants of one part in one element type, such as embeddings in float32."""

    part: str
    dtype: str
    nbytes: int


def stored_parts(g: Graph) -> tuple[StoredPart, ...]:
    """Bytes by part and type, the largest first; a tensor that several parts read counts once, as the first of them."""
    order = ("embeddings", "linears", "convolutions", "recurrent", "norms", "biases", "scales", "other")
    found: Counter[tuple[str, str]] = Counter()
    seen: dict[int, tuple[str, str, int]] = {}
    for v in g.model.graph.initializers.values():
        t = v.const_value
        if t is None:
            continue
        roles = {_role(v, user, index) for user, index in _readers(v)} or {"other"}
        part = min(roles, key=order.index)
        known = seen.get(id(t))
        if known is None or order.index(part) < order.index(known[0]):
            seen[id(t)] = (part, t.dtype.numpy().name, t.nbytes)
    for part, dtype, nbytes in seen.values():
        found[part, dtype] += nbytes
    return tuple(StoredPart(*key, n) for key, n in found.most_common() if n)


def _readers(v: ir.Value, depth: int = 4) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that compute with a constant, through those that only carry it on, and at which input."""
    for user, index in v.uses():
        chosen = user.op_type in ("Gather", "GatherND") and v.shape is not None and len(v.shape) == 3  # of experts
        if (user.op_type in CARRIERS or chosen) and index == 0 and depth:
            for out in user.outputs:
                yield from _readers(out, depth - 1)
        else:
            yield user, index


def _role(v: ir.Value, user: ir.Node, index: int) -> str:
    op, rank = user.op_type, 0 if v.shape is None else len(v.shape)
    if op in SCALED and index in SCALED[op]:
        return "scales"
    if op in TABLES and (index == 0 or op == "EmbedLayerNormalization") and rank > 1:
        return "embeddings"
    if op in NORMS or op in MORE_NORMS:
        return "norms"
    for part, ops in (("linears", PRODUCTS), ("convolutions", CONVOLUTIONS), ("recurrent", RECURRENT)):
        if op in ops:
            return part if rank > 1 or part == "recurrent" else "biases"
    return "biases" if op in ("Add", "Sum", "BiasGelu") and rank == 1 else "other"
