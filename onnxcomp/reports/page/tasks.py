"""What was lost in the terms of a task: words of a language model, classes, similarity of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcomp.reports.page.numbers import Figure, pointer

__all__ = ["Block", "tasks"]

SHOWN = 12  # changes of classes in the table


@dataclass(frozen=True)
class Block:
    """A small table: each row a name and figures of the report."""

    title: str
    says: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Figure]]


def tasks(report: Mapping[str, Any]) -> list[Block]:
    """The blocks that the outputs have figures for."""
    v = report["validation"]
    if v is None or not v["finite"]:
        return []
    found = []
    for name, d in v["outputs"].items():
        of = f" of {name}" if len(v["outputs"]) > 1 else ""
        base = pointer("validation", "outputs", name)
        if d["kl"] is not None:
            found.append(_words(report, name, of, base))
        if d["moved"]:
            found.append(_classes(d["moved"], of, base))
        if d["similarity"] is not None:
            found.append(_similarity(of, base))
    return found


def _words(report: Mapping[str, Any], name: str, of: str, base: str) -> Block:
    """What llama.cpp's perplexity tool prints of a quantized model, by the same names."""
    v = report["validation"]
    words = "perplexity" in v["metrics"] and name == v["scored"]

    def error(key: str, unit: str) -> list[list[str | Figure]]:
        """A row for a standard error, which reports of before do not have."""
        return [] if v["outputs"][name].get(key) is None else [["its standard error", Figure(f"{base}/{key}", unit)]]

    rows: list[list[str | Figure]] = [
        ["Mean KLD", Figure(f"{base}/kl", "nats")],
        *error("kl_error", "nats"),
        ["99.0% KLD", Figure(f"{base}/kl_p99", "nats")],
        ["Maximum KLD", Figure(f"{base}/kl_max", "nats")],
        ["Same top token" if words else "Same top class", Figure(f"{base}/agreement", "percent")],
        *error("agreement_error", "percent"),
    ]
    if words:
        metric = pointer("validation", "metrics", "perplexity")
        rows += [
            ["PPL(original)", Figure(f"{metric}/reference", "number")],
            ["PPL(result)", Figure(f"{metric}/candidate", "number")],
            ["PPL(result) / PPL(original) - 1", Figure(f"{metric}/change", "signed")],
            ["its 95 % interval, from", Figure(f"{metric}/low", "signed")],
            ["to", Figure(f"{metric}/high", "signed")],
        ]
    what = "each next token" if words else "each answer"
    says = f"KL divergence of the result's distribution from the original's, for {what}; less is better."
    return Block(f"{'Next tokens' if words else 'Scores'}{of}", says, ("Figure", "Value"), rows)


def _classes(moved: Sequence[Mapping[str, Any]], of: str, base: str) -> Block:
    """Which classes became which, by label where there is one."""
    rows: list[list[str | Figure]] = [
        [_change(x), Figure(f"{base}/moved/{i}/samples", "count")] for i, x in enumerate(moved[:SHOWN])
    ]
    says = f"Samples that the result gives another class than the original; the {len(rows)} most frequent changes."
    return Block(f"Classes that changed{of}", says, ("Original > result", "Samples"), rows)


def _change(x: Mapping[str, Any]) -> str:
    judged = {x["original"]: "now wrong", x["result"]: "now right"}.get(x["label"], "wrong in both")
    return f"{x['original']} > {x['result']}" + (f", label {x['label']}: {judged}" if x["label"] is not None else "")


def _similarity(of: str, base: str) -> Block:
    rows = list(_alike(f"{base}/similarity"))
    says = "Cosine similarity of all pairs of samples, in the result against the original."
    return Block(f"Similarity of samples{of}", says, ("Figure", "Value"), rows)


def _alike(base: str) -> Iterator[list[str | Figure]]:
    yield ["Samples", Figure(f"{base}/samples", "count")]
    yield ["Same nearest neighbour", Figure(f"{base}/neighbours", "percent")]
    yield ["Mean change of a cosine", Figure(f"{base}/mean_change", "number")]
    yield ["Largest change of a cosine", Figure(f"{base}/max_change", "number")]
