"""Quantized linears as graph edits, and whether they pay."""
