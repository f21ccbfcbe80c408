"""dates: a small T5 that reads dates in English, German and French in 19 spellings and writes them as `2027-03-09`.

    python -m models.dates --report     share of held-out dates that are exactly right, by transformers
    python -m models.dates --train      make the tokenizer, train into weights/dates
    python -m models.dates --data       draw data/dates anew

The seed is fixed, but equal bytes need the same torch, machine and number of threads; elsewhere the share agrees within
noise. Training takes about 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import dates_text
from models.vit_training import Schedule, interval

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import T5ForConditionalGeneration

WEIGHTS = Path(__file__).parent / "weights" / "dates"
BATCH, LONGEST = 64, 11  # pairs of a step; tokens of a date and its end
PAD, END = 0, 1
SCHEDULE = Schedule(steps=2500, peak=2e-3, warmup=150, decay=0.01, smoothing=0.0, average=0.99)


def build(seed: int = 0) -> T5ForConditionalGeneration:
    """The untrained model: 3 + 3 layers of width 128, 4 heads, gated MLP of 256, 1.3 M parameters."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=dates_text.VOCAB,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        n_positions=64,
    )
    return T5ForConditionalGeneration(config)


def load(folder: Path = WEIGHTS) -> T5ForConditionalGeneration:
    """The trained model in float32, in evaluation mode."""
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration.from_pretrained(folder).float().eval()


def reader(folder: Path = WEIGHTS) -> Tokenizer:
    """The tokenizer that is shipped."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def padded(rows: list[list[int]]) -> np.ndarray:
    """Tokens [N, longest], filled up at the end."""
    out = np.full((len(rows), max(map(len, rows))), PAD)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def batches(tok: Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sources and targets `[BATCH, tokens]` without end, each drawn once."""
    rng = np.random.default_rng(seed)
    while True:
        drawn = [dates_text.draw(rng, dates_text.TRAINED) for _ in range(BATCH)]
        yield tuple(padded([x.ids for x in tok.encode_batch(texts)]) for texts in zip(*drawn, strict=True))


def train(folder: Path = WEIGHTS, steps: int = SCHEDULE.steps, seed: int = 0, log=None) -> float:
    """Train on one thread, write the averaged weights in fp16 with the tokenizer; the share right of tuning days."""
    import torch

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    tok, model, schedule = dates_text.tokenizer(), build(seed), SCHEDULE
    tok.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 64}, indent=2) + "\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.peak, weight_decay=schedule.decay, betas=(0.9, 0.98))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    tune, drawn, start = list(dates_text.pairs(500, 4, dates_text.TUNED)), batches(tok, seed), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.peak * schedule.rate(step * schedule.steps // steps)
        ids, labels = (torch.from_numpy(a) for a in next(drawn))
        scores = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels, use_cache=False)
        optimizer.zero_grad()
        scores.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - min(schedule.average, (step + 1) / (step + 10)))
        if log and step % 250 == 249:
            right = correct(model.eval(), tok, tune[:200]).mean()
            model.train()
            log(f"{step + 1} loss {scores.loss.item():.4f} right {right:.3f} {time.perf_counter() - start:.0f} s")
    model.load_state_dict(average, strict=False)
    model.half().eval().save_pretrained(folder)
    return float(correct(load(folder), tok, tune).mean())


def correct(model: T5ForConditionalGeneration, tok: Tokenizer, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Whether each date is written exactly right: bool [N]."""
    import torch

    found = []
    for at in range(0, len(pairs), 250):
        ids = torch.from_numpy(padded([x.ids for x in tok.encode_batch([a for a, _ in pairs[at : at + 250]])]))
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=LONGEST + 3, do_sample=False
            )
        found += tok.decode_batch(made.tolist())
    return np.array([text == target for text, (_, target) in zip(found, pairs, strict=True)])


def report(folder: Path = WEIGHTS) -> dict[str, float]:
    """The share of held-out dates that are exactly right, with its 95 % interval."""
    found = interval(correct(load(folder), reader(folder), dates_text.read("heldout")))
    return {"exact_match": found["accuracy"], "low": found["low"], "high": found["high"], "dates": found["images"]}


def export(out: str | Path, seed: int = 0) -> Path:
    """Write encoder and decoder as an ONNX folder; the weights are shipped: `seed` changes nothing."""
    import onnxcomp as oc

    return oc.export(WEIGHTS, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "train", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.data:
        dates_text.write()
    if args.train:
        print(f"right of tuning days {train(args.out, args.steps, log=lambda line: print(line, flush=True)):.3f}")
    if args.report:
        print(json.dumps({name: round(value, 4) for name, value in report(args.out).items()}))


if __name__ == "__main__":
    main()
