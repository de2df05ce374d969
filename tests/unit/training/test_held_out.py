"""Held-out decoding ends, however slow the model is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.training.data.samples import Sample
from cllm_export.training.held_out import ROOM, held_out_length, measure
from tests.fakes import FakeEngine, HashModel, greedy, make_geometry

EOS = 8
VOCABULARY, BLOCK = 9, 4


class Model:
    """What ``measure`` uses of a model: facts and an engine."""

    def __init__(self, num_slots: int = 2, max_length: int = 200) -> None:
        self._model = HashModel(vocab_size=VOCABULARY)
        geometry = make_geometry(vocab_size=VOCABULARY, max_length=max_length)
        self.engine = FakeEngine(self._model, replace(geometry, max_block_size=BLOCK), num_slots=num_slots)
        self.facts = Facts(max_length)


class Facts:
    trained_with = TrainedWith(block_size=BLOCK, proposer="pad", loop="sliding")
    eos_token_ids = (VOCABULARY + 1,)
    pad_token_id = 0

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length


def sample(prompt: tuple[int, ...], num_answer: int) -> Sample:
    """A sample whose answer is the model's own."""
    answer = greedy(HashModel(vocab_size=VOCABULARY), list(prompt), num_answer)
    return Sample(id=str(prompt), tokens=(*prompt, *answer, VOCABULARY + 1), num_prompt=len(prompt))


def score(samples: list[Sample], most_tokens: int, model: Any = None, **options: Any) -> Any:
    return measure(model or Model(), samples, most_tokens=most_tokens, **options)


def test_an_endless_answer_is_decoded_little_further_than_its_own_target():
    """The target of its neighbour is long, and must not let it run on."""
    model = Model(num_slots=1)
    score([sample((1, 2), 3), sample((3, 4), 100)], 1000, model)
    [first, second] = (call for call in ends(model))
    assert first <= 2 + 3 + 1 + ROOM + BLOCK
    assert second > 100


def ends(model: Model) -> list[int]:
    """The largest position of each request that the engine's only slot decoded."""
    starts = [call.write_index[0] for call in model.engine.calls]
    borders = [index for index in range(1, len(starts)) if starts[index] < starts[index - 1]]
    return [starts[index - 1] for index in (*borders, len(starts))]


def test_a_long_target_is_compared_as_far_as_it_was_decoded():
    """Fifty tokens of an answer of a hundred are decoded: right ones are exact, and a wrong one is seen."""
    right = sample((1, 2), 100)
    tokens = list(right.tokens)
    tokens[2 + 20] = (tokens[2 + 20] + 1) % VOCABULARY
    wrong = replace(right, tokens=tuple(tokens))
    assert score([right, wrong], 50).exact_match == 0.5


def test_an_answer_that_does_not_end_where_its_target_ends_is_not_exact():
    assert score([sample((1, 2), 10)], 1000).exact_match == 0
    assert score([sample((1, 2), 10)], 10).exact_match == 1, "its end was not decoded"


def test_each_finished_prompt_is_reported():
    done: list[int] = []
    score([sample((1, 2), 3), sample((3, 4), 3), sample((5, 6), 3)], 5, finished=done.append)
    assert done == [1, 2, 3]


@pytest.mark.parametrize(("most_tokens", "longest", "expected"), [(1000, 1000, 118), (50, 1000, 52), (1000, 60, 60)])
def test_the_model_holds_no_more_than_is_decoded(most_tokens: int, longest: int, expected: int):
    samples = [sample((1, 2), 99)]
    assert held_out_length(samples, most_tokens=most_tokens, longest=longest, block_size=BLOCK) == expected
