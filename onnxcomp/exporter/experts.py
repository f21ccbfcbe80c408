"""Experts of a mixture as a loop: each works on the tokens that chose it, with its own matrices as constants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["looped_experts"]

LOOPED = "onnxcomp_looped"


@contextlib.contextmanager
def looped_experts(model: Any) -> Iterator[None]:
    """Meanwhile a model of transformers computes its experts one after another, where it lets that be chosen.

    Its other ways gather a copy of an expert's weights for every token, or sort tokens by expert into one product of
    slices: neither shows the experts as feed-forward parts.
    """
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(LOOPED, _looped)
    before = model.get_experts_implementation()
    model.set_experts_implementation(LOOPED)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _looped(self: Any, x: Any, index: Any, weights: Any) -> Any:
    """The sum of the chosen experts' results `[tokens, d]`; `index` and `weights` are `[tokens, chosen]`."""
    import torch

    out = torch.zeros_like(x)
    hit = torch.nn.functional.one_hot(index, self.num_experts).permute(2, 1, 0)
    for i in range(self.num_experts):
        slot, token = torch.where(hit[i])
        y = _product(self, x[token], "gate_up_proj" if self.has_gate else "up_proj", i)
        y = _product(self, self._apply_gate(y) if self.has_gate else self.act_fn(y), "down_proj", i)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out


def _product(self: Any, x: Any, name: str, expert: int) -> Any:
    """`x` times one expert's matrix, plus its bias where experts have one."""
    import torch

    matrix = getattr(self, name)[expert]
    bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
    return torch.nn.functional.linear(x, matrix.T if self.is_transposed else matrix, bias)
