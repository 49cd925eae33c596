"""Low-rank factorization of an ONNX graph itself, with no Python model: find its weights, rewrite it, run it."""
