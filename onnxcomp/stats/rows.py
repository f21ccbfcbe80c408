"""Activations as rows: without padding tokens, and with a key for each row from its sample and position."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxcomp.data.datasets import roles, specs
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.stats.row_keys import mix

__all__ = ["Samples", "dims", "mask_name", "rows", "token_axis"]

Dims = tuple[int | str, ...]


def dims(v: ir.Value) -> Dims | None:
    """The recorded shape of a value with names for dynamic axes, None where it is unknown."""
    if v.shape is None:
        return None
    return tuple(d if isinstance(d, int) else str(d.value) for d in v.shape)


def mask_name(graph: Graph) -> str | None:
    """The name of the attention mask input of shape [batch, sequence], 1 for tokens and 0 for padding; None without."""
    inputs = specs(graph)
    name = roles(inputs).get("mask", "")
    # In a padding mask 1 means padding; masks of pixels or global attention have nothing to do with padding.
    if not name.lower().endswith("mask") or any(word in name.lower() for word in ("padding", "pixel", "global")):
        return None
    return next((s.name for s in inputs if s.name == name and len(s.shape) == 2), None)


def token_axis(shape: tuple[int, ...], recorded: Dims | None, mask: Array | None) -> int | None:
    """The axis of an activation that runs over the tokens of the mask `[B, S]`; 0 for flattened tokens, or None."""
    if mask is None or len(shape) < 2:
        return None
    batch, sequence = mask.shape
    if len(shape) == 2:
        return 0 if sequence > 1 and shape[0] == batch * sequence else None
    axes = [a for a in range(1, len(shape) - 1) if shape[a] == sequence and shape[0] == batch]
    if len(axes) > 1 and recorded is not None and len(recorded) == len(shape):
        # There may be as many heads as tokens by coincidence; the axis of the tokens is the dynamic one.
        axes = [a for a in axes if isinstance(recorded[a], str)] or axes
    return axes[0] if len(axes) == 1 else None


def rows(x: Array, keep: Array | None, axis: int | None) -> Array:
    """An activation as float rows `[R, C]`, without the tokens that `keep` (`[B, S]`, None for all) leaves out."""
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float32)
    if x.ndim < 2:
        return x.reshape(1, -1)
    if keep is None or axis is None:
        return x.reshape(-1, x.shape[-1])
    if axis == 0:
        return np.asarray(x[keep.reshape(-1)])
    return np.asarray(np.moveaxis(x, axis, 1)[keep].reshape(-1, x.shape[-1]))


class Samples:
    """The samples of one run: which tokens are not padding, and keys for rows that do not depend on the batching."""

    def __init__(self, feeds: Mapping[str, Array], mask: str | None) -> None:
        self.feeds = feeds
        mask_array = feeds.get(mask) if mask is not None else None
        self.mask: Array | None = None if mask_array is None or mask_array.ndim != 2 else mask_array != 0
        self.keep = None if self.mask is None or self.mask.all() else self.mask

    @cached_property
    def _identity(self) -> Array | None:
        """A 64-bit hash per sample of its feeds without padding; None where feeds have no common batch axis."""
        sizes = {a.shape[0] if a.ndim else -1 for a in self.feeds.values()}
        if len(sizes) != 1 or sizes == {-1}:
            return None
        identities = []
        for b in range(sizes.pop()):
            digest = hashlib.blake2b(digest_size=8)
            for name in sorted(self.feeds):
                a = self.feeds[name]
                masked = self.mask is not None and a.shape[:2] == self.mask.shape
                digest.update((a[b][self.mask[b]] if masked and self.mask is not None else a[b]).tobytes())
            identities.append(int.from_bytes(digest.digest(), "little"))
        return np.array(identities, np.uint64)

    def keys(self, count: int, axis: int | None) -> Array | None:
        """Keys of a value's rows from sample and position: `[count]`, uint64; None where rows belong to no sample."""
        identity = self._identity
        if identity is None:
            return None
        tokens = self.mask.sum(axis=1) if self.keep is not None and self.mask is not None and axis is not None else None
        shares = np.ones(len(identity), np.int64) if tokens is None else tokens
        if count % shares.sum():
            return None
        lengths = shares * (count // shares.sum())
        place = np.concatenate([np.arange(n, dtype=np.uint64) for n in lengths])
        return mix(np.repeat(identity, lengths) + mix(place + np.uint64(1)))
