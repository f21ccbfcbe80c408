"""What a model's bytes are: every stored constant by the part that reads it and by its element type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.blocks.product_roles import PRODUCTS, product_roles
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import NORMS

__all__ = ["StoredPart", "stored_parts"]

CARRIERS = ("Transpose", "Reshape", "Identity", "Cast", "DequantizeLinear", "Slice", "Split", "Squeeze", "Unsqueeze")
TABLES = ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization")
# At which inputs scales and zero points of codes stand.
SCALED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), (1, 2)),
    **dict.fromkeys(("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul"), (2, 3)),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
}
ORDER = (
    "embeddings", "attention", "feed-forward", "head", "linears", "convolutions", "recurrent", "norms", "biases",
    "scales", "other",
)  # fmt: skip
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
    """Bytes by part and type, the largest first; a tensor that several parts read counts once, as the first of them.

    Weights of products are those of attentions, feed-forward parts and heads, else of `linears`.
    """
    readers = {v: list(_readers(v)) for v in g.model.graph.initializers.values() if v.const_value is not None}
    roles = product_roles(g, {n for v, found in readers.items() for n, i in found if _role(v, n, i) == "linears"})
    seen: dict[int, tuple[str, str, int]] = {}
    for v, found in readers.items():
        t = v.const_value
        assert t is not None
        part = min((_part(v, *reader, roles) for reader in found), key=ORDER.index, default="other")
        known = seen.get(id(t))
        if known is None or ORDER.index(part) < ORDER.index(known[0]):
            seen[id(t)] = (part, t.dtype.numpy().name, t.nbytes)
    total: Counter[tuple[str, str]] = Counter()
    for part, dtype, nbytes in seen.values():
        total[part, dtype] += nbytes
    return tuple(StoredPart(*key, n) for key, n in total.most_common() if n)


def _part(v: ir.Value, user: ir.Node, index: int, roles: Mapping[ir.Node, str]) -> str:
    role = _role(v, user, index)
    return roles.get(user, role) if role == "linears" else role


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
    if "Attention" in op and index == 1 and rank == 2:  # fused with its projections
        return "attention"
    for part, ops in (("linears", PRODUCTS), ("convolutions", CONVOLUTIONS), ("recurrent", RECURRENT)):
        if op in ops:
            return part if rank > 1 or part == "recurrent" else "biases"
    return "biases" if op in ("Add", "Sum", "BiasGelu") and rank == 1 else "other"
