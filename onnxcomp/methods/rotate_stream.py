"""Another basis for a residual stream, with fewer coordinates: its writers, readers and skips are rewritten.

With orthonormal columns `Q [d, d']` the stream carries `z = x Q`. An RMSNorm without gain commutes with a square `Q`; a
LayerNorm is one after `I - 11^T / d`, which is folded into the writers (SliceGPT, arXiv 2401.15024, section 3).

Writes may be projected along other directions than reads, by a dual `D [d, d']` with `Q^T D = I`: `z = x D`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks.linears import Index, Linear, NormSite
from onnxcomp.blocks.stream import Stream, stream_operands
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS, TOKEN_SELECTING
from onnxcomp.graph.scratch import as_tensor, release_pages
from onnxcomp.graph.values import sole_use
from onnxcomp.maths import Array, Float64

__all__ = ["basis", "is_free", "multiply", "rotate"]

PIECE = 1 << 22  # elements converted to float64 at a time, 32 MiB: bounds memory, not the result


def basis(g: Graph, q: Float64) -> ir.TensorProtocol:
    """A basis `[d, d']` as `rotate` takes it: in memory, or in the scratch folder of a large model."""
    return as_tensor(q, folder=g.spool)


def rotate(
    g: Graph,
    stream: Stream,
    bases: Mapping[ir.Value, ir.TensorProtocol],
    duals: Mapping[ir.Value, ir.TensorProtocol] | None = None,
) -> dict[str, ir.Value]:
    """Express every value of a stream in its basis; the new values by the names of the old ones.

    A skip between two different bases is multiplied by `Q^T D'`. `duals` are the bases themselves where none are given.
    Exact (to rounding) where the bases are square; otherwise the components outside them are lost. Values with the same
    basis object share it. No more than two bases are in memory at once.
    """
    rotation = _Rotation(g, stream, bases, duals or bases)
    rotation.run()
    g.forget_shapes()
    return {str(old.name): new for old, new in rotation.new.items()}


class _Rotation:
    def __init__(
        self,
        g: Graph,
        stream: Stream,
        bases: Mapping[ir.Value, ir.TensorProtocol],
        duals: Mapping[ir.Value, ir.TensorProtocol],
    ) -> None:
        self.g, self.stream, self.bases, self.duals = g, stream, bases, duals
        self.index, self.facts = Index.of(g), Facts(g)
        self.others = {v: stream.other_readers(v) for v in stream.values}
        self.members = {v.producer() for v in stream.values} | {n.node for n in stream.norms}
        self.new: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for v in self.stream.values:
            self.new[v] = self._carry(v)
        for norm in self.stream.norms:
            self._norm(norm)
        for v, users in self.others.items():
            if users or v.is_graph_output():
                back = self.g.op("MatMul", self.new[v], self._matrix(self._basis(v).T, v), like=v)
                self.g.replace(v, back, users=None if v.is_graph_output() else users)

    def _basis(self, v: ir.Value) -> Float64:
        """The basis `Q [d, d']` in which a value is read."""
        return self._of(self.bases, v)

    def _dual(self, v: ir.Value) -> Float64:
        """The dual `D [d, d']` by which writes to a value are multiplied."""
        return self._of(self.duals, v)

    def _of(self, bases: Mapping[ir.Value, ir.TensorProtocol], v: ir.Value) -> Float64:
        release_pages([*self.bases.values(), *self.duals.values()])  # those loaded before need not stay in memory
        return np.asarray(bases[v].numpy(), np.float64)

    def _matrix(self, m: Array, like: ir.Value) -> Array:
        dtype = like.dtype.numpy() if like.dtype is not None else np.dtype(np.float32)
        return np.ascontiguousarray(m).astype(dtype)

    # ---- the stream itself ---------------------------------------------------------------------------------------

    def _carry(self, v: ir.Value) -> ir.Value:
        """The value in its basis: a sum of terms in that basis, a move of one, or the start of the stream."""
        node, inputs = v.producer(), stream_operands(v, self.index, self.facts)
        if node is None or not inputs:
            return self._written(v, v)
        if node.op_type in ADDITIONS:
            return self.g.op(node.op_type, *(self._term(x, v) for x in inputs), name=f"{node.name}_sliced")
        attributes = {name: a.value for name, a in node.attributes.items()}
        moved = self.g.op(node.op_type, self.new[inputs[0]], *node.inputs[1:], name=f"{node.name}_sliced", **attributes)
        return self._rebased(moved, inputs[0], v)

    def _term(self, x: ir.Value, v: ir.Value) -> ir.Value:
        return self._rebased(self.new[x], x, v) if x in self.new else self._written(x, v)

    def _rebased(self, y: ir.Value, x: ir.Value, v: ir.Value) -> ir.Value:
        """A value in the basis of `x`, converted to that of `v`."""
        if self.bases[x] is self.bases[v]:
            return y
        return self.g.op("MatMul", y, self._matrix(self._basis(x).T @ self._dual(v), v), name=f"{v.name}_skip")

    def _written(self, x: ir.Value, v: ir.Value) -> ir.Value:
        """The output of a writer in the basis of `v`: folded into its weights where nothing else uses them."""
        q = self._dual(v)
        if self.stream.kind == "layer":
            q = q - q.mean(axis=0)  # (I - 11^T / d) D
        if self.g.is_constant(x):
            return self.g.constant(self._matrix(self.g.array(x).astype(np.float64) @ q, x), f"{x.name}_sliced")
        readers = {u for u, _ in x.uses()}
        is_internal = not x.is_graph_output() and not self.others.get(x) and readers <= self.members
        if is_internal and (x is v or len(readers) == 1):
            y, scale = self._unscaled(x)
            places = self._constants(y, square=q.shape[0] == q.shape[1])
            if places is not None:
                for constant, axis in places:
                    multiply(self.g, constant, q if scale is None else scale[:, None] * q, axis)
                return y
        return self.g.op("MatMul", x, self._matrix(q, x), name=f"{x.name}_sliced")

    def _unscaled(self, x: ir.Value) -> tuple[ir.Value, Float64 | None]:
        """A value before the constant factor of each channel that is its only use (layer scale), and the factor."""
        node = x.producer()
        if node is None or node.op_type != "Mul" or node.domain:
            return x, None
        for y, c in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            factor = self.g.array(c).astype(np.float64) if self.g.is_constant(c) else None
            if y is not None and y in self.index.by_output and sole_use(y) is not None and factor is not None:
                width = self.index.by_output[y].sizes[1]
                return (y, factor.reshape(-1)) if factor.size == width == factor.shape[-1] else (x, None)
        return x, None

    def _constants(self, x: ir.Value, *, square: bool) -> list[tuple[ir.Value, int]] | None:
        """The constants, with the axis of the channels, that a matrix behind a value is folded into; None if it isn't.

        Patches take `square` ones only: other widths stand in the constants of shapes.
        """
        linear = self.index.by_output.get(x)
        if linear is not None and is_free(linear):
            bias = [(linear.bias, -1)] if linear.bias is not None else []
            return [(linear.weight, 0 if linear.transposed else 1), *bias]
        if (table := self._table(x)) is not None:
            return [(table, 1)]
        return self._patches(x) if square else None

    def _patches(self, x: ir.Value) -> list[tuple[ir.Value, int]] | None:
        """The constants, with the axis of the channels, that make the tokens of an image; None for anything else.

        Tokens are concatenated from rows that are expanded, and from a convolution whose places become tokens.
        """
        node, shape = x.producer(), self.facts.shape(x)
        if node is None or not shape or len(list(x.uses())) != 1 or x.is_graph_output():
            return None
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) % len(shape) < len(shape) - 1:
            parts = [self._patches(y) for y in node.inputs if y is not None]
            return None if any(p is None for p in parts) else [place for p in parts if p is not None for place in p]
        if node.op_type == "Expand":
            return self._own([(node.inputs[0], -1)], shape[-1])
        if node.op_type != "Transpose" or node.attributes.get_ints("perm", ())[-1:] != (1,):
            return None
        v = node.inputs[0]
        before = v.producer() if v is not None else None
        if before is not None and before.op_type == "Reshape":
            old, new = (self.facts.shape(y) if y is not None else None for y in (before.inputs[0], v))
            is_own = v is not None and sole_use(v) is not None
            v = before.inputs[0] if is_own and old and new and list(old[:2]) == list(new[:2]) else None
            before = v.producer() if v is not None else None
        if v is None or before is None or before.op_type != "Conv" or before.attributes.get_int("group", 1) != 1:
            return None
        return self._own([(w, 0) for w in before.inputs[1:] if w is not None], shape[-1]) if sole_use(v) else None

    def _own(self, places: list[tuple[ir.Value | None, int]], width: object) -> list[tuple[ir.Value, int]] | None:
        """Places of constants of that many channels, if nothing else reads them."""
        own = [(v, axis) for v, axis in places if v is not None and self.g.is_constant(v) and sole_use(v) is not None]
        return own if len(own) == len(places) and all(self.g.array(v).shape[axis] == width for v, axis in own) else None

    def _table(self, x: ir.Value) -> ir.Value | None:
        """The embedding table `[rows, d]` that only this value is looked up in."""
        node = x.producer()
        table = node.inputs[0] if node is not None and node.op_type == "Gather" else None
        if node is None or table is None or not self.g.is_constant(table) or len(list(table.uses())) != 1:
            return None
        return table if len(table.shape or ()) == 2 and node.attributes.get_int("axis", 0) == 0 else None

    # ---- norms ---------------------------------------------------------------------------------------------------

    def _norm(self, norm: NormSite) -> None:
        """An RMSNorm over the `d'` coordinates that divides by the full width `d`; its gain is folded into readers."""
        q = self._basis(norm.input)
        d, kept = q.shape
        epsilon = norm.node.attributes.get_float("epsilon", 1e-5) * d / kept
        level = self._matrix(np.full(kept, np.sqrt(d / kept)), norm.gain)
        new = self.g.op(
            "RMSNormalization", self.new[norm.input], level, axis=-1, epsilon=epsilon, name=f"{norm.name}_sliced"
        )
        gain = self.g.array(norm.gain).astype(np.float64).reshape(-1)
        shift = None if norm.bias is None else self.g.array(norm.bias).astype(np.float64).reshape(-1)
        restore = q.T * gain  # [d', d]
        unfolded = []
        for node in norm.readers:
            linear = next((x for x in self.index.by_source.get(norm.output, []) if x.node is node), None)
            if linear is not None and self._can_read(linear, shift):
                self._let_read(linear, new, restore, shift)
            elif not self._select(node, norm.output, new, restore, shift):
                unfolded.append(node)
        if unfolded or norm.output.is_graph_output():
            back = self.g.op(
                "MatMul", new, self._matrix(restore, norm.gain), name=f"{norm.name}_restored", like=norm.output
            )
            if shift is not None:
                back = self.g.op("Add", back, self._matrix(shift, norm.gain), like=norm.output)
            self.g.replace(norm.output, back, users=None if norm.output.is_graph_output() else unfolded)

    def _select(self, node: ir.Node, old: ir.Value, new: ir.Value, r: Float64, shift: Float64 | None) -> bool:
        """Let a node that selects tokens of a norm's output, for linears alone, select those of the new one."""
        out = node.outputs[0]
        readers = self.index.by_source.get(out, [])
        is_selection = node.op_type in TOKEN_SELECTING and stream_operands(out, self.index, self.facts) == [old]
        if not is_selection or out.is_graph_output() or {u for u, _ in out.uses()} != {x.node for x in readers}:
            return False
        if not all(self._can_read(x, shift) for x in readers):
            return False
        self.g.set_input(node, 0, new)
        for x in readers:
            self._let_read(x, out, r, shift)
        return True

    @staticmethod
    def _can_read(x: Linear, shift: Float64 | None) -> bool:
        """Whether a matrix, and the norm's bias, can be folded into a linear: not where its weights are shared."""
        grows = shift is not None and x.bias is None
        return is_free(x) and not (grows and (x.output.is_graph_output() or x.node.op_type == "Gemm"))

    def _let_read(self, x: Linear, new: ir.Value, r: Float64, shift: Float64 | None) -> None:
        """Fold `r [d', d]` into a linear that then reads the `d'` coordinates."""
        weight = self.g.array(x.weight)
        w = weight.T if x.transposed else weight
        if shift is not None:
            added = product(w.T, shift[:, None])[:, 0]  # [N], the norm's bias through the weight
            if x.bias is None:
                users = list(x.users)
                y = self.g.op("Add", x.output, added, name=f"{x.name}_bias", like=x.output)
                self.g.replace(x.output, y, users=users)
            else:
                self.g.put(x.bias, self.g.array(x.bias) + added)
        self.g.put(x.weight, product(w.T, r.T) if x.transposed else np.ascontiguousarray(product(w.T, r.T).T))
        self.g.set_input(x.node, 0, new)


def is_free(x: Linear) -> bool:
    """Whether a linear's constants are floats that nothing else uses."""
    constants = [v for v in (x.weight, x.bias) if v is not None]
    return not x.quantized and all(len({u for u, _ in v.uses()}) == 1 and not v.is_graph_output() for v in constants)


def multiply(g: Graph, v: ir.Value, q: Float64, axis: int) -> None:
    """Multiply a constant along its first or last axis by `q [d, d']`, rounding once."""
    a = g.array(v)
    g.put(v, product(a, q) if axis in (1, -1) else np.ascontiguousarray(product(a.T, q).T))


def product(a: Array, q: Array) -> Array:
    """`a @ q` over the last axis of a constant, computed in float64 in pieces, in the type of `a`."""
    rows = a.reshape(-1, a.shape[-1])
    step = max(1, PIECE // rows.shape[1])
    out = np.empty((len(rows), q.shape[1]), a.dtype)
    for i in range(0, len(rows), step):
        out[i : i + step] = rows[i : i + step].astype(np.float64) @ q
    return out.reshape(*a.shape[:-1], q.shape[1])
