"""Comparison of models by speed and memory on this machine, each in a process of its own."""
