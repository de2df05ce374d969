"""All that ``tune`` imports, loaded once: what is forked from here starts at once. It runs nothing, so no thread."""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})

import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import cllm_export.cli.entry
import cllm_export.training.command  # noqa: F401
import tests.e2e.tuning_worker  # noqa: F401
