"""Pruning of heads, channels and widths: scores, amounts, cut."""
