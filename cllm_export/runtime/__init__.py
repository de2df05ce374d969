"""Run a bundle: numpy, tokenizers and one engine; never torch, transformers or onnx."""

from __future__ import annotations

from cllm_export.runtime.engine import Engine, Forward
from cllm_export.runtime.generate import Generation, Model, load
from cllm_export.runtime.ort_engine import OrtEngine
from cllm_export.runtime.statistics import Statistics

__all__ = ["Engine", "Forward", "Generation", "Model", "OrtEngine", "Statistics", "load"]
