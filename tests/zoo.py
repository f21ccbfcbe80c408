"""Tiny random transformers of every architecture, and the ways to spell each as ONNX; needs the `export` extra."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(os.environ.get("ONNXCOMP_ZOO", Path(__file__).resolve().parents[1] / "models" / "cache" / "zoo"))
GRAPHS = Path(__file__).resolve().parent / "graphs"  # the diagonal of the matrix, for tests without torch
H, LAYERS, HEADS, FF, VOCAB, SPAN = 16, 2, 4, 24, 40, 40
FORMAT = 1  # of the cached graphs; raise it when this file exports them otherwise
BASE = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FF}
TEXT = {**BASE, "vocab_size": VOCAB, "max_position_embeddings": SPAN}
ROBERTA = {**TEXT, "max_position_embeddings": SPAN + 2, "pad_token_id": 1}
GROUPED = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
WIDE = {**GROUPED, "head_dim": 4}
IMAGE = {**BASE, "image_size": 8, "patch_size": 4, "num_channels": 1}
EOS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PAIR = {"d_model": H, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS}
PAIR |= {"decoder_attention_heads": HEADS, "encoder_ffn_dim": FF, "decoder_ffn_dim": FF, "use_cache": False}
PAIR |= {"vocab_size": VOCAB, "decoder_start_token_id": 1, **EOS}


@dataclass(frozen=True)
class Architecture:
    """A tiny model: its class and configuration, what it is fed, and the anatomy that recognition must find."""

    name: str
    model: str
    config: str
    options: dict[str, Any]
    inputs: tuple[str, ...]
    output: str
    attentions: int
    mlps: int
    norms: int
    causal: bool = False
    window: int = 0  # narrowest layer: keys a causal query sees, itself included; else keys to each side; 0 = all
    constant_norms: int = 0  # norms among them that read parameters alone: a tool may compute them beforehand
    square: bool = False  # padding hides queries as well as keys, so that padded rows see no key
    revision: int = FORMAT  # of this model's graphs; raise it when they are built otherwise
    past: int = 0  # heads of the key-value cache it takes and gives; 0 = none
    routes: tuple[str, ...] = ("dynamo", "legacy", "transformers")
    moes: int = 0  # feed-forward parts of experts
    experts: str = ""  # how transformers computes experts: batched_mm, or looped (one product per expert)
    layers: int = LAYERS
    image: int = 8  # height and width of its images
    only: tuple[str, ...] = ()  # its spellings, where not all are made

    @functools.cached_property
    def key(self) -> str:
        """Changes with whatever an export depends on, so that no stale graph is judged."""
        packages = ("torch", "transformers", "onnxscript", "onnx")
        versions = [importlib.metadata.version(p) for p in packages]
        parts = (
            self.model,
            self.config,
            sorted(self.options.items()),
            self.inputs,
            self.output,
            versions,
            self.revision,
            *([self.experts] if self.experts else []),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the inputs: keys and values of each layer's cache come last."""
        return (*self.inputs, *(f"past_{i}" for i in range(2 * LAYERS if self.past else 0)))

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return (self.output, *(f"present_{i}" for i in range(2 * LAYERS if self.past else 0)))

    @property
    def spellings(self) -> dict[str, Spelling]:
        """The ways to write it, by name."""
        return {n: s for n, s in SPELLINGS.items() if s.route in self.routes and (not self.only or n in self.only)}

    def build(self, attention: str = "sdpa") -> Any:
        """The PyTorch module with distinct random weights, the same at every call."""
        import torch
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        module, _, name = self.model.rpartition(".")
        home = importlib.import_module(f"transformers.{module}") if module else transformers
        more = {"experts_implementation": "batched_mm"} if self.experts else {}
        model = getattr(home, name)._from_config(config, attn_implementation=attention, **more).eval()
        if self.experts == "looped":
            _loop_experts(model)
        for p in model.parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, float(p.float().mean().round()), 0.1)
            elif p.ndim == 2:
                torch.nn.init.normal_(p, 0.0, p.shape[1] ** -0.5)
            elif p.min() == p.max():  # tables that start at zero: tools drop what adds nothing
                torch.nn.init.normal_(p, 0.0, 0.1)
        return model


