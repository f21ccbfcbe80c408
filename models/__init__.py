"""Reference models: one script each with `export(out, seed=0)`; checkpoints in `weights/`, data in `data/`.

Not packaged with onnxcomp, and no part of it imports this folder. Scripts use the public names of `onnxcomp` only.
"""
