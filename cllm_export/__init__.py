"""Export Consistency LLMs and decode them in parallel, token for token equal to autoregressive decoding.

    import cllm_export

    model = cllm_export.load("bundle")
    print(model.generate("The SQL database has ...").text)

Importing this package loads neither torch, transformers nor onnx.
"""

from __future__ import annotations

from cllm_export.errors import CllmExportError
from cllm_export.runtime.generate import Generation, Model, load
from cllm_export.runtime.service import Handle, Service

__all__ = ["CllmExportError", "Generation", "Handle", "Model", "Service", "__version__", "load"]

__version__ = "0.1.0"
