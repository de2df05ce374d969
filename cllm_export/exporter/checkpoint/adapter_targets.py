"""The modules that an adapter's config names. An adapter without matrices for one of them is incomplete."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

REPEATED_REPEAT = re.compile(r"[*+}][?+]?\)[*+{]")
"""A repeated group that ends with a repeat: Python's matching of such an expression may take exponential time."""


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """The modules that an adapter's config names, chosen as PEFT chooses them.

    Args:
        config: the contents of ``adapter_config.json``.
        modules: every module of the base that has a matrix.

    Raises:
        ValueError: the config names them in a way that is not understood; the message is a noun phrase.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not targets:
        raise ValueError(f"target_modules {targets!r}, where a list or an expression is needed")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        chosen = {module for module in modules if module.startswith("model.layers.")}
    else:
        chosen = {module for module in modules if _named(module, targets, "target_modules")}
    if not isinstance(targets, str):
        chosen = {module for module in chosen if module in targets or _in_layers(config, module)}
    return {module for module in chosen if not _named(module, excluded, "exclude_modules")}


def _named(module: str, names: object, key: str) -> bool:
    """Whether a list has the module's name or an end of it, or an expression fits the whole name."""
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return any(module == name or module.endswith(f".{name}") for name in names)
    if not isinstance(names, str):
        raise ValueError(f"{key} {reprlib.repr(names)}, where a list or an expression is needed")
    if REPEATED_REPEAT.search(names):
        raise ValueError(f"{key} {names!r}, which repeats what is repeated and may take forever")
    try:
        return re.fullmatch(names, module) is not None
    except re.error as error:
        raise ValueError(f"{key} {names!r}, which is no expression ({error})") from None


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is in the layers that ``layers_to_transform`` chooses; without a choice, it always is."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in (layers if isinstance(layers, list) else [layers])
    return False
