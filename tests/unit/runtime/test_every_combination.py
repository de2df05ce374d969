"""Every option beside every other: whatever a request says and however it is run, it gives what plain decoding gives.

Plain decoding is one request at a time, one token a forward, on a model that keeps and shares nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.contract import FixedShapes
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import CllmExportError
from cllm_export.runtime.decoding.draft_model import DraftModel
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import FILTERS
from cllm_export.runtime.request_run import Generation
from cllm_export.runtime.service import Handle, Service
from tests.fakes import FakeEngine, HashModel, make_model, properties, with_manifest, write_bundle

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")

MAX_LENGTH = 64
NUM_SLOTS = 3
VOCABULARY = 40
"""Tokens that the model predicts: few, so that ends of sequence, stop strings and repetitions are common."""
ROW_BYTES = 2 * 2 * 2 * 8 * 8
TRAINED = {"sliding": TrainedWith(block_size=5, proposer="pad", loop="sliding"), "none": None}
REGEXES = ["(a|b)+c", "the (cat|dog) sat [0-9]{2,4}", "[ab]\u00e9\u00e9\u00e9[cd]{1,3}\u20ac\u20ac"]
LOOKAHEAD = ("window", "ngram", "guesses")
CHAINS = ["pad", "repeat", "prompt", "lookup", "pool", "model", "pool+lookup", "lookup+model+repeat", "model+pool"]


class Outcome(NamedTuple):
    """What a request came to: what it gave, or the error that it ended with."""

    gave: tuple[Any, ...]
    error: str | None


class World(NamedTuple):
    """What a request runs on."""

    language_model: HashModel
    draft_model: HashModel
    trained: TrainedWith | None
    fixed_block_size: int | None
    num_rows_kept: int
    block_size: int | str | None
    """Of the service."""


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


tokens = st.integers(0, VOCABULARY - 1)
drawing = st.one_of(
    st.just({}),
    optional(
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
        top_k=st.sampled_from([1, 3]),
        top_p=st.sampled_from([0.3, 0.9]),
        min_p=st.sampled_from([0.05, 0.5]),
        repetition_penalty=st.sampled_from([0.5, 1.5]),
        logit_bias=st.dictionaries(tokens, st.sampled_from([float("-inf"), -3.0, 3.0]), max_size=12),
        logprobs=st.integers(0, 3),
        seed=st.integers(0, 2**63 - 1),
    ).map(lambda given: {"temperature": 0} | given if given.keys() & FILTERS else given),
    optional(
        regex=st.sampled_from(REGEXES),
        temperature=st.sampled_from([0.7, 2.0]),
        logit_bias=st.dictionaries(st.integers(60, 110), st.sampled_from([float("-inf"), 3.0]), max_size=12),
        logprobs=st.integers(0, 2),
        seed=st.integers(0, 99),
    ),
)
ending = optional(
    max_new_tokens=st.integers(1, 20),
    stop=st.lists(st.text("!\"#$%&'()*+,-./0123", min_size=1, max_size=3), max_size=2),
    ignore_eos=st.booleans(),
)
how = st.one_of(
    st.fixed_dictionaries(
        {"method": st.sampled_from([method for method in METHODS if method != "autoregressive"])},
        optional={
            "block_size": st.integers(1, 16),
            "deterministic": st.booleans(),
            "proposer": st.sampled_from(CHAINS),
        },
    ),
    st.fixed_dictionaries(
        {"method": st.just("autoregressive")},
        optional={"block_size": st.integers(1, 16), "deterministic": st.booleans()},
    ),
    st.fixed_dictionaries({"method": st.sampled_from(["jacobi", "speculative"]), "block_size": st.just("auto")}),
    st.fixed_dictionaries(
        {"method": st.just("lookahead"), "window": st.integers(1, 3), "ngram": st.integers(2, 3)},
        optional={"guesses": st.just(1), "proposer": st.sampled_from(["pad", "lookup", "pool"])},
    ),
)
prompts = st.one_of(
    st.lists(tokens, min_size=1, max_size=20),
    st.builds(lambda first, length: [first] * length, tokens, st.integers(1, MAX_LENGTH - 1)),
    st.just(list(range(2, MAX_LENGTH + 1))),
)


class Request(NamedTuple):
    prompt: list[int]
    ending: dict[str, Any]
    drawing: dict[str, Any]
    how: dict[str, Any]
    cut: int | None
    """Deltas after which nobody reads on, None where all are read."""

    @property
    def what(self) -> dict[str, Any]:
        """Options that say what must come out; the seed of the noise is among them."""
        room = MAX_LENGTH - len(self.prompt)
        options = {"seed": 0} | self.ending | self.drawing
        options["max_new_tokens"] = min(options.get("max_new_tokens", room), room)
        if "regex" in options:
            options.pop("ignore_eos", None)
        return options

    @property
    def options(self) -> dict[str, Any]:
        """All its options, those that exclude each other left out."""
        how = dict(self.how)
        if how["method"] == "lookahead" and self.drawing.keys() - {"seed"}:
            how = {"method": "jacobi"}
        return self.what | how


requests = st.builds(Request, prompts, ending, drawing, how, st.sampled_from([None, None, None, 0, 1, 3]))
worlds = st.builds(
    World,
    st.builds(
        HashModel, vocab_size=st.just(VOCABULARY), window=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 9)
    ),
    st.builds(
        HashModel, vocab_size=st.just(VOCABULARY), window=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 9)
    ),
    st.sampled_from(list(TRAINED.values())),
    st.sampled_from([None, None, 1, 4, 16]),
    st.sampled_from([0, 20, 10_000]),
    st.sampled_from([None, 1, 3, 8, 9, 16, "auto"]),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("combinations") / "bundle")


def make(bundle, world: World) -> Model:
    manifest, shapes = bundle.manifest, None
    geometry = manifest.geometry
    if world.fixed_block_size:
        shapes = FixedShapes(batch_size=NUM_SLOTS, block_size=world.fixed_block_size, kv_length=geometry.cache_length)
    graphs = {name: entry.__class__(file=entry.file, fixed_shapes=shapes) for name, entry in manifest.graphs.items()}
    changed = with_manifest(
        bundle, trained_with=world.trained, graphs=graphs, block_size=world.fixed_block_size or manifest.block_size
    )
    drafter = DraftModel(
        FakeEngine(world.draft_model, geometry, num_slots=NUM_SLOTS),
        max_length=MAX_LENGTH,
        pad_token_id=0,
        trained_with=world.trained,
    )
    return make_model(
        changed,
        world.language_model,
        num_slots=NUM_SLOTS,
        draft_model=drafter,
        prefix_cache_bytes=world.num_rows_kept * ROW_BYTES,
        forward_seconds={1: 1.0, 4: 1.5, 16: 3.0},
    )


def outcome_of(generation: Generation) -> tuple[Any, ...]:
    return generation.token_ids, generation.text, generation.finish_reason, generation.logprobs


def plain(bundle, world: World, request: Request) -> Outcome:
    model = make_model(bundle, world.language_model)
    given: dict[str, Any] = request.what
    try:
        return Outcome(
            outcome_of(model.generate(request.prompt, method="autoregressive", block_size=1, **given)),
            None,
        )
    except CllmExportError as error:
        return Outcome((), str(error))


def check_record(request: Request, found: Generation) -> None:
    """Whatever cut it, the record says of the right rows that they are the text, and statistics count what it says."""
    text = [*request.prompt, *found.token_ids]
    for at, block, next_ids, num_accepted, new in found.forwards:
        assert block[:num_accepted] == text[at : at + num_accepted]
        assert 1 <= num_accepted <= len(block) == len(next_ids)
        assert new
    assert [token for record in found.forwards for token in record.new] == list(found.token_ids)
    statistics = found.statistics
    assert statistics.new_tokens == len(found.token_ids)
    assert statistics.forwards == len(found.forwards) == sum(statistics.acceptance_histogram.values())
    assert statistics.prompt_tokens == len(request.prompt) > statistics.reused_tokens


def stop_reading(handle: Handle, count: int) -> None:
    """Read so many deltas, and cancel; what it may fail with is judged by its result."""
    with suppress(CllmExportError):
        for _ in islice(handle, count):
            pass
    handle.cancel()


def is_beginning(found: Generation, expected: Outcome) -> bool:
    token_ids = expected.gave[0] if expected.gave else None
    return token_ids is None or found.token_ids == token_ids[: len(found.token_ids)]


def settled(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that this model has no choice about."""
    left = dict(options)
    if model.engine.fixed_shapes:
        left.pop("block_size", None)
        if left["method"] == "lookahead":  # a bundle with fixed shapes has no graph for it
            left = {name: value for name, value in left.items() if name not in LOOKAHEAD} | {"method": "jacobi"}
    if left.get("deterministic") and left.get("block_size") == "auto":
        del left["deterministic"]
    return left


