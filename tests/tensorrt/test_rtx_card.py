"""A plan of TensorRT for RTX on a simulated card: which calls are made, what is kept, and what is refused.

Every call is checked against the bindings of TensorRT for RTX themselves. No card ran anything here.
"""

from __future__ import annotations

import json
import logging
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.manifest import Bundle
from cllm_export.cli.show.decoding import show_bench
from cllm_export.errors import EngineError, GpuError, OptionError, PlanError
from cllm_export.measure import bench as measuring
from cllm_export.measure.bench import run_bench
from cllm_export.measure.options import BenchOptions
from cllm_export.runtime.decoding.block_size.latency_file import LATENCY_NAME
from cllm_export.runtime.decoding.block_size.time_forwards import time_in_turn
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.tensorrt import build_plan as building
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.library import TENSORRT_RTX
from cllm_export.tensorrt.plan_files import Plan, open_plan
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.conftest import THREADS, Workshop
from tests.tensorrt.simulation import SimulatedGpu

CAPABILITY, TARGET = (8, 9), "sm89"


def card(**device: Any) -> SimulatedGpu:
    return SimulatedGpu(library=TENSORRT_RTX, **{"name": "An RTX card", "capability": CAPABILITY, **device})


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


@pytest.fixture
def plan(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan that another machine built for cards of SM89, which no card has run."""
    builder = card()
    monkeypatch.setattr(building, "import_library", lambda _: builder.trt)
    options = PlanOptions(
        engine="tensorrt-rtx", targets=(TARGET,), block_sizes=(1, 8), prefill_chunk=16, kv_lengths=(32, 64)
    )
    built = build_plan(bundle, options)
    [asked] = builder.trt.called("IBuilderConfig.set_compute_capability")
    assert asked["compute_capability"] is builder.trt.ComputeCapability.SM89
    assert json.loads(built.file.read_bytes())["flags"] == ["REQUIRE_USER_ALLOCATION"], "a forward can be captured"
    assert not builder.tensorrt.executions, "a build server has no card to run a plan on"
    return built


def caches(plan: Plan) -> list[str]:
    return sorted(path.name for path in plan.path.glob("cache-*"))


def test_a_plan_runs_on_a_card_of_its_targets_with_the_tokens_of_the_cpu(bundle: Bundle, plan: Plan):
    prompt = random.Random(0).choices(range(bundle.manifest.geometry.vocab_size), k=37)
    simulated = card()
    cpu = Model(bundle.manifest, OrtEngine(bundle, threads=THREADS), TextCodec.of_bundle(bundle))
    with TrtEngine(bundle, gpu=simulated.gpu) as engine:
        model = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
        asked: dict[str, Any] = {"max_new_tokens": 40, "block_size": 8, "ignore_eos": True}
        assert model.generate(prompt, **asked).token_ids == cpu.generate(prompt, **asked).token_ids
        assert simulated.cuda.launches
    assert simulated.cuda.is_empty()


def test_the_first_load_runs_each_shape_and_keeps_its_kernels_for_the_next(bundle: Bundle, plan: Plan):
    first, second = card(), card()
    with TrtEngine(bundle, gpu=first.gpu) as engine:
        assert (engine.num_syncs, engine.run_seconds) == (0, 0.0)
        assert not engine.read_rows(0, 0, engine.geometry.cache_length).any(), "a dead row must hold no NaN"
    shapes = {(size, rows) for _, *rest in first.tensorrt.compiled if rest for _, size, rows in [rest]}
    whole = bundle.manifest.geometry.cache_length
    assert shapes == {(size, rows) for size in (1, 8) for rows in (32, 64, whole)}
    assert caches(plan) == ["cache-An-RTX-card-13-0.bin"]
    kept = (plan.path / caches(plan)[0]).read_bytes()
    with TrtEngine(bundle, gpu=second.gpu):
        assert second.tensorrt.executions == 0, "nothing has to be tried again"
    assert (plan.path / caches(plan)[0]).read_bytes() == kept
    with load(bundle.path) as model:
        prompt = [5, 9, 7]
        expected = model.generate(prompt, max_new_tokens=12, block_size=8, ignore_eos=True).token_ids
    with TrtEngine(bundle, gpu=second.gpu) as engine:
        again = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
        assert again.generate(prompt, max_new_tokens=12, block_size=8, ignore_eos=True).token_ids == expected
    assert second.tensorrt.compiled == []


@pytest.mark.parametrize(
    "other",
    [{"driver": 13020}, {"name": "Another RTX card"}],
    ids=["another driver", "another card"],
)
def test_each_card_and_driver_keeps_its_own_kernels(bundle: Bundle, plan: Plan, other: dict[str, Any]):
    for device in ({}, other):
        simulated = card(**device)
        with TrtEngine(bundle, gpu=simulated.gpu):
            assert simulated.tensorrt.compiled
    assert len(caches(plan)) == 2


@pytest.mark.parametrize("damage", [b"", b"not kernels", b'{"card": ["x", 0, "1.6"], "kernels": []}'])
def test_kernels_that_the_library_refuses_are_compiled_again(bundle: Bundle, plan: Plan, damage: bytes):
    with TrtEngine(bundle, gpu=card().gpu):
        pass
    [path] = plan.path.glob("cache-*")
    kept = path.read_bytes()
    path.write_bytes(damage)
    with TrtEngine(bundle, gpu=card().gpu):
        pass
    assert path.read_bytes() == kept


def test_a_plan_that_cannot_be_written_to_runs_and_says_so_once(
    bundle: Bundle, plan: Plan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: Path, _data: bytes) -> int:
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)  # the tests may run as root, whom no mode stops
    with caplog.at_level(logging.WARNING), TrtEngine(bundle, gpu=card().gpu) as engine:
        assert engine.block_sizes == (1, 8)
    [record] = caplog.records
    assert "are not kept, so each load compiles them again" in record.getMessage()
    assert caches(plan) == []


def test_a_card_of_other_generations_is_refused_with_the_command_that_rebuilds(bundle: Bundle, plan: Plan):
    with pytest.raises(
        PlanError, match=r"generation: built for sm89, here is sm120; rebuild with: .* --for sm89 --for sm120 "
    ):
        TrtEngine(bundle, gpu=card(capability=(12, 0)).gpu)
    with pytest.raises(PlanError, match=r"does not run here: generation: built for sm89, here is sm86; rebuild it"):
        TrtEngine(bundle, plan=plan, gpu=card(capability=(8, 6)).gpu)


def test_a_plan_that_fails_in_its_first_forwards_leaves_nothing_on_card_or_disk(bundle: Bundle, plan: Plan):
    for broken, said in (
        ("execute", r"does not run on this card: TensorRT failed in a forward .*simulated\] execute failed"),
        ("capture", r"does not run on this card: TensorRT for RTX cannot record a forward of .* as a CUDA graph"),
        ("runtime cache", "does not run on this card: TensorRT makes no execution context"),
    ):
        simulated = card()
        simulated.tensorrt.broken = {broken}
        with pytest.raises(PlanError, match=said):
            TrtEngine(bundle, gpu=simulated.gpu)
        assert simulated.cuda.is_empty()
        assert caches(plan) == []


def test_a_truncated_plan_is_refused_before_it_reaches_the_library(bundle: Bundle, plan: Plan):
    plan.file.write_bytes(plan.file.read_bytes()[:100])
    simulated = card()
    with pytest.raises(PlanError, match=r"has 100 bytes, its manifest says \d+; build it again: "):
        TrtEngine(bundle, gpu=simulated.gpu)
    with pytest.raises(PlanError, match="build it again: "):
        open_plan(plan.path)


def test_a_plan_that_the_library_does_not_load_is_an_error(bundle: Bundle, plan: Plan):
    simulated = card()
    simulated.tensorrt.broken = {"deserialize"}
    with pytest.raises(EngineError, match=r"TensorRT does not load .*simulated\] deserialize failed"):
        TrtEngine(bundle, gpu=simulated.gpu)
    assert simulated.cuda.is_empty()


def test_n_is_chosen_among_those_of_the_plan(bundle: Bundle, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """Another n is padded to one of these, and near the end of the cache there is no room for it."""
    with TrtEngine(bundle, gpu=card().gpu) as engine:
        model = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
        seen, forward = set(), engine.forward
        monkeypatch.setattr(
            engine, "forward", lambda batch, **named: seen.add(len(batch.input_ids[0])) or forward(batch, **named)
        )
        model.generate([5, 9, 7] * 9, max_new_tokens=40, block_size="auto", ignore_eos=True)
        assert 1 in seen <= {1, 8}


def test_bench_times_a_plan_and_keeps_no_times_of_it(
    bundle: Bundle, plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`latency.json` is of ONNX Runtime on this processor."""
    monkeypatch.setattr("cllm_export.tensorrt.library.open_gpu", lambda _: card().gpu)
    monkeypatch.setattr(measuring, "time_in_turn", partial(time_in_turn, rounds=1, min_seconds=0))
    options = BenchOptions(provider="tensorrt-rtx", methods=("jacobi",), block_sizes=(8,), max_new_tokens=4, repeats=1)
    report = run_bench([bundle], options=options)
    assert report["provider"] == "tensorrt-rtx"
    machine = report["machine"]
    assert (machine["device"], machine["plan"]) == (card().gpu.facts.name, plan.path.name)
    assert "onnxruntime" not in machine, "it ran nothing"
    show_bench(report)
    assert f"{machine['device']}, TensorRT for RTX {machine['tensorrt-rtx']}, driver 13.0" in capsys.readouterr().out
    assert {entry["equal"] for entry in report["settings"]} == {report["prompts"]}
    assert [each["block_size"] for each in report["bundles"][0]["latency"]] == [1, 8]
    assert not (bundle.path / LATENCY_NAME).exists()
    with pytest.raises(OptionError, match="block_sizes must be among the plan's, 1 or 8, got 16"):
        run_bench([bundle], options=BenchOptions(provider="tensorrt-rtx", block_sizes=(16,)))
    with pytest.raises(OptionError, match="plan is of one bundle, got 2 bundles"):
        run_bench([bundle, bundle], options=BenchOptions(provider="tensorrt-rtx", plan=plan.path.name))


def test_the_provider_opens_its_own_library(bundle: Bundle, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    simulated, asked = card(), []

    def open_gpu(library: Any) -> Any:
        asked.append(library)
        if library is not TENSORRT_RTX:
            raise GpuError("another library")
        return simulated.gpu

    monkeypatch.setattr("cllm_export.tensorrt.library.open_gpu", open_gpu)
    with load(bundle.path, provider="tensorrt-rtx") as model:
        assert model.generate([5, 9, 7], max_new_tokens=4, ignore_eos=True).token_ids
    with pytest.raises(GpuError, match="another library"):
        load(bundle.path, provider="tensorrt")
    assert [library.name for library in asked] == ["tensorrt-rtx", "tensorrt"]
