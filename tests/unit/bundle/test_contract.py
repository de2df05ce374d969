"""The contract: its specs, its bounds, and that the fake engine which every other test leans on keeps it."""

from __future__ import annotations

import pytest

from cllm_export.bundle.contract import (
    Batch,
    FixedShapes,
    Geometry,
    cache_names,
    check_forward,
    graph_inputs,
    graph_outputs,
)
from cllm_export.checks import require_at_least
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.engines.base import Engine
from tests.fakes import FakeEngine, HashModel, ScriptModel, make_geometry

GEOMETRY = make_geometry(max_length=20, max_block_size=4)
FIXED = FixedShapes(batch_size=2, block_size=4, kv_length=23)
SCRIPT = [10, 12, 14, 16]
PROMPT = [5, 6]


def reciting_engine(**options) -> FakeEngine:
    """An engine that recites SCRIPT after PROMPT, whose first token is prefilled in every slot."""
    engine = FakeEngine(ScriptModel(prompt_length=len(PROMPT), script=SCRIPT), GEOMETRY, **options)
    slots = engine.num_slots
    engine.prefill(Batch([PROMPT[:1]] * slots, [1] * slots, [0] * slots))
    return engine


def test_inputs_come_in_the_order_of_the_contract_with_symbolic_axes():
    specs = [(spec.name, spec.dtype, spec.shape) for spec in graph_inputs(GEOMETRY, "fp16")]
    cache = ("float16", ("B", 2, 23, 8))
    assert specs == [
        ("input_ids", "int64", ("B", "n")),
        ("num_committed", "int64", ("B",)),
        ("write_index", "int64", ("B",)),
        ("kv_positions", "int64", ("S",)),
        ("head_rows", "int64", ("h",)),
        ("past_key.0", *cache),
        ("past_value.0", *cache),
        ("past_key.1", *cache),
        ("past_value.1", *cache),
    ]


def test_fixed_shapes_pin_every_axis():
    specs = [*graph_inputs(GEOMETRY, "fp32", FIXED), *graph_outputs(GEOMETRY, "fp32", FIXED)]
    assert all(isinstance(axis, int) for spec in specs for axis in spec.shape)
    shapes = {spec.name: spec.shape for spec in specs}
    assert shapes["input_ids"] == (2, 4)
    assert shapes["kv_positions"] == (23,)
    assert shapes["head_rows"] == (4,)
    assert shapes["next_ids"] == (2, 4)


def test_every_past_has_a_present_of_its_own_shape_and_dtype():
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in graph_inputs(GEOMETRY, "fp32")}
    outputs = {spec.name: (spec.dtype, spec.shape) for spec in graph_outputs(GEOMETRY, "fp32")}
    assert list(outputs)[:2] == ["next_ids", "num_accepted"]
    assert all(inputs[past] == outputs[present] for past, present in cache_names(GEOMETRY.num_layers))


def test_kv_bytes_per_token_counts_keys_and_values_of_every_layer():
    assert GEOMETRY.kv_bytes_per_token("fp32") == 2 * 2 * 2 * 8 * 4
    assert GEOMETRY.kv_bytes_per_token("fp16") == 2 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("name", Geometry.__dataclass_fields__)
def test_a_geometry_without_one_of_its_numbers_is_refused_by_name(name):
    values = {field: getattr(GEOMETRY, field) for field in Geometry.__dataclass_fields__}
    with pytest.raises(OptionError, match=name):
        Geometry(**values | {name: 0})


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_only_an_int_of_at_least_the_minimum_passes(value):
    with pytest.raises(OptionError, match="block_size must be an integer of at least 1"):
        require_at_least("block_size", value, 1)


def test_a_forward_that_ends_at_the_last_row_fits():
    check_forward(block_size=4, write_index=[0, 19], kv_length=23, geometry=GEOMETRY)


def test_a_forward_beyond_the_cache_is_refused_with_its_numbers():
    with pytest.raises(EngineError, match=r"block of 4 at write index 20 needs 24 .* has 23"):
        check_forward(block_size=4, write_index=[0, 20], kv_length=24, geometry=GEOMETRY)


def test_a_kv_length_that_hides_a_row_from_itself_is_refused():
    with pytest.raises(EngineError, match="KV length 11 is below write index 8"):
        check_forward(block_size=4, write_index=[0, 8], kv_length=11, geometry=GEOMETRY)


@pytest.mark.parametrize("write_index", [[0, 20, 5], [3, -1, 7]])
def test_one_slot_out_of_bounds_is_enough(write_index):
    with pytest.raises(EngineError):
        check_forward(block_size=4, write_index=write_index, kv_length=23, geometry=GEOMETRY)


