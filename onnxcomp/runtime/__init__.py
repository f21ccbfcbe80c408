"""Models that run: sessions, how a graph is given to them, runs in stretches. Only this room imports onnxruntime."""
