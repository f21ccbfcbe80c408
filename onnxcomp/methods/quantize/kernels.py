"""Which codes of weights a target multiplies by, without a copy of the weight in float at every run."""

from __future__ import annotations

from collections.abc import Collection

from onnxcomp.errors import RecipeError, TargetError
from onnxcomp.target import Target, resolved

__all__ = ["require", "slower"]


def slower(target: Target) -> list[str]:
    """What is known of the speed of such products on the target before any work."""
    if not resolved(target).quantized.saturates:
        return []
    return [
        "without VNNI products with weights of few bits are slower than float32 where they have many rows (encoders, "
        "prompts), and pay where they have few (decoding): tools/format_speed has factors, bench tells for your shapes"
    ]


def require(
    target: Target, bits: Collection[object], block: int | str, *, symmetric: bool, codes: str = "integer"
) -> None:
    """Raise where a product with such codes has no kernel on the target.

    `RecipeError` where it has none anywhere, `TargetError` where it has none there.
    """
    name, q = f"'{target.name}'", target.quantized
    if codes != "integer":
        if codes not in q.floats:
            legal = f"takes {', '.join(q.floats)}" if q.floats else "takes integers only"
            why = f"{name} has no product with {codes} weights and would make them float at every run"
            raise TargetError(f"quantize-weights: {why}; it {legal}")
        return
    used = {4 if b == 3 else b for b in bits if b and isinstance(b, int)}
    if block == "channel":
        if used - {8}:
            raise RecipeError("quantize-weights: with 'block: channel' products run in 8 bits only; say bits: 8")
        return
    for b in sorted(used):
        fast = q.blocks.get(b, ())
        if block not in fast:
            known = " or ".join(map(str, fast))
            instead = f"in blocks of {known}, not of {block}" if known else "nowhere"
            raise TargetError(f"quantize-weights: on {name} products with {b} bits run {instead}")
    if used and not symmetric and not q.block_zero_points:
        raise TargetError(f"quantize-weights: on {name} products run only without zero points; say symmetric: true")
