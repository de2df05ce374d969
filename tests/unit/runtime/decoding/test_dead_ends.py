"""A guess never changes what a grammar allows: dead ends, limits of the parser, and ends of sequence in drafts."""

from __future__ import annotations

import re
from collections import Counter
from random import Random
from typing import Any

import pytest

from cllm_export.errors import CllmExportError, GrammarError, OptionError
from cllm_export.runtime.decoding.constraint import GrammarCompiler
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.fakes import (
    EOS,
    HashModel,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    make_geometry,
    make_model,
    write_bundle,
)

llguidance = pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")

DEAD = r"/[^\s\S]/"
"""A lexeme that no text matches."""
LOOP = 'start: "x" ("a" loop | "b" "c" "d" "e")\nloop: "a" loop'
"""The texts that begin with xa never end, and llguidance notes it only when it reads the second a."""
LETTERS = "abc"
DRAFTING = [method for method in METHODS if method != "autoregressive"]
PROPOSERS = ["pad", "repeat", "prompt", "lookup", "pool", "pool+lookup"]
SIZES = [1, 2, 3, 5, 8, 16]

LEXEMES = ('"a"', '"b"', '"c"', '"a"', '"b"', "/[ab]*a[ab]{3}c/", "/[ab]{1,3}/", "X", DEAD, '"a" loop', "</s>")
LIMITS = {"step_max_items": (20, 40, 80), "step_lexer_fuel": (60, 150, 300), "max_lexer_states": (8, 12, 16, 24)}
"""Limits of the parser that a few tokens meet."""


def make_grammar(random: Random, depth: int = 3) -> str:
    """A rule in which some texts end, some reach a dead end, and some never end."""
    if not depth or random.random() < 0.15:
        return random.choice(LEXEMES)
    parts = [make_grammar(random, depth - 1) for _ in range(random.randint(2, 3))]
    kind = random.choice(("sequence", "sequence", "choice", "star", "option"))
    if kind == "sequence":
        return " ".join(parts)
    if kind == "choice":
        return f"({' | '.join(parts)})"
    return f"({parts[0]}){'*' if kind == 'star' else '?'} {parts[1]}"


class Case:
    """One random request, and what it is drawn with."""

    def __init__(self, seed: int) -> None:
        random = Random(seed)
        limit = random.choice((None, None, *LIMITS))
        self.limits = {limit: random.choice(LIMITS[limit])} if limit else {}
        self.prompt = "".join(random.choice(LETTERS + ".") for _ in range(random.randint(1, 6))) * random.randint(1, 3)
        self.biases = {
            letter: random.choice((-20.0, 20.0, float("-inf")))
            for letter in random.sample(LETTERS + ".", random.randint(0, 2))
        }
        self.options = {
            "grammar": f'start: {make_grammar(random)}\nloop: "a" loop\nX: /[ab]{{1,2}}/ & /[bc]+/',
            "max_new_tokens": random.randint(1, 16),
            "stop": random.choice(([], [], ["bb"], ["ab", "cc"])),
            "logprobs": 1,
            "seed": seed,
            **random.choice(({}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 2, "repetition_penalty": 1.3})),
        }
        self.hows = [
            {"method": method, "proposer": random.choice(PROPOSERS), "block_size": random.choice(SIZES)}
            for method in METHODS
            if method != "autoregressive" or not seed % 4
        ]
        for how in self.hows:
            if how["method"] == "autoregressive":
                del how["proposer"]


class LimitedMatchers:
    """llguidance's matchers with other limits."""

    grammar_from_json_schema = llguidance.LLMatcher.grammar_from_json_schema
    grammar_from_regex = llguidance.LLMatcher.grammar_from_regex
    grammar_from_lark = llguidance.LLMatcher.grammar_from_lark

    def __init__(self, limits: dict[str, int]) -> None:
        self._limits = limits

    def __call__(self, tokenizer: Any, grammar: str, **options: Any) -> Any:
        limits = llguidance.LLParserLimits(**self._limits)
        return _MATCHER(tokenizer, grammar, limits=limits, **options)


_MATCHER = llguidance.LLMatcher


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("dead-ends") / "bundle")


@pytest.fixture(scope="module")
def model(bundle) -> Model:
    return make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2))


