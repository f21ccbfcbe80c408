"""Rotary position embedding: spelled-out rotations to RotaryEmbedding on `[b, s, n * h]`, whole or part of a head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import reshaped, sink
from onnxcomp.analysis.sizes import Shape
from onnxcomp.canonical.rotary_pairs import Turn, chosen, turns
from onnxcomp.canonical.rotary_tables import Tables
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.graph import Graph

__all__ = ["raise_rotary"]


@dataclass
class Rotary:
    """Recognition of one graph's rotations; tables are halved and widened once."""

    g: Graph
    f: Facts
    sizes: Sizes
    tables: Tables
    _wide: dict[tuple[ir.Value, object], ir.Value] = field(default_factory=dict)

    def raise_all(self) -> None:
        """Rewrite the spelled-out rotations, then bring all to three axes."""
        for node in self.g.nodes("Add", "Concat", "Reshape"):
            for turn in turns(self.f, node):
                if self._rewrite(turn):
                    break
        for node in self.g.nodes("RotaryEmbedding"):
            if node.domain == "":
                self._widen_tables(node)
                self._sink(self._of_whole_head(node))

    # ---- rewriting -----------------------------------------------------------------------------------------------

    def _rewrite(self, turn: Turn) -> bool:
        shape = self.f.shape(turn.x)
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return False
        axis = self._heads_axis(shape, turn)
        style = {"interleaved": turn.interleaved, "full": turn.full}
        cos, sin = (self.tables.table(t, axis, **style) if axis else None for t in (turn.cos, turn.sin))
        if axis is None or cos is None or sin is None:
            self.g.decline(turn.node, "rotary: the cosine and sine tables are not two equal halves over the width")
            return False
        whole = self._whole_head(turn.x, turn.out, shape[3])
        x, out = whole if whole is not None else (turn.x, turn.out)
        attrs: dict[str, Any] = {
            "interleaved": 1 if turn.interleaved and shape[3] > 2 else None,
            "rotary_embedding_dim": shape[3] if whole else None,
        }
        if axis == 1:
            new: ir.Value | None = self.g.op("RotaryEmbedding", x, cos, sin, like=out, **attrs)
        else:
            new = self._flat(x, [cos, sin], out, attrs)
        if new is not None:
            self.g.replace(out, new)
        return new is not None

    def _whole_head(self, x: ir.Value, out: ir.Value, width: int) -> tuple[ir.Value, ir.Value] | None:
        """The head of which `x`, the first `width` channels, is rotated, and the value that joins the rest to `out`."""
        users = list(dict.fromkeys(u for u, _ in out.uses()))
        source = chosen(self.f, x)
        if len(users) != 1 or users[0].op_type != "Concat" or source is None or out.is_graph_output():
            return None
        concat = users[0]
        rest = chosen(self.f, concat.inputs[-1]) if len(concat.inputs) == 2 else None
        whole = self.f.shape(source.x)
        if rest is None or rest.x is not source.x or whole is None or concat.inputs[0] is not out:
            return None
        fits = (*source.keep, *rest.keep) == tuple(range(int(whole[-1]))) and len(source.keep) == width  # type: ignore[arg-type]
        return (source.x, concat.outputs[0]) if fits and self.f.shape(concat.outputs[0]) == whole else None

    def _of_whole_head(self, node: ir.Node) -> ir.Node:
        """The operator on whole heads where it turned a slice of them, as some exporters write it; else itself."""
        x, shape = node.inputs[0], self.f.shape(node.inputs[0])
        if x is None or shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return node
        whole = self._whole_head(x, node.outputs[0], shape[3])
        if whole is None or "rotary_embedding_dim" in node.attributes:
            return node
        attrs = {k: a.value for k, a in node.attributes.items() if a.value} | {"rotary_embedding_dim": shape[3]}
        y = self.g.op("RotaryEmbedding", whole[0], *node.inputs[1:], like=whole[1], **attrs)
        self.g.replace(whole[1], y)
        made = y.producer()
        assert made is not None
        return made

    def _flat(self, x: ir.Value, tables: list[ir.Value], out: ir.Value, attrs: dict[str, Any]) -> ir.Value | None:
        """Rotation of `[b, s, n, h]`, through three axes and back."""
        shape = self.f.shape(x)
        if shape is None or not isinstance(shape[2], int) or not isinstance(shape[3], int):
            return None
        flat = reshaped(self.g, self.f, x, [*shape[:2], shape[2] * shape[3]])
        if flat is None:
            return None
        turned = self.g.op("RotaryEmbedding", flat, *tables, num_heads=shape[2], **attrs)
        return reshaped(self.g, self.f, turned, shape, like=out)

    def _heads_axis(self, shape: Shape, turn: Turn) -> int | None:
        """Which axis of `x` the tables are the same for: 1 for `[b, n, s, h]`, 2 for `[b, s, n, h]`."""
        found = {self._axis_without_heads(shape, t, turn.full) for t in (turn.cos, turn.sin)}
        return found.pop() if len(found) == 1 else None

    def _axis_without_heads(self, shape: Shape, table: ir.Value, full: bool) -> int | None:
        t, width = self.f.shape(table), shape[-1]
        if t is None or len(t) > 4 or not isinstance(width, int) or t[-1] != (width if full else width // 2):
            return None
        t = (1,) * (4 - len(t)) + t
        if t[1] == 1 and self.f.same(t[2], shape[2]):
            return 1
        return 2 if t[2] == 1 and self.f.same(t[1], shape[1]) else None

    # ---- layout --------------------------------------------------------------------------------------------------

    def _widen_tables(self, node: ir.Node) -> None:
        """Give cos and sin the batch of `x`: runtimes do not broadcast it, whatever the exporter wrote."""
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
                or not self.sizes.possible(shape[:1])
            ):
                continue
            key = (table, shape[0])
            if key not in self._wide:
                self._wide[key] = self.g.op("Expand", table, self.sizes.vector([shape[0], 1, 1]))
            self.g.set_input(node, i, self._wide[key])

    def _sink(self, node: ir.Node) -> None:
        """Turn a rotation of `[b, n, s, h]` into one of `[b, s, n * h]`, before copies of heads are made."""
        x, out = node.inputs[0], node.outputs[0]
        shape = self.f.shape(x)
        if x is None or shape is None or len(shape) != 4:
            return
        sunk = sink(self.g, self.f, x, grouped=True)
        if sunk is None or not isinstance(shape[3], int):
            self.g.decline(node, "rotary: head count or width is not static")
            return
        attrs = {k: a.value for k, a in node.attributes.items() if a.value != 0} | {"num_heads": sunk.heads}
        new = self.g.op("RotaryEmbedding", sunk.value, *node.inputs[1:], **attrs)
        split = reshaped(self.g, self.f, new, [shape[0], shape[2], sunk.heads, shape[3]])
        if split is None:
            return
        turned = self.g.op("Transpose", split, perm=[0, 2, 1, 3])
        if sunk.repeat > 1:
            one = self.g.op("Unsqueeze", turned, np.array([2], np.int64))
            wide = self.g.op("Expand", one, np.array([1, 1, sunk.repeat, 1, 1], np.int64))
            turned = self.g.op("Reshape", wide, np.array([0, sunk.heads * sunk.repeat, -1, shape[3]], np.int64))
        turned.type, turned.shape = out.type, out.shape
        self.g.replace(out, turned)


def raise_rotary(g: Graph, f: Facts) -> None:
    """Rewrite every rotary embedding that is recognised."""
    Rotary(g, f, Sizes(g, f), Tables(g, f)).raise_all()
