"""Rotary embedding: decomposed rotations become RotaryEmbedding on `[b, s, n * h]`, of all or part of a head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import merge_heads, reshaped
from onnxcomp.analysis.sizes import Shape
from onnxcomp.canonical.rotary_pairs import RotationMatch, channel_selection, rotations
from onnxcomp.canonical.rotary_tables import Tables
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.graph import Graph
from onnxcomp.graph.values import users_of

__all__ = ["raise_rotary"]


@dataclass
class RotaryRecognizer:
    """Recognition of one graph's rotations; each table is halved and expanded once."""

    g: Graph
    f: Facts
    sizes: Sizes
    tables: Tables
    _wide: dict[tuple[ir.Value, object], ir.Value] = field(default_factory=dict)

    def raise_all(self) -> None:
        """Rewrite decomposed rotations, then bring all rotations to three axes."""
        for node in self.g.nodes("Add", "Concat", "Reshape"):
            for match in rotations(self.f, node):
                if self._rewrite(match):
                    break
        for node in self.g.nodes("RotaryEmbedding"):
            if node.domain == "":
                self._expand_tables(node)
                self._merge_heads(self._on_whole_head(node))

    # ---- rewriting -----------------------------------------------------------------------------------------------

    def _rewrite(self, match: RotationMatch) -> bool:
        shape = self.f.shape(match.x)
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return False
        axis = self._heads_axis(shape, match)
        style = {"interleaved": match.interleaved, "full": match.full}
        cos, sin = (self.tables.table(t, axis, **style) if axis else None for t in (match.cos, match.sin))
        if axis is None or cos is None or sin is None:
            self.g.decline(match.node, "rotary: the cosine and sine tables do not consist of two equal halves")
            return False
        head = self._whole_head(match.x, match.out, shape[3])
        x, out = head if head is not None else (match.x, match.out)
        attrs: dict[str, Any] = {
            "interleaved": 1 if match.interleaved and shape[3] > 2 else None,
            "rotary_embedding_dim": shape[3] if head else None,
        }
        if axis == 1:
            new: ir.Value | None = self.g.op("RotaryEmbedding", x, cos, sin, like=out, **attrs)
        else:
            new = self._rewrite_3d(x, [cos, sin], out, attrs)
        if new is not None:
            self.g.replace(out, new)
        return new is not None

    def _whole_head(self, x: ir.Value, out: ir.Value, width: int) -> tuple[ir.Value, ir.Value] | None:
        """The head of whose first `width` channels `x` consists, and the Concat of `out` with its other channels."""
        users = users_of(out)
        source = channel_selection(self.f, x)
        if len(users) != 1 or users[0].op_type != "Concat" or source is None or out.is_graph_output():
            return None
        concat = users[0]
        rest = channel_selection(self.f, concat.inputs[-1]) if len(concat.inputs) == 2 else None
        head_shape = self.f.shape(source.x)
        if rest is None or rest.x is not source.x or head_shape is None or concat.inputs[0] is not out:
            return None
        fits = (*source.keep, *rest.keep) == tuple(range(int(head_shape[-1]))) and len(source.keep) == width  # type: ignore[arg-type]
        return (source.x, concat.outputs[0]) if fits and self.f.shape(concat.outputs[0]) == head_shape else None

    def _on_whole_head(self, node: ir.Node) -> ir.Node:
        """The operator on entire heads, where an exporter applied it to a slice of them; else the node itself."""
        x, shape = node.inputs[0], self.f.shape(node.inputs[0])
        if x is None or shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return node
        head = self._whole_head(x, node.outputs[0], shape[3])
        if head is None or "rotary_embedding_dim" in node.attributes:
            return node
        attrs = {k: a.value for k, a in node.attributes.items() if a.value} | {"rotary_embedding_dim": shape[3]}
        y = self.g.op("RotaryEmbedding", head[0], *node.inputs[1:], like=head[1], **attrs)
        self.g.replace(head[1], y)
        producer = y.producer()
        assert producer is not None
        return producer

    def _rewrite_3d(self, x: ir.Value, tables: list[ir.Value], out: ir.Value, attrs: dict[str, Any]) -> ir.Value | None:
        """Rotate `[b, s, n, h]` as `[b, s, n * h]`."""
        shape = self.f.shape(x)
        if shape is None or not isinstance(shape[2], int) or not isinstance(shape[3], int):
            return None
        flat = reshaped(self.g, self.f, x, [*shape[:2], shape[2] * shape[3]])
        if flat is None:
            return None
        rotated = self.g.op("RotaryEmbedding", flat, *tables, num_heads=shape[2], **attrs)
        return reshaped(self.g, self.f, rotated, shape, like=out)

    def _heads_axis(self, shape: Shape, match: RotationMatch) -> int | None:
        """The axis of heads, along which the tables are broadcast: 1 for `[b, n, s, h]`, 2 for `[b, s, n, h]`."""
        axes = {self._axis_without_heads(shape, t, match.full) for t in (match.cos, match.sin)}
        return axes.pop() if len(axes) == 1 else None

    def _axis_without_heads(self, shape: Shape, table: ir.Value, full: bool) -> int | None:
        t, width = self.f.shape(table), shape[-1]
        if t is None or len(t) > 4 or not isinstance(width, int) or t[-1] != (width if full else width // 2):
            return None
        t = (1,) * (4 - len(t)) + t
        if t[1] == 1 and self.f.same(t[2], shape[2]):
            return 1
        return 2 if t[2] == 1 and self.f.same(t[1], shape[1]) else None

    # ---- layout --------------------------------------------------------------------------------------------------

    def _expand_tables(self, node: ir.Node) -> None:
        """Expand cos and sin to the batch of `x`: runtimes do not broadcast it, though exporters write batch 1."""
        shape = self.f.shape(node.inputs[0])
        if shape is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
            return
        for i in (1, 2):
            table, t = node.inputs[i], self.f.shape(node.inputs[i])
            if (
                table is None
                or t is None
                or len(t) != 3
                or t[0] != 1
                or shape[0] == 1
                or not self.sizes.can_compute(shape[:1])
            ):
                continue
            key = (table, shape[0])
            if key not in self._wide:
                self._wide[key] = self.g.op("Expand", table, self.sizes.vector([shape[0], 1, 1]))
            self.g.set_input(node, i, self._wide[key])

    def _merge_heads(self, node: ir.Node) -> None:
        """Rotate `[b, s, n * h]` in place of `[b, n, s, h]`, before heads are copied."""
        x, out = node.inputs[0], node.outputs[0]
        shape = self.f.shape(x)
        if x is None or shape is None or len(shape) != 4:
            return
        merged = merge_heads(self.g, self.f, x, grouped=True)
        if merged is None or not isinstance(shape[3], int):
            self.g.decline(node, "rotary: head count or width is not static")
            return
        attrs = {k: a.value for k, a in node.attributes.items() if a.value != 0} | {"num_heads": merged.heads}
        new = self.g.op("RotaryEmbedding", merged.value, *node.inputs[1:], **attrs)
        split = reshaped(self.g, self.f, new, [shape[0], shape[2], merged.heads, shape[3]])
        if split is None:
            return
        transposed = self.g.op("Transpose", split, perm=[0, 2, 1, 3])
        if merged.repeat > 1:
            unsqueezed = self.g.op("Unsqueeze", transposed, np.array([2], np.int64))
            expanded = self.g.op("Expand", unsqueezed, np.array([1, 1, merged.repeat, 1, 1], np.int64))
            transposed = self.g.op(
                "Reshape", expanded, np.array([0, merged.heads * merged.repeat, -1, shape[3]], np.int64)
            )
        transposed.type, transposed.shape = out.type, out.shape
        self.g.replace(out, transposed)


def raise_rotary(g: Graph, f: Facts) -> None:
    """Rewrite every recognized rotary embedding."""
    RotaryRecognizer(g, f, Sizes(g, f), Tables(g, f)).raise_all()