def ids_of(model, text):
    return [EOS if letter == "." else model.codec.tokenizer.token_to_id(letter) for letter in text]


def outcome_of(model, prompt, **options):
    """What a request gives, or the error that it ends with."""
    try:
        found = model.generate(prompt, **options)
    except CllmExportError as error:
        return type(error).__name__, str(error)
    return found.token_ids, found.text, found.finish_reason, found.logprobs


def test_all_methods_proposers_and_sizes_give_one_answer_for_every_grammar(model, monkeypatch):
    """The prompt repeats letters and ends of sequence, so drafts of them reach dead ends, limits and ends."""
    seen: Counter[str] = Counter()
    for seed in range(240):
        case = Case(seed)
        monkeypatch.setattr(llguidance, "LLMatcher", LimitedMatchers(case.limits))
        tokens = ids_of(model, case.prompt)
        biases = {ids_of(model, letter)[0]: value for letter, value in case.biases.items()}
        options = {**case.options, "logit_bias": biases}
        expected = outcome_of(model, tokens, method="autoregressive", block_size=1, **options)
        seen[expected[2] if len(expected) == 4 else expected[1]] += 1
        for how in case.hows:
            assert outcome_of(model, tokens, **how, **options) == expected, (seed, how)
    kinds = ("eos", "length", "stop", "dead end", "matches no text", "nothing can", "Too many items", "too many states")
    for kind in kinds:
        assert sum(count for outcome, count in seen.items() if kind in outcome) >= 3, (kind, seen)


@pytest.mark.parametrize("method", DRAFTING)
@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("size", SIZES)
def test_a_rejected_draft_into_an_endless_loop_leaves_the_text_as_it_was(model, method, proposer, size):
    prompt = ids_of(model, "xaaaaxaaaaxaaaa")
    options = {"grammar": LOOP, "logit_bias": {ids_of(model, "b")[0]: 50.0}, "max_new_tokens": 20}
    generation = model.generate(prompt, method=method, proposer=proposer, block_size=size, **options)
    assert (generation.text, generation.finish_reason) == ("xbcde", "eos")


@pytest.mark.parametrize("limit", [{"max_lexer_states": 60}, {"step_lexer_fuel": 500}])
def test_a_draft_that_meets_a_limit_of_the_lexer_leaves_the_text_as_it_was(model, monkeypatch, limit):
    """A copy of a matcher shares its lexer: many guesses in copies would use up the states of the text."""
    monkeypatch.setattr(llguidance, "LLMatcher", LimitedMatchers(limit))
    options = {"regex": "([ab]*a[ab]{12}c)+", "max_new_tokens": 40, "temperature": 1.0}
    outcomes: Counter[str] = Counter()
    for seed in range(3):
        prompt = ids_of(model, "aabbabab" * 3)
        expected = outcome_of(model, prompt, method="autoregressive", seed=seed, **options)
        outcomes[expected[2] if len(expected) == 4 else expected[0]] += 1
        for method in DRAFTING:
            for proposer in ("lookup", "prompt"):
                found = outcome_of(model, prompt, method=method, proposer=proposer, block_size=16, seed=seed, **options)
                assert found == expected, (method, proposer, seed)
    assert outcomes["GrammarError"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_dead_end_is_an_error_that_names_its_place(model, method, size):
    with pytest.raises(GrammarError, match="grammar leads to a dead end at new token 2: nothing can follow"):
        model.generate([5], grammar=f'start: "a" {DEAD}', method=method, block_size=size)


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_end_beyond_the_length_limit_is_not_met(model, method):
    generation = model.generate([5], grammar=f'start: "a" {DEAD}', method=method, block_size=8, max_new_tokens=1)
    assert (generation.text, generation.finish_reason) == ("a", "length")


@pytest.mark.parametrize(
    ("option", "source"),
    [
        ("regex", r"[^\s\S]"),
        ("regex", r"a[^\s\S]"),
        ("grammar", f"start: {DEAD}"),
        ("grammar", "start: X\nX: /a+/ & /b+/"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}),
        ("json_schema", {"enum": []}),
        ("json_schema", False),
    ],
)
def test_a_grammar_that_no_text_matches_is_refused_before_anything_runs(bundle, option, source):
    fresh = make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size))
    source = "false" if source is False else source
    with pytest.raises(GrammarError, match=f"{option} (matches no text|does not compile)"):
        fresh.generate([5], **{option: source})
    assert not fresh.engine.calls


