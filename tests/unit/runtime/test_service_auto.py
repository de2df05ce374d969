"""``Service(block_size="auto")``: every width that reads or decodes was compared with n = 1."""

from __future__ import annotations

from typing import Any

import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import Bundle
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.prefix.prompt_state import PromptState
from cllm_export.runtime.engines.base import Forward
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.fakes import FakeEngine, HashModel, Row, greedy, make_geometry, make_model, write_bundle

LANGUAGE = HashModel(vocab_size=64)
"""Every earlier KV row changes a token, so one wrong row makes all later tokens wrong."""
PROMPTS = [[5], list(range(2, 32)), [6, 7, 8], [9] * 23, [3, 4], list(range(40, 57)), [11, 12, 13, 14], [2] * 12]


class WidthEngine(FakeEngine):
    """Gives other tokens, and writes other KV rows, where a forward or a prefill has another width than these."""

    def __init__(self, exact: set[int], *, num_slots: int = 3) -> None:
        super().__init__(LANGUAGE, make_geometry(vocab_size=64), num_slots=num_slots)
        self._exact = exact

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        forward = super().forward(batch, with_logits=with_logits)
        if len(batch.input_ids[0]) in self._exact:
            return forward
        self._spoil(batch)
        logits = None if forward.logits is None else forward.logits + 1
        return forward._replace(next_ids=[[token ^ 1 for token in slot] for slot in forward.next_ids], logits=logits)

    def prefill(self, batch: Batch) -> None:
        super().prefill(batch)
        if len(batch.input_ids[0]) not in self._exact:
            self._spoil(batch)

    def _spoil(self, batch: Batch) -> None:
        for rows, block, start in zip(self.rows, batch.input_ids, batch.write_index, strict=True):
            for index in range(start, start + len(block)):
                rows[index] = Row(rows[index].token, rows[index].context ^ 1)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def model_of(bundle: Bundle, engine: FakeEngine, **options: Any) -> Model:
    """A model that compares its block sizes before the first request."""
    codec = make_model(bundle, LANGUAGE).codec
    return Model(bundle.manifest, engine, codec, forward_seconds={1: 1e-4, 16: 1.1e-4}, **options)


def widths_of(service: Service, engine: FakeEngine) -> set[int]:
    """The widths of all forwards that requests of every length, beside one another, took."""
    start = len(engine.calls)
    handles = [service.submit(prompt, max_new_tokens=9 + 2 * index) for index, prompt in enumerate(PROMPTS * 2)]
    found = [list(handle.result(timeout=60).token_ids) for handle in handles]
    assert found == [greedy(LANGUAGE, prompt, 9 + 2 * index, eos=(1,)) for index, prompt in enumerate(PROMPTS * 2)]
    return {len(call.input_ids[0]) for call in engine.calls[start:]}


@pytest.mark.parametrize("exact", [{1, 2, 4, 8}, {1, 4, 16}, {1, 2, 4, 8, 12, 16}], ids=str)
@pytest.mark.parametrize("keeps_prefixes", [False, True])
def test_no_token_and_no_kv_row_comes_from_a_width_that_was_not_compared(
    bundle: Bundle, exact: set[int], keeps_prefixes: bool
):
    """Every request gives the tokens of n = 1, whatever its neighbours read in the same forwards."""
    engine, state = WidthEngine(exact), None
    if keeps_prefixes:
        state = PromptState(engine, max_bytes=1 << 20, fingerprint=bundle.fingerprint, max_length=64)
    model = model_of(bundle, engine, prompt_state=state)
    with Service(model, block_size="auto") as service:
        assert set(model.auto_sizes or ()) == exact
        widths = widths_of(service, engine)
    assert widths <= exact
    assert {1, max(exact)} <= widths, "prompts are read in few forwards"


def test_where_auto_means_one_n_its_service_is_the_one_of_that_n(bundle: Bundle):
    """No size is exact: prompts are read in chunks of one width, and decoded at n = 1."""

    def calls(block_size: int | str, engine: FakeEngine) -> list[tuple[str, int]]:
        known = ExactSizes(different=frozenset({2, 4, 8, 12, 16}))
        with Service(model_of(bundle, engine, exact_sizes=known), block_size=block_size) as service:  # type: ignore[arg-type]
            for prompt in PROMPTS:
                service.submit(prompt, max_new_tokens=5).result(timeout=60)
        return [(call.kind, len(call.input_ids[0])) for call in engine.calls]

    found = calls("auto", FakeEngine(LANGUAGE, make_geometry(vocab_size=64), num_slots=2))
    assert found == calls(1, FakeEngine(LANGUAGE, make_geometry(vocab_size=64), num_slots=2))
    assert set(found) == {("prefill", 16), ("forward", 1)}


def test_a_prefill_that_differs_where_its_forward_does_not_makes_a_size_different(bundle: Bundle):
    class OddPrefill(WidthEngine):
        def prefill(self, batch: Batch) -> None:
            super().prefill(batch)
            if len(batch.input_ids[0]) == 8:
                self._spoil(batch)

    engine = OddPrefill(set(range(1, 33)))
    model = model_of(bundle, engine)
    with Service(model, block_size="auto") as service:
        assert model.auto_sizes == (1, 2, 4, 12, 16)
        assert 8 not in widths_of(service, engine)
