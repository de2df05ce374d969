"""Export Consistency LLMs and decode them in parallel.

At every fixed n, the output equals that of autoregressive decoding, token for token.

    import cllm_export

    model = cllm_export.load("bundle")
    print(model.generate("Question: which cities are there?").text)

Importing this package imports its errors alone. Every other name is imported on first use, and none of the runtime
loads torch, transformers or onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cllm_export.errors import (
    BundleError,
    CheckpointError,
    ChecksumError,
    CllmExportError,
    EngineError,
    GpuError,
    MissingExtraError,
    OptionError,
    OutdatedPackageError,
    OutputError,
    PlanError,
    PromptError,
    QueueFullError,
    SnapshotError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from cllm_export.bundle.manifest import Bundle, open_bundle
    from cllm_export.exporter.options import BuildOptions
    from cllm_export.exporter.pipeline import build
    from cllm_export.prompts import Chat, Prompt, read_prompts
    from cllm_export.runtime.load import load
    from cllm_export.runtime.model import Model
    from cllm_export.runtime.options import GenerateOptions
    from cllm_export.runtime.request_run import Generation, Stream
    from cllm_export.runtime.service import Handle, Service
    from cllm_export.verification.report import Parity, VerifyOptions
    from cllm_export.verification.verify import verify

__all__ = [
    "BuildOptions",
    "Bundle",
    "BundleError",
    "Chat",
    "CheckpointError",
    "ChecksumError",
    "CllmExportError",
    "EngineError",
    "GenerateOptions",
    "Generation",
    "GpuError",
    "Handle",
    "MissingExtraError",
    "Model",
    "OptionError",
    "OutdatedPackageError",
    "OutputError",
    "Parity",
    "PlanError",
    "Prompt",
    "PromptError",
    "QueueFullError",
    "Service",
    "SnapshotError",
    "Stream",
    "UnsupportedError",
    "VerifyOptions",
    "__version__",
    "build",
    "load",
    "open_bundle",
    "read_prompts",
    "verify",
]

__version__ = "0.1.0"

_LAZY = {
    "BuildOptions": "cllm_export.exporter.options",
    "Bundle": "cllm_export.bundle.manifest",
    "Chat": "cllm_export.prompts",
    "GenerateOptions": "cllm_export.runtime.options",
    "Generation": "cllm_export.runtime.request_run",
    "Handle": "cllm_export.runtime.service",
    "Model": "cllm_export.runtime.model",
    "Parity": "cllm_export.verification.report",
    "Prompt": "cllm_export.prompts",
    "Service": "cllm_export.runtime.service",
    "Stream": "cllm_export.runtime.request_run",
    "VerifyOptions": "cllm_export.verification.report",
    "build": "cllm_export.exporter.pipeline",
    "load": "cllm_export.runtime.load",
    "open_bundle": "cllm_export.bundle.manifest",
    "read_prompts": "cllm_export.prompts",
    "verify": "cllm_export.verification.verify",
}
"""Public name -> the module it is imported from on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
