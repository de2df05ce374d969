"""Draft sources over a real engine: the demo model with its parent as draft model, and the other way round.

Equality is required: every method runs the same n-shaped forward of the same engine.
"""

from __future__ import annotations

import pytest

from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.conftest import DEMO, THREADS, Workshop

NUM_SLOTS, NUM_PROMPTS = 3, 20
OPTIONS = {"max_new_tokens": 64}
PROPOSERS = ["lookup", "pool+lookup", "model", "lookup+model"]


@pytest.fixture(scope="module")
def bundles(workshop: Workshop) -> dict[str, str]:
    return {name: str(workshop.bundle(name).path) for name in ("demo", "parent")}


def with_draft_model(bundles: dict[str, str], name: str, draft: str, **options: int) -> Model:
    return load(bundles[name], draft_model=bundles[draft], threads=THREADS, **options)


def questions(model: Model) -> list[list[int]]:
    return [model.encode(prompt.content) for prompt in read_prompts(DEMO / "prompts.jsonl", limit=NUM_PROMPTS)]


def test_the_parent_drafts_for_the_demo_model_and_changes_no_token(bundles: dict[str, str]):
    model = with_draft_model(bundles, "demo", "parent")
    forwards = tokens = 0
    for prompt in questions(model):
        plain = model.generate(prompt, method="autoregressive", block_size=8, **OPTIONS)
        found = model.generate(prompt, method="speculative", proposer="model", block_size=8, **OPTIONS)
        assert found.token_ids == plain.token_ids
        forwards, tokens = forwards + found.statistics.forwards, tokens + found.statistics.new_tokens
    assert tokens > 2 * forwards, "the parent knows most of what its child says"


@pytest.mark.parametrize(("name", "draft"), [("demo", "parent"), ("parent", "demo")])
def test_slots_with_any_method_and_source_give_what_each_gives_alone(bundles: dict[str, str], name: str, draft: str):
    """The parent drafts a token a forward, the demo model, a CLLM, in blocks."""
    model = with_draft_model(bundles, name, draft, num_slots=NUM_SLOTS)
    prompts = questions(model)[:12]
    with Service(model, block_size=8) as service:
        plain = [found.token_ids for found in service.generate(prompts, method="autoregressive", **OPTIONS)]
        handles = [
            service.submit(
                prompt,
                method=METHODS[index % 3],
                proposer=PROPOSERS[index % 4],
                temperature=0.7 if index % 5 == 4 else 0.0,
                seed=index,
                **OPTIONS,
            )
            for index, prompt in enumerate(prompts)
        ]
        found = [handle.result() for handle in handles]
        drawn = [
            service.submit(prompts[index], method="autoregressive", temperature=0.7, seed=index, **OPTIONS).result()
            for index in (4, 9)
        ]
    expected = [tokens if index % 5 != 4 else drawn[index // 5].token_ids for index, tokens in enumerate(plain)]
    assert [entry.token_ids for entry in found] == expected
