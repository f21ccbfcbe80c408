"""docs_lm: a small Llama-style decoder (RoPE, RMSNorm, SwiGLU, grouped KV heads) trained on Python's doc strings.

    python -m models.docs_lm --report     held-out perplexity beside unigram, bigram and trigram on the same tokens
    python -m models.docs_lm --train      train again from the shipped tokens into weights/docs_lm
    python -m models.docs_lm --collect    make tokenizer and token files anew from this Python (then train)

The seed is fixed, but equal bytes need the same torch, machine and number of threads; elsewhere the perplexity agrees
within noise. Training takes 20 to 30 minutes on one core; steps and rate were chosen on the tuning modules.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import docs_text, ngram

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

WEIGHTS = Path(__file__).parent / "weights" / "docs_lm"
DATA = docs_text.DATA
STEPS, BATCH, PEAK, WARMUP, DECAY, DROPOUT, AVERAGE = 3000, 16, 2e-3, 200, 0.1, 0.1, 0.998


def build(seed: int = 0) -> LlamaForCausalLM:
    """The untrained model: 4 layers of width 192, 6 heads on 2 KV heads, gated MLP of 512, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=docs_text.VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def load(folder: Path = WEIGHTS) -> LlamaForCausalLM:
    """The trained model, in evaluation mode."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval()


def logits_perplexity(model: LlamaForCausalLM, ids: np.ndarray, batch: int = 32) -> float:
    """exp of the mean negative log likelihood of tokens 1.. of every window [N, W]."""
    import torch

    total = 0.0
    with torch.no_grad():
        for rows in torch.from_numpy(ids.astype(np.int64)).split(batch):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            )
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def add_dropout(model: LlamaForCausalLM, p: float) -> list:
    """Hooks that drop parts of the embedding and of every residual branch in training; Llama has none of its own."""
    import torch

    def drop(module, _inputs, output):
        kept = output[0] if isinstance(output, tuple) else output
        kept = torch.nn.functional.dropout(kept, p, module.training)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    branches = [model.model.embed_tokens, *(m for layer in model.model.layers for m in (layer.self_attn, layer.mlp))]
    return [branch.register_forward_hook(drop) for branch in branches]


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))


def train(folder: Path = WEIGHTS, steps: int = STEPS, seed: int = 0, threads: int = 1, log=None) -> float:
    """Train from the shipped tokens, write the averaged weights, return perplexity on the tuning modules."""
    import torch

    torch.set_num_threads(threads)
    model, rng = build(seed), np.random.default_rng(seed)
    data = np.load(DATA / "train.npz")
    tokens, tune = data["tokens"], rows_of(data["tune"])
    hooks, optimizer = add_dropout(model, DROPOUT), optimizer_of(model)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = time.perf_counter()
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate(step, steps)
        at = rng.integers(0, len(tokens) - docs_text.WINDOW, BATCH)
        ids = torch.from_numpy(np.stack([tokens[a : a + docs_text.WINDOW] for a in at]).astype(np.int64))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - min(AVERAGE, (step + 1) / (step + 10)))
        if log and step % 250 == 249:
            now = f"tune {logits_perplexity(model.eval(), tune):.2f} {time.perf_counter() - start:.0f} s"
            log(f"{step + 1} loss {loss.item():.3f} {now}")
    for hook in hooks:
        hook.remove()
    model.load_state_dict(average, strict=False)
    model.tie_weights()
    model.eval().save_pretrained(folder)
    return logits_perplexity(model, tune)


def rows_of(tokens: np.ndarray) -> np.ndarray:
    """A stream cut into all its windows [N, WINDOW]."""
    return tokens[: len(tokens) // docs_text.WINDOW * docs_text.WINDOW].reshape(-1, docs_text.WINDOW)


def baselines() -> dict[str, float]:
    """Held-out perplexity of unigram, bigram and trigram on the shipped tokens."""
    data = np.load(DATA / "train.npz")
    return ngram.perplexities(
        data["tokens"], rows_of(data["tune"]), np.load(DATA / "heldout.npz")["input_ids"], docs_text.VOCAB
    )


def report(folder: Path = WEIGHTS) -> dict[str, float]:
    """Held-out perplexity of the model and of the n-gram baselines, on the same tokens."""
    return {"docs_lm": logits_perplexity(load(folder), np.load(DATA / "heldout.npz")["input_ids"]), **baselines()}


def export(out: str | Path, seed: int = 0) -> Path:
    """Write the trained model, without caches, as an ONNX folder; its weights are shipped: `seed` changes nothing."""
    import onnxcomp as oc

    return oc.export(WEIGHTS, out, past=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("collect", "train", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.collect:
        print(docs_text.write(WEIGHTS))
    if args.train:
        print(f"tuning perplexity {train(args.out, args.steps, log=lambda line: print(line, flush=True)):.2f}")
    if args.report:
        print(json.dumps({name: round(value, 2) for name, value in report(args.out).items()}))


if __name__ == "__main__":
    main()
