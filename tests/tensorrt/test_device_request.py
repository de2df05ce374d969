"""Requests whose loop stays on the device give what they give with the loop on the host, or are refused by name.

Nothing here ran on a GPU: both run over the simulated one, and equality is required of tokens, text, end, and every
record.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from cllm_export import load
from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import Bundle
from cllm_export.cli import main
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.prefix.prompt_state import PromptState
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from cllm_export.runtime.request_run import Generation
from cllm_export.runtime.service import Service
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.loop import device_loop
from cllm_export.tensorrt.loop.device_request import DeviceLoops
from cllm_export.tensorrt.plan_files import Plan
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.conftest import PINNED, THREADS, Workshop
from tests.fakes import properties
from tests.tensorrt.simulation import SimulatedGpu

SIZES = (8, 16)
EOS = tuple(range(60, 80))
"""As many as a random model meets one of in some twenty tokens."""
TOKENS = st.lists(st.integers(3, 90), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return workshop.copy(workshop.bundle("small", max_length=96), tmp_path_factory.mktemp("requests") / "bundle")


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> Plan:
    options = PlanOptions(batch_size=2, block_sizes=SIZES, prefill_chunk=16, kv_lengths=(32, 64))
    return build_plan(bundle, options, gpu=SimulatedGpu().gpu)


class Side(NamedTuple):
    """A model over a GPU of its own."""

    simulated: SimulatedGpu
    model: Model


def open_side(bundle: Bundle, plan: Plan, directory: Path) -> Side:
    simulated = SimulatedGpu()
    gpu = replace(simulated.gpu, compiler=simulated.compiler(directory))
    engine = TrtEngine(bundle, plan=plan, gpu=gpu)
    state = PromptState(
        engine, max_bytes=1 << 20, fingerprint=bundle.fingerprint, max_length=bundle.manifest.max_length
    )
    facts = replace(bundle.manifest, eos_token_ids=EOS)
    return Side(simulated, Model(facts, engine, TextCodec.of_bundle(bundle), prompt_state=state))


@pytest.fixture(scope="module")
def sides(bundle: Bundle, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Side]]:
    """The loop on the host, and on the device."""
    host, device = (open_side(bundle, plan, tmp_path_factory.mktemp("kernels")) for _ in range(2))
    yield host, device
    for side in (host, device):
        side.model.close()
        assert side.simulated.cuda.is_empty()
        assert not side.simulated.driver.behaviour.modules


@pytest.fixture
def device(sides: tuple[Side, Side]) -> Side:
    return sides[1]


def facts_of(generation: Generation) -> dict[str, Any]:
    """All that does not tell of time, and where the loop ran."""
    statistics = replace(
        generation.statistics, prefill_seconds=0.0, decode_seconds=0.0, engine_seconds=0.0, on_device=None
    )
    return {name: getattr(generation, name) for name in ("text", "token_ids", "finish_reason", "forwards")} | {
        "statistics": statistics
    }


@settings(properties, max_examples=60)
@given(data=st.data(), prompt=TOKENS, is_ahead=st.booleans(), count=st.sampled_from([1, 2, 8, 64]))
def test_a_request_gives_what_it_gives_with_the_loop_on_the_host(
    sides: tuple[Side, Side], data: st.DataObject, prompt: list[int], is_ahead: bool, count: int
):
    """Limits, ends of sequence, stop strings, prompts that begin alike: records, statistics and reuse included."""
    host, device = sides
    options: dict[str, Any] = {
        "method": "jacobi",
        "block_size": data.draw(st.sampled_from(SIZES), "block_size"),
        "proposer": data.draw(st.sampled_from(["pad", "repeat"]), "proposer"),
        "max_new_tokens": data.draw(st.integers(1, 96 - len(prompt)), "max_new_tokens"),
        "ignore_eos": data.draw(st.booleans(), "ignore_eos"),
    }
    shorter = prompt[: data.draw(st.integers(1, len(prompt)), "of the prompt, what was read before")]
    text, _ = (side.model.generate(shorter, **options).text for side in sides)  # both have kept the same
    start = data.draw(st.integers(0, max(0, len(text) - 1)), "start of the stop string")
    if stop := text[start : start + data.draw(st.integers(0, 3), "its length")]:
        options["stop"] = [stop]
    expected = host.model.generate(prompt, **options)
    device.simulated.cuda.is_ahead = is_ahead
    found = device.model.generate(prompt, **options, forwards_per_sync=count)
    device.simulated.cuda.is_ahead = False
    assert facts_of(found) == facts_of(expected)
    event(found.finish_reason)
    on_device = found.statistics.on_device
    assert on_device is not None
    assert on_device.num_forwards >= found.statistics.forwards
    assert found.statistics.syncs_per_token == on_device.num_syncs / max(1, len(found.token_ids))
    assert expected.statistics.on_device is None


def test_what_a_request_read_and_gave_is_kept_for_the_next(bundle: Bundle, plan: Plan, tmp_path: Path):
    side = open_side(bundle, plan, tmp_path)
    with side.model as model:
        first = model.generate([*range(3, 30)], max_new_tokens=20, ignore_eos=True, block_size=8, forwards_per_sync=4)
        text = [*range(3, 30), *first.token_ids]
        again = model.generate(text, max_new_tokens=9, ignore_eos=True, block_size=8)
        assert again.statistics.reused_tokens >= len(text) - 2
        on_device = model.generate(text, max_new_tokens=9, ignore_eos=True, block_size=8, forwards_per_sync=4)
        assert on_device.statistics.reused_tokens >= len(text) - 2
        assert on_device.token_ids == again.token_ids
        assert model.generate(text, max_new_tokens=9, ignore_eos=True, block_size=8).token_ids == again.token_ids
    assert side.simulated.cuda.is_empty()


def test_a_stream_gives_the_text_launch_by_launch_and_may_be_left(device: Side, monkeypatch: pytest.MonkeyPatch):
    """The launches are held here, so that nothing but the request itself ends them."""
    held, decode = [], device_loop.DeviceLoop.decode

    def hold(*arguments: Any, **options: Any) -> Any:
        held.append(decode(*arguments, **options))
        return held[-1]

    monkeypatch.setattr(device_loop.DeviceLoop, "decode", hold)
    options: dict[str, Any] = {"block_size": 8, "max_new_tokens": 40, "ignore_eos": True}
    expected = device.model.generate([5, 6, 7], **options)
    with device.model.stream([5, 6, 7], **options, forwards_per_sync=2) as stream:
        assert "".join(stream) == expected.text
        assert stream.result().token_ids == expected.token_ids
    with device.model.stream([5, 6, 7], **options, forwards_per_sync=2) as stream:
        next(stream)
    left = stream.result()
    assert left.finish_reason == "cancelled"
    assert left.token_ids == expected.token_ids[: len(left.token_ids)]
    assert 0 < len(left.token_ids) < 40
    assert left.statistics.on_device is not None
    assert not any(device.simulated.cuda.queues.values()), "the device was left at work"
    assert device.model.generate([5, 6, 7], **options).token_ids == expected.token_ids


def test_fewer_waits_of_the_host_are_what_it_brings(device: Side):
    options: dict[str, Any] = {"block_size": 8, "max_new_tokens": 48, "ignore_eos": True}
    waits = {}
    for count in (1, 4, 16):
        for _ in range(4):  # the last replays what the others recorded
            statistics = device.model.generate([5, 6, 7], **options, forwards_per_sync=count).statistics
        assert statistics.on_device
        waits[count] = statistics.on_device.num_syncs
        assert waits[count] <= -(-statistics.forwards // count) + 1
        assert statistics.to_dict()["on_device"] == {
            "num_forwards": statistics.on_device.num_forwards,
            "num_syncs": waits[count],
            "form": "conditional",
            "form_reason": None,
            "syncs_per_token": round(waits[count] / 48, 4),
        }
    assert waits[16] < waits[4] < waits[1]


REFUSED: dict[str, dict[str, Any]] = {
    "forwards_per_sync must be an integer of at least 1, got 0": {"forwards_per_sync": 0},
    "excludes sampling": {"temperature": 0.7},
    "excludes logprobs": {"logprobs": 0},
    "for the method jacobi, and the method is autoregressive": {"method": "autoregressive"},
    "for the method jacobi, and the method is jacobi-block": {"method": "jacobi-block"},
    "for the method jacobi, and the method is speculative": {"method": "speculative"},
    "for the proposers pad and repeat, and the proposer is 'lookup'": {"proposer": "lookup"},
    r"and the proposer is 'pool\+repeat'": {"proposer": "pool+repeat"},
    "excludes block_size 'auto'": {"block_size": "auto"},
    "takes a block size of the plan's, 8 or 16, got 12": {"block_size": 12},
    "excludes sampling: leave one": {"repetition_penalty": 1.1},
    "excludes a grammar": {"regex": "a+"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_device_cannot_do_is_refused_by_name_before_anything_runs(device: Side, message: str):
    if "regex" in REFUSED[message]:
        pytest.importorskip("llguidance")
    before = len(device.simulated.runtime.calls)
    options: dict[str, Any] = {"method": "jacobi", "block_size": 8, "forwards_per_sync": 4, **REFUSED[message]}
    with pytest.raises(OptionError, match=message):
        device.model.generate([5, 6], **options)
    assert len(device.simulated.runtime.calls) == before


def test_too_many_ends_are_refused_by_number(device: Side):
    model = device.model
    many = Model(replace(model.facts, eos_token_ids=tuple(range(257))), model.engine, model.codec)  # type: ignore[type-var]
    with pytest.raises(OptionError, match="256 end-of-sequence tokens at most, the model has 257"):
        many.generate([5, 6], block_size=8, forwards_per_sync=2)


def test_lookahead_is_refused(device: Side):
    with pytest.raises(OptionError, match="TrtEngine runs no lookahead graph"):
        device.model.generate([5, 6], method="lookahead")
    with pytest.raises(OptionError, match="forwards_per_sync is for the method jacobi, and the method is lookahead"):
        device.model.generate([5, 6], method="lookahead", forwards_per_sync=2)


def test_an_engine_that_is_not_tensorrts_is_refused_by_name(bundle: Bundle):
    model = Model(bundle.manifest, OrtEngine(bundle, threads=THREADS), TextCodec.of_bundle(bundle))
    with pytest.raises(OptionError, match=r"is for TensorRT, and this model runs on OrtEngine.*provider='tensorrt'"):
        model.generate([5, 6], forwards_per_sync=2)


def test_a_service_refuses_it_and_says_where_it_runs(device: Side):
    with (
        Service(device.model, block_size=8) as service,
        pytest.raises(OptionError, match=r"one request at a time, through Model\.generate"),
    ):
        service.submit([5, 6], forwards_per_sync=2)


def test_the_default_block_size_is_the_models_own(device: Side):
    assert device.model.facts.block_size == 16
    found = device.model.generate([5, 6], max_new_tokens=3, ignore_eos=True, forwards_per_sync=2)
    assert {len(record.block) for record in found.forwards} == {16}


def test_a_device_that_fails_ends_the_request_and_frees_the_model(bundle: Bundle, plan: Plan, tmp_path: Path):
    side = open_side(bundle, plan, tmp_path)
    options: dict[str, Any] = {"block_size": 8, "max_new_tokens": 30, "ignore_eos": True, "forwards_per_sync": 2}
    with side.model as model:
        expected = model.generate([5, 6], **options).token_ids
        side.simulated.tensorrt.broken.add("execute")
        with pytest.raises(EngineError, match="TensorRT says"):
            model.generate([*range(3, 40)], **options)
        side.simulated.tensorrt.broken.clear()
        assert model.generate([5, 6], **options).token_ids == expected
    assert side.simulated.cuda.is_empty()


def test_a_device_that_ends_a_request_too_early_is_found_out(device: Side, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_loop.DeviceLoop, "decode", lambda *_, **__: iter(()))
    monkeypatch.setattr("cllm_export.tensorrt.loop.device_request.DeviceRequest.cancel", lambda *_: None)
    with pytest.raises(EngineError, match="ended a request that has not ended by its rules"):
        device.model.generate([5, 6], block_size=8, max_new_tokens=3, forwards_per_sync=2)


@pytest.fixture
def machine(bundle: Bundle, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """What ``load`` takes for this machine's GPU."""
    simulated = SimulatedGpu()
    gpu = replace(simulated.gpu, compiler=simulated.compiler(tmp_path))
    monkeypatch.setattr("cllm_export.tensorrt.library.open_gpu", lambda _: gpu)
    return simulated


