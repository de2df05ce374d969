"""llama.cpp's C library through its Python binding: one model in one context, with llama.cpp's own defaults."""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class LlamaContext:
    """A GGUF file, loaded, with a KV cache for so many positions."""

    def __init__(self, model: Path, *, context_length: int, threads: int) -> None:
        self.lib = lib = import_binding()
        self.version: str = lib.__version__ + " (llama-cpp-python)"
        # An unkept callback would be collected while the library still calls it.
        self._silence = lib.llama_log_callback(lambda _level, _text, _data: None)
        lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not loaded:
            raise SystemExit(f"llama.cpp does not load {model}: is it a GGUF file?")
        self.vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context_length, threads, threads
        self.context: Any = lib.llama_init_from_model(loaded, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {context_length} positions for {model}")

    def forward(self, batch: Any) -> None:
        """Runs a batch, which need not have ended where ``llama_synchronize`` is not called."""
        if status := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode returned {status}, expected 0")


def import_binding() -> ModuleType:
    """The installed ``llama_cpp``, not the file of that name, which stands in the first directory of the path."""
    here = Path(__file__).resolve().parent
    saved = sys.path
    try:
        sys.path = [entry for entry in saved if Path(entry).resolve() != here]
        return importlib.import_module("llama_cpp")
    finally:
        sys.path = saved