@properties
@given(world=worlds, requests=st.lists(requests, min_size=1, max_size=5))
def test_one_request_at_a_time_gives_what_plain_decoding_gives(bundle, world, requests):
    model = make(bundle, world)
    for request in requests:
        expected = plain(bundle, world, request)
        try:
            with model.stream(request.prompt, **settled(model, request.options)) as stream:
                deltas = []
                while request.cut is None or len(deltas) < request.cut:
                    if (delta := next(stream, None)) is None:
                        break
                    deltas.append(delta)
                if request.cut is not None:
                    continue
                found = stream.result()
        except CllmExportError as error:
            assert str(error) == expected.error
            continue
        assert Outcome(outcome_of(found), None) == expected
        assert "".join(deltas) == found.text
        check_record(request, found)


@properties
@given(world=worlds, requests=st.lists(requests, min_size=1, max_size=8))
def test_requests_that_share_an_engine_give_what_plain_decoding_gives(bundle, world, requests):
    model = make(bundle, world)
    shared = [request for request in requests if request.options["method"] != "lookahead"]
    left = {"block_size", "deterministic"}
    with Service(model, block_size=None if world.fixed_block_size else world.block_size) as service:
        handles = []
        for request in shared:
            options = {name: value for name, value in request.options.items() if name not in left}
            if service.block_size == "auto" and options["method"] == "jacobi-block":
                options["method"] = "jacobi"
            handles.append(service.submit(request.prompt, **options))
            if request.cut is not None:
                stop_reading(handles[-1], request.cut)
        for request, handle in zip(shared, handles, strict=True):
            expected = plain(bundle, world, request)
            try:
                found = handle.result(30)
            except CllmExportError as error:
                assert str(error) == expected.error
                continue
            if request.cut is not None and found.finish_reason == "cancelled":
                assert is_beginning(found, expected)
                continue
            assert Outcome(outcome_of(found), None) == expected
            check_record(request, found)
        assert service.num_open == 0
