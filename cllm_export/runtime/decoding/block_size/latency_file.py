"""``latency.json``: T(n) as measured by ``cllm-export bench``. It is in the bundle's directory, but not part of it.

It is valid only for the bundle, machine, threads and number of slots that it was measured with. If they differ, the
file is ignored, and the runtime measures T(n) itself.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.storage import write_json
from cllm_export.runtime.decoding.block_size.measured_times import monotone
from cllm_export.runtime.engines.machine import describe_machine

log = logging.getLogger(__name__)

LATENCY_NAME = "latency.json"
_CONDITIONS = ("processor", "threads", "onnxruntime")


def read_latency(bundle: Bundle, *, num_slots: int, threads: int | None) -> dict[int, float] | None:
    """Seconds of a forward by block size, which never fall with it. None if the file is missing, or if it is not valid
    here, which is logged."""
    path = bundle.path / LATENCY_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found, seconds = raw["conditions"], {int(size): float(value) for size, value in raw["seconds"].items()}
        if not seconds or min(seconds) < 1 or not all(0 < value < math.inf for value in seconds.values()):
            raise ValueError("it names no block size, or a size or time that is not positive")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is left alone, it cannot be read: %s; write it again with cllm-export bench", path, error)
        return None
    expected = _conditions(bundle, num_slots, threads)
    differing = sorted(key for key in expected if not isinstance(found, dict) or found.get(key) != expected[key])
    if differing:
        log.info("%s is left alone, it was measured with another %s", path, ", ".join(differing))
        return None
    return monotone(seconds)


def write_latency(bundle: Bundle, seconds: Mapping[int, float], *, num_slots: int, threads: int | None) -> None:
    """Write the file completely or not at all.

    Raises:
        OutputError: the bundle's directory is not writable.
    """
    report = {
        "conditions": _conditions(bundle, num_slots, threads),
        "seconds": {str(size): value for size, value in sorted(seconds.items())},
    }
    write_json(bundle.path / LATENCY_NAME, report)


def _conditions(bundle: Bundle, num_slots: int, threads: int | None) -> dict[str, Any]:
    machine = describe_machine(threads)
    conditions = {name: machine[name] for name in _CONDITIONS}
    return {"bundle_fingerprint": bundle.fingerprint, "num_slots": num_slots, **conditions}
