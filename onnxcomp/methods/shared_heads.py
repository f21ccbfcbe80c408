"""Grouped-query attention from multi-head attention: alignments of key and value heads, their mean, and repair.

Shapes: `H` key or value heads of `D` channels each, made by a projection `[K, H D]` with heads `[H, K, D]`; `count`
neighbouring heads form a group. An alignment maps head `x_h` `[R, D]` to `x_h A_h` before the mean of the group, and
what is multiplied with the head takes `B_h`, so that `mean_h(x_h A_h) B_h^T` replaces `x_h`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Attention, Linear
from onnxcomp.graph import Graph, interface
from onnxcomp.graph.values import users_of
from onnxcomp.maths import Float64, affine
from onnxcomp.maths.procrustes import rotations, spans
from onnxcomp.methods import head_matrices
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.readers import Repair
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, Stats, gram, mean, norm2, var

__all__ = ["Alignment", "average", "cache_stays", "factorized", "key_path", "needs", "repair", "rotated", "unaligned"]


AXES_OF_HEADS = 2  # axes of a cache `[b, kv_heads, t, h]` up to that of its heads


@dataclass(frozen=True)
class Alignment:
    """The maps `A` (`into`) and `B` (`back`) of all heads, both `[H, D, D]`.

    `loss` is the share of the heads' energy on calibration data that the mean does not give back.
    """

    into: Float64
    back: Float64
    loss: float = 0.0


def key_path(a: Attention) -> list[ir.Node] | None:
    """Nodes between the key projection and the attention; None where they are more than rotary embeddings."""
    path, v = [], a.node.inputs[1]
    while v is not None and v is not a.k.output:
        node = v.producer()
        if node is None or node.op_type != "RotaryEmbedding" or len(v.uses()) > 1:
            return None
        path.append(node)
        v = node.inputs[0]
    return path


def cache_stays(a: Attention) -> str:
    """Why the caches of an attention cannot have fewer heads, "" where they can or there are none."""
    if a.present is None and (a.past is not None or any(list(v.uses()) for v in a.node.outputs[1:])):
        return "of its keys and values only some are inputs and outputs of the model"
    for v in a.past or ():
        if not v.is_graph_input():
            return f"its cache '{v.name}' is computed"
        if other := next((u for u in users_of(v) if u is not a.node and not _reads_lengths(u)), None):
            return f"its cache '{v.name}' is also read by '{other.name}' ({other.op_type})"
    for v in a.present or ():
        if not v.is_graph_output() or list(v.uses()):
            return f"its cache '{v.name}' is not an output of the model alone"
    return ""


def _reads_lengths(node: ir.Node) -> bool:
    """Whether a node reads sizes of a cache `[b, kv_heads, t, h]` behind its heads."""
    return node.op_type == "Shape" and node.attributes.get_int("start", 0) >= AXES_OF_HEADS


def unaligned(g: Graph, a: Attention, x: Linear, count: int, stats: Stats | None) -> Alignment:
    """Identity maps for the plain mean of `count` neighbours; its loss is 0 where there are no statistics."""
    if stats is None:
        identity = _identities(a.kv_heads, x.sizes[1] // a.kv_heads)
        return Alignment(identity, identity)
    return _orthogonal(g, a, x, count, stats, lambda heads, _: _identities(len(heads), heads.shape[-1]))


def _identities(count: int, width: int) -> Float64:
    return np.broadcast_to(np.eye(width), (count, width, width))


def rotated(g: Graph, a: Attention, x: Linear, count: int, stats: Stats) -> Alignment:
    """Rotations that bring `count` neighbouring key or value heads closest to their mean (`procrustes.rotations`)."""

    def maps(heads: Float64, inputs: Float64) -> Float64:
        return rotations(heads, inputs, *_planes(a, x, heads.shape[-1]))

    return _orthogonal(g, a, x, count, stats, maps)


def _orthogonal(
    g: Graph, a: Attention, x: Linear, count: int, stats: Stats, maps: Callable[[Float64, Float64], Float64]
) -> Alignment:
    """An alignment, with its loss, by orthogonal `maps(heads [count, K, D], inputs [K, K])` of each group of heads."""
    inputs = np.asarray(stats[gram(x.source)])
    every = head_matrices.split(head_matrices.read(g, x), a.kv_heads)  # [H, K, D]
    into, lost, total = list[Float64](), 0.0, 0.0
    for first in range(0, a.kv_heads, count):
        heads = every[first : first + count]
        into.append(maps(heads, inputs))
        aligned = heads @ into[-1]
        total += _squares(aligned, inputs)
        lost += _squares(aligned - aligned.mean(0), inputs)
    joined = np.concatenate(into)
    return Alignment(joined, joined, lost / total if total else 0.0)


def _squares(heads: Float64, inputs: Float64) -> float:
    """Sum of the squared outputs of heads `[count, K, D]` over inputs of the Gram matrix `[K, K]`."""
    return float(np.einsum("hkd,kl,hld->", heads, inputs, heads, optimize=True))


def needs(a: Attention) -> Iterable[Need]:
    """The statistics that `factorized` uses."""
    yield gram(a.q.output)
    yield from (make(x.output) for x in (a.k, a.v) for make in (gram, mean, var, norm2))


def factorized(g: Graph, a: Attention, x: Linear, count: int, stats: Stats) -> Alignment:
    """Low-rank factors of `count` neighbouring heads, weighted by how queries or the output projection use them.

    A part that all keys share moves no softmax, and the mean of the values goes into the bias of the output projection
    where there is one: there only deviations from the mean count.
    """
    centred = a.o.bias is not None if x is a.v else not key_path(a)
    moments, uses = _moments(stats, x, centred), _uses(g, a, x, stats)  # [H D, H D], [H, D, D]
    width = uses.shape[-1]
    into, back = list[Float64](), list[Float64]()
    lost = total = 0.0
    for first in range(0, a.kv_heads, count):
        at = slice(first * width, (first + count) * width)
        of_group, used = moments[at, at], uses[first : first + count]  # [count D, count D], [count, D, D]
        one, two = spans(of_group, used, *_planes(a, x, width))
        error = np.eye(count * width) - one.reshape(-1, width) @ two.reshape(-1, width).T / count
        lost += _energy(error.T @ of_group @ error, used)
        total += _energy(of_group, used)
        into.append(one)
        back.append(two)
    return Alignment(np.concatenate(into), np.concatenate(back), lost / total if total else 0.0)


def _moments(stats: Stats, x: Linear, centred: bool) -> Float64:
    """Gram matrix `[H D, H D]` of a projection's output, or of its deviations from the mean."""
    moments, means = (np.asarray(stats[make(x.output)], np.float64) for make in (gram, mean))
    if not centred:
        return moments
    rows = affine.count(stats[norm2(x.output)], means, stats[var(x.output)])
    return moments - rows * np.outer(means, means)


