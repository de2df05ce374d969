"""The host lags behind the loop on the device: what it reads late is what the loop on the host gives, at any lag.

Nothing here ran on a GPU. The simulated one runs what it is given at once, or no further than somebody waits for; a
real one is somewhere between. A buffer that is read too late fails in the one, one read too early in the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_export.bundle.manifest import Bundle
from cllm_export.runtime.decoding.batch import BatchRequest, decode_requests
from cllm_export.runtime.engines import cuda as cuda_module
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.library import Gpu
from cllm_export.tensorrt.loop import device_loop, launch_copy
from cllm_export.tensorrt.loop.device_loop import DeviceLoop, Form
from cllm_export.tensorrt.plan_files import Plan
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.conftest import Workshop
from tests.fakes import properties
from tests.tensorrt.doubles import Nonconforming
from tests.tensorrt.simulation import SimulatedGpu

BLOCK_SIZE = 8
SLOTS = 3
LIMIT = 60
"""New tokens, at most, of what is drawn."""
COUNTS = (1, 2, 8)
"""Forwards a launch."""
PROMPTS = [[5, 6, 7], [9], [*range(2, 31)]]
SHORTER = [[*range(2, 19)]] * SLOTS
"""Their first launch of two forwards fills the smallest KV length, if every draft is right."""
RAGGED = st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=40), min_size=SLOTS, max_size=SLOTS)


class Expected(NamedTuple):
    """What the loop on the host gives."""

    token_ids: list[list[int]]
    num_forwards: int
    """Of the request that takes most."""


def decode_on_host(engine: Any, prompts: Sequence[list[int]], proposer: str, limit: int, eos: set[int]) -> Expected:
    decodes = decode_requests(
        engine,
        [BatchRequest(prompt=prompt, max_new_tokens=limit) for prompt in prompts],
        method="jacobi",
        block_size=BLOCK_SIZE,
        proposer=proposer,
        eos_token_ids=eos,
        pad_token_id=0,
    )
    tokens = [[token for record in decode.records for token in record.new] for decode in decodes]
    return Expected(tokens, max(len(decode.records) for decode in decodes))


class Stand:
    """An engine over a simulated GPU, with a loop for each form and k."""

    def __init__(self, bundle: Bundle, plan: Plan, directory: Path) -> None:
        self.simulated = SimulatedGpu()
        self._owned = contextlib.ExitStack()
        self.engine = self._owned.enter_context(TrtEngine(bundle, plan=plan, gpu=self.simulated.gpu))
        self._directory = directory
        self._loops: dict[tuple[Form, int], DeviceLoop] = {}

    def loop(self, form: Form, count: int) -> DeviceLoop:
        if (form, count) not in self._loops:
            self._directory.joinpath(f"{form}{count}").mkdir()
            self._loops[form, count] = self._owned.enter_context(
                DeviceLoop(
                    self.engine,
                    block_size=BLOCK_SIZE,
                    compute_capability="9.0",
                    forwards_per_sync=count,
                    form=form,
                    compiler=self.simulated.compiler(self._directory / f"{form}{count}"),
                )
            )
        return self._loops[form, count]

    def close(self) -> None:
        self._owned.close()


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return workshop.copy(workshop.bundle("small", max_length=96), tmp_path_factory.mktemp("lag") / "bundle")


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> Plan:
    options = PlanOptions(batch_size=SLOTS, block_sizes=(BLOCK_SIZE, 16), prefill_chunk=16, kv_lengths=(32, 64))
    return build_plan(bundle, options, gpu=SimulatedGpu().gpu)


@pytest.fixture(scope="module")
def stand(bundle: Bundle, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    stand = Stand(bundle, plan, tmp_path_factory.mktemp("kernels"))
    yield stand
    stand.close()
    assert stand.simulated.cuda.is_empty()


@settings(properties, max_examples=60)
@given(data=st.data(), prompts=RAGGED, form=st.sampled_from(get_args(Form)), is_ahead=st.booleans())
def test_tokens_are_those_of_the_loop_on_the_host_at_any_lag(
    stand: Stand, data: st.DataObject, prompts: list[list[int]], form: Form, is_ahead: bool
):
    """Ragged prompts, ends by limit, by end of sequence and at the end of the cache, graphs recorded and replayed."""
    engine, count = stand.engine, data.draw(st.sampled_from(COUNTS), "k")
    room = engine.geometry.cache_length - BLOCK_SIZE + 1 - max(map(len, prompts))
    limit = data.draw(st.integers(1, LIMIT) | st.just(room), "max_new_tokens")
    proposer = data.draw(st.sampled_from(["pad", "repeat"]), "proposer")
    stand.simulated.cuda.is_ahead = False
    expected = decode_on_host(engine, prompts, proposer, limit, set())
    eos = set(data.draw(st.lists(st.sampled_from([*chain(*expected.token_ids)]), max_size=2), "eos"))
    expected = decode_on_host(engine, prompts, proposer, limit, eos)
    stand.simulated.cuda.is_ahead = is_ahead
    loop = stand.loop(form, count)
    result = loop.run(
        prompts, max_new_tokens=limit, eos_token_ids=eos, proposed_token=None if proposer == "repeat" else 0
    )
    assert result.token_ids == expected.token_ids
    idle = result.num_forwards - expected.num_forwards
    most = 1 if form == "conditional" else 2 * count - 1  # the rest of the last launch, and the one behind it
    assert 0 <= idle <= most
    assert result.num_syncs <= result.num_forwards


def record_all(loop: DeviceLoop, prompts: list[list[int]], limit: int) -> None:
    """Have every graph that such a run replays recorded."""
    for _ in range(4):
        loop.run(prompts, max_new_tokens=limit, eos_token_ids=(), proposed_token=0)


@pytest.mark.parametrize("form", get_args(Form))
def test_the_device_has_its_next_launch_before_the_host_waits(stand: Stand, form: Form):
    """Whatever the host waits for, more stands behind it, but where nothing can be left to do."""
    stand.simulated.cuda.is_ahead = False
    loop = stand.loop(form, 2)
    record_all(loop, PROMPTS, 40)
    before = len(stand.simulated.cuda.left_behind)
    result = loop.run(PROMPTS, max_new_tokens=40, eos_token_ids=(), proposed_token=0)
    left_behind = stand.simulated.cuda.left_behind[before:]
    assert len(left_behind) == result.num_syncs > 4
    assert all(left_behind[:-1])
    assert left_behind[-1] == 0


@pytest.mark.parametrize("form", get_args(Form))
def test_nothing_is_launched_ahead_that_can_find_nothing_to_do(stand: Stand, form: Form):
    """A forward gives a token at least, so that as many forwards as tokens are left end every request."""
    loop = stand.loop(form, 8)
    record_all(loop, PROMPTS, 8)
    result = loop.run(PROMPTS, max_new_tokens=8, eos_token_ids=(), proposed_token=0)
    assert result.num_syncs == 1
    assert result.num_forwards <= 8


def test_attention_reads_no_more_than_what_is_left_may_need(bundle: Bundle, plan: Plan, tmp_path: Path):
    """Two tokens are at most two forwards, however many a launch might have."""
    stand = Stand(bundle, plan, tmp_path)
    for _ in range(2):
        stand.loop("conditional", 64).run([[5, 6, 7]] * SLOTS, max_new_tokens=2, eos_token_ids=(), proposed_token=0)
    given = stand.simulated.trt.called("IExecutionContext.set_input_shape")
    assert {call["shape"] for call in given if call["name"] == "kv_positions"} == {(32,)}
    stand.close()


@pytest.mark.parametrize("form", get_args(Form))
def test_a_run_that_is_left_early_leaves_loop_and_engine_as_they_were(stand: Stand, form: Form):
    stand.simulated.cuda.is_ahead = False
    expected = decode_on_host(stand.engine, PROMPTS, "pad", 30, set())
    loop = stand.loop(form, 2)
    record_all(loop, PROMPTS, 30)
    asked: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": (), "proposed_token": 0}
    loop.read(PROMPTS)
    with contextlib.closing(loop.decode(PROMPTS, **asked)) as launches:
        first = next(launches)
    assert [turns[0].next_ids[0] for turns in first] == [tokens[0] for tokens in expected.token_ids]
    assert not any(stand.simulated.cuda.queues.values()), "the device was left at work"
    assert loop.run(PROMPTS, **asked).token_ids == expected.token_ids


def test_a_slot_without_a_prompt_idles(stand: Stand):
    stand.simulated.cuda.is_ahead = False
    expected = decode_on_host(stand.engine, PROMPTS[2:], "pad", 30, set())
    loop, prompts = stand.loop("conditional", 8), [[], [], PROMPTS[2]]
    loop.read(prompts)
    given = list(loop.decode(prompts, max_new_tokens=30, eos_token_ids=(), proposed_token=0))
    assert not any(turns for of_launch in given for turns in of_launch[:2])
    turns = [turn for of_launch in given for turn in of_launch[2]]
    tokens = [token for turn in turns for token in turn.next_ids[: turn.num_accepted]]
    assert tokens[:30] == expected.token_ids[0]


def accept_all(simulated: SimulatedGpu) -> None:
    """Let every forward find its whole block right, and fail where a row of it is outside of what it reads: no model
    moves on as fast as this."""

    def execute(_: Any, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        view = simulated.tensorrt._view
        blocks = view(addresses["input_ids"], shapes["input_ids"], "tensor(int64)")
        slots, size = blocks.shape
        names = ("num_committed", "write_index", "num_accepted")
        committed, start, accepted = (view(addresses[name], (slots,), "tensor(int64)") for name in names)
        (kv_length,) = shapes["kv_positions"]
        if start.max() + size > kv_length:
            raise Nonconforming(f"rows {start.max()} to {start.max() + size} of {kv_length}")
        if shapes["head_rows"][0] == size:
            view(addresses["next_ids"], (slots, size), "tensor(int64)")[...] = blocks
            accepted[:] = committed * size

    simulated.tensorrt._execute = execute  # type: ignore[method-assign]


@pytest.mark.parametrize("is_ahead", [False, True], ids=["behind", "ahead"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", get_args(Form))
def test_no_row_is_outside_where_every_draft_is_right(
    bundle: Bundle, plan: Plan, tmp_path: Path, form: Form, count: int, is_ahead: bool
):
    """Up to the end of the cache, one slot far ahead of the others, in graphs that are recorded and replayed."""
    stand = Stand(bundle, plan, tmp_path)
    accept_all(stand.simulated)
    stand.simulated.cuda.is_ahead = is_ahead
    room = stand.engine.geometry.cache_length - BLOCK_SIZE + 1 - len(PROMPTS[2])
    for prompts, limit in ((PROMPTS, room), (PROMPTS, room), (PROMPTS, room - 5), (SHORTER, room), (SHORTER, 40)):
        result = stand.loop(form, count).run(prompts, max_new_tokens=limit, eos_token_ids=(), proposed_token=0)
        assert [len(tokens) for tokens in result.token_ids] == [limit] * SLOTS
        needed = -(-limit // BLOCK_SIZE)
        assert needed <= result.num_forwards <= needed + (1 if form == "conditional" else 2 * count - 1)
    stand.close()
    assert stand.simulated.cuda.is_empty()


# Mistakes that one lag or the other must find.

COPIES = """        for name, host in self._host.items():
            self._cuda.copy(host.address, addresses[name], host.array.nbytes, "to host", stream)
