"""Comparison of two models on the same data: drift of the outputs, task metrics of each, and gates on both."""
