"""Plans: built from real bundles through doubles of every supported TensorRT, and kept under what they depend on.

Nothing here ran on a GPU. What is proved is that every call has the form that this TensorRT takes, that the profiles,
flags and files are those that were asked for, and that each way to fail ends in a sentence and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.bundle.quantization import Quantization
from cllm_export.errors import GpuError, MissingExtraError, OptionError, PlanError
from cllm_export.extras import install_line
from cllm_export.runtime.load import load
from cllm_export.tensorrt.build_plan import build_plan, profiles_of
from cllm_export.tensorrt.engine import TrtEngine, platform_of
from cllm_export.tensorrt.library import TENSORRT, TENSORRT_RTX, Library, open_gpu
from cllm_export.tensorrt.plan_files import Platform, find_plan, open_plan, plan_key, plans_of, require_fit
from cllm_export.tensorrt.plan_options import PlanOptions, default_kv_lengths, settle
from tests.conftest import PINNED, Workshop
from tests.fakes import with_manifest
from tests.tensorrt.simulation import SimulatedGpu, versions


@pytest.fixture(params=list(versions()), ids=[version for version, _ in versions()])
def simulated(request: pytest.FixtureRequest) -> SimulatedGpu:
    tensorrt, cuda = request.param
    return SimulatedGpu(tensorrt=tensorrt, cuda=cuda)


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


def test_a_plan_has_a_profile_for_chunks_and_one_for_each_block_size(simulated: SimulatedGpu, bundle: Bundle):
    plan = build_plan(bundle, PlanOptions(block_sizes=(16, 1, 8), prefill_chunk=32), gpu=simulated.gpu)
    profiles = json.loads(plan.file.read_bytes())["profiles"]
    assert [profile["input_ids"] for profile in profiles] == [
        [[1, 1], [1, 32], [1, 32]],
        [[1, 1], [1, 1], [1, 2]],
        [[1, 8]] * 3,
        [[1, 16]] * 3,
    ]
    assert [profile["head_rows"][2] for profile in profiles] == [[1], [1], [8], [16]]
    rows = bundle.manifest.geometry.cache_length
    assert {tuple(profile["kv_positions"][2]) for profile in profiles} == {(rows,)}
    assert plan.manifest.settings.block_sizes == (1, 8, 16)
    assert simulated.cuda.is_empty(), "the smoke forward left something on the device"
    assert simulated.tensorrt.executions == 1 + 3 * 1


def test_every_option_reaches_the_builder(simulated: SimulatedGpu, bundle: Bundle):
    options = PlanOptions(
        workspace=1 << 28,
        optimization_level=5,
        logits=False,
        weight_streaming=True,
        strip_weights=True,
        version_compatible=True,
        hardware="ampere+",
    )
    plan = build_plan(bundle, options, gpu=simulated.gpu)
    trt, content = simulated.trt, json.loads(plan.file.read_bytes())
    flags = {"WEIGHT_STREAMING", "STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"}
    assert set(content["flags"]) == flags, "REFIT alone may lose biases"
    assert "logits" not in content["outputs"]
    assert trt.called("set IBuilderConfig.builder_optimization_level") == [{"value": 5}]
    assert trt.called("IBuilderConfig.set_memory_pool_limit")[0]["pool_size"] == 1 << 28
    [level] = trt.called("set IBuilderConfig.hardware_compatibility_level")
    assert level["value"] is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert trt.called("OnnxParserRefitter.refit_from_file"), "a stripped plan gets its weights from the bundle"
    assert trt.called("set ICudaEngine.weight_streaming_budget_v2")


def test_a_pinned_bundle_gives_a_plan_without_profiles(simulated: SimulatedGpu, workshop: Workshop, tmp_path: Path):
    bundle = workshop.copy(workshop.bundle("small", **PINNED), tmp_path / "bundle")
    plan = build_plan(bundle, gpu=simulated.gpu)
    assert json.loads(plan.file.read_bytes())["profiles"] == []
    assert plan.manifest.settings.block_sizes == (PINNED["block_size"],)
    assert profiles_of(bundle.manifest, plan.manifest.settings) == []
    with pytest.raises(OptionError, match="pinned to 1 slots and blocks of 8"):
        build_plan(bundle, PlanOptions(block_sizes=(4,)), gpu=simulated.gpu)


def test_the_weights_of_a_linked_bundle_are_handed_over(simulated: SimulatedGpu, workshop: Workshop, tmp_path: Path):
    linked = workshop.bundle("small", weights="link")
    bundle = workshop.copy(linked, tmp_path / "bundle")
    build_plan(bundle, PlanOptions(strip_weights=True), gpu=simulated.gpu)
    sizes = {name: weight.length for name, weight in bundle.manifest.linked_weights.items()}
    assert len(sizes) > 5
    for reader in ("OnnxParser", "OnnxParserRefitter"):
        handed = simulated.trt.called(f"{reader}.load_initializer")
        assert {call["name"]: call["size"] for call in handed} == sizes


def test_a_plan_that_is_there_is_not_built_again_unless_forced(bundle: Bundle):
    simulated, said = SimulatedGpu(), []
    first = build_plan(bundle, gpu=simulated.gpu)
    again = build_plan(bundle, gpu=simulated.gpu, say=said.append)
    assert again == first
    assert len(simulated.trt.called("Builder.build_serialized_network")) == 1
    assert "is there already" in said[0]
    build_plan(bundle, gpu=simulated.gpu, force=True)
    assert len(simulated.trt.called("Builder.build_serialized_network")) == 2


def test_the_memory_that_a_build_is_expected_to_take_is_said_first(bundle: Bundle):
    said: list[str] = []
    build_plan(bundle, gpu=SimulatedGpu().gpu, say=said.append)
    assert [line.split(":")[0] for line in said[:7]] == [
        "predicted weights",
        "predicted KV cache",
        "predicted activations",
        "predicted running engine",
        "predicted prefix cache",
        "predicted build, host",
        "predicted build, device",
    ]
    assert [line.split(" in ")[0] for line in said[7:]] == ["parsed", "built", "loaded and ran"]


def test_what_kernels_took_is_kept_for_the_next_build_on_the_same_gpu(bundle: Bundle):
    simulated = SimulatedGpu()
    for size in (2, 4):
        build_plan(bundle, PlanOptions(block_sizes=(size,)), gpu=simulated.gpu)
    build_plan(bundle, gpu=SimulatedGpu(name="Another").gpu)
    contents = {path.name: path.read_bytes() for path in plans_of(bundle).glob("timing-*.cache")}
    assert sorted(contents.values()) == [b"measured;", b"measured;measured;"]


def test_a_timing_cache_that_does_not_fit_is_started_anew(bundle: Bundle):
    build_plan(bundle, gpu=SimulatedGpu().gpu)
    [path] = plans_of(bundle).glob("timing-*.cache")
    path.write_bytes(b"of another GPU")
    build_plan(bundle, PlanOptions(block_sizes=(2,)), gpu=SimulatedGpu().gpu)
    assert path.read_bytes() == b"measured;"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            "parse",
            r"does not take .*tensorrt.onnx: a node that is not known; TensorRT says: \[simulated\] parse failed",
        ),
        ("build", r"could not build a plan of .*; TensorRT says: \[simulated\] build failed"),
        ("deserialize", r"was built and does not run: TensorRT does not load .*simulated\] deserialize failed"),
        ("execute", r"was built and does not run: TensorRT failed in a forward .*simulated\] execute failed"),
        ("alias", "was built and does not run: the plan does not write present_key.0 in place of past_key.0"),
        ("kv_positions", "takes kv_positions for a shape, which must lie in host memory"),
    ],
)
def test_a_build_that_fails_says_why_in_tensorrts_words_and_leaves_nothing(bundle: Bundle, broken: str, message: str):
    simulated = SimulatedGpu()
    simulated.tensorrt.broken.add(broken)
    with pytest.raises(PlanError, match=message):
        build_plan(bundle, gpu=simulated.gpu)
    assert simulated.cuda.is_empty()
    assert [path.name for path in plans_of(bundle).rglob("*") if path.suffix != ".cache"] == []


def test_a_build_that_fails_keeps_the_plan_that_was_there(bundle: Bundle):
    simulated = SimulatedGpu()
    plan = build_plan(bundle, gpu=simulated.gpu)
    simulated.tensorrt.broken.add("build")
    with pytest.raises(PlanError):
        build_plan(bundle, gpu=simulated.gpu, force=True)
    open_plan(plan.path).check_file()


def test_a_bundle_with_operators_of_onnx_runtime_is_refused_before_anything_starts(bundle: Bundle):
    record = Quantization(
        scheme="int4",
        method="round to nearest",
        group_size=32,
        engines=("onnxruntime",),
        weights=("weight",),
        kept={},
    )
    with pytest.raises(PlanError, match=r"int4 for onnxruntime.*engine='tensorrt'"):
        build_plan(with_manifest(bundle, quantization=record))


def test_a_bf16_bundle_is_refused_on_a_gpu_without_bf16(bundle: Bundle):
    bf16 = with_manifest(bundle, precision="bf16")
    with pytest.raises(GpuError, match=r"bf16, which sm75 does not have.*precision='fp16'.*sm80 or newer"):
        build_plan(bf16, gpu=SimulatedGpu(capability=(7, 5)).gpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_sizes": (10_000,)}, "block_size must be at most"),
        ({"block_sizes": (0,)}, "block_sizes must be an integer of at least 1, got 0"),
        ({"kv_lengths": (10_000,)}, "kv_lengths must be at most the cache's"),
        ({"optimization_level": 6}, "optimization_level must be an integer from 0 to 5, got 6"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"hardware": "any"}, "hardware must be one of same, compute-capability, ampere+"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(bundle: Bundle, options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message.replace("+", r"\+")):
        settle(PlanOptions(**options), bundle.manifest)


def test_kv_lengths_double_up_to_the_whole_cache():
    assert default_kv_lengths(2111) == (256, 512, 1024, 2048, 2111)
    assert default_kv_lengths(256) == (256,)
    assert default_kv_lengths(100) == (100,)


HERE = Platform(gpu="Simulated GPU", compute_capability="9.0", tensorrt="11.4.0.106", driver="13.0")
ELSEWHERE: dict[str, Callable[[Platform], Platform]] = {
    "GPU": lambda here: replace(here, gpu="Another GPU"),
    "compute capability": lambda here: replace(here, gpu="Another GPU", compute_capability="8.6"),
    "TensorRT": lambda here: replace(here, tensorrt="11.0.0.114"),
    "driver (CUDA)": lambda here: replace(here, driver="13.1"),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_plan_for_another_machine_says_exactly_what_differs_and_how_to_rebuild(bundle: Bundle, what: str):
    build_plan(bundle, PlanOptions(block_sizes=(4,), strip_weights=True), gpu=SimulatedGpu().gpu)
    assert find_plan(bundle, HERE)
    with pytest.raises(PlanError) as raised:
        find_plan(bundle, ELSEWHERE[what](HERE))
    message = str(raised.value)
    assert f"{what}: built for " in message
    assert all(f"{other}: built" not in message for other in ELSEWHERE if other not in (what, "GPU"))
    assert f"rebuild with: cllm-export plan {bundle.path} --engine tensorrt --batch-size 1 --block-size 4" in message
    assert "--strip-weights" in message


def test_a_bundle_that_was_built_again_has_no_plan(bundle: Bundle):
    plan = build_plan(bundle, gpu=SimulatedGpu().gpu)
    rebuilt = replace(bundle, fingerprint="f" * 64)
    with pytest.raises(PlanError, match=f"bundle: built for {bundle.fingerprint}, here is ffff"):
        require_fit(plan, rebuilt, HERE)


@pytest.mark.parametrize(
    ("options", "there", "runs"),
    [
        ({"hardware": "compute-capability"}, {"gpu": "Another GPU"}, True),
        ({"hardware": "compute-capability"}, {"gpu": "Another GPU", "compute_capability": "8.6"}, False),
        ({"hardware": "ampere+"}, {"gpu": "Another GPU", "compute_capability": "8.6"}, True),
        ({"hardware": "ampere+"}, {"gpu": "Another GPU", "compute_capability": "7.5"}, False),
        ({"version_compatible": True}, {"tensorrt": "11.5.0.1"}, True),
        ({"version_compatible": True}, {"tensorrt": "11.3.0.1"}, False),
        ({"version_compatible": True}, {"tensorrt": "12.0.0.1"}, False),
    ],
)
def test_compatibility_flags_let_a_plan_run_where_they_say(
    bundle: Bundle, options: dict[str, Any], there: dict[str, str], runs: bool
):
    plan = build_plan(bundle, PlanOptions(**options), gpu=SimulatedGpu().gpu)
    assert (not plan.manifest.differences(bundle.fingerprint, replace(HERE, **there))) == runs


def test_the_key_follows_from_everything_a_plan_depends_on(bundle: Bundle):
    settings = settle(PlanOptions(), bundle.manifest)
    keys = {plan_key(bundle.fingerprint, HERE, settings), plan_key("f" * 64, HERE, settings)}
    keys |= {plan_key(bundle.fingerprint, change(HERE), settings) for change in ELSEWHERE.values()}
    keys |= {
        plan_key(bundle.fingerprint, HERE, settle(PlanOptions(**options), bundle.manifest))
        for options in (
            {"batch_size": 2},
            {"block_sizes": (2,)},
            {"prefill_chunk": 8},
            {"kv_lengths": (64,)},
            {"workspace": 1},
            {"optimization_level": 4},
            {"logits": False},
            {"weight_streaming": True},
            {"strip_weights": True},
            {"version_compatible": True},
            {"hardware": "ampere+"},
            {"single_row_kernels": True},
        )
    }
    assert len(keys) == 2 + len(ELSEWHERE) + 12


@pytest.mark.parametrize("last", [0, 1])
def test_of_two_plans_that_run_here_the_newest_is_taken_and_named(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, last: int
):
    gpu = SimulatedGpu().gpu
    plans = [build_plan(bundle, PlanOptions(block_sizes=(size,)), gpu=gpu) for size in (2, 4)]
    for plan in plans:
        os.utime(plan.path / "plan.json", ns=(0, 10**18 + (plan is plans[last])))
    with TrtEngine(bundle, gpu=gpu) as engine:
        assert engine.describe()["plan"] == plans[last].path.name
    told = [f"{plan.path.name} (n = {size}, 1 slot)" for plan, size in zip(plans, (2, 4), strict=True)]
    assert f"the newest is taken, {told[last]}; choose another with plan (--plan): {told[1 - last]}" in caplog.text


def test_a_plan_is_chosen_by_its_key_and_an_unknown_one_is_refused_with_those_there_are(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    gpu = SimulatedGpu().gpu
    monkeypatch.setattr("cllm_export.tensorrt.library.open_gpu", lambda _: gpu)
    with pytest.raises(PlanError, match="has no plan, so none of key 'old'"):
        load(bundle.path, provider="tensorrt", plan="old")
    keys = {size: build_plan(bundle, PlanOptions(block_sizes=(size,)), gpu=gpu).path.name for size in (2, 4)}
    for size, key in keys.items():
        with load(bundle.path, provider="tensorrt", plan=key) as model:
            assert model.engine.block_sizes == (size,)
    assert not caplog.records, "nothing was chosen for the user"
    for key in ("old", "../plans", ""):
        with pytest.raises(OptionError, match=f"plan must be one of {', '.join(sorted(keys.values()))}, got"):
            load(bundle.path, provider="tensorrt", plan=key)
    with pytest.raises(OptionError, match=r"plan is for provider tensorrt and tensorrt-rtx, got .* and provider cpu"):
        load(bundle.path, plan=keys[2])


def test_without_cuda_python_the_extra_of_the_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cllm_export.runtime.engines.cuda.require_gpu", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for library in (TENSORRT, TENSORRT_RTX):
        with pytest.raises(MissingExtraError, match=re.escape(install_line(library.extra))):
            open_gpu(library)


def test_a_bundle_without_a_plan_names_the_command(bundle: Bundle):
    with pytest.raises(PlanError, match=r"has no plan; build one with: cllm-export plan .* --engine tensorrt"):
        find_plan(bundle, HERE)


def test_a_damaged_plan_is_found_out(bundle: Bundle):
    plan = build_plan(bundle, gpu=SimulatedGpu().gpu)
    content = bytearray(plan.file.read_bytes())
    content[len(content) // 2] ^= 1
    plan.file.write_bytes(content)
    with pytest.raises(PlanError, match="is corrupted: its sha256 is"):
        build_plan(bundle, gpu=SimulatedGpu().gpu)
    plan.file.write_bytes(content[:-1])
    with pytest.raises(PlanError, match=f"has {len(content) - 1} bytes, its manifest says {len(content)}"):
        open_plan(plan.path)
    (plan.path / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="is damaged"):
        open_plan(plan.path)
    shutil.rmtree(plan.path)
    with pytest.raises(PlanError, match="holds no plan"):
        open_plan(plan.path)


def test_the_platform_is_what_gpu_and_bindings_say(simulated: SimulatedGpu):
    assert replace(platform_of(simulated.gpu), tensorrt=HERE.tensorrt) == HERE
    assert platform_of(simulated.gpu).tensorrt == simulated.trt.__version__


@pytest.mark.parametrize(
    ("library", "formats", "generation", "lacked"),
    [
        (TENSORRT_RTX, ("fp16", "fp8"), "sm86", "fp8"),
        (TENSORRT_RTX, ("fp32",), "sm75", "fp32"),
        (TENSORRT, ("fp16", "int4"), "sm75", "int4"),
        (TENSORRT, ("fp32", "int8"), "sm75", None),
        (TENSORRT_RTX, ("bf16", "fp8"), "sm89", None),
    ],
)
def test_a_library_knows_the_first_cards_of_each_number_format(
    library: Library, formats: tuple[str, ...], generation: str, lacked: str | None
):
    refused = pytest.raises(GpuError, match=f"it is a bundle with {lacked}, which {generation} does not have")
    with refused if lacked else contextlib.nullcontext():
        library.require_formats("it is", formats, ("sm120", generation))


@pytest.mark.parametrize("others", [(), ("unfolded",)], ids=["none", "of an earlier name"])
def test_a_bundle_without_a_graph_for_tensorrt_is_said_to_be_old(bundle: Bundle, others: tuple[str, ...]):
    said: list[str] = []
    graphs = dict.fromkeys((GREEDY_GRAPH, *others), bundle.manifest.graphs[GREEDY_GRAPH])
    build_plan(with_manifest(bundle, graphs=graphs), gpu=SimulatedGpu().gpu, say=said.append)
    assert said[0] == "this bundle has no graph for TensorRT: build it again, for a plan of fewer kernels"


def test_an_old_plan_does_not_keep_a_new_one_from_running(bundle: Bundle):
    gpu = SimulatedGpu().gpu
    old, new = (build_plan(bundle, PlanOptions(block_sizes=(size,)), gpu=gpu) for size in (2, 4))
    manifest = old.path / "plan.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 3', '"schema_version": 1'))
    assert find_plan(bundle, platform_of(gpu)) == new
    shutil.rmtree(new.path)
    with pytest.raises(PlanError, match="schema_version 1, this cllm-export reads 3: build it again"):
        find_plan(bundle, platform_of(gpu))
