"""What ``verify`` says of the sizes that are bit-equal to n = 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cllm_export.bundle.contract import Batch, FixedShapes
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.engines.base import Engine
from cllm_export.verification import exact
from cllm_export.verification.engine_checks import EngineRun, bfloat16_bits
from cllm_export.verification.exact import Exactness, check_exact_sizes, exactness_of
from cllm_export.verification.report import VerifyOptions, check_slots
from tests.fakes import FakeEngine, HashModel, RoundingEngine, make_geometry, write_bundle

SIZES = [2, 3, 4, 8, 12, 16]
"""Those of ``auto`` up to 16, and 3."""
CPU = EngineRun("cpu", None)


def compared(*engines: Engine, pasts: tuple[int, ...] = (5, 20)) -> Exactness:
    return check_exact_sizes(engines, own_sizes=(3,), pasts=pasts)


def test_an_exact_engine_passes_and_its_sizes_are_named():
    found = compared(RoundingEngine(), RoundingEngine(num_slots=2))
    assert found.check.passed is True
    assert found.to_dict() == {"equal": SIZES, "different": [], "num_slots": [1, 2]}
    assert "n = 2, 3, 4, 8, 12, 16 gives the logits and KV of n = 1, with 1 and 2 slots" in found.check.detail


@pytest.mark.parametrize(
    "engine",
    [
        RoundingEngine(logits_of=lambda size, *_: size == 8),
        RoundingEngine(kv_of=lambda size, index, _: (size, index) == (8, 6)),
        RoundingEngine(logits_of=lambda size, index, slot: (size, index, slot) == (8, 7, 1), num_slots=2),
    ],
    ids=["logits", "kv", "one row of one slot"],
)
def test_a_size_that_differs_fails_no_bundle_but_is_not_certified(engine: RoundingEngine):
    found = compared(RoundingEngine(), engine)
    assert found.check.passed is None
    assert found.to_dict() == {"equal": [2, 3, 4, 12, 16], "different": [8], "num_slots": [1, engine.num_slots]}
    assert "n = 8 does not, so auto leaves it out" in found.check.detail


def test_a_difference_after_many_rows_alone_is_found():
    engine = RoundingEngine()
    engine._logits_of = lambda size, *_: size == 4 and engine.calls[-1].write_index[0] > 30
    assert compared(engine).to_dict() == {"equal": [2, 3, 8, 12, 16], "different": [4], "num_slots": [1]}


def test_the_longest_text_is_compared_beside_short_ones():
    """One slot has as many KV rows as the cache has room for; the others keep theirs."""
    engine = RoundingEngine(num_slots=2)
    engine._logits_of = lambda size, *_: size == 4 and engine.calls[-1].write_index[0] > 40
    found = compared(engine)
    assert found.to_dict() == {"equal": [2, 3, 8, 12, 16], "different": [4], "num_slots": [2]}
    assert "after up to 48 KV rows" in found.check.detail
    assert any(long == 48 and short < 24 for long, short in (call.write_index for call in engine.calls))


def test_a_slot_whose_rows_of_one_token_depend_on_a_longer_neighbour_is_said():
    engine = RoundingEngine(num_slots=2)
    engine._kv_of = lambda _, __, slot: slot == 1 and engine.calls[-1].write_index[0] > 40
    found = compared(engine)
    assert found.to_dict() == {"equal": [], "different": SIZES, "num_slots": [2]}
    assert "n = 1 beside a slot with 48 KV rows gives other rows" in found.check.detail


@pytest.mark.parametrize("odd", [5, 20])
def test_a_prefill_width_that_writes_other_kv_is_said(odd: int):
    """The widest chunk reads as many rows as it has."""

    class OddPrefill(RoundingEngine):
        def prefill(self, batch: Batch) -> None:
            super().prefill(batch)
            size = len(batch.input_ids[0])
            for row in range(batch.write_index[0], batch.write_index[0] + size):
                (self._off.add if size == odd else self._off.discard)((0, row))

    found = compared(OddPrefill())
    assert found.check.passed is None
    assert f"prefill in chunks of {odd} writes other KV" in found.check.detail


def test_what_cannot_be_compared_is_said_and_certifies_nothing():
    shapes = FixedShapes(batch_size=1, block_size=4, kv_length=79)
    pinned = FakeEngine(HashModel(vocab_size=64), make_geometry(vocab_size=64), fixed_shapes=shapes)
    mute = RoundingEngine()
    mute.has_logits = False
    for engine, why in ((pinned, "one shape"), (mute, "no logits")):
        found = compared(engine)
        assert (found.check.passed, found.to_dict()) == (None, None)
        assert why in found.check.detail


def test_a_cache_with_little_room_is_compared_where_it_has_room():
    engine = RoundingEngine()
    found = compared(engine, pasts=(500,))
    assert found.sizes is not None
    assert sorted(found.sizes.equal) == SIZES
    assert max(call.write_index[0] for call in engine.calls) < engine.geometry.cache_length


def with_engines(monkeypatch: pytest.MonkeyPatch, open_engine: Callable[[int | None], FakeEngine]) -> None:
    monkeypatch.setattr(EngineRun, "open", lambda _, bundle, num_slots=None, **options: open_engine(num_slots))


@pytest.mark.parametrize(("provider", "slots"), [("cpu", [1, 2]), ("cuda", [1, 2]), ("tensorrt", [None])])
def test_slots_vary_where_they_may(tmp_path, monkeypatch: pytest.MonkeyPatch, provider, slots):
    """A plan has the slots that it was built with."""
    asked: list[int | None] = []

    def opened(num_slots: int | None) -> FakeEngine:
        asked.append(num_slots)
        return RoundingEngine(num_slots=num_slots or 3)

    with_engines(monkeypatch, opened)
    monkeypatch.setattr(exact, "PASTS", (5,))
    found = exactness_of(write_bundle(tmp_path / "bundle"), EngineRun(provider, None), VerifyOptions(provider=provider))
    assert asked == slots
    assert found.num_slots == [each or 3 for each in slots]


@pytest.mark.parametrize(("num_slots", "slots"), [(8, [1, 8]), (1, [1])])
def test_the_slots_of_a_service_are_compared(tmp_path, monkeypatch: pytest.MonkeyPatch, num_slots, slots):
    with_engines(monkeypatch, lambda number: RoundingEngine(num_slots=number or 1))
    monkeypatch.setattr(exact, "PASTS", (5,))
    found = exactness_of(write_bundle(tmp_path / "bundle"), CPU, VerifyOptions(num_slots=num_slots))
    assert (found.to_dict() or {})["num_slots"] == slots


def test_slots_that_no_engine_of_the_bundle_has_are_refused_before_any_work(tmp_path):
    with pytest.raises(OptionError, match="a plan has the slots that it was built with, got num_slots=8"):
        VerifyOptions(provider="tensorrt", num_slots=8)
    shapes = FixedShapes(batch_size=2, block_size=4, kv_length=79)
    pinned, free = (write_bundle(tmp_path / str(each), fixed_shapes=each) for each in (shapes, None))
    with pytest.raises(OptionError, match="is pinned to 2 slots, got num_slots=3: leave num_slots out"):
        check_slots(pinned, VerifyOptions(num_slots=3))
    with pytest.raises(OptionError, match="bytes of memory are free: give at most num_slots="):
        check_slots(free, VerifyOptions(num_slots=10**12))
    check_slots(pinned, VerifyOptions(num_slots=2))
    check_slots(free, VerifyOptions(num_slots=3))


def test_an_engine_that_fails_fails_the_check(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def broken(_: int | None) -> FakeEngine:
        raise EngineError("it broke")

    with_engines(monkeypatch, broken)
    found = exactness_of(write_bundle(tmp_path / "bundle"), CPU, VerifyOptions())
    assert (found.check.passed, found.check.detail, found.to_dict()) == (False, "it broke", None)


def test_layers_are_compared_on_the_cpu_alone():
    with pytest.raises(OptionError, match="compared on the CPU alone, got provider='cuda'"):
        VerifyOptions(provider="cuda", by_layer=True)
    with pytest.raises(OptionError, match="provider"):
        VerifyOptions(provider="gpu")  # type: ignore[arg-type]


def test_a_number_is_written_into_bfloat16_by_its_bits():
    assert bfloat16_bits(100.0) == 0x42C8
    assert bfloat16_bits(1.0) == 0x3F80
