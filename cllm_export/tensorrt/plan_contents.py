"""What is inside a plan: kernels, attention, copies of the cache and memory, read from the builder's own log.

TensorRT prints every layer of a finished engine, with its inputs and outputs, when profiling verbosity is DETAILED. The
text is the same on a machine without a GPU, so a test can hold a plan to its counts before any card has run it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm_export.bundle.contract import LOGITS
from cllm_export.checks import from_fields

LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: \[(?P<inputs>.*?)\](?:, Constants: \[.*?\])?"
    r", Outputs: \[(?P<outputs>.*?)\], (?:Tactic|Param)"
)
TENSOR = re.compile(r"\{ Name: ([^,]+),")
SIZED_TENSOR = re.compile(r"\{ Name: ([^,]+), Dimensions: \[([\d,-]*)\],.*?, Datatype: (\w+)")
"""A tensor's name, its shape with -1 for an axis that varies, and its datatype."""
BITS = {"Float": 32, "Half": 16, "BFloat16": 16, "FP8": 8, "Int8": 8}
"""Bits of a number in a copy of the cache."""
ROW_AXIS = 2
"""Axis of the rows in a cache [B, K, rows, D]."""
GROUP = re.compile(r"_myl(\d+)_\d+$")
"""The compiled part that a kernel belongs to. Each profile has one, numbered in the order of the profiles."""
PROFILE = re.compile(r"\[profile (\d+)\]")
ATTENTION = re.compile(r"^_?(\w*mha\w*?)_myl")
CACHE = re.compile(r"^(?:past|present)_(?:key|value)\.")
PRESENT = re.compile(r"^present_(?:key|value)\.")
BYTES = re.compile(r"^Total (Weights|Activation|Device Persistent) Memory: (\d+) bytes")
LOGITS_OUTPUT = re.compile(rf"^{LOGITS}(?: \[profile \d+\])?$")
ONLY_COPIES = re.compile(r"^__myl_(?:Slic|Move|Resh|Tran)+_myl")
"""Names of generated kernels say what they compute. This one computes nothing."""
NOT_KERNELS = ("shape_call", "ShapeHostToDevice", "signal", "wait")
"""Layers that launch no kernel: shapes on the host, their copies, and the order of two streams."""


@dataclass(frozen=True, kw_only=True)
class ProfileContents:
    """One optimization profile of a plan. Counts are of one forward."""

    kernels: int
    """Kernels that a forward launches, without shape computations on the host."""
    attention: dict[str, int] = field(default_factory=dict)
    """Fused attention kernels: name -> how many. Empty if attention is spelled out as matrix products."""
    cache_copies: int
    """Kernels that read keys or values of the cache only to write them elsewhere."""
    cache_copy_bytes: int
    """Bytes that these kernels read and write in a forward at the longest KV length."""
    logits_copies: int = 0
    """Kernels that only copy the logits. An odd vocabulary needs one in fp16, because its head is padded."""
    reformats: int
    """Layers that change only the layout of a tensor."""
    host_copies: int
    """Copies of shapes from the host, which a captured graph cannot repeat with other values."""
    device_bytes: int
    """Device memory of an execution context: activations and scratch."""


