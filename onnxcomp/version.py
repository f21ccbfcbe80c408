"""The version of onnxcomp and those of the files it writes, where everything may import them from."""

__all__ = ["EXPORT_SCHEMA", "INSPECT_SCHEMA", "REPORT_SCHEMA", "__version__"]

__version__ = "0.1.0"

# Raised when readers of the file have to change: report.json, what `inspect --json` prints, export.json.
REPORT_SCHEMA = 3
INSPECT_SCHEMA = 1
EXPORT_SCHEMA = 1