@pytest.mark.parametrize("method", METHODS)
def test_an_end_of_sequence_token_that_a_grammar_names_ends_only_a_whole_text(model, method):
    whole = model.generate([5], grammar='start: "a" </s>', method=method, block_size=4)
    assert (whole.text, whole.finish_reason) == ("a", "eos")
    with pytest.raises(GrammarError, match="dead end at new token 2: no token of the model can follow"):
        model.generate([5], grammar='start: "a" </s> "b"', method=method, block_size=4)


def test_a_dead_end_in_a_service_ends_its_request_alone(bundle):
    vocabulary = bundle.manifest.geometry.vocab_size
    with Service(make_model(bundle, HashModel(vocab_size=vocabulary), num_slots=2), block_size=4) as service:
        broken = service.submit([5], grammar=f'start: "a" {DEAD}')
        sound = service.submit([5], max_new_tokens=6, ignore_eos=True)
        with pytest.raises(GrammarError, match="dead end at new token 2"):
            broken.result(timeout=10)
        assert len(sound.result(timeout=10).token_ids) == 6
        with pytest.raises(GrammarError, match="regex matches no text"):
            service.submit([5], regex=r"[^\s\S]")


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("columns", [-1, -3, 0, 1, 40])
def test_a_tokenizer_may_be_larger_or_smaller_than_the_logits(tmp_path, make_tokenizer, columns):
    """Gemma 3 has a token more in its tokenizer than in its embedding; others pad the embedding."""
    vocabulary = make_tokenizer().get_vocab_size() + columns
    opened = write_bundle(
        tmp_path / "bundle", tokenizer=make_tokenizer(), geometry=make_geometry(vocab_size=vocabulary)
    )
    uneven = make_model(opened, HashModel(vocab_size=vocabulary, window=2))
    for method in METHODS:
        for source in ("(a|b)+c", "[a-e]{2,6}"):
            found = uneven.generate([5], regex=source, method=method, block_size=4, temperature=1.0, seed=1)
            assert all(token < vocabulary for token in found.token_ids)
            assert found.finish_reason == "length" or re.fullmatch(source, found.text)


def test_a_text_that_needs_a_token_without_a_column_matches_nothing(tmp_path):
    tokenizer = byte_fallback_tokenizer()
    last = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary = tokenizer.token_to_id(last)
    opened = write_bundle(tmp_path / "bundle", tokenizer=tokenizer, geometry=make_geometry(vocab_size=vocabulary))
    uneven = make_model(opened, HashModel(vocab_size=vocabulary))
    with pytest.raises(GrammarError, match="regex matches no text: no token of the model can follow"):
        uneven.generate([5], regex=last)
    with pytest.raises(GrammarError, match="dead end at new token 2: no token of the model can follow"):
        uneven.generate([5], regex=f"a{last}")


def test_a_model_whose_end_of_sequence_token_is_not_in_its_tokenizer_is_refused(model):
    size = model.codec.tokenizer.get_vocab_size()
    with pytest.raises(OptionError, match="end-of-sequence token that its tokenizer has"):
        GrammarCompiler(model.codec, vocab_size=size + 10, eos_token_ids=[size + 3])


def test_every_end_of_sequence_token_of_the_model_may_end_a_complete_text(model):
    size = model.codec.tokenizer.get_vocab_size()
    compiler = GrammarCompiler(model.codec, vocab_size=size + 10, eos_token_ids=[EOS, 7, size + 3])
    constraint = compiler.compile("regex", "x")
    constraint.push(0, ids_of(model, "x")[0])
    allowed = constraint.state(1).allowed
    assert [token for token, may in enumerate(allowed) if may] == [EOS, 7, size + 3]


def test_an_engine_that_does_not_repeat_itself_makes_the_grammar_read_the_text_anew(model):
    compiler = GrammarCompiler(
        model.codec, vocab_size=model.limits.vocab_size, eos_token_ids=model.limits.eos_token_ids
    )
    a, b, c = ids_of(model, "abc")
    constraint = compiler.compile("regex", "a(ab|bc)")
    for length, token in enumerate((a, a, b)):
        constraint.push(length, token)
    constraint.push(1, b)
    assert constraint.state(2).only == c