def test_a_model_gives_everything_back_and_does_not_run_afterwards(machine: SimulatedGpu, bundle: Bundle):
    with load(bundle.path, provider="tensorrt", draft_model=bundle.path) as model:
        expected = model.generate("a", block_size=8, max_new_tokens=9, ignore_eos=True).token_ids
        drafted = model.generate("a", method="speculative", block_size=8, max_new_tokens=9, ignore_eos=True)
        on_device = model.generate("a", block_size=8, max_new_tokens=9, ignore_eos=True, forwards_per_sync=3)
        assert drafted.token_ids == on_device.token_ids == expected
        assert not machine.cuda.is_empty()
    assert machine.cuda.is_empty()
    assert not machine.driver.behaviour.modules
    model.close()
    for use in (lambda: model.generate("a"), lambda: model.generate("a", block_size=8, forwards_per_sync=3)):
        with pytest.raises(EngineError, match="this model is closed"):
            use()
    engine: Any = model.engine
    for run in (
        lambda: engine.forward(Batch([[1]], [1], [0])),
        lambda: engine.read_rows(0, 0, 1),
        lambda: engine.enqueue_decode(8, 32),
    ):
        with pytest.raises(EngineError, match="this engine is closed"):
            run()


@pytest.mark.parametrize("count", [None, 4])
def test_the_command_line_decodes_on_the_device_and_tells_the_waits(
    machine: SimulatedGpu,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int | None,
):
    prompts = bundle.path.parent / "prompts.txt"
    prompts.write_text("one\nand another\n", encoding="utf-8")
    asked = ["generate", str(bundle.path), "--provider", "tensorrt", "--block-size", "8", "--max-new-tokens", "12"]
    on_device = ["--forwards-per-sync", str(count)] if count else []

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["cllm-export", *asked, *on_device, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert not exit_info.value.code
        assert machine.cuda.is_empty(), "the command left something on the device"
        captured = capsys.readouterr()
        return captured.out, captured.err

    out, err = run("--stats", "one")
    assert ("waits of the host" in err) == bool(count)
    lines = [json.loads(line) for line in run("--json", "--prompts", str(prompts))[0].splitlines()]
    assert [("on_device" in line["stats"]) for line in lines] == [bool(count)] * 2
    assert lines[0]["text"] == out.removesuffix("\n")


def test_the_command_line_refuses_it_beside_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["cllm-export", "generate", str(bundle.path), "--forwards-per-sync", "4", "one"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert "--forwards-per-sync is for TensorRT" in capsys.readouterr().err


def test_loops_are_made_once_for_each_n_and_k(bundle: Bundle, plan: Plan, tmp_path: Path):
    simulated = SimulatedGpu()
    gpu = replace(simulated.gpu, compiler=simulated.compiler(tmp_path))
    with ExitStack() as owned:
        engine = owned.enter_context(TrtEngine(bundle, plan=plan, gpu=gpu))
        loops = DeviceLoops()
        owned.callback(loops.close)
        first = loops.find(engine, block_size=8, forwards_per_sync=2)
        assert loops.find(engine, block_size=8, forwards_per_sync=2) is first
        assert loops.find(engine, block_size=8, forwards_per_sync=3) is not first
        assert loops.find(engine, block_size=16, forwards_per_sync=2) is not first
    assert simulated.cuda.is_empty()


def test_an_old_driver_unrolls_and_the_statistics_say_why(bundle: Bundle, plan: Plan, tmp_path: Path):
    side = open_side(bundle, plan, tmp_path)
    side.simulated.cuda.driver = 12030
    options: dict[str, Any] = {"block_size": 8, "max_new_tokens": 40, "ignore_eos": True}
    with side.model as model:
        expected = model.generate([5, 6, 7], **options)
        for is_ahead in (False, True):
            side.simulated.cuda.is_ahead = is_ahead
            found = model.generate([5, 6, 7], **options, forwards_per_sync=3)
            assert facts_of(found)["forwards"] == expected.forwards
            on_device = found.statistics.on_device
            assert on_device is not None
            assert on_device.form == "unrolled"
            assert "the driver has 12.3" in str(on_device.form_reason)
            assert on_device.num_forwards - found.statistics.forwards <= 5
    assert side.simulated.cuda.is_empty()


def test_a_pinned_plan_decodes_on_the_device(workshop: Workshop, tmp_path: Path):
    bundle = workshop.copy(workshop.bundle("small", **PINNED), tmp_path / "bundle")
    simulated = SimulatedGpu()
    gpu = replace(simulated.gpu, compiler=simulated.compiler(tmp_path))
    engine = TrtEngine(bundle, plan=build_plan(bundle, gpu=gpu), gpu=gpu)
    with Model(bundle.manifest, engine, TextCodec.of_bundle(bundle)) as model:
        options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
        expected = model.generate([*range(3, 22)], **options)
        for _ in range(2):
            found = model.generate([*range(3, 22)], **options, forwards_per_sync=4)
            assert (found.token_ids, found.forwards) == (expected.token_ids, expected.forwards)
    assert simulated.cuda.is_empty()


def test_a_kernel_that_does_not_compile_ends_the_request_before_it_reads(bundle: Bundle, plan: Plan, tmp_path: Path):
    side = open_side(bundle, plan, tmp_path / "missing")
    with side.model as model:
        with pytest.raises(EngineError, match="NVRTC does not compile"):
            model.generate([5, 6, 7], block_size=8, max_new_tokens=4, forwards_per_sync=3)
        assert not side.simulated.tensorrt.executions
        assert len(model.generate([5, 6, 7], block_size=8, max_new_tokens=4, ignore_eos=True).token_ids) == 4
    assert side.simulated.cuda.is_empty()
