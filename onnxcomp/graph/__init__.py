"""The owner of a model in memory, what must move together in it, and what makes it valid."""

from onnxcomp.graph.graph import CONTRIB, Declined, Graph, Noted, Site

__all__ = ["CONTRIB", "Declined", "Graph", "Noted", "Site"]
