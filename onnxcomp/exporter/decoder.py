"""Export of a decoder with its key-value caches: one graph for the prompt and for every token after it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from onnxcomp.errors import ExportError
from onnxcomp.exporter.work import Axes, Work, array_of, difference

__all__ = ["Decoder"]

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"  # as optimum calls them, and its readers
TOTAL = f"{PAST} + {NEW}"
KEEP = "logits_to_keep"  # what models of transformers call the number of last tokens to give logits of
LONGEST = 12  # tokens that are compared with PyTorch


@dataclass(frozen=True)
class Port:
    """The cache of one layer, keys or values: its heads, the width of each, and its name behind past and present."""

    name: str
    heads: int
    width: int


@dataclass
class Decoder(Work):
    """A causal language model that takes and gives the keys and values of each layer, by the names that optimum uses.

    `past_key_values.N.key` and `.value` are `[batch, heads, past, width]`, `present.N.*` the same with the new tokens.
    """

    ports: tuple[Port, ...] = field(default=())
    last: bool = False  # logits of the last token only, [batch, 1, words]
    past: ClassVar[bool] = True

    @classmethod
    def of(
        cls, model: Any, task: str, dtype: str, opset: int, static: dict[str, int], *, last: bool = False
    ) -> Decoder:
        """The work of a model whose layers all cache keys and values; raises `ExportError` for another cache."""
        if "sequence" in static:
            raise ExportError(
                "a fixed 'sequence' does not go with caches: the prompt and later tokens have other lengths; "
                "use --no-past for a graph that reads whole sequences"
            )
        takes = inspect.signature(model.forward).parameters
        if last and KEEP not in takes:
            kind = type(model).__name__
            raise ExportError(f"{kind} has no '{KEEP}' for --last-logits; compress has a pass, last-logits, instead")
        text = tuple(n for n in ("input_ids", "attention_mask", "position_ids") if n in takes)
        model.config.use_cache = True
        ports = _ports(model)
        inputs = (*text, *(f"past_key_values.{p.name}" for p in ports))
        return cls(model, task, dtype, opset, static, inputs, ports=ports, last=last)

    @property
    def text(self) -> tuple[str, ...]:
        """The inputs that are no caches."""
        return self.inputs[: len(self.inputs) - len(self.ports)]

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logits", *(f"present.{p.name}" for p in self.ports))

    def axes(self) -> dict[str, Axes]:
        """Names of the open axes of each input."""
        batch = None if "batch" in self.static else BATCH
        text = {n: (batch, TOTAL if n == "attention_mask" else NEW) for n in self.text}
        return text | {f"past_key_values.{p.name}": (batch, None, PAST, None) for p in self.ports}

    def output_axes(self) -> dict[str, Axes]:
        """Names of the open axes of each output."""
        batch = None if "batch" in self.static else BATCH
        return {"logits": (batch, 1 if self.last else NEW, None)} | {
            f"present.{p.name}": (batch, None, TOTAL, None) for p in self.ports
        }

    def sample(self) -> dict[str, Any]:
        """Three tokens behind five, the second row padded: no size is that of another axis."""
        import torch

        batch, rng = self.static.get("batch", 2), np.random.default_rng(0)
        feeds = self.fed(*self.prompt(rng, batch, 8), 5)
        for p in self.ports:
            states = rng.standard_normal((batch, p.heads, 5, p.width)).astype(np.float32)
            feeds[f"past_key_values.{p.name}"] = torch.from_numpy(states).to(self.model.dtype)
        return feeds

    def prompt(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Any, Any]:
        """Random tokens and their mask `[batch, length]`; every second row begins with padding."""
        ids = self.tokens(rng, batch, length)
        mask = np.ones_like(ids)
        mask[1::2, : max(length // 3, 1)] = 0
        ids[mask == 0] = self.padding
        return ids, mask

    def fed(self, ids: Any, mask: Any, past: int) -> dict[str, Any]:
        """The inputs for the tokens after the first `past`, but for the caches."""
        import torch

        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        arrays = {"input_ids": ids[:, past:], "attention_mask": mask, "position_ids": positions[:, past:]}
        return {n: torch.from_numpy(arrays[n]) for n in self.text}

    def module(self) -> Any:
        """A PyTorch module from inputs and caches to logits and longer caches."""
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer

        work = self

        class Cached(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = work.model

            def forward(self, *args: Any) -> tuple[Any, ...]:
                states = iter(args[len(work.text) :])
                cache = DynamicCache()
                for keys, values in zip(states, states, strict=True):
                    layer = DynamicLayer()
                    layer.lazy_initialization(keys, values)
                    layer.keys, layer.values = keys, values
                    cache.layers.append(layer)
                named = dict(zip(work.text, args, strict=False))
                out = self.model(**named, **({KEEP: 1} if work.last else {}), past_key_values=cache, use_cache=True)
                return (out.logits, *(t for x in out.past_key_values.layers for t in (x.keys, x.values)))

        return Cached().eval()

    def differences(self, session: Any) -> list[dict[str, Any]]:
        """Largest differences to PyTorch on whole sequences: a prompt with empty caches, one token, then several."""
        positions = getattr(self.config, "max_position_embeddings", None) or LONGEST
        length, found = min(LONGEST, positions), []
        cuts = sorted({0, length // 2, length // 2 + 1, length})
        for seed, batch in enumerate([self.static["batch"]] if "batch" in self.static else [1, 3], 1):
            ids, mask = self.prompt(np.random.default_rng(seed), batch, length)
            theirs = self.reference(self.fed(ids, mask, 0), use_cache=False)["logits"]
            caches = {f"past_key_values.{p.name}": self._empty(p, batch) for p in self.ports}
            for start, end in pairwise(cuts):
                feeds = {k: array_of(v) for k, v in self.fed(ids[:, :end], mask[:, :end], start).items()} | caches
                ours = session.run({k: v for k, v in feeds.items() if k in self.inputs})
                here = slice(end - 1 if self.last else start, end)
                worst = difference(self.dtype, "logits", theirs[:, here], ours["logits"], mask[:, here])
                found.append(worst | {"inputs": {"input_ids": [batch, end - start]}, "past": start})
                caches = {f"past_key_values.{p.name}": ours[f"present.{p.name}"] for p in self.ports}
        return found

    def _empty(self, p: Port, batch: int) -> Any:
        import torch

        return array_of(torch.zeros((batch, p.heads, 0, p.width), dtype=self.model.dtype))


def _ports(model: Any) -> tuple[Port, ...]:
    """Keys and values of each layer, as a run on two tokens leaves them."""
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    kind = type(model).__name__
    why = "use --no-past for a graph that reads whole sequences"
    try:
        with torch.no_grad():
            out = model(
                input_ids=torch.zeros((1, 2), dtype=torch.int64), past_key_values=DynamicCache(), use_cache=True
            )
        layers = out.past_key_values.layers
    except Exception as e:  # models of other caches raise anything
        raise ExportError(
            f"{kind} does not run with a cache of keys and values alone ({type(e).__name__}); {why}"
        ) from e
    for layer in layers:
        if not isinstance(layer, DynamicLayer) or getattr(layer, "keys", None) is None or layer.keys.ndim != 4:
            raise ExportError(f"{kind} caches other things than keys and values ({type(layer).__name__}); {why}")
    pairs = [(f"{i}.{n}", t) for i, x in enumerate(layers) for n, t in (("key", x.keys), ("value", x.values))]
    if not pairs:
        raise ExportError(f"{kind} caches nothing; {why}")
    return tuple(Port(name, t.shape[1], t.shape[3]) for name, t in pairs)
