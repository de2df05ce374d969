"""``latency.json``: what was measured of forwards on this machine. It is in the bundle's directory, not part of it.

It holds T(n) as ``cllm-export bench`` timed it, and the block sizes that were compared with n = 1. Each entry is valid
only for the bundle, processor, library, its options, threads and number of slots that it was measured with. Without a
valid one the runtime measures itself.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.storage import one_writer, write_json
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.block_size.measured_times import monotone
from cllm_export.runtime.engines.machine import describe_machine, processor_features
from cllm_export.runtime.engines.onnxruntime import SESSION_OPTIONS

log = logging.getLogger(__name__)

LATENCY_NAME = "latency.json"
_CONDITIONS = ("processor", "threads", "onnxruntime")
_OPTIONAL = {"seconds", "exact_sizes"}


def read_latency(bundle: Bundle, *, num_slots: int, threads: int | None) -> dict[int, float] | None:
    """Seconds of a forward by block size, which never fall with it. None if they were not timed here.

    If the file is damaged or of another machine, the log says so.
    """
    entry = _entry_here(bundle, _conditions(bundle, num_slots, threads))
    return monotone(_seconds(entry)) if "seconds" in entry else None


def read_compared_sizes(bundle: Bundle, *, num_slots: int, threads: int | None) -> ExactSizes:
    """The block sizes that were compared with n = 1 here. The log says as much as for ``read_latency``."""
    entry = _entry_here(bundle, _conditions(bundle, num_slots, threads))
    return ExactSizes.of_dict(entry["exact_sizes"]) if "exact_sizes" in entry else ExactSizes()


def write_latency(bundle: Bundle, seconds: Mapping[int, float], *, num_slots: int, threads: int | None) -> None:
    """Keep the times of this machine. The file is written completely or not at all.

    Raises:
        OutputError: the bundle's directory is not writable.
    """
    timed = {str(size): value for size, value in sorted(seconds.items())}
    _keep(bundle, {"seconds": timed}, num_slots, threads)


def write_compared_sizes(bundle: Bundle, sizes: ExactSizes, *, num_slots: int, threads: int | None) -> None:
    """Keep which block sizes were compared with n = 1 on this machine, as ``write_latency`` keeps times.

    Raises:
        OutputError: the bundle's directory is not writable.
    """
    _keep(bundle, {"exact_sizes": sizes.to_dict()}, num_slots, threads)


def _keep(bundle: Bundle, found: Mapping[str, Any], num_slots: int, threads: int | None) -> None:
    """Add to the entry of this machine. Entries of another build of the bundle go, those of other writers stay."""
    conditions = _conditions(bundle, num_slots, threads)
    with one_writer(bundle.path):
        try:
            entries = _read(bundle)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError):
            entries = []
        same = [entry for entry in entries if entry["conditions"].get("bundle_fingerprint") == bundle.fingerprint]
        mine = next((entry for entry in same if entry["conditions"] == conditions), {})
        others = [entry for entry in same if entry["conditions"] != conditions]
        write_json(bundle.path / LATENCY_NAME, {"measured": [*others, {**mine, "conditions": conditions, **found}]})


def _entry_here(bundle: Bundle, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that was measured under these conditions; empty where there is none."""
    path = bundle.path / LATENCY_NAME
    try:
        entries = _read(bundle)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        log.warning("%s is left alone, it cannot be read: %s; write it again with cllm-export bench", path, error)
        return {}
    for entry in entries:
        if entry["conditions"] == conditions:
            return entry
    found = entries[-1]["conditions"] if entries else {}
    differing = sorted(key for key in conditions if found.get(key) != conditions[key])
    log.info("%s is left alone, it was measured with another %s", path, ", ".join(differing))
    return {}


def _read(bundle: Bundle) -> list[dict[str, Any]]:
    """Every entry of the file, checked.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, OptionError: there is no file, or it is damaged.
    """
    raw = json.loads((bundle.path / LATENCY_NAME).read_text(encoding="utf-8"))
    entries: list[dict[str, Any]] = raw["measured"]
    for entry in entries:
        if not isinstance(entry["conditions"], dict) or not _OPTIONAL & set(entry):
            raise ValueError("an entry has no conditions, or nothing that was measured")
        if "seconds" in entry:
            _seconds(entry)
        if "exact_sizes" in entry:
            ExactSizes.of_dict(entry["exact_sizes"])
    return entries


def _seconds(entry: Mapping[str, Any]) -> dict[int, float]:
    seconds = {int(size): float(value) for size, value in entry["seconds"].items()}
    if not seconds or min(seconds) < 1 or not all(0 < value < math.inf for value in seconds.values()):
        raise ValueError("it names no block size, or a size or time that is not positive")
    return seconds


def _conditions(bundle: Bundle, num_slots: int, threads: int | None) -> dict[str, Any]:
    machine = describe_machine(threads)
    conditions = {name: machine[name] for name in _CONDITIONS}
    own = {"bundle_fingerprint": bundle.fingerprint, "num_slots": num_slots, "features": processor_features()}
    return own | conditions | {"session_options": dict(SESSION_OPTIONS)}
