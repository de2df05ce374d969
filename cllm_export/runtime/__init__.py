"""Run a bundle: numpy, tokenizers and one engine; never torch, transformers or onnx."""
