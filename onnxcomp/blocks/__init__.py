"""Typed views of a canonical graph (attentions, MLPs, layers), computed on demand: an edit makes them invalid."""

from __future__ import annotations

from onnxcomp.blocks.attentions import Attention, attentions
from onnxcomp.blocks.batched import BatchedLinear, batched_linears
from onnxcomp.blocks.ends import Embedding, Head, embeddings, head
from onnxcomp.blocks.experts import Experts, experts
from onnxcomp.blocks.layers import Layer, layers
from onnxcomp.blocks.linears import Linear, NormSite, linears, norms, siblings
from onnxcomp.blocks.mlps import Mlp, mlps

__all__ = [
    "Attention",
    "BatchedLinear",
    "Embedding",
    "Experts",
    "Head",
    "Layer",
    "Linear",
    "Mlp",
    "NormSite",
    "attentions",
    "batched_linears",
    "embeddings",
    "experts",
    "head",
    "layers",
    "linears",
    "mlps",
    "norms",
    "siblings",
]
