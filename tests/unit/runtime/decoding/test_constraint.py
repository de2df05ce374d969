"""Constrained output: the grammar masks every row of a block, and no loop changes what comes out."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import MissingExtraError, OptionError
from cllm_export.extras import install_line
from cllm_export.runtime.decoding.constraint import GrammarCompiler
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.fakes import EOS, HashModel, calls_of, make_model, properties, write_bundle

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
FORCING = "[ab]\u00e9\u00e9\u00e9\u00e9[cd]{1,3}\u20ac\u20ac"
REGEXES = ["(a|b)+c", "the (cat|dog) sat [0-9]{2,4}", "[a-z ]{5,30}\\.", FORCING]
"""The last one leaves no choice at most bytes of its text: its letters are of several tokens."""


def compile_regex(model, regex):
    limits = model.limits
    compiler = GrammarCompiler(model.codec, vocab_size=limits.vocab_size, eos_token_ids=limits.eos_token_ids)
    return compiler.compile("regex", regex)


def state_after(model, regex, text):
    """What may follow a text, of a constraint that has seen nothing else."""
    fresh = compile_regex(model, regex)
    for index, token in enumerate(text):
        fresh.push(index, token)
    return fresh.state(len(text))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("constraint") / "bundle")


@pytest.fixture(scope="module")
def model(bundle) -> Model:
    return make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2))


@properties
@given(
    regex=st.sampled_from(REGEXES),
    method=st.sampled_from(["jacobi", "jacobi-block"]),
    size=st.integers(2, 8),
    seed=st.integers(0, 2**62),
    temperature=st.sampled_from([0.0, 1.0]),
    proposer=st.sampled_from(["pad", "lookup", "prompt"]),
)
def test_constrained_decoding_gives_the_same_tokens_by_every_loop(
    model, regex, method, size, seed, temperature, proposer
):
    common = {"regex": regex, "seed": seed, "temperature": temperature, "max_new_tokens": 40}
    jacobi = model.generate([5, 9, 3], method=method, proposer=proposer, block_size=size, **common)
    plain = model.generate([5, 9, 3], method="autoregressive", block_size=size, **common)
    assert jacobi.token_ids == plain.token_ids
    if plain.finish_reason == "eos":
        assert re.fullmatch(regex, plain.text)


@properties
@given(
    regex=st.sampled_from(REGEXES),
    seed=st.integers(0, 2**62),
    num_known=st.integers(0, 3),
    limit=st.integers(1, 12),
)
def test_forced_tokens_are_those_that_single_token_masks_leave_no_choice_about(model, regex, seed, num_known, limit):
    """Walks the grammar a token and a mask at a time, with matchers that nothing was rolled back in."""
    generation = model.generate([5], regex=regex, temperature=1.0, seed=seed, method="autoregressive")
    text = [token for token in generation.token_ids if token != EOS]
    start = seed % len(text)
    known = text[start : start + num_known]
    expected = []
    while len(expected) < limit:
        allowed = np.flatnonzero(state_after(model, regex, [*text[:start], *known, *expected]).allowed).tolist()
        if len(allowed) != 1 or allowed == [EOS]:
            break
        expected += allowed
    constraint = compile_regex(model, regex)
    for index, token in enumerate([*text[:start], *known]):
        constraint.push(index, token)
    assert constraint.forced(start + len(known), limit) == expected
    assert (constraint.state(start).allowed == state_after(model, regex, text[:start]).allowed).all()


@pytest.mark.parametrize("method", ["jacobi", "jacobi-block"])
def test_forced_tokens_are_committed_rows_of_the_block_and_save_forwards(bundle, method):
    model = make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=None))
    generation = model.generate([5], regex=FORCING, method=method, block_size=8)
    plain = model.generate([5], regex=FORCING, method="autoregressive", block_size=8)
    assert generation.token_ids == plain.token_ids
    assert max(call.num_committed[0] for call in calls_of(model) if call.kind == "forward") >= 6
    assert generation.statistics.forwards <= plain.statistics.forwards / 2


def test_a_forced_token_that_is_banned_ends_the_request_as_it_does_one_by_one(model):
    banned = {model.codec.encode("\u00e9")[0]: float("-inf")}
    for method in ("jacobi", "jacobi-block", "autoregressive"):
        with pytest.raises(OptionError, match="leave no token to go on with"):
            model.generate([5], regex=FORCING, logit_bias=banned, method=method, block_size=8)


def test_a_request_whose_grammar_fails_ends_alone(bundle):
    vocabulary = bundle.manifest.geometry.vocab_size
    with Service(make_model(bundle, HashModel(vocab_size=vocabulary), num_slots=2), block_size=4) as service:
        broken = service.submit([5], regex=REGEXES[0], max_new_tokens=20)
        broken._run.task.decode._sampler._constraint = None
        broken._run.task.decode._sampler.forced = lambda *_: 1 / 0
        sound = service.submit([5], max_new_tokens=6, ignore_eos=True)
        with pytest.raises(ZeroDivisionError):
            broken.result(timeout=10)
        assert len(sound.result(timeout=10).token_ids) == 6


def test_a_text_under_a_schema_is_json_of_that_schema(model):
    for seed in range(20):
        generation = model.generate([5], json_schema=SCHEMA, temperature=1.0, seed=seed, top_p=0.9)
        if generation.finish_reason == "eos":
            found = json.loads(generation.text)
            assert found["name"] in ("cat", "dog") and 0 <= found["count"] <= 99


def test_constrained_and_free_requests_share_a_batch(bundle, model):
    vocabulary = bundle.manifest.geometry.vocab_size
    requests = [{"regex": REGEXES[index % 3]} if index % 2 else {} for index in range(8)]
    with Service(make_model(bundle, HashModel(vocab_size=vocabulary, window=2), num_slots=3), block_size=4) as service:
        handles = [service.submit([5 + i], max_new_tokens=20, **request) for i, request in enumerate(requests)]
        found = [handle.result().token_ids for handle in handles]
    alone = [model.generate([5 + i], block_size=4, max_new_tokens=20, **r).token_ids for i, r in enumerate(requests)]
    assert found == alone


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"regex": "(a"}, "regex does not compile: .*unclosed group"),
        ({"json_schema": "{"}, "json_schema does not compile"),
        ({"json_schema": {"enum": {"cat", "dog"}}}, "json_schema holds what JSON cannot"),
        ({"json_schema": {"type": "thing"}}, "json_schema does not compile"),
        ({"grammar": "start: missing"}, "grammar does not compile"),
        ({"regex": ""}, "regex must be a non-empty text"),
        ({"regex": "a", "grammar": 'start: "a"'}, "exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "regex excludes ignore_eos"),
    ],
)
def test_bad_grammars_are_refused_before_anything_runs(model, wrong, said):
    with pytest.raises(OptionError, match=said):
        model.generate([5], **wrong)


def test_without_the_extra_its_install_line_is_told(bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    model = make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size))
    with pytest.raises(MissingExtraError, match=re.escape(install_line("grammar"))):
        model.generate([5], regex="a")
