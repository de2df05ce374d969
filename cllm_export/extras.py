"""The packages that each extra installs: the install line if one is missing, and the floor if one is too old."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Literal

from cllm_export.errors import MissingExtraError, OutdatedPackageError

Extra = Literal["export", "train", "sentencepiece"]

PROJECT = "cllm-export"

_RUNTIME = ("numpy", "filelock", "safetensors", "tokenizers", "jinja2")
_EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
_PACKAGES: dict[Extra, tuple[str, ...]] = {
    "export": _EXPORT,
    "train": (*_EXPORT, "pyarrow", "accelerate", "peft", "tensorboard"),
    "sentencepiece": ("sentencepiece", "google"),
}
_DISTRIBUTIONS = {"google": "protobuf"}
"""Package -> the distribution that holds it, if its name differs by more than an underscore."""


@contextmanager
def needs_extra(extra: Extra) -> Iterator[None]:
    """Check the versions of an extra's packages, and turn the ImportError of a missing one into its install line.

    Raises:
        MissingExtraError: a package that is missing in the block belongs to this extra.
        OutdatedPackageError: an installed package of this extra is older than its floor.
    """
    require_floors(*_RUNTIME, *_PACKAGES[extra])
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in _PACKAGES[extra]:
            raise MissingExtraError(error.name, extra=extra) from None
        raise


def require_floors(*packages: str) -> None:
    """Check that each of these packages, if it is installed, is as new as the metadata of this project asks.

    An older one fails in ways that blame something else: an early transformers calls a sound checkpoint incomplete.

    Raises:
        OutdatedPackageError: one is older.
    """
    for package in packages:
        distribution = _DISTRIBUTIONS.get(package, package.replace("_", "-"))
        floor, installed = declared_floors().get(distribution), _installed(distribution)
        if floor and installed and _release(installed) < _release(floor):
            raise OutdatedPackageError(distribution, installed=installed, floor=floor)


@cache
def declared_floors() -> dict[str, str]:
    """Distribution -> its oldest version, from the metadata of this project; empty if the project is not installed."""
    try:
        requirements = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {}
    matches = (re.match(r"([\w.-]+)\s*\(?>=\s*([\w.]+)", requirement) for requirement in requirements)
    return {match[1].lower().replace("_", "-"): match[2] for match in matches if match}


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without zeros at the end: ``2.13.0+cpu`` gives (2, 13)."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