def _loop_experts(model: Any) -> None:
    """Compute experts one after another, each on the tokens that chose it, as implementations before batching do."""
    import torch
    from torch.nn import functional

    def forward(self: Any, x: Any, index: Any, weights: Any) -> Any:
        out, hit = torch.zeros_like(x), functional.one_hot(index, self.num_experts).permute(2, 1, 0)
        for i in range(self.num_experts):
            slot, token = torch.where(hit[i])
            gate, up = functional.linear(x[token], self.gate_up_proj[i]).chunk(2, dim=-1)
            y = functional.linear(self.act_fn(gate) * up, self.down_proj[i]) * weights[token, slot, None]
            out = out.index_add(0, token, y)
        return out

    for module in model.modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            module.forward = functools.partial(forward, module)


def _text(name: str, model: str, config: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    language = "CausalLM" in model or "LMHead" in model
    output = "logits" if language else "last_hidden_state"
    inputs = ("input_ids", "attention_mask")
    counts = {"attentions": LAYERS, "mlps": LAYERS, "causal": language, **more}
    return Architecture(name, model, config, options, inputs, output, norms=norms, **counts)


def _image(name: str, model: str, config: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    counts = {"attentions": LAYERS, "mlps": LAYERS, "output": "last_hidden_state", **more}
    return Architecture(name, model, config, options, ("pixel_values",), norms=norms, **counts)


def _pair(
    name: str, model: str, config: str, options: dict[str, Any], norms: int, first: str, **more: Any
) -> Architecture:
    inputs = (first, "attention_mask", "decoder_input_ids") if first == "input_ids" else (first, "decoder_input_ids")
    counts = {"attentions": 3 * LAYERS, "mlps": 2 * LAYERS, "norms": norms, **more}
    return Architecture(name, model, config, options, inputs, "last_hidden_state", causal=True, **counts)


GPT2 = {"vocab_size": VOCAB, "n_embd": H, "n_layer": LAYERS, "n_head": HEADS, "n_positions": SPAN, "use_cache": False}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 8, "type_vocab_size": 0}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "image_size": 8, "patch_size": 1}
T5 = {"vocab_size": VOCAB, "d_model": H, "d_kv": 4, "d_ff": FF, "num_layers": LAYERS, "num_heads": HEADS}
T5 |= {"use_cache": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
GEMMA = {**WIDE, "sliding_window": 4, "query_pre_attn_scalar": 8}
WAV = {**BASE, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
WAV |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": VOCAB}
WHISPER = {**PAIR, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": SPAN}
SPAN_PAIR = {**PAIR, "max_position_embeddings": SPAN}
WHISPER_CODE = "models.whisper.modeling_whisper"
CACHING = ("dynamo", "legacy")  # transformers' exporter has an interface of its own for caches
CLIP_TEXT = {**TEXT, **EOS, "projection_dim": H}

ALL = (
    _text("bert", "BertModel", "BertConfig", TEXT, 5),
    _image("vit", "ViTModel", "ViTConfig", IMAGE, 5),
    _text("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED, 5),
    _text("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, 5),
    _pair("t5", "T5Model", "T5Config", T5, 12, "input_ids"),
    _text("clip-text", "CLIPTextModel", "CLIPTextConfig", CLIP_TEXT, 5, causal=True),
    _image("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", IMAGE, 6, output="pooler_output"),
    _pair("whisper", "WhisperModel", "WhisperConfig", WHISPER, 12, "input_features"),
    _text("roberta", "RobertaModel", "RobertaConfig", ROBERTA, 5),
    _text(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": H, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FF},
        5,
    ),
    _text("albert", "AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 8}, 5),
    _text("electra", "ElectraModel", "ElectraConfig", {**TEXT, "embedding_size": 8}, 5),
    _text("deberta-v2", "DebertaV2Model", "DebertaV2Config", DEBERTA, 6, constant_norms=1, square=True),
    _text("mpnet", "MPNetModel", "MPNetConfig", ROBERTA, 5),
    _text(
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        {**TEXT, **EOS, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        5,
        window=2,
    ),
    _image("deit", "DeiTModel", "DeiTConfig", IMAGE, 5, revision=2),
    _image("swin", "SwinModel", "SwinConfig", {**SWIN, "num_channels": 1}, 11, attentions=4, mlps=4),
    _image(
        "beit",
        "BeitModel",
        "BeitConfig",
        {**IMAGE, "use_relative_position_bias": True},
        5,
        output="pooler_output",
        revision=2,
    ),
    _image("dinov2", "Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, 5),
    _image(
        "siglip-vision",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        IMAGE,
        6,
        attentions=3,
        mlps=3,
        output="pooler_output",
    ),
    _text("siglip-text", "SiglipTextModel", "SiglipTextConfig", {**TEXT, **EOS}, 5),
    _text("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, "rotary_pct": 0.5, "use_cache": False}, 5),
    _text(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": FF, "word_embed_proj_dim": H, "use_cache": False, **EOS},
        5,
    ),
    _text(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": H, "n_layer": LAYERS, "n_head": HEADS, "use_cache": False},
        6,
    ),
    _text("mistral", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}, 5, window=4),
    _text("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, 5),
    _text("qwen3", "Qwen3ForCausalLM", "Qwen3Config", WIDE, 9),
    _text("gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, **EOS}, 9, window=4),
    _text("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**GEMMA, **EOS}, 13, window=4),
    _text("phi3", "Phi3ForCausalLM", "Phi3Config", {**GROUPED, **EOS, "original_max_position_embeddings": SPAN}, 5),
    _text(
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        | {"multi_query": True, "parallel_attn": True, "bias": False, "use_cache": False, "ffn_hidden_size": FF},
        3,
    ),
    _pair("bart", "BartModel", "BartConfig", SPAN_PAIR, 12, "input_ids"),
    _pair("marian", "MarianModel", "MarianConfig", SPAN_PAIR, 10, "input_ids"),
    Architecture(
        "wav2vec2",
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        WAV,
        ("input_values",),
        "last_hidden_state",
        attentions=LAYERS,
        mlps=LAYERS,
        norms=6,
    ),
    Architecture(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": CLIP_TEXT, "vision_config": IMAGE, "projection_dim": H},
        ("input_ids", "attention_mask", "pixel_values"),
        "logits_per_text",
        attentions=2 * LAYERS,
        mlps=2 * LAYERS,
        norms=11,
        causal=True,
    ),
    _pair("t5-gated", "T5Model", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, 12, "input_ids"),
    Architecture(
        "whisper-encoder",
        f"{WHISPER_CODE}.WhisperEncoder",
        "WhisperConfig",
        WHISPER,
        ("input_features",),
        "last_hidden_state",
        attentions=LAYERS,
        mlps=LAYERS,
        norms=5,
    ),
    Architecture(
        "whisper-decoder",
        f"{WHISPER_CODE}.WhisperDecoder",
        "WhisperConfig",
        WHISPER,
        ("input_ids", "encoder_hidden_states"),
        "last_hidden_state",
        attentions=2 * LAYERS,
        mlps=LAYERS,
        norms=7,
        causal=True,
    ),
    _text("llama-cache", "LlamaForCausalLM", "LlamaConfig", {**GROUPED, "use_cache": True}, 5, past=2, routes=CACHING),
    _text("gpt2-cache", "GPT2LMHeadModel", "GPT2Config", {**GPT2, "use_cache": True}, 5, past=HEADS, routes=CACHING),
)
BY_NAME = {a.name: a for a in ALL}


@dataclass(frozen=True)
class Spelling:
    """One way to write a model as ONNX: exporter, attention implementation, opset, element type, and what ran after."""

    route: str  # dynamo | legacy | transformers
    attention: str
    opset: int
    dtype: str = "fp32"
    after: str = ""  # "" | ort-fusions (transformers') | onnxsim | onnxslim | ort-optimizer | ort-session

    def __str__(self) -> str:
        parts = [self.route, self.attention, str(self.opset)]
        return "-".join(
            [*parts, *([self.dtype] if self.dtype != "fp32" else []), *([self.after] if self.after else [])]
        )


PLAIN = (
    *(Spelling("dynamo", attention, opset) for opset in range(17, 24) for attention in ("sdpa", "eager")),
    *(Spelling("legacy", attention, opset) for opset in range(13, 18) for attention in ("sdpa", "eager")),
    *(Spelling("transformers", attention, opset) for opset in (18, 20, 23) for attention in ("sdpa", "eager")),
)
CHANGED = (
    Spelling("transformers", "sdpa", 20, after="ort-fusions"),
    Spelling("dynamo", "sdpa", 18, after="onnxsim"),
    Spelling("legacy", "eager", 17, after="onnxsim"),
    Spelling("dynamo", "sdpa", 18, after="onnxslim"),
    Spelling("legacy", "eager", 17, after="ort-optimizer"),
    Spelling("dynamo", "sdpa", 18, after="ort-optimizer"),
    Spelling("dynamo", "sdpa", 18, after="ort-session"),
    Spelling("legacy", "eager", 17, after="ort-session"),
    Spelling("dynamo", "sdpa", 18, "fp16"),
    Spelling("dynamo", "eager", 18, "fp16"),
    Spelling("transformers", "sdpa", 20, "bf16"),
    Spelling("legacy", "eager", 17, "fp16"),
)
SPELLINGS = {str(s): s for s in (*PLAIN, *CHANGED)}
GROUPS: dict[str, Callable[[Spelling], bool]] = {
    "dynamo 17-23": lambda s: s in PLAIN and s.route == "dynamo",
    "legacy 13-17": lambda s: s in PLAIN and s.route == "legacy",
    "transformers 18-23": lambda s: s in PLAIN and s.route == "transformers",
    "fused, simplified": lambda s: bool(s.after),
    "fp16, bf16": lambda s: s.dtype != "fp32",
}


def feeds(a: Architecture, batch: int, length: int, padding: str = "none", dtype: str = "fp32") -> dict[str, Any]:
    """NumPy inputs; `padding` is none, left or right and shortens odd rows by a third."""
    rng = np.random.default_rng(length)
    old = length // 2 if a.past else 0  # tokens in the cache
    mask = np.ones((batch, old + length), np.int64)
    gap = length // 3
    if padding != "none":
        mask[1::2, slice(0, gap) if padding == "left" else slice(old + length - gap, None)] = 0
    floats = np.float16 if dtype == "fp16" else np.float32
    made = {
        "input_ids": rng.integers(3, VOCAB, (batch, length)),
        "attention_mask": mask,
        "decoder_input_ids": rng.integers(3, VOCAB, (batch, length // 2 + 1)),
        "pixel_values": rng.standard_normal((batch, 1, a.image, a.image)).astype(floats),
        "input_features": rng.standard_normal((batch, 8, 20)).astype(floats),
        "input_values": rng.standard_normal((batch, 16 * length + 40)).astype(floats),
        "encoder_hidden_states": rng.standard_normal((batch, length + 2, H)).astype(floats),
    }
    for name in a.taken[len(a.inputs) :]:
        made[name] = rng.standard_normal((batch, a.past, old, H // HEADS)).astype(floats)
    return {name: made[name] for name in a.taken}


def path_of(a: Architecture, s: Spelling, cache: Path = CACHE) -> Path:
    """Where the graph is kept; beside it, `.txt` holds the exporter's error where there is none."""
    return cache / a.name / a.key / f"{s}.onnx"


def export(a: Architecture, s: Spelling, cache: Path = CACHE) -> Path | None:
    """The cached graph, made when missing; None when the exporter cannot (the reason is in the `.txt` file)."""
    path = path_of(a, s, cache)
    why = path.with_suffix(".txt")
    if path.exists():
        return path
    if why.exists():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with _quiet():
            if s.after and s.after != "ort-fusions":
                source = export(a, Spelling(s.route, s.attention, s.opset, s.dtype), cache)
                if source is None:
                    raise RuntimeError("the graph it starts from cannot be exported")
                AFTER[s.after](a, source, part)
            else:
                ROUTES[s.route](a, s, part)
    except Exception as e:  # noqa: BLE001  exporters raise anything; the reason is kept
        why.write_text(f"{type(e).__name__}: {e}"[:2000])
        part.unlink(missing_ok=True)
        return None
    part.rename(path)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing from the exporters, not even what their C++ parts print."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(fd) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in (1, 2):
            os.dup2(nowhere, fd)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, was in zip((1, 2), kept, strict=True):
            os.dup2(was, fd)
            os.close(was)
        os.close(nowhere)
        logging.disable(level)


def _model(a: Architecture, s: Spelling) -> Any:
    import torch

    return a.build(s.attention).to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[s.dtype])


def _example(a: Architecture, s: Spelling) -> dict[str, Any]:
    import torch

    tensors = {k: torch.from_numpy(v) for k, v in feeds(a, 2, 9, "left").items()}
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return {k: v.to(types[s.dtype]) if v.is_floating_point() else v for k, v in tensors.items()}


def _axes(a: Architecture, name: str) -> dict[int, str]:
    if name in ("pixel_values", "input_features"):
        return {0: "batch"}
    if name.startswith(("past_", "present_")):
        return {0: "batch", 2: name.partition("_")[0]}
    seconds = {"decoder_input_ids": "target", "input_values": "samples", "encoder_hidden_states": "source"}
    if a.past:
        seconds["attention_mask"] = "present"
    return {0: "batch", 1: seconds.get(name, "sequence")}


def _wrapped(a: Architecture, s: Spelling) -> Any:
    import torch

    class OneOutput(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(a.inputs, args, strict=True)))[a.output]

    class Cached(torch.nn.Module):
        """The model with its cache as plain tensors: keys and values of each layer in, the longer ones out."""

        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            from transformers.cache_utils import DynamicCache

            held, past = DynamicCache(config=self.model.config), args[len(a.inputs) :]
            for i in range(LAYERS):
                held.update(past[2 * i], past[2 * i + 1], i)
            named = dict(zip(a.inputs, args[: len(a.inputs)], strict=True))
            out = self.model(**named, past_key_values=held, use_cache=True)
            return (out[a.output], *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))

    return (Cached if a.past else OneOutput)(_model(a, s)).eval()


def _dynamo(a: Architecture, s: Spelling, out: Path) -> None:
    import torch

    names = {"batch": torch.export.Dim.DYNAMIC}
    shapes = (tuple({i: names.get(n, torch.export.Dim.DYNAMIC) for i, n in _axes(a, x).items()} for x in a.taken),)
    args = tuple(_example(a, s).values())
    options = {"input_names": list(a.taken), "output_names": list(a.given), "dynamic_shapes": shapes, "verbose": False}
    program = torch.onnx.export(_wrapped(a, s), args, dynamo=True, opset_version=s.opset, **options)
    if program.model.opset_imports[""] != s.opset:
        raise RuntimeError(f"asked for opset {s.opset}, the exporter wrote {program.model.opset_imports['']}")
    _save(program.model, out)


def _legacy(a: Architecture, s: Spelling, out: Path) -> None:
    import onnx_ir as ir
    import torch

    axes = {x: _axes(a, x) for x in (*a.taken, *a.given[1:])} | {a.output: {0: "batch"}}
    named = {"input_names": list(a.taken), "output_names": list(a.given), "dynamic_axes": axes}
    args = tuple(_example(a, s).values())
    torch.onnx.export(_wrapped(a, s), args, str(out), dynamo=False, opset_version=s.opset, **named)
    _save(ir.load(out), out)


def _transformers(a: Architecture, s: Spelling, out: Path) -> None:
    import onnx_ir as ir
    import torch
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    shapes = {x: dict.fromkeys(_axes(a, x), torch.export.Dim.DYNAMIC) for x in a.inputs}
    fusions = {"ort_fusions": "cpu"} if s.after == "ort-fusions" else {}
    settings = OnnxConfig(opset_version=s.opset, dynamic_shapes=shapes, **fusions)
    program = OnnxExporter().export(_model(a, s), _example(a, s), settings).program
    ir.external_data.load_to_model(program)
    program.graph.outputs[:] = [v for v in program.graph.outputs if v.name == a.output]  # one model, one interface
    RemoveUnusedNodesPass()(program)
    _save(program, out)


ROUTES: dict[str, Callable[[Architecture, Spelling, Path], None]] = {
    "dynamo": _dynamo,
    "legacy": _legacy,
    "transformers": _transformers,
}


def _onnxsim(_: Architecture, source: Path, out: Path) -> None:
    import onnx
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(simplified, out)


def _onnxslim(_: Architecture, source: Path, out: Path) -> None:
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)


# What ONNX Runtime's offline optimizer calls the family; BERT's fusions for all it does not name.
FAMILIES = {
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2", "gemma2", "gemma3", "falcon", "opt", "bloom"), "gpt2"),
    **dict.fromkeys(("bart", "marian", "whisper"), "bart"),
    **dict.fromkeys(("clip-text", "clip-vision", "siglip-text", "siglip-vision"), "clip"),
    **dict.fromkeys(("vit", "deit", "beit", "dinov2"), "vit"),
    **{"gpt-neox": "gpt_neox", "phi3": "phi", "qwen3": "qwen3", "swin": "swin", "t5": "t5"},
}


def _ort_optimizer(a: Architecture, source: Path, out: Path) -> None:
    """ONNX Runtime's offline optimizer, told the family, heads and width as its documentation asks."""
    from onnxruntime.transformers import optimizer  # noqa: TID251  the tool whose output is tested

    sizes = (0, 0) if a.name == "swin" else (HEADS, H)
    model = optimizer.optimize_model(str(source), FAMILIES.get(a.name, "bert"), *sizes, opt_level=0)
    model.save_model_to_file(str(out))


def _ort_session(_: Architecture, source: Path, out: Path) -> None:
    """The graph as a session writes it after its extended (portable) optimizations."""
    import onnxruntime as ort  # noqa: TID251  the tool whose output is tested

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


AFTER: dict[str, Callable[[Architecture, Path, Path], None]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "ort-optimizer": _ort_optimizer,
    "ort-session": _ort_session,
}


def _save(model: Any, path: Path) -> None:
    """Write the graph without the exporter's stack traces and paths."""
    import onnx_ir as ir

    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for v in node.outputs:
            v.metadata_props.clear()
    for v in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        v.metadata_props.clear()
        v.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    ir.save(model, path)


# ---- the diagonal kept for tests -------------------------------------------------------------------------------------

# Graphs in the repository: every architecture, every spelling, and several spellings of a few models.
DIAGONAL: dict[str, str] = {
    "bert": "dynamo-sdpa-18 dynamo-eager-18 dynamo-sdpa-20 dynamo-eager-20 dynamo-sdpa-23 dynamo-eager-23 "
    "legacy-sdpa-14 transformers-sdpa-18 legacy-eager-17-ort-optimizer",
    "llama": "dynamo-sdpa-18 dynamo-eager-18 dynamo-sdpa-23 legacy-sdpa-14 transformers-sdpa-18",
    "gpt2": "dynamo-sdpa-18 legacy-sdpa-14",
    "qwen3": "dynamo-sdpa-18",
    "vit": "dynamo-sdpa-18 dynamo-sdpa-23 transformers-sdpa-18",
    "t5": "dynamo-eager-19",
    "clip-text": "legacy-sdpa-15",
    "clip-vision": "dynamo-sdpa-18-ort-optimizer",
    "whisper": "dynamo-sdpa-21",
    "roberta": "transformers-sdpa-20-ort-fusions",
    "distilbert": "legacy-sdpa-17",
    "albert": "dynamo-sdpa-18-onnxsim",
    "electra": "legacy-eager-17-onnxsim dynamo-sdpa-18-ort-session",
    "deberta-v2": "dynamo-eager-22",
    "mpnet": "legacy-eager-15",
    "modernbert": "dynamo-sdpa-22 dynamo-sdpa-18-fp16 legacy-eager-17-ort-session",
    "deit": "legacy-eager-17",
    "swin": "dynamo-eager-18",
    "beit": "legacy-eager-14",
    "dinov2": "dynamo-sdpa-18-onnxslim",
    "siglip-vision": "legacy-sdpa-16",
    "siglip-text": "transformers-eager-20",
    "gpt-neox": "transformers-sdpa-20 transformers-sdpa-20-ort-fusions legacy-eager-17-ort-session",
    "opt": "legacy-eager-16",
    "bloom": "dynamo-eager-21",
    "mistral": "dynamo-sdpa-19 legacy-eager-17-fp16",
    "qwen2": "transformers-sdpa-23",
    "gemma2": "transformers-eager-18",
    "gemma3": "dynamo-sdpa-18-fp16 dynamo-eager-18-fp16",
    "phi3": "transformers-sdpa-20-bf16",
    "falcon": "transformers-eager-23",
    "bart": "dynamo-sdpa-17 dynamo-eager-17",
    "marian": "dynamo-eager-17 legacy-eager-14",
    "wav2vec2": "legacy-eager-13",
    "clip": "dynamo-sdpa-20",
    "t5-gated": "legacy-eager-17",
    "whisper-encoder": "dynamo-sdpa-20",
    "whisper-decoder": "dynamo-sdpa-20",
    "llama-cache": "legacy-eager-17 dynamo-sdpa-18",
    "gpt2-cache": "dynamo-sdpa-20",
}


def graph(name: str) -> Path:
    """The file of a kept graph, such as `bert.dynamo-sdpa-18`."""
    return GRAPHS / f"{name}.onnx.gz"


def load_graph(name: str) -> Any:
    """A kept graph as an `onnx_ir.Model`."""
    import onnx
    import onnx_ir as ir

    return ir.from_proto(onnx.load_model_from_string(gzip.decompress(graph(name).read_bytes())))


def kept() -> dict[str, tuple[Architecture, Spelling]]:
    """Names of the kept graphs with what they are."""
    return {f"{a}.{s}": (BY_NAME[a], SPELLINGS[s]) for a, line in DIAGONAL.items() for s in line.split()}


def keep() -> list[Path]:
    """Write the diagonal anew, exporting what is missing; returns the files.

    Raises `ValueError` for a cell that the exporter cannot make.
    """
    GRAPHS.mkdir(exist_ok=True)
    for old in GRAPHS.glob("*.onnx*"):
        old.unlink()
    for name, (a, s) in kept().items():
        made = export(a, s)
        if made is None:
            raise ValueError(f"{name}: {path_of(a, s).with_suffix('.txt').read_text()[:300]}")
        graph(name).write_bytes(gzip.compress(made.read_bytes(), mtime=0))
    return [graph(name) for name in kept()]
