"""A decoder whose attentions write new keys and values into the caches that they read: GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.mask_names import name_masks
from onnxcomp.canonical.sinks import has_sink
from onnxcomp.data.inputs import roles, specs, total_mask
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import CONTRIB, Graph, extract
from onnxcomp.graph.values import users_of
from onnxcomp.lowering.coded_caches import as_floats, as_inputs
from onnxcomp.lowering.forms.form import ints
from onnxcomp.lowering.older_opsets import scale_of
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session

__all__ = ["group_attentions"]

# Heads are a multiple of so many channels, more with a rotary embedding: the kernels check it when they run.
WIDTHS, ROTARY_WIDTHS = 8, 16
HIDDEN = (
    -1e9
)  # added to the scores of padding; softmax gives exactly 0 for it, and no NaN where a row sees nothing else
SHORT = 16  # positions whose angles must not change with the length of the text


@dataclass(frozen=True)
class _Site:
    """An attention with caches, `Attention` of rank 3; `q` and `k` as they are before the rotary embedding, if any."""

    node: ir.Node
    q: ir.Value
    k: ir.Value
    rotary: ir.Node | None
    window: int
    padded: bool


def group_attentions(g: Graph, context: int) -> str:
    """Replace all attentions of a decoder with caches, with their rotary embeddings; returns why not, else "".

    `context` is the number of positions that it knows. Positions are then counted from the first token of a row,
    padding included, which attention by relative positions does not see. ONNX Runtime's `GroupQueryAttention` takes
    several new tokens behind others for a single sample only.
    """
    coded = as_floats(g)
    mask = total_mask(specs(g))
    nodes = [n for n in g.nodes("Attention") if n.domain == ""]
    if not nodes:
        return "it has no attention of ONNX's own operator; compress or optimize it first"
    if mask is None:
        return "no input is a mask of all tokens, whose length the operator needs"
    sites = []
    for node in nodes:
        site = _site(g, node)
        if isinstance(site, str):
            return f"'{node.name}': {site}"
        sites.append(site)
    tables = dict[tuple[ir.Value, ir.Value], tuple[Array, Array]]()
    for pair in {_angles(s.rotary) for s in sites if s.rotary is not None}:
        found = _tables(g, pair, context)
        if isinstance(found, str):
            return found
        tables[pair] = found
    _replace(g, sites, g.value(mask.name), tables)
    as_inputs(g, coded)
    return ""


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _site(g: Graph, node: ir.Node) -> _Site | str:
    """An attention as the operator wants it, or why it cannot."""
    q, k, v, mask, past, past_v = (_input(node, i) for i in range(6))
    heads, kv = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    if past is None or past_v is None or not past.is_graph_input() or len(node.outputs) != 3:
        return "it has no caches that are inputs and outputs of the model"
    if q is None or k is None or v is None or not heads or not kv or heads % kv:
        return "its numbers of heads are not known"
    if any(_input(node, i) is not None for i in range(6, len(node.inputs))) or has_sink(node):
        return "it counts its keys, or has a score that belongs to no key"
    if (
        past.shape is None
        or past.shape != past_v.shape
        or not isinstance(width := past.shape[3], int)
        or width % WIDTHS
    ):
        return f"its heads are no multiple of {WIDTHS} channels, or keys and values differ in size"
    if node.attributes.get_int("is_causal", 0) or q.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "it is causal by an attribute, or of a type that the operator does not take"
    named = name_masks(g, [mask])[mask]
    kind, _, added = named.name.partition("+")
    words = kind.split()
    if named.bias or added not in ("", "padding") or words[:1] != ["causal"] or len(words) not in (1, 3):
        return f"its mask is '{named.name}', not causal with a window and padding at most"
    window = int(words[2]) if len(words) == 3 and words[1] == "window" and words[2].isdigit() else 0
    if len(words) == 3 and not window:
        return f"its mask is '{named.name}'"
    turned = [n for x in (q, k) if (n := x.producer()) is not None and n.op_type == "RotaryEmbedding"]
    if not turned:
        return _Site(node, q, k, None, window, added == "padding")
    if why := _unlike(turned, width):
        return why
    before = [n.inputs[0] for n in turned]
    assert before[0] is not None
    assert before[1] is not None
    return _Site(node, before[0], before[1], turned[0], window, added == "padding")


def _unlike(rotary: list[ir.Node], width: int) -> str:
    """Why the rotary embeddings of queries and keys cannot go inside, "" if they can."""
    if len(rotary) != 2 or any(n.domain != "" or _input(n, 3) is not None or _rank(n.inputs[0]) != 3 for n in rotary):
        return "its rotary embedding is of another form"
    first, second = rotary
    if _angles(first) != _angles(second) or any(len(users_of(n.outputs[0])) != 1 for n in rotary):
        return "queries and keys are turned by other angles, or read elsewhere"
    if _sides(first) != _sides(second):
        return "queries and keys are turned in other pairs"
    return f"turned heads are to be a multiple of {ROTARY_WIDTHS} channels" if width % ROTARY_WIDTHS else ""


def _rank(v: ir.Value | None) -> int:
    return -1 if v is None or v.shape is None else len(v.shape)


def _angles(rotary: ir.Node) -> tuple[ir.Value, ir.Value]:
    cos, sin = rotary.inputs[1], rotary.inputs[2]
    assert cos is not None
    assert sin is not None
    return cos, sin


def _sides(rotary: ir.Node) -> tuple[int, int]:
    return rotary.attributes.get_int("interleaved", 0), rotary.attributes.get_int("rotary_embedding_dim", 0)


def _tables(g: Graph, angles: tuple[ir.Value, ir.Value], context: int) -> tuple[Array, Array] | str:
    """Cosines and sines `[context, channels / 2]` by position, or why they are not known."""
    positions = roles(specs(g)).get("positions")
    nodes, light = extract.light_prefix(g, angles)
    if len(light) != len(set(angles)) or positions is None:
        return "the angles of its rotary embedding are not computed from positions"
    part = extract.extract_subgraph(g, nodes, light)
    if [str(v.name) for v in part.inputs] != [positions]:
        return "the angles of its rotary embedding depend on more than positions"
    dtype = (part.inputs[0].dtype or ir.DataType.INT64).numpy()
    names = [str(v.name) for v in angles]
    try:
        with Session(part) as session:
            whole, short = (session.run({positions: np.arange(n, dtype=dtype)[None]}) for n in (context, SHORT))
    except OnnxcompError as e:
        return f"the angles of its rotary embedding cannot be computed: {e}"
    if any(whole[n].ndim != 3 or not np.array_equal(whole[n][:, :SHORT], short[n]) for n in names):
        return "the angles of its rotary embedding depend on the length of the text"
    if 2 * whole[names[0]].shape[2] % ROTARY_WIDTHS:
        return f"its rotary embedding turns no multiple of {ROTARY_WIDTHS} channels"
    return whole[names[0]][0], whole[names[1]][0]


def _replace(
    g: Graph, sites: list[_Site], mask: ir.Value, tables: dict[tuple[ir.Value, ir.Value], tuple[Array, Array]]
) -> None:
    length = g.op("Cast", g.op("Shape", mask, start=1, end=2), to=int(ir.DataType.INT32))
    total = g.op("Squeeze", length, ints(0), name="total_sequence_length")
    rows = g.op("Shape", mask, start=0, end=1)
    last = g.op("Expand", g.op("Sub", length, np.array([1], np.int32)), rows, name="last_token")
    stored = {
        pair: tuple(g.constant(t, f"{n}_cache") for t, n in zip(two, ("cos", "sin"), strict=True))
        for pair, two in tables.items()
    }
    bias = _bias(g, sites, mask) if any(s.padded for s in sites) else None
    for s in sites:
        cos, sin = (None, None) if s.rotary is None else stored[_angles(s.rotary)]
        kv = s.node.attributes.get_int("kv_num_heads", 0)
        attrs: dict[str, int | float] = {"num_heads": s.node.attributes.get_int("q_num_heads", 0), "kv_num_heads": kv}
        attrs |= {"scale": scale_of(s.node), "softcap": s.node.attributes.get_float("softcap", 0.0)}
        if s.rotary is not None:
            attrs |= {"do_rotary": 1, "rotary_interleaved": _sides(s.rotary)[0]}
        if s.window:
            attrs["local_window_size"] = s.window
        out = g.op(
            "GroupQueryAttention", s.q, s.k, s.node.inputs[2], s.node.inputs[4], s.node.inputs[5], last, total,
            cos, sin, None, bias if s.padded else None, domain=CONTRIB, outputs=3, name=f"{s.node.name}_grouped",
            like=s.node.outputs[0], **attrs,
        )  # fmt: skip
        made = out.producer()
        assert made is not None
        for old, new in zip(s.node.outputs, made.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            g.replace(old, new)
    g.sweep()
    for v in [v for v in g.model.graph.inputs if not users_of(v) and not v.is_graph_output()]:
        g.model.graph.inputs.remove(v)


def _bias(g: Graph, sites: list[_Site], mask: ir.Value) -> ir.Value:
    """0 for tokens and a very low score for padding, `[batch, 1, new, all]`."""
    dtype = sites[0].q.dtype or ir.DataType.FLOAT
    low = np.array(HIDDEN if dtype is ir.DataType.FLOAT else -6e4, dtype.numpy())
    hidden = g.op("Sub", np.array(1, dtype.numpy()), g.op("Cast", mask, to=int(dtype)))
    keys = g.op("Unsqueeze", g.op("Mul", hidden, low), ints(1, 2))
    new = g.op("Shape", sites[0].q, start=1, end=2)
    shape = g.op("Concat", ints(1, 1), new, ints(1), axis=0)
    return g.op("Expand", keys, shape, name="padding_bias")
