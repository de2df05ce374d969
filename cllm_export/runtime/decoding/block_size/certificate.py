"""What a certificate certifies: a provider on a device, with its versions and threads. ``verify`` writes it.

``parity.json`` says under which conditions a bundle was verified, and which block sizes were exact. It counts
only where the same conditions hold. On a CPU the bits depend on the instruction sets, so another processor with the
same ones will do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from cllm_export.bundle.manifest import PARITY_NAME, Bundle
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes

log = logging.getLogger(__name__)


def conditions_of(bundle: Bundle, provider: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that a certificate names, JSON-ready. ``facts`` are those of ``Engine.describe``."""
    quantization = bundle.manifest.quantization
    return {
        "provider": provider,
        "precision": bundle.manifest.precision,
        "quantization": quantization.scheme if quantization else None,
        **facts,
    }


def read_certified_sizes(bundle: Bundle, conditions: Mapping[str, Any], *, num_slots: int) -> ExactSizes:
    """The sizes that the bundle's certificate compared with this number of slots. None where it does not count here."""
    try:
        report = json.loads((bundle.path / PARITY_NAME).read_text(encoding="utf-8"))
        certified, sizes = report["conditions"], report["exact_sizes"]
        counts = report["passed"] is True and report["bundle_fingerprint"] == bundle.fingerprint
        if not counts or sizes is None:
            return ExactSizes()
        found, slots = ExactSizes.of_dict(sizes), list(sizes["num_slots"])
    except FileNotFoundError:
        return ExactSizes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError):
        log.warning("%s does not count, it is damaged: run cllm-export verify again", bundle.path / PARITY_NAME)
        return ExactSizes()
    differing = differences(certified, conditions)
    if differing or num_slots not in slots:
        what = ", ".join(differing) or "number of slots"
        log.info("%s does not count here, it certifies another %s", bundle.path / PARITY_NAME, what)
        return ExactSizes()
    return found


def differences(certified: Any, here: Mapping[str, Any]) -> list[str]:
    """Names of the conditions under which a certificate does not count here."""
    if not isinstance(certified, Mapping):
        return sorted(here)
    if here.get("device") is None:
        return ["device"]
    needed = set(here) - ({"device"} if "features" in here else set())
    return sorted(name for name in needed if certified.get(name) != here[name])
