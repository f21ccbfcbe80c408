"""Let several query heads share one key and value head: multi-head to grouped-query or multi-query attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp.blocks import Attention, Linear, attentions
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Array
from onnxcomp.maths.align import rotations
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, gram
from onnxcomp.structure import projections
from onnxcomp.target import Target

__all__ = ["GroupHeads"]


@dataclass(frozen=True)
class GroupHeads(Pass):
    """Replace the keys and values of neighbouring heads by their mean, after turning the heads onto each other.

    Means of key and value heads are Ainslie et al., GQA, 2023 (arXiv 2305.13245, section 2.1). Before the mean, each
    head is rotated towards the others (`maths.align`): values freely, keys within the planes of their rotary embedding;
    queries and the output projection take the rotation back, so that turning alone changes nothing.
    """

    stage: ClassVar[Stage] = Stage.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    share: Annotated[int, Field(ge=1)] = 2
    """How many key and value heads become one; 1 changes nothing."""
    align: bool = True
    """Turn heads onto each other before the mean."""
    max_loss: Annotated[float, Field(ge=0, le=1)] = 1.0
    """An attention whose keys or values lose more than this share of their energy on calibration data stays."""

    @property
    def is_identity(self) -> bool:
        """Whether every head keeps its own keys and values."""
        return self.share == 1

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every attention with several key and value heads."""
        return [a.site for a in attentions(g) if a.kv_heads > 1]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """Gram matrices of what keys and values are made from."""
        if not self.is_identity:
            found = [a for a in attentions(g) if a.kv_heads > 1 and not self._blocked(g, a)]
            yield from dict.fromkeys(gram(x.source) for a in found for x in (a.k, a.v))

    def run(self, g: Graph, env: Env) -> None:
        """Group the heads of each attention."""
        if self.is_identity:
            return
        for a in [a for a in attentions(g) if a.kv_heads > 1]:
            if why := self._blocked(g, a):
                g.decline(a.site, why)
            else:
                self._group(g, a, env)
        g.forget_shapes()

    def _blocked(self, g: Graph, a: Attention) -> str:
        if a.kv_heads % self.share:
            return f"its {a.kv_heads} key and value heads do not divide into groups of {self.share}"
        if a.past is not None or len(a.node.outputs) > 1:
            return "its keys and values are inputs or outputs of the model"
        if any(x.quantized or len(x.weight.uses()) > 1 for x in a.linears):
            return "a weight is quantized or shared with another layer"
        if a.node.inputs[2] is not a.v.output or _key_path(a) is None:
            return "keys or values are moved between their projection and the attention"
        return ""

    def _group(self, g: Graph, a: Attention, env: Env) -> None:
        groups = a.kv_heads // self.share
        turn_k, lost_k = self._turned(g, a, a.k, env.stats[gram(a.k.source)], *_planes(a))
        turn_v, lost_v = self._turned(g, a, a.v, env.stats[gram(a.v.source)], [], None)
        if max(lost_k, lost_v) > self.max_loss:
            g.decline(a.site, f"the mean would lose {lost_k:.1%} of its keys and {lost_v:.1%} of its values")
            return
        for x, turn in ((a.k, turn_k), (a.v, turn_v)):
            for value, user in projections.constants(x):
                old = projections.split(projections.read(g, x, value), a.kv_heads) @ turn
                mean = old.reshape(groups, self.share, *old.shape[1:]).mean(1)
                projections.write(g, x, value, user, projections.joined(mean))
        repeat = a.heads // a.kv_heads
        back_q, back_o = (np.repeat(t, repeat, axis=0) for t in (turn_k, turn_v))
        for value, user in projections.constants(a.q):
            projections.write(
                g,
                a.q,
                value,
                user,
                projections.joined(projections.split(projections.read(g, a.q, value), a.heads) @ back_q),
            )
        o = projections.read(g, a.o)
        rows = o.reshape(a.heads, -1, o.shape[1])
        projections.write(g, a.o, a.o.weight, a.o.node, (back_o.transpose(0, 2, 1) @ rows).reshape(o.shape))
        g.set_attr(a.node, kv_num_heads=groups)
        for node in _key_path(a) or ():
            if node.op_type == "RotaryEmbedding":
                g.set_attr(node, num_heads=groups)

    def _turned(
        self, g: Graph, a: Attention, x: Linear, moments: Array, pairs: list[tuple[int, int]], free: list[int] | None
    ) -> tuple[Array, float]:
        """Rotations `[heads, D, D]` of keys or values, and the share of their energy that the means lose."""
        turns, lost, whole = [], 0.0, 0.0
        every = projections.split(projections.read(g, x), a.kv_heads)
        for i in range(0, a.kv_heads, self.share):
            heads = every[i : i + self.share]
            width = heads.shape[-1]
            plain = np.broadcast_to(np.eye(width), (self.share, width, width))
            given = list(range(width)) if free is None else free
            turns.append(rotations(heads, moments, pairs, given) if self.align else plain)
            turned = heads @ turns[-1]
            lost += float(np.einsum("hkd,kl,hld->", off := turned - turned.mean(0), moments, off, optimize=True))
            whole += float(np.einsum("hkd,kl,hld->", turned, moments, turned, optimize=True))
        return np.concatenate(turns), lost / whole if whole else 0.0


def _key_path(a: Attention) -> list[ir.Node] | None:
    """Nodes between the key projection and the attention; None where they are more than rotation."""
    found, v = [], a.node.inputs[1]
    while v is not None and v is not a.k.output:
        node = v.producer()
        if node is None or node.op_type != "RotaryEmbedding" or len(v.uses()) > 1:
            return None
        found.append(node)
        v = node.inputs[0]
    return found


def _planes(a: Attention) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs of key channels that a rotary embedding turns together, and the channels it leaves alone."""
    path, width = _key_path(a), a.head_dim
    if not path:
        return [], list(range(width))
    turned = path[0].attributes.get_int("rotary_embedding_dim", 0) or width
    if path[0].attributes.get_int("interleaved", 0):
        return [(i, i + 1) for i in range(0, turned, 2)], list(range(turned, width))
    return [(i, i + turned // 2) for i in range(turned // 2)], list(range(turned, width))
