"""The model in memory: counted edits, coupled groups of axes, validity, storage of tensors."""

from onnxcomp.graph.graph import CONTRIB, Declined, Graph, Noted, Site

__all__ = ["CONTRIB", "Declined", "Graph", "Noted", "Site"]
