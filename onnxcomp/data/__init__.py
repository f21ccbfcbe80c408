"""Calibration and evaluation data: sources, checks against a model's inputs, batches."""
