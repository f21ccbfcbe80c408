"""Sliding-window attention: every token attends to near ones only, in each layer as far as its attention needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.blocks import Attention, attentions
from onnxcomp.blocks.mask_names import name_masks
from onnxcomp.graph import Graph, Site
from onnxcomp.methods import sliding_caches
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.methods.windows import WIDTHS, Bands, kept_by_width, widest
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import absmax, mean
from onnxcomp.target import Target

__all__ = ["WindowAttention"]


@dataclass(frozen=True)
class WindowAttention(Pass):
    """Hide keys that are `width` or more positions away from their query, in addition to those the mask hides already.

    Sliding windows are Beltagy et al., Longformer, 2020 (arXiv 2004.05150, section 3.1); sinks are Xiao et al.,
    StreamingLLM, 2023 (arXiv 2309.17453). Without a width each layer gets the smallest one that keeps the share `mass`
    of its attention on calibration data. Places are counted from the first token of a row, padding included.
    """

    stage: ClassVar[Stage] = Stage.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_interface: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"width": 0, "mass": 1.0}
    example: ClassVar[Mapping[str, Any]] = {"mass": 0.9}
    example_error: ClassVar[float] = 0.6

    width: Annotated[int, Field(ge=0)] = 0
    """Keys to each side, the token itself included (a causal model has one side); 0 lets `mass` decide."""
    mass: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of attention, averaged over heads and queries, that a layer's window keeps; 1 changes nothing."""
    sinks: Annotated[int, Field(ge=0)] = 0
    """First tokens that every query attends to; in encoders they also attend to every token, as a class token must."""
    skip: tuple[str, ...] = ()
    """Patterns of the names of attentions that are not changed."""
    cache: Literal["whole", "sliding"] = "whole"
    """What the caches of a decoder hold: all tokens, or the sinks and those in the window, one width for all layers."""

    @property
    def wants_data(self) -> bool:
        """A given width needs none."""
        return self.width == 0

    def advice(self, target: Target) -> Iterable[str]:
        """What the target makes of a mask."""
        if self.is_identity:
            return
        yield (
            f"window-attention: a mask makes nothing faster on '{target.name}' by itself, all scores are computed; "
            "causal models without padding masks become GroupQueryAttention with a window where that is measured to be "
            "faster, and a runtime that keeps only the last keys in its cache can use the widths of the report"
        )

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every attention that is not skipped."""
        return [a.site for a in self._all(g)]

    def run(self, g: Graph, env: Env) -> None:
        """Narrow the masks, or say why not."""
        if self.is_identity:
            return
        every = self._all(g)
        masks = name_masks(g, [a.mask for a in every])
        free: list[Attention] = []
        for a in every:
            if why := self._blocked(a):
                g.decline(a.site, why)
            else:
                free.append(a)
        widths = {a.name: self.width for a in free} if self.width else self._measured(g, env, free)
        current = {a.name: _width_of(masks[a.mask].name) for a in free}
        if self.cache == "sliding":
            width = self._slide(g, free, {min(w, current[n] or w) for n, w in widths.items()})
            widths = dict.fromkeys(widths, width) if width else {}
        bands = Bands(g)
        for a in free if widths else ():
            width, keys, now = widths[a.name], bands.keys(a), current[a.name]
            if width == 0:
                g.decline(a.site, f"no window shorter than its sequences keeps {self.mass:.4g} of its attention")
            elif keys is not None and width >= keys:
                g.decline(a.site, f"its {keys} keys fit into a window of {width}")
            elif now is not None and width >= now and self.cache == "whole":
                g.decline(a.site, f"its window of {now} is no wider than {width}")
            else:
                bands.narrow(a, width, self.sinks)
                g.note(a.site, f"window {width}" + (f", {self.sinks} sinks" if self.sinks else ""))
        g.forget_shapes()

    def _slide(self, g: Graph, free: list[Attention], widths: set[int]) -> int:
        """Let the caches slide under the widest window, which is returned; 0 where they cannot."""
        why = f"no window keeps {self.mass:.4g} of the attention of all layers" if 0 in widths else ""
        if why := sliding_caches.why_not(g, free) or why:
            for a in free:
                g.decline(a.site, f"its cache cannot slide: {why}")
            return 0
        sliding_caches.slide(g, free, max(widths), self.sinks)
        return max(widths)

    def _all(self, g: Graph) -> list[Attention]:
        return [a for a in attentions(g) if skipped(self.skip, a.name) is None]

    def _blocked(self, a: Attention) -> str:
        if a.is_cross:
            return "its keys come from another sequence than its queries, so they have no distance"
        if any(x is not None for x in a.node.inputs[6:]):
            return "it counts its keys at run time"
        if a.has_sink:
            return "its mask holds a sink, to which no window applies"
        return ""

    def _measured(self, g: Graph, env: Env, chosen: list[Attention]) -> dict[str, int]:
        """The width of each attention by its name, 0 where all keys are needed."""
        copy = g.clone()
        names = {a.name for a in chosen}
        copies = [a for a in attentions(copy) if a.name in names]
        values = kept_by_width(copy, copies, self.sinks)
        copy.sort()
        kept, lengths = [mean(v) for v in values], [absmax(v, "channel") for v in values]
        stats = env.collect(copy, [*kept, *lengths])
        widths = {}
        for a, share, length in zip(copies, kept, lengths, strict=True):
            keeps, longest = stats[share][: len(WIDTHS)].tolist(), int(stats[length][-1])
            widths[a.name] = widest(keeps, self.mass, longest) or 0
        return widths


def _width_of(mask: str) -> int | None:
    """The window in the name of a mask: `causal window 8`, `window 3` (to each side) and `padding` behind them."""
    parts = re.match(r"(causal )?window (\d+)", mask)
    return None if parts is None else int(parts[2]) + (parts[1] is None)
