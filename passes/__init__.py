"""One pass per file; the file name is the pass's name. Adding a file is all it takes to add a pass."""

if __name__ != "onnxcomp.passes":
    raise ImportError(f"this is not the package '{__name__}': import onnxcomp.passes")