def _uses(g: Graph, a: Attention, x: Linear, stats: Stats) -> Float64:
    """Moments `[H, D, D]` of what each key or value head is multiplied with, summed over the query heads on it."""
    if x is a.v:
        rows = head_matrices.read(g, a.o).reshape(a.kv_heads, a.heads // a.kv_heads, -1, a.o.sizes[1])
        return np.asarray(np.einsum("hrdn,hren->hde", rows, rows, optimize=True))
    queries = np.asarray(stats[gram(a.q.output)], np.float64).reshape(a.heads, a.head_dim, a.heads, a.head_dim)
    of_heads = np.stack([queries[h, :, h] for h in range(a.heads)])  # the diagonal blocks: [heads, D, D]
    return np.asarray(of_heads.reshape(a.kv_heads, -1, a.head_dim, a.head_dim).sum(1))


def _energy(moments: Float64, uses: Float64) -> float:
    """Squared norm of the products of heads, moments `[H D, H D]`, with what uses them, moments `[H, D, D]`."""
    blocks = moments.reshape(*uses.shape[:2], *uses.shape[:2])  # [H, D, H, D]
    return float(sum(np.sum(blocks[h, :, h] * u) for h, u in enumerate(uses)))


def average(g: Graph, a: Attention, keys: Alignment, values: Alignment, count: int) -> None:
    """Replace the key and value heads of each group by their aligned mean; queries and output projection map back."""
    groups, repeat = a.kv_heads // count, a.heads // a.kv_heads
    for x, to in ((a.k, keys), (a.v, values)):
        for value, user in head_matrices.constants(x):
            heads = head_matrices.split(head_matrices.read(g, x, value), a.kv_heads) @ to.into  # [H, K, D]
            means = heads.reshape(groups, count, *heads.shape[1:]).mean(1)  # [groups, K, D]
            head_matrices.write(g, x, value, user, head_matrices.merge(means))
    back_q, back_o = (np.repeat(t.back, repeat, axis=0) for t in (keys, values))  # [heads, D, D], of query heads
    for value, user in head_matrices.constants(a.q):
        heads = head_matrices.split(head_matrices.read(g, a.q, value), a.heads)
        head_matrices.write(g, a.q, value, user, head_matrices.merge(heads @ back_q))
    o = head_matrices.read(g, a.o)
    rows = o.reshape(a.heads, -1, o.shape[1])  # [heads, D, N]
    head_matrices.write(g, a.o, a.o.weight, a.o.node, (back_o.transpose(0, 2, 1) @ rows).reshape(o.shape))
    g.set_attr(a.node, kv_num_heads=groups)
    for node in key_path(a) or ():
        g.set_attr(node, num_heads=groups)
    for v in (*(a.past or ()), *(a.present or ())):
        if v.shape is not None:
            v.shape = ir.Shape([v.shape[0], groups, *v.shape[2:]])
    g.interface = interface.interface(g.model.graph)


def repair(g: Graph, uncut: Graph, env: Env, outputs: Sequence[Linear], how: Repair = "least-squares") -> None:
    """Refit output projections to the uncut residual stream, by sequential repair (`repair.sequential`)."""
    sequential.refit_in_order(g, uncut, env, [sequential.reader_of(x) for x in outputs], how=how)


def _planes(a: Attention, x: Linear, width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs of key channels that a rotary embedding rotates together, and the channels that it does not rotate."""
    path = key_path(a) if x is a.k else None
    if not path:
        return [], list(range(width))
    rotary = path[0].attributes.get_int("rotary_embedding_dim", 0) or width
    if path[0].attributes.get_int("interleaved", 0):
        return [(i, i + 1) for i in range(0, rotary, 2)], list(range(rotary, width))
    return [(i, i + rotary // 2) for i in range(rotary // 2)], list(range(rotary, width))