def test_a_negative_write_index_is_refused():
    with pytest.raises(EngineError):
        check_forward(block_size=4, write_index=[0, -1], kv_length=23, geometry=GEOMETRY)


def test_the_fake_engine_is_an_engine():
    engine: Engine = FakeEngine(HashModel(vocab_size=8), GEOMETRY)
    assert engine.run_seconds == 0
    assert (engine.num_slots, engine.fixed_shapes, engine.geometry) == (1, None, GEOMETRY)


def test_the_fake_engine_accepts_the_matching_prefix_of_a_draft():
    next_ids, num_accepted, _ = reciting_engine().forward(Batch([[6, 10, 3, 14]], [1], [1]))
    assert num_accepted == [2]
    assert next_ids[0][:2] == [10, 12]
    assert next_ids[0][2] != 14


def test_the_fake_engine_counts_committed_rows_as_right():
    engine = reciting_engine()
    assert engine.forward(Batch([[6, 31, 30, 29]], [3], [1])).num_accepted == [3]


def test_the_fake_engine_accepts_nothing_in_an_idle_slot():
    engine = reciting_engine(num_slots=2)
    block = [6, *SCRIPT[:3]]
    assert engine.forward(Batch([block, block], [1, 0], [1, 1])).num_accepted == [4, 0]


def test_the_fake_engine_writes_an_idle_slot_too():
    engine = reciting_engine(num_slots=2)
    engine.forward(Batch([[6, 0], [7, 8]], [1, 0], [1, 3]))
    assert [row.token for row in engine.rows[1][3:5]] == [7, 8]


def test_the_fake_engine_keeps_slots_apart():
    engine = reciting_engine(num_slots=2)
    alone = reciting_engine().forward(Batch([[6, 10]], [1], [1]))
    both = engine.forward(Batch([[6, 10], [9, 9]], [1, 1], [1, 5]))
    assert both.next_ids[0] == alone.next_ids[0]


@pytest.mark.parametrize("write_index", [1, 3])
def test_a_wrong_write_index_changes_what_the_fake_engine_predicts(write_index):
    predictions = []
    for index in (2, write_index):
        engine = FakeEngine(HashModel(vocab_size=1 << 20, window=2), make_geometry(vocab_size=1 << 20))
        engine.prefill(Batch([[3, 4]], [2], [0]))
        predictions.append(engine.forward(Batch([[5]], [1], [index])).next_ids)
    assert predictions[0] != predictions[1]


def test_a_right_token_over_a_wrong_past_changes_what_the_fake_engine_predicts():
    fresh, stale = (FakeEngine(HashModel(vocab_size=1 << 20), make_geometry(vocab_size=1 << 20)) for _ in range(2))
    fresh.prefill(Batch([[3, 4, 5]], [3], [0]))
    stale.prefill(Batch([[3, 9, 5]], [3], [0]))
    stale.prefill(Batch([[4]], [1], [1]))  # row 1 is right now, but row 2 still holds what it saw of the wrong one
    assert [row.token for row in stale.rows[0][:3]] == [3, 4, 5]
    assert fresh.forward(Batch([[6]], [1], [3])) != stale.forward(Batch([[6]], [1], [3]))


def test_rows_of_a_rejected_draft_do_not_show_once_they_are_overwritten():
    clean, dirty = reciting_engine(), reciting_engine()
    dirty.forward(Batch([[6, 31, 31, 31]], [1], [1]))
    block = [[6, *SCRIPT[:3]]]
    assert dirty.forward(Batch(block, [1], [1])) == clean.forward(Batch(block, [1], [1]))


@pytest.mark.parametrize(
    ("input_ids", "num_committed", "write_index"),
    [
        ([[1, 2]], [1], [22]),
        ([[1, 2, 3, 4, 5]], [1], [0]),
        ([[1, 2]], [3], [0]),
        ([[1, 32]], [1], [0]),
        ([[1], [2]], [1], [0]),
        ([[]], [0], [0]),
    ],
    ids=["beyond the cache", "block too large", "too many committed", "not a token", "too many slots", "no tokens"],
)
def test_the_fake_engine_refuses_what_the_contract_forbids(input_ids, num_committed, write_index):
    engine = FakeEngine(HashModel(vocab_size=32), GEOMETRY)
    with pytest.raises(EngineError):
        engine.forward(Batch(input_ids, num_committed, write_index))
    assert engine.calls == []


def test_a_fake_engine_with_fixed_shapes_takes_no_other_block():
    engine = FakeEngine(HashModel(vocab_size=32), GEOMETRY, fixed_shapes=FIXED)
    with pytest.raises(EngineError, match="pinned to blocks of 4, got 3"):
        engine.forward(Batch([[1, 2, 3]] * 2, [1, 1], [0, 0]))
