"""Embedding tables as int8 rows, shared by every quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Embedding
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.values import users_of
from onnxcomp.methods.quantize.linears import FLOATS, WeightCodes
from onnxcomp.methods.skip_patterns import skipped

__all__ = ["chosen", "quantizable", "read_as", "site", "store"]


def quantizable(g: Graph) -> list[Embedding]:
    """Embedding tables `[rows, width]` that are stored in a float type."""
    return [e for e in blocks.embeddings(g) if e.table is e.node.inputs[0] and e.table.dtype in FLOATS]


def site(e: Embedding) -> Site:
    """The place in the graph, for passes and reports."""
    return Site(str(e.node.name), (str(e.node.name),), "embedding")


def chosen(g: Graph, skip: Iterable[str], min_size: int) -> list[Embedding]:
    """Quantizable tables; those that match a skip pattern, by node or table, or are small are declined by name."""
    kept, patterns = [], tuple(skip)
    for e in quantizable(g):
        hit = skipped(patterns, str(e.node.name), str(e.table.name))
        if hit is not None:
            g.decline(site(e), f"skipped by the pattern '{hit}'")
        elif e.rows * e.width < min_size:
            g.decline(site(e), f"its {e.rows}x{e.width} table is smaller than min_size={min_size}: nothing to gain")
        else:
            kept.append(e)
    return kept


def store(g: Graph, tables: Iterable[Embedding], codes: WeightCodes) -> None:
    """Let tables be read as `DequantizeLinear(codes)`, int8 with one scale per row or one in all.

    A head that was quantized before and shares the table shares its codes.
    """

    def dequantized(e: Embedding) -> ir.Value:
        q, scale = codes.rows(e.table)
        axis = None if codes.axis is None else 0
        return g.op("DequantizeLinear", q, scale, axis=axis, name=f"{e.node.name}_table", like=e.table)

    read_as(g, tables, dequantized)


def read_as(g: Graph, tables: Iterable[Embedding], read: Callable[[Embedding], ir.Value]) -> None:
    """Let tables be read as another value; a table that something else reads as float stays as it is."""
    tables = list(tables)
    if tables:
        g.sweep()  # float products that were replaced read their tables no more
    nodes = {e.node for e in tables}
    for e in tables:
        other = next((n for n in users_of(e.table) if n not in nodes), None)
        if other is not None:
            g.decline(site(e), f"'{other.name}' reads the table as float: storing it twice would make the model larger")
            continue
        g.set_input(e.node, 0, read(e))
