"""Function-identical checkpoints with LLM-like activation outliers: a few channels `factor` times the median channel.

A channel of a tensor that is written by one module (a norm's gain and bias, a linear's output row) and read only by
linears may be scaled by s in the writer and by 1/s in the matching input columns of every reader. With s a power of two
the outputs agree to the rounding of sums, mostly to the bit. Where that is legal:

* Llama: both norms of a layer, and the product before `down_proj`, which is linear in `up_proj` (the final norm too,
  unless its reader is tied to the embedding)
* pre-norm ViT: both norms of a layer and the final one (GELU is not homogeneous, so nothing inside the MLP)
* BERT: its post-norms also feed the residual, so only the attention values, which `softmax(QK) V` reads linearly
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Site:
    """A tensor whose channels may be scaled: the module that writes it, and the linears that read it."""

    kind: str  # norm | product | value
    writer: nn.Module
    readers: tuple[nn.Linear, ...]
    repeat: int = 1  # grouped KV heads: query heads that read one value head
    head: int = 0  # with `repeat`, channels per head

    def columns(self, channel: int) -> list[int]:
        """The reader's input columns that see a channel of the writer."""
        if self.repeat == 1:
            return [channel]
        head, at = divmod(channel, self.head)
        return [(head * self.repeat + i) * self.head + at for i in range(self.repeat)]

    def scale(self, channel: int, by: float) -> None:
        """Scale a channel up in the writer, and down in every reader."""
        import torch

        with torch.no_grad():
            self.writer.weight[channel] *= by
            if getattr(self.writer, "bias", None) is not None:
                self.writer.bias[channel] *= by
            for reader in self.readers:
                reader.weight[:, self.columns(channel)] /= by


def llama_sites(model: PreTrainedModel) -> list[Site]:
    """Both norms and the gated product of every layer; the final norm if the head has weights of its own."""
    sites = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        sites.append(Site("norm", layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)))
        sites.append(Site("norm", layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
        sites.append(Site("product", mlp.up_proj, (mlp.down_proj,)))
    if not model.config.tie_word_embeddings:
        sites.append(Site("norm", model.model.norm, (model.lm_head,)))
    return sites


def vit_sites(model: PreTrainedModel) -> list[Site]:
    """Both norms of every layer, and the final one before the classifier."""
    sites = []
    for layer in model.vit.layers:
        attention = layer.attention
        sites.append(Site("norm", layer.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)))
        sites.append(Site("norm", layer.layernorm_after, (layer.mlp.fc1,)))
    return [*sites, Site("norm", model.vit.layernorm, (model.classifier,))]


def bert_sites(model: PreTrainedModel) -> list[Site]:
    """The attention values of every layer."""
    layers = getattr(model, "bert", model).encoder.layer
    return [Site("value", layer.attention.self.value, (layer.attention.output.dense,)) for layer in layers]


SITES: dict[str, Callable[[PreTrainedModel], list[Site]]] = {"llama": llama_sites, "vit": vit_sites, "bert": bert_sites}


def load(folder: Path) -> PreTrainedModel:
    """The checkpoint as the class its config names, in evaluation mode."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def probe(model: PreTrainedModel, sites: list[Site], seed: int = 0) -> list[np.ndarray]:
    """Largest absolute value per channel of every site's tensor on random inputs: one [channels] array per site."""
    import torch

    peaks: list[np.ndarray] = [np.zeros(0)] * len(sites)

    def watch(at: int) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            peaks[at] = inputs[0].detach().flatten(0, -2).abs().amax(0).numpy()

        return hook

    hooks = [site.readers[0].register_forward_pre_hook(watch(i)) for i, site in enumerate(sites)]
    generator, config = torch.Generator().manual_seed(seed), model.config
    with torch.no_grad():
        if config.model_type == "vit":
            model(
                pixel_values=torch.randn(
                    64, config.num_channels, config.image_size, config.image_size, generator=generator
                )
            )
        else:
            model(input_ids=torch.randint(config.vocab_size, (8, 64), generator=generator))
    for hook in hooks:
        hook.remove()
    return peaks


def ratios(peaks: list[np.ndarray]) -> np.ndarray:
    """Largest channel over the median channel, per site."""
    return np.array([peak.max() / np.median(peak) for peak in peaks])


def plant(
    checkpoint_dir: str | Path, out_dir: str | Path, channels: int = 4, factor: float = 40, seed: int = 0
) -> Path:
    """Write a copy with the same outputs, whose sites have `channels` channels of about `factor` times the median.

    Norm sites get the same channels in every layer, as LLMs do; each scale is the power of two nearest to `factor`.
    """
    source, out = Path(checkpoint_dir), Path(out_dir)
    model, rng = load(source), np.random.default_rng(seed)
    if model.config.model_type not in SITES:
        raise ValueError(f"no legal places known for model type {model.config.model_type!r}; known: {sorted(SITES)}")
    sites = SITES[model.config.model_type](model)
    residual = rng.choice(model.config.hidden_size, channels, replace=False)
    for site, peak in zip(sites, probe(model, sites, seed), strict=True):
        width = site.writer.weight.shape[0]
        chosen = residual if site.kind == "norm" else rng.choice(width, channels, replace=False)
        for channel in chosen.tolist():
            now = max(float(peak[column]) for column in site.columns(channel))
            exponent = np.rint(np.log2(factor * np.median(peak) / max(now, 1e-6)))
            site.scale(channel, float(2.0 ** np.clip(exponent, 0, 10)))
    model.save_pretrained(out)
    _copy_rest(source, out)
    return out


def _copy_rest(source: Path, out: Path) -> None:
    """Copy tokenizer and processor files beside the weights."""
    for path in source.glob("*.json"):
        if not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
