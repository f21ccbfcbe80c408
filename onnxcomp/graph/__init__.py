"""The model in memory: counted edits, coupled groups of axes, validity, storage of tensors."""

from onnxcomp.graph.graph import CONTRIB, Graph
from onnxcomp.graph.records import Covered, Declined, Noted, Site

__all__ = ["CONTRIB", "Covered", "Declined", "Graph", "Noted", "Site"]
