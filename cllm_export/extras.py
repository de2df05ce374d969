"""The packages that each extra installs, and the install line to show if one of them is missing."""

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
    """Turn the ImportError of a missing package of an extra, raised in the block, into the extra's install line.

    Raises:
        MissingExtraError: the missing package belongs to this extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in _PACKAGES[extra]:
            raise MissingExtraError(error.name, extra=extra) from None
        raise
