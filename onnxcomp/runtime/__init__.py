"""Running models: sessions, passing a graph to them, execution in segments. Only this room imports onnxruntime."""
