"""Which block sizes ``auto`` may use: those whose rows are bit-equal to the rows of n = 1 on this engine."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from cllm_export.bundle.contract import Batch, FixedShapes
from cllm_export.bundle.manifest import PARITY_NAME, Bundle, TrainedWith
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.block_size.auto_sizes import candidate_sizes, settle_sizes
from cllm_export.runtime.decoding.block_size.certificate import conditions_of, differences, read_certified_sizes
from cllm_export.runtime.decoding.block_size.exact_sizes import (
    PREFILLED,
    ExactSizes,
    RowsOfOne,
    affordable_sizes,
    compare_sizes,
)
from cllm_export.runtime.decoding.block_size.latency_file import (
    read_compared_sizes,
    read_latency,
    write_compared_sizes,
    write_latency,
)
from cllm_export.runtime.engines.base import KvRows
from cllm_export.runtime.model import Model
from tests.fakes import (
    PAD,
    FakeEngine,
    HashModel,
    RoundingEngine,
    greedy,
    make_geometry,
    make_model,
    with_manifest,
    write_bundle,
)

SIZES = (2, 4, 8, 12, 16)
NOTHING = ExactSizes()


def settle(engine: FakeEngine, *, first: int = 1, known: ExactSizes = NOTHING, seconds: float = 1e-4):
    kept: list[ExactSizes] = []
    found = settle_sizes(
        engine,
        candidate_sizes(engine, first=first),
        first=first,
        pad_token_id=PAD,
        known_times={1: seconds, 16: 2 * seconds},
        known_sizes=known,
        keep=kept.append,
    )
    return found, kept


def test_every_size_of_an_engine_whose_rows_depend_on_nothing_else_is_exact():
    found = compare_sizes(RoundingEngine(num_slots=3), SIZES)
    assert found == ExactSizes(equal=frozenset(SIZES))


def test_sizes_that_add_1e_7_are_found_and_auto_leaves_them_out(caplog):
    """A kernel that rounds otherwise from n = 8 on."""
    engine = RoundingEngine(logits_of=lambda size, *_: size >= 8)
    assert compare_sizes(engine, SIZES) == ExactSizes(equal=frozenset({2, 4}), different=frozenset({8, 12, 16}))
    found, kept = settle(engine)
    assert found.sizes == (1, 2, 4)
    assert kept == [ExactSizes(equal=frozenset({2, 4}), different=frozenset({8, 12, 16}))]
    assert "auto uses n = 1, 2, 4 alone. n = 8, 12, 16 round otherwise than n = 1 on this engine" in caplog.text


@pytest.mark.parametrize("row", [0, 5, 11])
def test_one_row_of_a_block_that_differs_is_enough(row: int):
    engine = RoundingEngine(logits_of=lambda size, index, _: (size, index) == (12, row))
    assert compare_sizes(engine, SIZES).different == {12}


def test_one_slot_that_differs_is_enough():
    engine = RoundingEngine(logits_of=lambda size, index, slot: (size, index, slot) == (4, 1, 2), num_slots=3)
    assert compare_sizes(engine, SIZES).different == {4}


def test_kv_that_differs_makes_a_size_different_though_its_logits_agree():
    """Later rows of another size would read it."""
    engine = RoundingEngine(kv_of=lambda size, index, _: (size, index) == (8, 7))
    assert compare_sizes(engine, SIZES).different == {8}


def test_a_block_that_differs_only_after_another_is_found_where_all_blocks_are_compared():
    engine = RoundingEngine(kv_of=lambda size, index, _: size == 4 and engine.calls[-1].write_index[0] > 9)
    rows = RowsOfOne(engine, past=9, count=16)
    assert rows.are_given_by(4)
    assert not rows.are_given_by(4, num_blocks=None)
    assert rows.are_given_by(2, num_blocks=None)


def test_prefill_that_writes_other_bits_at_a_width_is_found():
    class OddPrefill(RoundingEngine):
        def prefill(self, batch: Batch) -> None:
            super().prefill(batch)
            size = len(batch.input_ids[0])
            start = batch.write_index[0]
            for index in range(start, start + size):
                (self._off.add if size == 5 else self._off.discard)((0, index))

    rows = RowsOfOne(OddPrefill(), past=15, count=2)
    assert [width for width in (1, 3, 5, 8, 15) if not rows.past_is_given_by(width)] == [5]


def test_rows_that_the_prefix_cache_kept_give_the_same_logits():
    class LossyCopy(RoundingEngine):
        def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
            super().write_rows(slot, start, stop, rows // 2)

    assert RowsOfOne(RoundingEngine(num_slots=2), past=9, count=3).past_is_kept(3)
    assert not RowsOfOne(LossyCopy(num_slots=2), past=9, count=3).past_is_kept(3)


def test_sizes_that_were_compared_before_are_not_compared_again():
    engine = RoundingEngine()
    known = ExactSizes(equal=frozenset({2, 4, 8, 12}), different=frozenset({16}))
    found, kept = settle(engine, known=known)
    assert (found.sizes, kept, engine.calls) == ((1, 2, 4, 8, 12), [], [])


def test_where_no_size_is_exact_auto_is_the_one_of_the_training_or_one_and_says_so(caplog):
    engine = RoundingEngine(logits_of=lambda size, *_: size > 1)
    trained, _ = settle(engine, first=16)
    assert (trained.sizes, trained.policy.choose(())) == ((16,), 16)
    assert "it gives the tokens of autoregressive decoding at n = 16" in caplog.text
    untrained, _ = settle(engine)
    assert (untrained.sizes, untrained.policy.choose(())) == ((1,), 1)


def test_where_other_sizes_are_exact_the_one_of_the_training_is_left_out():
    found, _ = settle(RoundingEngine(logits_of=lambda size, *_: size == 16), first=16)
    assert found.sizes == (1, 2, 4, 8, 12)


def test_an_engine_too_slow_to_compare_them_all_compares_what_fits_and_names_the_call(caplog):
    found, kept = settle(RoundingEngine(), seconds=0.07)
    assert found.sizes == (1, 2, 4)
    assert kept == [ExactSizes(equal=frozenset({2, 4}))]
    assert "n = 8, 12, 16 were not compared with n = 1, which takes more than 2 s" in caplog.text
    assert "compare once with Model.compare_sizes()" in caplog.text


def test_an_engine_without_logits_is_not_compared(caplog):
    engine = RoundingEngine()
    engine.has_logits = False
    found, kept = settle(engine, first=8)
    assert (found.sizes, kept, engine.calls) == ((8,), [], [])
    assert "the plan gives no logits" in caplog.text


def test_the_work_of_a_comparison_is_bounded_by_the_times_of_forwards():
    sizes, slow = (2, 16, 4, 8), {1: 1.0, 16: 1.0}
    once = 8 + 2 * 4  # eight rows of one token, and a forward and a prefill of each of 1, 2, 4 and 8
    cost = 1.0 + 2 * once  # the past, then in a short text and in a long one
    assert affordable_sizes(sizes, slow, budget=cost) == (2, 4, 8)
    assert affordable_sizes(sizes, slow, budget=cost - 0.5) == (2, 4)
    assert affordable_sizes(sizes, slow, budget=100) == sizes


def test_the_most_useful_size_may_take_longer_and_none_is_compared_in_its_place():
    """Else a model of a middling size would lose the n that it was trained with, which a larger one keeps."""
    sizes, slow = (16, 2, 4, 8), {1: 1.0, 16: 1.0}
    alone = 1.0 + 2 * (16 + 2 * 2)
    assert affordable_sizes(sizes, slow, budget=alone / 5) == (16,)
    assert affordable_sizes(sizes, slow, budget=alone / 5 - 0.1) == ()


def test_the_comparison_runs_as_many_forwards_as_its_bound_says():
    engine = RoundingEngine(max_length=400)
    compare_sizes(engine, (2, 4, 8))
    ran = [(call.kind, len(call.input_ids[0])) for call in engine.calls]
    in_one_text = [("forward", 1)] * 8 + [(kind, size) for size in (1, 2, 4, 8) for kind in ("forward", "prefill")]
    assert ran == [("prefill", PREFILLED), *in_one_text, *in_one_text]


def test_the_longest_text_that_the_cache_has_room_for_is_compared():
    """Attention over many rows may add up in more parts at one n than at another."""
    engine = RoundingEngine(max_length=2000)
    engine._logits_of = lambda size, *_: size == 8 and engine.calls[-1].write_index[0] > 1900
    found = compare_sizes(engine, SIZES)
    assert found == ExactSizes(equal=frozenset({2, 4, 12, 16}), different=frozenset({8}))
    last_rows = max(call.write_index[0] + len(call.input_ids[0]) for call in engine.calls)
    assert last_rows == engine.geometry.cache_length - 15


@pytest.mark.parametrize("of_size", [8, 1])
def test_a_slot_whose_rows_depend_on_a_longer_neighbour_is_found(of_size: int):
    """A forward has one KV length for all slots: that of the longest."""
    engine = RoundingEngine(num_slots=3, max_length=400)
    engine._logits_of = lambda size, _, slot: (size, slot) == (of_size, 2) and max(engine.calls[-1].write_index) > 300
    found = compare_sizes(engine, SIZES)
    assert found.different == ({8} if of_size == 8 else set(SIZES)), "where n = 1 depends on it, nothing is exact"


def test_the_longest_text_is_not_compared_where_rows_cannot_be_copied():
    engine = RoundingEngine(max_length=400)
    engine.can_copy_rows = False
    assert compare_sizes(engine, SIZES).equal == set(SIZES)
    assert max(call.write_index[0] for call in engine.calls) < 2 * PREFILLED


def test_the_comparison_reads_more_rows_than_it_prefills():
    """Attention over many rows adds up in parts, and must be compared too."""
    engine = RoundingEngine(num_slots=2)
    compare_sizes(engine, (2, 16))
    past = engine.geometry.cache_length - 15 - 16
    assert [call.write_index for call in engine.calls[1:3]] == [[past, past - 1], [past + 1, past]]
    assert engine.num_rows_restored == past - PREFILLED + past - 1 - PREFILLED


def test_a_cache_without_room_is_compared_from_its_first_row_on():
    engine = FakeEngine(HashModel(vocab_size=64), make_geometry(vocab_size=64, max_length=4, max_block_size=16))
    assert compare_sizes(engine, SIZES).equal == set(SIZES)


def test_a_size_that_differed_once_is_different():
    first, second = ExactSizes(equal=frozenset({2, 8})), ExactSizes(equal=frozenset({4}), different=frozenset({8}))
    assert first.joined(second) == ExactSizes(equal=frozenset({2, 4}), different=frozenset({8}))
    with pytest.raises(OptionError, match="both equal and different"):
        ExactSizes(equal=frozenset({8}), different=frozenset({8}))


# Requests.


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def rounding_model(bundle: Bundle, engine: FakeEngine, *, seconds: float = 1e-4, **options: Any) -> Model:
    found = make_model(bundle, HashModel(vocab_size=64), exact_sizes=NOTHING)
    return Model(bundle.manifest, engine, found.codec, forward_seconds={1: seconds, 16: 2 * seconds}, **options)


def test_requests_use_exact_sizes_alone_and_give_the_tokens_of_one(bundle: Bundle, caplog):
    trained = TrainedWith(block_size=16, proposer="pad", loop="sliding")
    model = rounding_model(
        with_manifest(bundle, trained_with=trained), RoundingEngine(logits_of=lambda size, *_: size >= 8)
    )
    assert model.auto_sizes is None
    for start in range(6):
        found = model.generate([5, start], max_new_tokens=40, ignore_eos=True)
        assert list(found.token_ids) == greedy(HashModel(vocab_size=64), [5, start], 40)
        assert {len(record.block) for record in found.forwards} <= {1, 2, 4}
    assert model.auto_sizes == (1, 2, 4)
    assert caplog.text.count("auto uses n = 1, 2, 4 alone") == 1, "it is said once"


def test_a_pinned_size_compares_nothing_and_is_used_whatever_its_bits(bundle: Bundle, caplog):
    model = rounding_model(bundle, RoundingEngine(logits_of=lambda size, *_: size >= 8))
    found = model.generate([5, 6], max_new_tokens=4, block_size=16, ignore_eos=True)
    assert {len(record.block) for record in found.forwards} == {16}
    assert (model.auto_sizes, caplog.text) == (None, "")


def test_a_large_model_ends_up_compared_by_one_call_and_every_later_load_knows(bundle: Bundle, caplog):
    """Its forwards take seconds, so a first request compares nothing."""
    trained = with_manifest(bundle, trained_with=TrainedWith(block_size=16, proposer="pad", loop="sliding"))
    engine, kept = RoundingEngine(logits_of=lambda size, *_: size == 8), list[ExactSizes]()
    model = rounding_model(trained, engine, seconds=9.0, keep_sizes=kept.append)
    model.generate([5, 6], max_new_tokens=2)
    assert (model.auto_sizes, kept) == ((16,), [])
    assert "compare once with Model.compare_sizes() or cllm-export bench" in caplog.text
    assert model.compare_sizes() == model.auto_sizes == (1, 2, 4, 12, 16)
    assert kept == [ExactSizes(equal=frozenset({2, 4, 12, 16}), different=frozenset({8}))]
    num_calls = len(engine.calls)
    assert model.compare_sizes() == (1, 2, 4, 12, 16)
    assert len(engine.calls) == num_calls, "sizes are compared once"
    again = RoundingEngine()
    later = rounding_model(trained, again, seconds=9.0, exact_sizes=kept[0])
    later.generate([5, 6], max_new_tokens=2)
    assert later.auto_sizes == (1, 2, 4, 12, 16)


def test_sizes_are_not_compared_beside_a_request_nor_where_there_is_one(bundle: Bundle, tmp_path):
    model = rounding_model(bundle, RoundingEngine())
    with model.lease.hold(), pytest.raises(EngineError, match="another request is running"):
        model.compare_sizes()
    shapes = FixedShapes(batch_size=1, block_size=4, kv_length=79)
    pinned = make_model(write_bundle(tmp_path / "pinned", fixed_shapes=shapes), HashModel(vocab_size=64))
    with pytest.raises(OptionError, match="has the block size 4 alone: there is no other to compare"):
        pinned.compare_sizes()


# Files.


def test_compared_sizes_are_kept_beside_the_times_of_the_same_conditions(bundle: Bundle):
    here: dict[str, Any] = {"num_slots": 1, "threads": 1}
    found = ExactSizes(equal=frozenset({2, 4}), different=frozenset({8}))
    write_latency(bundle, {1: 1.0, 8: 2.0}, **here)
    write_compared_sizes(bundle, found, **here)
    write_compared_sizes(bundle, NOTHING, num_slots=4, threads=1)
    assert read_compared_sizes(bundle, **here) == found
    assert read_latency(bundle, **here) == {1: 1.0, 8: 2.0}
    assert read_compared_sizes(bundle, num_slots=1, threads=2) == NOTHING
    write_latency(bundle, {1: 3.0}, **here)
    assert read_compared_sizes(bundle, **here) == found
    assert read_latency(bundle, **here) == {1: 3.0}


FACTS: dict[str, Any] = {"device": "a processor", "features": ["x86_64", "avx2"], "threads": 2, "onnxruntime": "1.32.0"}


def certify(bundle: Bundle, **changes: Any) -> None:
    report = {
        "bundle_fingerprint": bundle.fingerprint,
        "passed": True,
        "conditions": conditions_of(bundle, "cpu", FACTS),
        "exact_sizes": {"num_slots": [1, 2], "equal": [2, 8], "different": [16]},
    }
    (bundle.path / PARITY_NAME).write_text(json.dumps(report | changes))


def certified(bundle: Bundle, provider: str = "cpu", num_slots: int = 1, **changes: Any) -> ExactSizes:
    return read_certified_sizes(bundle, conditions_of(bundle, provider, FACTS | changes), num_slots=num_slots)


def test_a_certificate_counts_on_a_processor_with_the_same_features(bundle: Bundle):
    certify(bundle)
    expected = ExactSizes(equal=frozenset({2, 8}), different=frozenset({16}))
    assert (
        certified(bundle) == certified(bundle, device="another processor") == certified(bundle, num_slots=2) == expected
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"provider": "cuda"}, "provider"),
        ({"features": ["x86_64"]}, "features"),
        ({"threads": 1}, "threads"),
        ({"onnxruntime": "1.31.0"}, "onnxruntime"),
        ({"num_slots": 3}, "number of slots"),
        ({"device": None}, "device"),
    ],
)
def test_a_certificate_of_other_conditions_does_not_count(bundle: Bundle, caplog, changes: dict[str, Any], what: str):
    certify(bundle)
    with caplog.at_level(logging.INFO):
        assert certified(bundle, **changes) == NOTHING
    assert f"it certifies another {what}" in caplog.text


def test_a_certificate_of_another_gpu_does_not_count():
    """Processors are told by their instruction sets, GPUs by their names."""
    here = {"provider": "cuda", "device": "NVIDIA H200", "driver": "13.0"}
    assert differences(here, here) == []
    assert differences(here | {"device": "NVIDIA L4"}, here) == ["device"]


@pytest.mark.parametrize(
    "changes",
    [{"passed": False}, {"bundle_fingerprint": "another"}, {"exact_sizes": None}],
    ids=["failed", "rebuilt", "by layer"],
)
def test_a_certificate_that_proves_nothing_here_is_passed_over(bundle: Bundle, caplog, changes: dict[str, Any]):
    certify(bundle, **changes)
    assert certified(bundle) == NOTHING
    assert caplog.text == ""


@pytest.mark.parametrize("changes", [{"exact_sizes": 3}, {"exact_sizes": {"equal": [2]}}, {"conditions": None}])
def test_a_damaged_certificate_does_not_count(bundle: Bundle, changes: dict[str, Any]):
    certify(bundle, **changes)
    assert certified(bundle) == NOTHING
