"""llama.cpp for tools/decoder_speed, run by a Python that has xllamacpp, gguf, numpy and safetensors.

llama_speed.py write CHECKPOINT FILE.gguf        a Llama checkpoint with all matrices in Q4_0 and invented words
llama_speed.py time FILE.gguf PROMPT NEW THREADS  prints [tokens a second of the prompt, of new tokens]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(checkpoint: Path, out: Path) -> None:
    """Rows of queries and keys stay in their order, which changes what the model says but not its speed."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    words = config["vocab_size"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(words)])
    writer.add_token_scores([0.0] * words)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * words)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, a in load_file(checkpoint / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in OUTER:
            new = OUTER[stem]
        else:
            layer, _, part = stem.removeprefix("model.layers.").partition(".")
            new = f"blk.{layer}.{NAMES[part]}"
        if a.ndim == 1:
            writer.add_tensor(f"{new}.weight", a.astype(np.float32))
        else:
            writer.add_tensor(f"{new}.weight", gguf.quants.quantize(a.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(file: Path, prompt: int, new: int, threads: int) -> list[float]:
    """Tokens a second by llama.cpp's own clock, of the second of two requests."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_predict = 2 * (prompt + new), 1, new
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt = params.warmup = False
    server = xllamacpp.Server(params)
    tokens = [(i * 37) % 30000 + 3 for i in range(prompt)]
    asked = {"prompt": tokens, "n_predict": new, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    answer: Any = None
    for _ in range(2):
        answer = server.handle_completions(asked)
    told = answer["timings"]
    return [told["prompt_per_second"], told["predicted_per_second"]]


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(json.dumps(timed(Path(sys.argv[2]), *map(int, sys.argv[3:6]))))
