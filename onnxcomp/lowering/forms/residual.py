"""Forms of a residual addition and the norm that reads it."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering.forms.form import Context, Form, Kind, Spot

__all__ = ["RESIDUAL"]

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
SKIP = {"LayerNormalization": "SkipLayerNormalization"}
SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def _find(g: Graph) -> list[Spot]:
    """Additions of two computed values with the norms that read them; several norms of one sum are one spot."""
    spots = []
    for add in g.nodes("Add", "Sum"):
        if add.domain or len(add.inputs) != 2 or any(g.is_constant(x) for x in add.inputs):
            continue
        norms = [u for u, i in add.outputs[0].uses() if u.op_type in NORMS and i == 0 and u.domain == ""]
        if norms:
            spots.append(Spot("residual", str(add.name), (add, *dict.fromkeys(norms)), add.op_type))
    return spots


def _as(op: str) -> Form:
    """The addition as `Add`, which the runtime fuses with the norm, or as `Sum`, which it does not."""

    def rewrite(ctx: Context, spot: Spot) -> None:
        add, g = spot.nodes[0], ctx.g
        if add.op_type != op:
            out = add.outputs[0]
            g.replace(out, g.op(op, *add.inputs, name=f"{add.name}_{op.lower()}", like=out))

    return Form(op, rewrite)


def _skip(ctx: Context, spot: Spot) -> None:
    """`SkipLayerNormalization(a, b)`: the normalized sum, and the sum itself where it has other users."""
    add, norm = spot.nodes
    a, b = add.inputs
    layer = norm.op_type == "LayerNormalization"
    stream = add.outputs[0]
    used = stream.is_graph_output() or any(u is not norm for u, _ in stream.uses())
    out = ctx.g.op(
        SKIP.get(norm.op_type, "SkipSimplifiedLayerNormalization"),
        a, b, *norm.inputs[1 : 3 if layer else 2], domain=CONTRIB, outputs=4 if used else 1,
        epsilon=norm.attributes.get_float("epsilon", 1e-5), name=f"{norm.name}_skip", like=norm.outputs[0],
    )  # fmt: skip
    node = out.producer()
    if used and node is not None:
        for unused in node.outputs[1:3]:
            unused.name = ""
        node.outputs[3].type, node.outputs[3].shape = stream.type, stream.shape
        ctx.g.replace(stream, node.outputs[3])
    ctx.g.replace(norm.outputs[0], out)


def _refuse_skip(ctx: Context, spot: Spot) -> str:
    if len(spot.nodes) != 2:
        return "several norms read the sum"
    norm = spot.nodes[1]
    x = norm.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    gain = ctx.g.tensor(norm.inputs[1])
    if rank not in (2, 3) or norm.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return "takes a norm over the last of two or three axes"
    if len(norm.outputs) > 1 or gain is None or len(gain.shape) != 1:
        return "takes a constant gain of one axis"
    if not all(_alike(a, x) for a in spot.nodes[0].inputs):
        return "both summands need the shape of the sum"
    return ""


def _alike(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values have the same recorded shape (equal numbers and names)."""
    if a is None or b is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(x == y and x is not None for x, y in zip(a.shape, b.shape, strict=True))


RESIDUAL = Kind(
    "residual",
    _find,
    (_as("Sum"), _as("Add"), Form("Skip", _skip, tuple((CONTRIB, op) for op in SKIPS), _refuse_skip)),
)
