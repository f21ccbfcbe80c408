"""Key and value heads that several query heads come to share: how each is mapped there, and what maps back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Attention, Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Float64, affine
from onnxcomp.maths.procrustes import rotations, spans
from onnxcomp.methods import head_matrices
from onnxcomp.methods.repair import sequential
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, Stats, gram, mean, norm2, var

__all__ = ["Shared", "key_path", "needs", "plain", "repair", "share", "spanned", "turned"]


@dataclass(frozen=True)
class Shared:
    """Heads become the mean of `x_h into_h`; what multiplies them takes `back_h`; both `[heads, D, D]`.

    `lost` is the share of their energy on calibration data that the mean does not give back.
    """

    into: Float64
    back: Float64
    lost: float = 0.0


def key_path(a: Attention) -> list[ir.Node] | None:
    """Nodes between the key projection and the attention; None where they are more than rotation."""
    found, v = [], a.node.inputs[1]
    while v is not None and v is not a.k.output:
        node = v.producer()
        if node is None or node.op_type != "RotaryEmbedding" or len(v.uses()) > 1:
            return None
        found.append(node)
        v = node.inputs[0]
    return found


def plain(a: Attention, x: Linear) -> Shared:
    """Heads as they are, for the plain mean."""
    width = x.sizes[1] // a.kv_heads
    same = np.broadcast_to(np.eye(width), (a.kv_heads, width, width))
    return Shared(same, same)


def turned(g: Graph, a: Attention, x: Linear, count: int, stats: Stats, align: bool) -> Shared:
    """Keys or values rotated onto each other, `count` neighbours at a time, or left as they are for the plain mean."""
    turns, lost, whole = [], 0.0, 0.0
    inputs = np.asarray(stats[gram(x.source)])
    every = head_matrices.split(head_matrices.read(g, x), a.kv_heads)
    for i in range(0, a.kv_heads, count):
        heads = every[i : i + count]
        width = heads.shape[-1]
        own = rotations(heads, inputs, *_planes(a, x, width)) if align else plain(a, x).into[i : i + count]
        turns.append(own)
        off = heads @ turns[-1]
        whole += float(np.einsum("hkd,kl,hld->", off, inputs, off, optimize=True))
        off = off - off.mean(0)
        lost += float(np.einsum("hkd,kl,hld->", off, inputs, off, optimize=True))
    found = np.concatenate(turns)
    return Shared(found, found, lost / whole if whole else 0.0)


def needs(a: Attention) -> Iterable[Need]:
    """What `spanned` reads."""
    yield gram(a.q.output)
    yield from (make(x.output) for x in (a.k, a.v) for make in (gram, mean, var, norm2))


def spanned(g: Graph, a: Attention, x: Linear, count: int, stats: Stats) -> Shared:
    """Keys or values that span what `count` neighbours hold, weighed by how queries or the output projection read it.

    What all keys have in common moves no softmax, and what all values have in common goes into the bias of the output
    projection where there is one: there only deviations from the mean count.
    """
    centred = a.o.bias is not None if x is a.v else not key_path(a)
    inner, reads = _moments(stats, x, centred), _reads(g, a, x, stats)
    width = reads.shape[-1]
    into, back = list[Float64](), list[Float64]()
    lost = whole = 0.0
    for i in range(0, a.kv_heads, count):
        at = slice(i * width, (i + count) * width)
        own, read = inner[at, at], reads[i : i + count]
        one, two = spans(own, read, *_planes(a, x, width))
        off = np.eye(count * width) - one.reshape(-1, width) @ two.reshape(-1, width).T / count
        lost += _energy(off.T @ own @ off, read)
        whole += _energy(own, read)
        into.append(one)
        back.append(two)
    return Shared(np.concatenate(into), np.concatenate(back), lost / whole if whole else 0.0)


def _moments(stats: Stats, x: Linear, centred: bool) -> Float64:
    """Gram matrix of a projection's output, or of its deviations from the mean."""
    whole, middle = (np.asarray(stats[make(x.output)], np.float64) for make in (gram, mean))
    if not centred:
        return whole
    rows = affine.count(stats[norm2(x.output)], middle, stats[var(x.output)])
    return whole - rows * np.outer(middle, middle)


def _reads(g: Graph, a: Attention, x: Linear, stats: Stats) -> Float64:
    """Moments `[kv_heads, D, D]` of what each key or value head is multiplied with."""
    if x is a.v:
        rows = head_matrices.read(g, a.o).reshape(a.kv_heads, a.heads // a.kv_heads, -1, a.o.sizes[1])
        return np.asarray(np.einsum("hrdn,hren->hde", rows, rows, optimize=True))
    every = np.asarray(stats[gram(a.q.output)], np.float64).reshape(a.heads, a.head_dim, a.heads, a.head_dim)
    own = np.stack([every[h, :, h] for h in range(a.heads)])
    return np.asarray(own.reshape(a.kv_heads, -1, a.head_dim, a.head_dim).sum(1))


def _energy(inner: Float64, reads: Float64) -> float:
    """What moments of heads side by side `[H D, H D]` amount to where each head is read `[H, D, D]`."""
    each = inner.reshape(*reads.shape[:2], *reads.shape[:2])
    return float(sum(np.sum(each[h, :, h] * r) for h, r in enumerate(reads)))


def share(g: Graph, a: Attention, keys: Shared, values: Shared, count: int) -> None:
    """Give an attention the mapped heads' means, and its queries and output projection what maps back."""
    groups, repeat = a.kv_heads // count, a.heads // a.kv_heads
    for x, to in ((a.k, keys), (a.v, values)):
        for value, user in head_matrices.constants(x):
            old = head_matrices.split(head_matrices.read(g, x, value), a.kv_heads) @ to.into
            together = old.reshape(groups, count, *old.shape[1:]).mean(1)
            head_matrices.write(g, x, value, user, head_matrices.joined(together))
    back_q, back_o = (np.repeat(t.back, repeat, axis=0) for t in (keys, values))
    for value, user in head_matrices.constants(a.q):
        heads = head_matrices.split(head_matrices.read(g, a.q, value), a.heads)
        head_matrices.write(g, a.q, value, user, head_matrices.joined(heads @ back_q))
    o = head_matrices.read(g, a.o)
    rows = o.reshape(a.heads, -1, o.shape[1])
    head_matrices.write(g, a.o, a.o.weight, a.o.node, (back_o.transpose(0, 2, 1) @ rows).reshape(o.shape))
    g.set_attr(a.node, kv_num_heads=groups)
    for node in key_path(a) or ():
        g.set_attr(node, num_heads=groups)


def repair(g: Graph, uncut: Graph, env: Env, outputs: Sequence[Linear], whole: bool = False) -> None:
    """Fit output projections to the uncut residual stream, as `repairs.in_order` does readers of a cut axis."""
    sequential.in_order(g, uncut, env, [sequential.alone(x) for x in outputs], whole=whole)


def _planes(a: Attention, x: Linear, width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs of key channels that a rotary embedding turns together, and the channels it leaves alone."""
    path = key_path(a) if x is a.k else None
    if not path:
        return [], list(range(width))
    turned = path[0].attributes.get_int("rotary_embedding_dim", 0) or width
    if path[0].attributes.get_int("interleaved", 0):
        return [(i, i + 1) for i in range(0, turned, 2)], list(range(turned, width))
    return [(i, i + turned // 2) for i in range(turned // 2)], list(range(turned, width))
