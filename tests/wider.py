"""Architectures beyond those of `zoo`: what people bring, a few spellings of each; needs the `export` extra."""

from __future__ import annotations

from typing import Any

from tests.zoo import ALL as KNOWN
from tests.zoo import (
    EOS,
    FF,
    GROUPED,
    HEADS,
    IMAGE,
    LAYERS,
    SPAN_PAIR,
    T5,
    TEXT,
    VOCAB,
    WAV,
    WIDE,
    Architecture,
    H,
    _image,
    _pair,
    _text,
)

SPELLINGS = ("dynamo-sdpa-18", "dynamo-eager-20", "legacy-sdpa-14", "legacy-eager-17", "transformers-sdpa-18")


def _language(name: str, family: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    config = more.pop("config", f"{family}Config")
    return _text(name, f"{family}ForCausalLM", config, options, norms, only=SPELLINGS, **more)


def _encoder(name: str, family: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    return _text(name, f"{family}Model", f"{family}Config", options, norms, only=SPELLINGS, **more)


def _vision(name: str, family: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    return _image(name, f"{family}Model", f"{family}Config", options, norms, only=SPELLINGS, **more)


def _audio(name: str, family: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    counts = {"attentions": LAYERS, "mlps": LAYERS, "norms": norms, **more}
    inputs = ("input_values",)
    return Architecture(
        name, f"{family}Model", f"{family}Config", options, inputs, "last_hidden_state", only=SPELLINGS, **counts
    )


def _experts(name: str, family: str, options: dict[str, Any], norms: int, **more: Any) -> Architecture:
    return _language(name, family, options, norms, **{"mlps": 0, "moes": LAYERS, "experts": "batched_mm", **more})


PYRAMID = {"num_channels": 1, "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1]}
PYRAMID |= {"patch_sizes": [3, 3], "strides": [4, 2], "hidden_sizes": [8, 16], "num_attention_heads": [2, 4]}
SEGFORMER = {**PYRAMID, "mlp_ratios": [2, 2]}
PVT = {"num_channels": 1, "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "patch_sizes": [4, 2]}
PVT |= {"strides": [4, 2], "hidden_sizes": [8, 16], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
PVT |= {"sequence_reduction_ratios": [2, 1]}
PVT2 = {"num_channels": 1, "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "patch_sizes": [7, 3]}
PVT2 |= {"strides": [4, 2], "hidden_sizes": [8, 16], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
PVT2 |= {"sr_ratios": [2, 1]}
SHIFTED = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 16, "patch_size": 1}
SHIFTED |= {"num_channels": 1}
LEVIT = {"image_size": 64, "num_channels": 1, "hidden_sizes": [16, 16, 32], "num_attention_heads": [2, 2, 4]}
LEVIT |= {"depths": [1, 1, 1], "key_dim": [4, 4, 4], "patch_size": 16}
FOUR = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFORMER = {**WAV, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3}
MPT = {
    "vocab_size": VOCAB,
    "d_model": H,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "max_seq_len": SPAN_PAIR["max_position_embeddings"],
}
MPT |= {"expansion_ratio": 2, "use_cache": False}

LOCAL_T5 = {**T5, "local_radius": 3}

NEW = (
    _language(
        "qwen3-next",
        "Qwen3Next",
        {**WIDE, "layer_types": ["full_attention"] * 2, "mlp_only_layers": [0, 1], "num_experts": 0},
        9,
    ),
    _language("qwen3.5", "Qwen3_5", {**WIDE, "layer_types": ["full_attention"] * 2}, 9, config="Qwen3_5TextConfig"),
    _language("olmo", "Olmo", {**GROUPED, **EOS, "clip_qkv": 0.5}, 5),
    _experts(
        "dbrx",
        "Dbrx",
        {"d_model": H, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 40, "vocab_size": VOCAB, "use_cache": False}
        | {
            "attn_config": {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": FF, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": H},
        },
        5,
        mlps=8,
    ),
    _vision("dinov3", "DINOv3ViT", {**IMAGE, "num_register_tokens": 2}, 5),
    _vision("levit", "Levit", LEVIT, 0, attentions=5, mlps=5, layers=5, image=64),
    _vision("swinv2", "Swinv2", SHIFTED, 11, attentions=4, mlps=4, layers=4, image=16),
    _vision("swin-shifted", "Swin", SHIFTED, 11, attentions=4, mlps=4, layers=4, image=16),
    _vision(
        "hiera",
        "Hiera",
        {"embed_dim": 8, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3]}
        | {"depths": [1, 1], "num_heads": [1, 2], "embed_dim_multiplier": 2.0, "num_query_pool": 1, "num_channels": 1}
        | {
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
            "mlp_ratio": 2.0,
        },
        4,
        image=32,
    ),
    _vision("segformer", "Segformer", SEGFORMER, 9, image=32),
    _vision("pvt", "Pvt", PVT, 8, image=32),
    _vision("pvt-v2", "PvtV2", PVT2, 9, image=32),
    _vision("vitdet", "VitDet", {**IMAGE, "window_size": 2, "window_block_indices": [0]}, 4),
    _vision("yolos", "Yolos", {**IMAGE, "num_detection_tokens": 3, "image_size": [8, 8]}, 5),
    _vision("ijepa", "IJepa", IMAGE, 5),
    _vision("vit-msn", "ViTMSN", IMAGE, 5),
    _vision("data2vec-vision", "Data2VecVision", {**IMAGE, "use_relative_position_bias": True}, 4),
    _image(
        "eomt",
        "EomtForUniversalSegmentation",
        "EomtConfig",
        {"hidden_size": H, "num_hidden_layers": 4, "num_attention_heads": HEADS, "image_size": 16, "patch_size": 4}
        | {"num_channels": 1, "num_blocks": 1, "num_queries": 5, "num_labels": 3, "num_register_tokens": 1}
        | {"num_upscale_blocks": 1, "mlp_ratio": 2},
        12,
        only=SPELLINGS,
        attentions=4,
        mlps=8,
        layers=4,
        image=16,
        output="masks_queries_logits",
    ),
    _language("stablelm", "StableLm", {**GROUPED, "qk_layernorm": True, **EOS}, 9),
    _language("bitnet", "BitNet", {**GROUPED, **EOS}, 9),
    _audio("wavlm", "WavLM", WAV, 6),
    _audio("hubert", "Hubert", WAV, 6),
    _audio("wav2vec2-conformer", "Wav2Vec2Conformer", CONFORMER, 12, mlps=4),
    _text(
        "xlm",
        "XLMModel",
        "XLMConfig",
        {
            "vocab_size": VOCAB,
            "emb_dim": H,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": 40,
            "n_langs": 1,
        },
        5,
        only=SPELLINGS,
        square=True,
    ),
    _pair(
        "longt5", "LongT5Model", "LongT5Config", {**T5, "local_radius": 3}, 12, "input_ids", only=SPELLINGS, layers=4
    ),
    _language("mpt", "Mpt", MPT, 5),
    _encoder(
        "mobilebert",
        "MobileBert",
        {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8, "num_feedforward_networks": 2},
        0,
        mlps=4,
    ),
    _experts("mixtral", "Mixtral", {**GROUPED, **FOUR}, 5),
    _experts("mixtral-looped", "Mixtral", {**GROUPED, **FOUR}, 5, experts="looped", mlps=8),
    _experts(
        "qwen2-moe",
        "Qwen2Moe",
        {**GROUPED, **FOUR, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8},
        5,
        mlps=LAYERS,
    ),
    _experts("qwen3-moe", "Qwen3Moe", {**WIDE, **FOUR, "moe_intermediate_size": 12, "norm_topk_prob": True}, 9),
    _experts("olmoe", "Olmoe", {**GROUPED, **FOUR, **EOS}, 9),
    _experts("gpt-oss", "GptOss", {**WIDE, **FOUR, "sliding_window": 4}, 5, window=4),
    _experts("granitemoe", "GraniteMoe", {**GROUPED, **FOUR}, 5),
    _experts("phimoe", "Phimoe", {**GROUPED, **FOUR}, 5),
    _language("cohere", "Cohere", {**GROUPED, **EOS}, 3),
    _language("cohere2", "Cohere2", {**WIDE, **EOS, "sliding_window": 4}, 3, window=4),
    _language(
        "gptj",
        "GPTJ",
        {
            "vocab_size": VOCAB,
            "n_embd": H,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 40,
            "rotary_dim": 4,
            "n_inner": FF,
            "use_cache": False,
        },
        3,
    ),
    _language("glm", "Glm", {**WIDE, **EOS, "head_dim": 8, "partial_rotary_factor": 0.5}, 5),
    _language("glm4", "Glm4", {**WIDE, **EOS, "head_dim": 8, "partial_rotary_factor": 0.5}, 9),
    _language("phi", "Phi", {**GROUPED, **EOS, "num_key_value_heads": 4}, 3),
    _language("persimmon", "Persimmon", {**GROUPED, **EOS}, 9),
    _language("starcoder2", "Starcoder2", GROUPED, 5),
    _language("olmo2", "Olmo2", {**GROUPED, **EOS}, 9),
    _language("nemotron", "Nemotron", {**GROUPED, **EOS}, 5),
    _language("granite", "Granite", {**GROUPED, **EOS}, 5),
    _language(
        "exaone4",
        "Exaone4",
        {**GROUPED, **EOS, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        9,
        window=4,
    ),
    _language(
        "gpt-bigcode",
        "GPTBigCode",
        {
            "vocab_size": VOCAB,
            "n_embd": H,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 40,
            "n_inner": FF,
            "use_cache": False,
        },
        5,
    ),
    _encoder("xlm-roberta", "XLMRoberta", {**TEXT, "max_position_embeddings": 42, "pad_token_id": 1}, 5),
    _encoder("megatron-bert", "MegatronBert", TEXT, 5),
    _encoder(
        "esm",
        "Esm",
        {**TEXT, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 4, "token_dropout": False},
        5,
    ),
    _encoder("roformer", "RoFormer", {**TEXT, "embedding_size": H}, 5),
    _encoder("nomic-bert", "NomicBert", {**TEXT, "type_vocab_size": 1}, 5),
    _encoder(
        "xmod",
        "Xmod",
        {**TEXT, "max_position_embeddings": 42, "pad_token_id": 1, "languages": ["en_XX"], "default_language": "en_XX"},
        7,
        mlps=4,
    ),
    _pair("pegasus", "PegasusModel", "PegasusConfig", SPAN_PAIR, 12, "input_ids", only=SPELLINGS, layers=4),
    _pair("mbart", "MBartModel", "MBartConfig", SPAN_PAIR, 14, "input_ids", only=SPELLINGS, layers=4),
    _pair("mt5", "MT5Model", "MT5Config", T5, 12, "input_ids", only=SPELLINGS, layers=4),
)
ALL = (*KNOWN, *NEW)
BY_NAME = {a.name: a for a in ALL}