"""
MARK = "        self._cuda.mark(self._event, stream)\n"

MISTAKES = [
    (cuda_module, '"cudaEventCreateWithFlags", self.runtime.cudaEventDisableTiming', '"cudaEventCreateWithFlags"'),
    (cuda_module, "cudaEventDisableTiming", "cudaEventDisableTime"),
    (cuda_module, "self.runtime.cudaEventDisableTiming", "self.runtime.cudaEventDefault"),
    (cuda_module, '"cudaEventRecord", event, stream', '"cudaEventRecord", event'),
    (cuda_module, '"cudaEventRecord", event, stream', '"cudaEventRecord", stream, event'),
    (cuda_module, '"cudaEventSynchronize", event', '"cudaStreamWaitEvent", event'),
    (cuda_module, 'self._call("cudaEventSynchronize", event)', "pass"),
    (cuda_module, 'self._call("cudaEventDestroy", event)', "pass"),
    (launch_copy, "self._cuda.mark(self._event, stream)", "pass"),
    (launch_copy, COPIES + MARK, MARK + COPIES),
    (launch_copy, "self._cuda.wait_for(self._event)", "pass"),
    (launch_copy, "place % ring_size", "(place + 1) % ring_size"),
    (launch_copy, "range(first, ", "range(0, "),
    (device_loop, "self._num_launches % LAUNCHES", "0"),
    (device_loop, "self._end + sum(flight.most_rows for flight in flights)", "self._end"),
    (device_loop, "for flight in flights)  # a forward", "for flight in [*flights][1:])  # a forward"),
    (device_loop, "if flights and count < 1:", "if flights and count < 0:"),
    (device_loop, "count * self._size, count)", "0, count)"),
    (device_loop, "count, recording.length * self._size, None", "count, 0, None"),
    (device_loop, 'cuda.clear(self._addresses["forwards"], INT32, stream)', "pass"),
    (device_loop, "            for flight in flights:\n                self._collect(flight)", "            pass"),
    (device_loop, "self._num_read = [first + len(of_slot)", "self._num_read = [first + len(of_slot) + 1"),
]  # fmt: skip


def use(bundle: Bundle, plan: Plan, directory: Path, loop_class: Any, cuda_class: Any) -> list[Any]:
    """What runs give at both lags, in both forms, to the end of the cache and stopped early."""
    given: list[Any] = []
    for is_ahead in (False, True):
        for form in get_args(Form):
            kernels = directory / f"{form}{is_ahead}"
            kernels.mkdir(exist_ok=True)
            simulated = SimulatedGpu()
            gpu = Gpu(tensorrt=simulated.trt, cuda=cuda_class(simulated.runtime), facts=simulated.gpu.facts)
            with (
                TrtEngine(bundle, plan=plan, gpu=gpu) as engine,
                loop_class(
                    engine,
                    block_size=BLOCK_SIZE,
                    compute_capability="9.0",
                    forwards_per_sync=2,
                    form=form,
                    compiler=simulated.compiler(kernels),
                ) as loop,
            ):
                simulated.cuda.is_ahead = is_ahead
                room = engine.geometry.cache_length - BLOCK_SIZE + 1 - len(PROMPTS[2])
                for limit in (room, 21, 20):
                    result = loop.run(PROMPTS, max_new_tokens=limit, eos_token_ids=(), proposed_token=0)
                    given.append((result.token_ids, result.num_forwards, result.num_syncs))
                launches = loop.decode(PROMPTS, max_new_tokens=20, eos_token_ids=(), proposed_token=0)
                next(launches)
                launches.close()
                assert not any(simulated.cuda.queues.values()), "the device was left at work"
                accept_all(simulated)
                for prompts in (PROMPTS, SHORTER):
                    result = loop.run(prompts, max_new_tokens=room, eos_token_ids=(), proposed_token=0)
                    given.append((result.token_ids, result.num_forwards, result.num_syncs))
            assert simulated.cuda.is_empty(), "something was left on the device"
    return given


@pytest.fixture(scope="module")
def right(bundle: Bundle, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return use(bundle, plan, tmp_path_factory.mktemp("right"), DeviceLoop, cuda_module.Cuda)


def test_without_a_mistake_both_lags_give_the_same(right: list[Any]):
    assert right[: len(right) // 2] == right[len(right) // 2 :]


@pytest.mark.parametrize(("module", "ours", "wrong"), MISTAKES, ids=[wrong[:50] for *_, wrong in MISTAKES])
def test_a_mistake_is_found_at_one_lag_or_the_other(
    bundle: Bundle, plan: Plan, tmp_path: Path, right: list[Any], module: ModuleType, ours: str, wrong: str
):
    mistaken = {each: each for each in (cuda_module, launch_copy, device_loop)}
    mistaken[module] = run_anew(module, ours, wrong)
    if module is launch_copy:
        mistaken[device_loop] = run_anew(device_loop, "", "")
        vars(mistaken[device_loop])["LaunchCopy"] = vars(mistaken[module])["LaunchCopy"]
    loop_class, cuda_class = vars(mistaken[device_loop])["DeviceLoop"], vars(mistaken[cuda_module])["Cuda"]
    try:
        given = use(bundle, plan, tmp_path, loop_class, cuda_class)
    except (Nonconforming, Exception):
        return
    assert given != right, "the mistake went unseen"


def run_anew(module: ModuleType, ours: str, wrong: str) -> ModuleType:
    """A module's source with a mistake in it, run as another module."""
    path = Path(str(module.__file__))
    source = path.read_text(encoding="utf-8")
    assert ours in source, f"{path.name} no longer holds {ours!r}: this tests nothing"
    made = ModuleType(module.__name__)
    exec(compile(source.replace(ours, wrong) if ours else source, str(path), "exec"), vars(made))
    return made
