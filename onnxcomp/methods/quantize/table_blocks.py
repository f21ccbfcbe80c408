"""Embedding tables as codes of 8 or 4 bits, shared with a head that reads the same table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Embedding, Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import formats
from onnxcomp.maths.formats import Format, Quantized
from onnxcomp.methods.quantize import linears, tables
from onnxcomp.target import Target

__all__ = ["BlockTables", "RowTables", "Tables"]


@dataclass
class RowTables:
    """Tables as int8 with one scale per row."""

    g: Graph
    target: Target
    eligible: Sequence[Embedding]

    def __post_init__(self) -> None:
        self.codes = linears.WeightCodes(self.g, "channel", self.target, self.eligible)

    def head(self, x: Linear, *, wide: bool) -> ir.Value:
        """The dequantized weight `[K, N]` of a head that shares a table; `wide` makes it float32."""
        return linears.integer_weight(self.codes, x, wide=wide)

    def store(self) -> None:
        """Let the tables be read from their codes."""
        tables.store(self.g, self.eligible, self.codes)


class BlockTables:
    """Tables as codes with a scale, and a zero point where not symmetric, for each block of a row."""

    def __init__(self, g: Graph, eligible: Sequence[Embedding], fmt: Format, block: int, *, symmetric: bool) -> None:
        self.g, self.eligible, self.fmt, self.block, self.symmetric = g, eligible, fmt, block, symmetric
        self._made: dict[ir.Value, tuple[ir.Value, Quantized]] = {}

    def _codes(self, table: ir.Value) -> tuple[ir.Value, Quantized]:
        """The codes `[rows, width]` as a constant, and what they are, `[width, rows]` in blocks of the first axis."""
        if table not in self._made:
            w = self.g.array(table).T
            q = formats.fit(
                w, self.fmt, axis=0, block=self.block, symmetric=self.symmetric, mse=True, scale_type=w.dtype
            )
            self._made[table] = self.g.constant(np.ascontiguousarray(q.codes.T), f"{table.name}_int{self.fmt.bits}"), q
        return self._made[table]

    def head(self, x: Linear, *, wide: bool) -> ir.Value:
        """The dequantized weight `[K, N]` of a head that shares a table; `wide` makes it float32."""
        codes, q = self._codes(x.weight)
        like = ir.Value(type=codes.type, shape=ir.Shape(x.sizes))
        columns = self.g.op("Transpose", codes, perm=[1, 0], name=f"{codes.name}_head", like=like)
        scale = q.scale.astype(np.float32) if wide else q.scale
        w = self._dequantized(columns, scale, q.zero, 0, f"{x.name}_weight")
        w.type, w.shape = ir.TensorType(ir.DataType.from_numpy(scale.dtype)), ir.Shape(x.sizes)
        return w

    def _dequantized(self, codes: ir.Value, scale: np.ndarray, zero: np.ndarray, axis: int, name: str) -> ir.Value:
        args = [self.g.constant(np.ascontiguousarray(scale), f"{name}_scale")]
        if not self.symmetric:
            args.append(self.g.constant(np.ascontiguousarray(zero), f"{name}_zero"))
        return self.g.op("DequantizeLinear", codes, *args, axis=axis, block_size=self.block, name=name)

    def store(self) -> None:
        """Let the tables be read from their codes."""

        def read(e: Embedding) -> ir.Value:
            codes, q = self._codes(e.table)
            w = self._dequantized(codes, q.scale.T, q.zero.T, 1, f"{e.node.name}_table")
            w.type, w.shape = e.table.type, e.table.shape
            return w

        tables.read_as(self.g, self.eligible, read)


Tables = RowTables | BlockTables
