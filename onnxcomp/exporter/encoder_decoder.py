"""Export of encoder-decoders: the encoder with the cross caches it fills, and the decoder that goes on from caches."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from onnxcomp.errors import ExportError
from onnxcomp.exporter.decoder import LONGEST, Port
from onnxcomp.exporter.work import Axes, Work, array_of, difference, image_sizes

__all__ = ["CrossDecoder", "Encoder", "two_sides"]

BATCH, SOURCE = "batch_size", "encoder_sequence_length"  # as optimum calls them
NEW, PAST = "decoder_sequence_length", "past_decoder_sequence_length"
TOTAL = f"{PAST} + {NEW}"
TEXT, SOUND, IMAGE = ("input_ids", "attention_mask"), ("input_features",), ("pixel_values",)


@dataclass
class _Side(Work):
    """What both graphs know: the caches of each layer's own and cross attention, and the inputs of the encoder."""

    own: tuple[Port, ...] = field(default=())
    cross: tuple[Port, ...] = field(default=())
    source: tuple[str, ...] = TEXT
    past: ClassVar[bool] = True

    def sources(self, batch: int, length: int, seed: int) -> dict[str, Any]:
        """Random inputs of the encoder as torch tensors; every second text ends with padding."""
        import torch

        rng = np.random.default_rng(seed)
        if self.source != TEXT:
            c = self.config
            sound = self.source == SOUND
            sizes = (c.num_mel_bins, 2 * c.max_source_positions) if sound else image_sizes(c.encoder)
            signal = rng.standard_normal((batch, *sizes)).astype(np.float32)
            return {self.source[0]: torch.from_numpy(signal).to(self.model.dtype)}
        ids = self.tokens(rng, batch, length)
        mask = np.ones_like(ids)
        mask[1::2, length - max(length // 3, 1) :] = 0
        ids[mask == 0] = self.padding
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    def tokens(self, rng: np.random.Generator, batch: int, sequence: int) -> Any:
        """Random tokens `[batch, sequence]` of the decoder without the padding token."""
        text = getattr(self.config, "decoder", None) or self.config
        ids = rng.integers(0, text.vocab_size, (batch, sequence))
        ids[ids == self.padding] = (self.padding + 1) % text.vocab_size
        return ids

    @property
    def padding(self) -> int:
        """The token that fills texts up."""
        pad = self.config.pad_token_id
        return pad if isinstance(pad, int) and pad >= 0 else 0

    @property
    def length(self) -> str | None:
        """The name of the axis of the encoder's states; None where sound or image fix it."""
        return SOURCE if self.source == TEXT else None

    def encoded(self, sources: dict[str, Any]) -> tuple[Any, ...]:
        """The encoder's states and the cross caches, by PyTorch."""
        import torch

        with torch.no_grad():
            return tuple(_encoding(self)(*sources.values()))


@dataclass
class Encoder(_Side):
    """From text or sound to the states of the encoder and what each cross attention of the decoder reads of them."""

    file: ClassVar[str] = "encoder_model.onnx"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("last_hidden_state", *(f"present.{p.name}" for p in self.cross))

    def axes(self) -> dict[str, Axes]:
        """Names of the open axes of each input."""
        return dict.fromkeys(self.inputs, (BATCH, self.length))

    def output_axes(self) -> dict[str, Axes]:
        """Names of the open axes of each output."""
        axes: dict[str, Axes] = {f"present.{p.name}": (BATCH, None, self.length, None) for p in self.cross}
        return axes | {"last_hidden_state": (BATCH, self.length, None)}

    def sample(self) -> dict[str, Any]:
        """Two texts of seven tokens."""
        return self.sources(2, 7, 0)

    def module(self) -> Any:
        """A PyTorch module from the encoder's inputs to its states and the cross caches."""
        return _encoding(self)

    def differences(self, session: Any) -> list[dict[str, Any]]:
        """Largest differences to PyTorch for texts of two lengths, where they are not padding."""
        found = []
        for seed, (batch, length) in enumerate([(1, 5), (3, 9)], 1):
            sources = self.sources(batch, length, seed)
            arrays = {k: array_of(v) for k, v in sources.items()}
            ours, mask = session.run(arrays), arrays.get("attention_mask")
            for name, t in zip(self.outputs, self.encoded(sources), strict=True):
                a, b = t.float().numpy(), ours[name]
                if a.ndim == 4:
                    a, b = a.transpose(0, 2, 1, 3), b.transpose(0, 2, 1, 3)
                sizes = {k: list(v.shape) for k, v in arrays.items()}
                found.append(difference(self.dtype, name, a, b, mask) | {"inputs": sizes})
        return found


@dataclass
class CrossDecoder(_Side):
    """From new tokens and caches to logits and longer caches of its own; the cross caches are the encoder's."""

    file: ClassVar[str] = "decoder_model.onnx"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logits", *(f"present.{p.name}" for p in self.own))

    def axes(self) -> dict[str, Axes]:
        """Names of the open axes of each input."""
        named: dict[str, Axes] = {"input_ids": (BATCH, NEW), "encoder_attention_mask": (BATCH, SOURCE)}
        named |= {f"past_key_values.{p.name}": (BATCH, None, PAST, None) for p in self.own}
        named |= {f"past_key_values.{p.name}": (BATCH, None, self.length, None) for p in self.cross}
        return {name: named[name] for name in self.inputs}

    def output_axes(self) -> dict[str, Axes]:
        """Names of the open axes of each output."""
        return {"logits": (BATCH, NEW, None)} | {f"present.{p.name}": (BATCH, None, TOTAL, None) for p in self.own}

    def sample(self) -> dict[str, Any]:
        """Three tokens behind five, of two texts of seven: no size is that of another axis."""
        import torch

        rng = np.random.default_rng(0)
        states = [rng.standard_normal((2, p.heads, 5, p.width)).astype(np.float32) for p in self.own]
        own = {
            f"past_key_values.{p.name}": torch.from_numpy(a).to(self.model.dtype)
            for p, a in zip(self.own, states, strict=True)
        }
        feeds = self.fed(self.tokens(rng, 2, 3), self.sources(2, 7, 0)) | own
        return {name: feeds[name] for name in self.inputs}

    def fed(self, ids: Any, sources: dict[str, Any]) -> dict[str, Any]:
        """All inputs but the decoder's own caches."""
        import torch

        cross = self.encoded(sources)[1:]
        feeds = {"input_ids": torch.from_numpy(ids), "encoder_attention_mask": sources.get("attention_mask")}
        return feeds | {f"past_key_values.{p.name}": t for p, t in zip(self.cross, cross, strict=True)}

    def module(self) -> Any:
        """A PyTorch module from new tokens and caches to logits and longer caches."""
        import torch

        work = self

        class Cached(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = work.model

            def forward(self, *args: Any) -> tuple[Any, ...]:
                feeds = dict(zip(work.inputs, args, strict=True))
                cache = _empty_cache()
                for side, ports in ((cache.self_attention_cache, work.own), (cache.cross_attention_cache, work.cross)):
                    _fill(side, [feeds[f"past_key_values.{p.name}"] for p in ports])
                cache.is_updated = dict.fromkeys(range(len(work.cross) // 2), True)
                keys = feeds[f"past_key_values.{work.cross[0].name}"]
                unread = torch.zeros((keys.shape[0], keys.shape[2], work.width), dtype=keys.dtype)
                mask = feeds.get("encoder_attention_mask")
                more = {} if mask is None else {"attention_mask": mask}
                out = self.model(
                    encoder_outputs=(unread,), decoder_input_ids=feeds["input_ids"], past_key_values=cache,
                    use_cache=True, **more,
                )  # fmt: skip
                return (out.logits, *(t for x in cache.self_attention_cache.layers for t in (x.keys, x.values)))

        return Cached().eval()

    @property
    def width(self) -> int:
        """Width of the encoder's states, which the decoder reads through the cross caches only."""
        return int((getattr(self.config, "encoder", None) or self.config).hidden_size)

    def differences(self, session: Any) -> list[dict[str, Any]]:
        """Largest differences to PyTorch on whole texts: first tokens with empty caches, one token, then several."""
        found = []
        for seed, batch in enumerate([1, 3], 1):
            sources, ids = self.sources(batch, 9, seed), self.tokens(np.random.default_rng(seed), batch, LONGEST)
            theirs = self.whole(sources, ids)
            steady = {k: array_of(v) for k, v in self.fed(ids, sources).items() if v is not None and k != "input_ids"}
            own = {f"past_key_values.{p.name}": self._empty(p, batch) for p in self.own}
            for start, end in pairwise((0, 4, 5, LONGEST)):
                feeds = {"input_ids": ids[:, start:end]} | steady | own
                ours = session.run({k: v for k, v in feeds.items() if k in self.inputs})
                worst = difference(self.dtype, "logits", theirs[:, start:end], ours["logits"], None)
                found.append(worst | {"inputs": {"input_ids": [batch, end - start]}, "past": start})
                own = {f"past_key_values.{p.name}": ours[f"present.{p.name}"] for p in self.own}
        return found

    def whole(self, sources: dict[str, Any], ids: Any) -> Any:
        """PyTorch's logits of whole sequences, without caches."""
        import torch

        with torch.no_grad():
            out = self.model(**sources, decoder_input_ids=torch.from_numpy(ids), use_cache=False)
        return out.logits.float().numpy()

    def _empty(self, p: Port, batch: int) -> Any:
        import torch

        return array_of(torch.zeros((batch, p.heads, 0, p.width), dtype=self.model.dtype))


def two_sides(model: Any, task: str, dtype: str, opset: int, static: dict[str, int]) -> list[Work]:
    """The works of an encoder-decoder's two graphs; raises `ExportError` where its caches are of another kind."""
    if static:
        raise ExportError(f"the axes of an encoder-decoder stay open: {', '.join(static)} cannot be fixed")
    takes = inspect.signature(model.forward).parameters
    source = next((s for s in (SOUND, IMAGE) if s[0] in takes), TEXT)
    side = _Side(model, task, dtype, opset, {}, source, source=source)
    model.config.use_cache = True
    own, cross = _ports(side)
    common: dict[str, Any] = {"own": own, "cross": cross, "source": source}
    mask = ("encoder_attention_mask",) if source == TEXT else ()
    fed = ("input_ids", *mask, *(f"past_key_values.{p.name}" for p in (*own, *cross)))
    return [
        Encoder(model, task, dtype, opset, {}, source, **common),
        CrossDecoder(model, task, dtype, opset, {}, fed, **common),
    ]


def _encoding(side: _Side) -> Any:
    """A PyTorch module that encodes, and lets the decoder read it once to fill the cross caches."""
    import torch

    class Encoded(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = side.model

        def forward(self, *args: Any) -> tuple[Any, ...]:
            named = dict(zip(side.source, args, strict=True))
            states = self.model.get_encoder()(**named)
            first = torch.zeros((states[0].shape[0], 1), dtype=torch.int64)
            mask = named.get("attention_mask")
            more = {} if mask is None else {"attention_mask": mask}
            cache = _empty_cache()
            self.model(encoder_outputs=states, decoder_input_ids=first, past_key_values=cache, use_cache=True, **more)
            layers = cache.cross_attention_cache.layers
            return (states[0], *(t for x in layers for t in (x.keys, x.values)))

    return Encoded().eval()


def _ports(side: _Side) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    import torch

    cache = _empty_cache()
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.int64)
            side.model(**side.sources(1, 4, 0), decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as e:  # models of other caches raise anything
        raise ExportError(f"{type(side.model).__name__} does not run with caches of keys and values: {e}") from e
    sides = ((cache.self_attention_cache, "decoder"), (cache.cross_attention_cache, "encoder"))
    own, cross = (
        tuple(
            Port(f"{i}.{what}.{n}", t.shape[1], t.shape[3])
            for i, x in enumerate(held.layers)
            for n, t in (("key", x.keys), ("value", x.values))
        )
        for held, what in sides
    )
    return own, cross


def _empty_cache() -> Any:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _fill(cache: Any, states: list[Any]) -> None:
    from transformers.cache_utils import DynamicLayer

    for keys, values in zip(states[::2], states[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
