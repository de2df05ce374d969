"""A list of prompts: in order, one by one or in slots, and what becomes of those that cannot be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import OptionError, PromptError
from cllm_export.runtime.decode_all import decode_all, first_difference
from cllm_export.runtime.model import Model
from tests.fakes import HashModel, make_model, write_bundle

PROMPTS = ["the cat", "", "sat on the mat", "x" * 500, [3, 1, 2]]
OPTIONS: dict[str, Any] = {"block_size": 4, "at_most": 9}


def make(tmp_path: Path, *, num_slots: int = 1) -> Model:
    bundle = write_bundle(tmp_path / "bundle", eos_token_ids=())
    model = HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2)
    return make_model(bundle, model, num_slots=num_slots)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_results_come_in_the_order_of_the_prompts(tmp_path: Path, num_slots: int):
    """One by one and in slots, each is what the prompt gives alone; refused ones are told and left out."""
    model, refused, done = make(tmp_path, num_slots=num_slots), list[int](), list[int]()
    decoded = list(
        decode_all(
            model,
            PROMPTS,
            in_slots=num_slots > 1,
            refused=lambda index, _: refused.append(index),
            progress=done.append,
            **OPTIONS,
        )
    )
    assert ([each.number for each in decoded], refused) == ([0, 2, 4], [1, 3])
    assert done[-1] == len(PROMPTS) and done == sorted(done)
    alone = make(tmp_path)
    for each in decoded:
        assert each.prompt_ids == alone.encode(PROMPTS[each.number])
        expected = alone.generate(each.prompt_ids, max_new_tokens=9, block_size=4)
        assert each.generation.token_ids == expected.token_ids


def test_a_refusal_is_raised_where_nobody_asks_for_it(tmp_path: Path):
    decoded = decode_all(make(tmp_path), PROMPTS, **OPTIONS)
    assert next(decoded).number == 0
    with pytest.raises(PromptError, match="empty"):
        next(decoded)


def test_new_tokens_are_cut_to_what_the_model_holds_only_where_that_is_asked_for(tmp_path: Path):
    model = make(tmp_path)
    room = model.facts.max_length - 3
    [each] = decode_all(model, [[1, 2, 3]], at_most=10_000, block_size=4)
    assert len(each.generation.token_ids) == room
    with pytest.raises(PromptError, match=f"at most {room}"):
        list(decode_all(model, [[1, 2, 3]], max_new_tokens=room + 1, block_size=4))


@pytest.mark.parametrize("in_slots", [False, True])
def test_each_prompt_has_the_seed_after_the_one_before(tmp_path: Path, in_slots: bool):
    decoded = decode_all(make(tmp_path), [[1], [1], [1]], in_slots=in_slots, first_seed=5, temperature=1.0, **OPTIONS)
    assert [each.generation.seed for each in decoded] == [5, 6, 7]


def test_an_n_that_is_chosen_is_not_repeatable_in_slots_either(tmp_path: Path):
    with pytest.raises(OptionError, match="exclude each other"):
        list(decode_all(make(tmp_path), [[1]], in_slots=True, block_size="auto", deterministic=True))


def test_the_first_difference_of_a_text_and_its_beginning_is_where_it_ends():
    assert first_difference((1, 2), (1, 2)) is None
    assert first_difference([1, 2], (1, 2)) is None
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2
