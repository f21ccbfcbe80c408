"""Key-value caches in 8 or 4 bits: a decoder remembers a quarter or an eighth of the bytes for each token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxcomp.blocks import Attention, attentions
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Float64
from onnxcomp.methods.quantize import cache_codes
from onnxcomp.methods.quantize.cache_codes import CacheScales, store_codes, why_not
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, absmax, sample
from onnxcomp.target import Target

__all__ = ["QuantizeCache"]

ROWS = 4096  # keys and values on which ranges of 4 bits are chosen


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Store keys and values as integers, with scales from calibration; the caches of the model become int8, or uint8.

    Scales are symmetric and fixed, of each channel of each head or of all (keys have their outliers in few channels:
    KIVI, arXiv 2402.02750). Both channels of a rotated pair share one, so that it holds at positions no sample had.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_interface: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"bits": 32}
    example: ClassVar[Mapping[str, Any]] = {"bits": 8}

    bits: Literal[4, 8, 32] = 8
    """Of each number in a cache; 32 leaves caches as they are."""
    per: Literal["channel", "tensor"] = "channel"
    """What shares a scale: a channel of a head, or all keys (all values) of a layer."""
    skip: tuple[str, ...] = ()
    """Patterns of the names of attentions whose caches are not changed."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every attention that is not skipped."""
        return [a.site for a in self._all(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The largest magnitude of every channel of keys and values, and for 4 bits rows of them."""
        if self.is_identity:
            return
        for v in (v for a in self._all(g) if not self._why_not(a) for v in _new(a)):
            yield absmax(v, "channel")
            if self.bits == 4:
                yield sample(v, ROWS)

    def run(self, g: Graph, env: Env) -> None:
        """Retype the caches, or say why not."""
        if self.is_identity:
            return
        before = after = 0
        for a in self._all(g):
            if why := self._why_not(a):
                g.decline(a.site, why)
                continue
            count = cache_codes.numbers(a)
            before, after = before + count * _bytes(a), after + count * self.bits // 8
            if not env.dry:
                keys, values = (self._scales(env, a, i) for i in range(2))
                store_codes(g, a, CacheScales(keys, values), self.bits)
            g.note(a.site, f"{self.bits} bits for each of {count} numbers that are kept of a token")
        if after:
            said = f"{after} bytes for each token instead of {before}"
            g.note("all caches", said, {"bytes": after, "before": before})
            cache_codes.declare(g)

    def _all(self, g: Graph) -> list[Attention]:
        return [a for a in attentions(g) if skipped(self.skip, a.name) is None]

    def _why_not(self, a: Attention) -> str:
        odd = self.bits == 4 and a.head_dim % 2
        return why_not(a) or ("its heads have an odd number of channels" if odd else "")

    def _scales(self, env: Env, a: Attention, index: int) -> Float64:
        """Of keys (index 0) or values (1), `[kv_heads, width]`."""
        v = _new(a)[index]
        most = env.stats[absmax(v, "channel")].astype(float).reshape(a.kv_heads, -1)
        rows = env.stats[sample(v, ROWS)].astype(float).reshape(-1, *most.shape) if self.bits == 4 else most[None]
        if index == 0:
            rows, most = cache_codes.anywhere(cache_codes.partners(a, most.shape[1]), rows, most)
        return cache_codes.best_scales(rows, most, self.bits, per_tensor=self.per == "tensor")


def _new(a: Attention) -> tuple[ir.Value, ir.Value]:
    """Keys and values of new tokens `[b, s, kv_heads * width]`."""
    keys, values = a.node.inputs[1:3]
    assert keys is not None
    assert values is not None
    return keys, values


def _bytes(a: Attention) -> int:
    """Of each number that is kept now."""
    assert a.past is not None
    return 2 if a.past[0].dtype is ir.DataType.FLOAT16 else 4
