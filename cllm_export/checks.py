"""Checks that everybody needs: of options, of names read from files, of parsed JSON."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, TypeVar

from cllm_export.errors import BundleError, OptionError

T = TypeVar("T")


def require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise OptionError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def require_plain_name(name: str) -> None:
    """Raise BundleError unless ``name`` is a plain file name: a path read from a file never leaves its directory."""
    if not name or name in (".", "..") or name != os.path.basename(name) or "\\" in name or "\0" in name:
        raise BundleError(f"file name {name!r} is not a plain name inside the bundle; do not use this bundle")


def from_fields(cls: type[T], raw: dict[str, Any]) -> T:
    """A dataclass from parsed JSON; a missing key is a TypeError, an unknown one a ValueError."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"unknown key {unknown[0]!r} in {cls.__name__}")
    return cls(**raw)


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Raise OptionError unless ``value`` is an int of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {value!r}")