@dataclass(frozen=True, kw_only=True)
class PlanContents:
    """What the builder says of a finished plan."""

    weight_bytes: int
    """Device memory of the weights, each copy counted."""
    profiles: tuple[ProfileContents, ...]
    """The prefill profile first, then one for each block size."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> PlanContents:
        """Make it from parsed JSON. Wrong keys raise TypeError or ValueError."""
        profiles = tuple(from_fields(ProfileContents, dict(each)) for each in raw["profiles"])
        return from_fields(cls, {**raw, "profiles": profiles})


def profile_names(block_sizes: Sequence[int], count: int) -> list[str]:
    """What each profile of a plan is for. A plan with fixed shapes has one profile for all."""
    return ["prefill", *(f"n = {size}" for size in block_sizes)][-count:]


def read_contents(report: Sequence[str], *, kv_length: int) -> PlanContents | None:
    """The contents of a plan from the messages of its build; None if they are not as this module knows them.

    Args:
        report: the messages that ``Log.report`` keeps, in their order.
        kv_length: the longest KV length S of the plan, in rows.
    """
    dump = next((message for message in report if message.startswith("Layers:")), None)
    if dump is None:
        return None
    memory = [(match[1], int(match[2])) for match in map(BYTES.match, report) if match]
    weights = [size for kind, size in memory if kind == "Weights"]
    activations = [size for kind, size in memory if kind == "Activation"]
    layers = [match for line in dump.splitlines() if (match := LAYER.search(line))]
    groups = _by_profile(layers)
    if not weights or len(activations) != len(groups):
        return None
    try:
        profiles = tuple(_contents(group, size, kv_length) for group, size in zip(groups, activations, strict=True))
    except (KeyError, ValueError, IndexError):  # a datatype or a shape that no cache is known to have
        return None
    return PlanContents(weight_bytes=weights[-1], profiles=profiles)


def _by_profile(layers: Iterable[re.Match[str]]) -> list[list[re.Match[str]]]:
    """Layers by profile. A kernel is told by its part, any other layer by the profile in its name."""
    kernels: dict[int, list[re.Match[str]]] = {}
    others: dict[int, list[re.Match[str]]] = {}
    for layer in layers:
        part, profile = GROUP.search(layer["name"]), PROFILE.search(layer["name"])
        if part:
            kernels.setdefault(int(part[1]), []).append(layer)
        else:
            others.setdefault(int(profile[1]) if profile else 0, []).append(layer)
    ordered = [kernels[part] for part in sorted(kernels)]
    return [[*group, *others.get(index, ())] for index, group in enumerate(ordered)]


def _contents(layers: Sequence[re.Match[str]], device_bytes: int, kv_length: int) -> ProfileContents:
    copies = [layer for layer in layers if _copies_cache(layer)]
    kinds = Counter(layer["kind"] for layer in layers)
    attention = Counter(match[1] for layer in layers if (match := ATTENTION.match(layer["name"])))
    return ProfileContents(
        kernels=len(layers) - sum(kinds[kind] for kind in NOT_KERNELS),
        attention=dict(sorted(attention.items())),
        cache_copies=len(copies),
        cache_copy_bytes=sum(_copied_bytes(layer, kv_length) for layer in copies),
        logits_copies=sum(_copies_logits(layer) for layer in layers),
        reformats=sum(count for kind, count in kinds.items() if "reformat" in kind.lower()),
        host_copies=kinds["ShapeHostToDevice"],
        device_bytes=device_bytes,
    )


def _copies_cache(layer: re.Match[str]) -> bool:
    """Whether a layer reads the cache, and neither updates it nor is the attention."""
    reads = any(CACHE.match(name) for name in TENSOR.findall(layer["inputs"]))
    writes = any(PRESENT.match(name) for name in TENSOR.findall(layer["outputs"]))
    return reads and not writes and not ATTENTION.match(layer["name"])


def _copied_bytes(layer: re.Match[str], kv_length: int) -> int:
    """Bytes of the cache's rows that a copy reads, and of all that it writes."""
    found = {side: SIZED_TENSOR.findall(layer[side]) for side in ("inputs", "outputs")}
    read = [
        _size(dimensions, datatype, kv_length, is_cache=True)
        for name, dimensions, datatype in found["inputs"]
        if CACHE.match(name)
    ]
    written = [_size(dimensions, datatype, kv_length) for _, dimensions, datatype in found["outputs"]]
    return sum(read) + sum(written)


def _size(dimensions: str, datatype: str, kv_length: int, *, is_cache: bool = False) -> int:
    """Bytes of a tensor; of a cache, those of rows 0..S-1."""
    shape = [kv_length if each == "-1" else int(each) for each in dimensions.split(",")]
    if is_cache:
        shape[ROW_AXIS] = min(shape[ROW_AXIS], kv_length)
    return math.prod(shape) * BITS[datatype] // 8


def _copies_logits(layer: re.Match[str]) -> bool:
    writes = any(LOGITS_OUTPUT.match(name) for name in TENSOR.findall(layer["outputs"]))
    return writes and ONLY_COPIES.match(layer["name"]) is not None
