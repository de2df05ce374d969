"""Plans by the real builder, and what is inside them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest

from cllm_export.bundle.manifest import Bundle, open_bundle
from cllm_export.errors import MissingExtraError
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.library import TENSORRT_RTX, import_library
from cllm_export.tensorrt.plan_contents import PlanContents
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.checkpoints import REALISTIC

GOLDEN = Path(__file__).with_name("plan_contents.json")
REWRITE = "python -m tests.tensorrt.rtx.golden"
BLOCK_SIZES = (1, 16)
PROFILES = ("prefill", *(f"n = {size}" for size in BLOCK_SIZES))
COUNTS = ("kernels", "attention", "cache_copies", "cache_copy_bytes", "host_copies", "logits_copies", "reformats")
CARDS = ("sm89", "sm120")
"""Ada and Blackwell. One plan holds both."""
ALL_SIZES = (1, 16, 64)
NUM_LAYERS = 2
SPELLED_OUT = ("gemma2",)
"""Families whose attention the graph spells out, since no kernel has their softcap."""
MOST_WEIGHTS = 1.02
"""Device memory of a plan's weights over the bytes that the graph's weights have. Kernels pad some of them."""
BITS = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.FLOAT8E4M3FN: 8,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.FLOAT: 32,
}


def require_library() -> str:
    """The version of TensorRT for RTX. Without it, the test is skipped with the reason."""
    try:
        return str(import_library(TENSORRT_RTX).__version__)
    except MissingExtraError as error:
        pytest.skip(str(error))


def contents_of(bundle: Bundle, directory: Path, *targets: str, **options: Any) -> PlanContents:
    """Build a plan for these targets, by default SM89, and give what the builder says of it.

    The plan is written into another directory with the bundle's files, so that the bundle stays as it is.
    """
    shutil.copytree(bundle.path, directory, copy_function=os.link)
    asked: dict[str, Any] = {"block_sizes": BLOCK_SIZES, **options}
    plan = build_plan(open_bundle(directory), PlanOptions(engine="tensorrt-rtx", targets=targets or ("sm89",), **asked))
    assert plan.manifest.contents is not None, "the builder's log no longer reads as it did"
    return plan.manifest.contents


def graph_weight_bytes(bundle: Bundle) -> int:
    """Bytes of the number weights of the graph that TensorRT parses. Indices and shapes are left out."""
    graph = onnx.load(bundle.graph_path(bundle.tensorrt_graph), load_external_data=False).graph
    return sum(math.prod(each.dims) * BITS.get(each.data_type, 0) // 8 for each in graph.initializer)


def require_sound(
    contents: PlanContents, bundle: Bundle, *, attention: int = NUM_LAYERS, num_profiles: int = 1 + len(ALL_SIZES)
) -> None:
    """Check that each profile of a plan has so many attention kernels, and that the plan holds each weight once."""
    assert [sum(profile.attention.values()) for profile in contents.profiles] == [attention] * num_profiles
    assert contents.weight_bytes <= MOST_WEIGHTS * graph_weight_bytes(bundle)


def counts_of(contents: PlanContents) -> dict[str, dict[str, Any]]:
    """What the golden holds of a plan: the counts of each profile."""
    profiles = zip(PROFILES, contents.profiles, strict=True)
    return {name: {key: asdict(profile)[key] for key in COUNTS} for name, profile in profiles}


def read_golden(version: str) -> Mapping[str, Any] | None:
    """The counts of each family that a version of the library gives. None of a version that nobody has looked at."""
    return json.loads(GOLDEN.read_text(encoding="utf-8")).get(version)


def family_of(name: str) -> str:
    return REALISTIC[name].family
