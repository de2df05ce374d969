"""Which packages an extra installs, and its install line where one of them is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from cllm_export.errors import MissingExtraError

Extra = Literal["export", "train", "sentencepiece"]

_EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
_PACKAGES: dict[Extra, tuple[str, ...]] = {
    "export": _EXPORT,
    "train": (*_EXPORT, "pyarrow", "accelerate", "peft", "tensorboard"),
    "sentencepiece": ("sentencepiece", "google"),
}


@contextmanager
def needs_extra(extra: Extra) -> Iterator[None]:
    """Turn a missing package of an extra, met in the block, into its install line.

    Raises:
        MissingExtraError: the package that is missing is one of this extra's.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in _PACKAGES[extra]:
            raise MissingExtraError(error.name, extra=extra) from None
        raise
