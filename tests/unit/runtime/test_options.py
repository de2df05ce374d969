"""The options of a request, and what a model's limits make of them: no model, no engine."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

import cllm_export
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.checks import option_specs
from cllm_export.errors import OptionError, PromptError
from cllm_export.runtime.decoding.sampling import Sampling
from cllm_export.runtime.options import GenerateOptions, ModelLimits, override, resolve, resolve_block_size

LIMITS = ModelLimits(
    block_size=8,
    max_block_size=64,
    fixed_block_size=None,
    max_length=100,
    vocab_size=50,
    eos_token_ids=(2, 3),
    pad_token_id=0,
    trained_with=None,
    has_draft_model=False,
)
PROMPT = [5, 6, 7]


def settle(limits=LIMITS, **options):
    return resolve(GenerateOptions(**options), limits, PROMPT)


def test_every_field_states_its_meaning():
    assert list(option_specs(GenerateOptions)) == [field.name for field in fields(GenerateOptions)]


def test_options_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        GenerateOptions().seed = 1


def test_the_sampling_options_are_those_of_sampling():
    assert {field.name for field in fields(Sampling)} < {field.name for field in fields(GenerateOptions)}
    request = settle(temperature=0.5, top_k=4, seed=9)
    assert (request.sampling.temperature, request.sampling.top_k, request.seed) == (0.5, 4, 9)


def test_nothing_said_is_greedy_jacobi_of_a_chosen_size_to_the_last_token():
    request = settle()
    assert (request.method, request.block_size, request.proposer) == ("jacobi", "auto", "pad")
    assert (request.max_new_tokens, request.stop, request.logprobs) == (97, (), None)
    assert request.eos_token_ids == {2, 3}
    assert not request.needs_sampler


def test_the_same_options_and_limits_give_the_same_request():
    assert settle(temperature=1.0) == settle(temperature=1.0)
    assert settle(temperature=1.0).seed == 0


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"method": "jacobi", "deterministic": True}, 8),
        ({"method": "jacobi", "block_size": 5}, 5),
        ({"method": "jacobi-block"}, 8),
        ({"method": "speculative"}, 8),
        ({"method": "speculative", "block_size": "auto"}, "auto"),
        ({"method": "autoregressive"}, 1),
        ({"method": "autoregressive", "block_size": "auto"}, 1),
        ({"method": "autoregressive", "block_size": 4}, 4),
    ],
    ids=str,
)
def test_the_block_size_follows_from_the_method(options, size):
    assert settle(**options).block_size == size


@pytest.mark.parametrize("block_size", [None, "auto", 4])
def test_a_pinned_engine_has_one_block_size(block_size):
    pinned = replace(LIMITS, fixed_block_size=4)
    assert settle(pinned, block_size=block_size).block_size == 4
    assert resolve_block_size(block_size, pinned) == 4
    with pytest.raises(OptionError, match="block_size must be 4, which this engine is pinned to, got 5") as error:
        settle(pinned, block_size=5)
    assert error.value.fields == ("block_size",)


def test_what_a_model_was_trained_with_is_its_default():
    trained = replace(LIMITS, trained_with=TrainedWith(block_size=16, proposer="repeat", loop="block"))
    assert (settle(trained).method, settle(trained).proposer) == ("jacobi-block", "repeat")
    assert settle(trained, block_size="auto").method == "jacobi"
    assert settle(trained, proposer="pad").proposer == "pad"


def test_a_proposer_is_refused_where_nothing_is_drafted():
    with pytest.raises(OptionError, match="the method is autoregressive: leave proposer out") as error:
        settle(method="autoregressive", proposer="lookup")
    assert error.value.fields == ("proposer", "method")
    filled = settle(method="autoregressive", block_size=4, proposer="lookup")  # its rows are discarded
    assert filled.proposer == "lookup"


def test_the_proposer_of_speculative_is_the_draft_model_where_there_is_one():
    assert settle(method="speculative").proposer == "lookup"
    assert settle(replace(LIMITS, has_draft_model=True), method="speculative").proposer == "model"
    with pytest.raises(OptionError, match="needs a draft model"):
        settle(proposer="model")


def test_a_lookahead_request_has_its_shape_and_as_many_rows():
    request = settle(method="lookahead", ngram=4)
    assert request.lookahead is not None
    assert request.lookahead.ngram == 4
    assert request.block_size == request.lookahead.max_rows
    assert request.proposer == "prompt"
    with pytest.raises(OptionError, match="choose smaller ones"):
        settle(replace(LIMITS, max_block_size=8), method="lookahead")


def test_a_request_on_the_device_has_the_models_own_block_size():
    assert settle(forwards_per_sync=4).block_size == 8
    for wrong in ({"method": "speculative"}, {"proposer": "lookup"}):
        with pytest.raises(OptionError, match="forwards_per_sync is for the"):
            settle(forwards_per_sync=4, **wrong)


def test_a_request_that_ignores_the_end_has_no_tokens_that_end_it():
    assert settle(ignore_eos=True).eos_token_ids == frozenset()


def test_new_tokens_that_do_not_fit_are_refused_with_the_room():
    assert settle(max_new_tokens=97).max_new_tokens == 97
    with pytest.raises(PromptError, match="ask for at most 97"):
        settle(max_new_tokens=98)
    with pytest.raises(PromptError, match="the prompt has 100 tokens and this model holds 100 in all"):
        resolve(GenerateOptions(), LIMITS, [5] * 100)


def test_a_bias_of_a_token_that_the_model_has_not_is_refused():
    with pytest.raises(OptionError, match="takes token ids from 0 to 49, got 50"):
        settle(logit_bias={50: 1.0})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"block_size": "auto", "deterministic": True}, "exclude each other"),
        ({"block_size": "auto", "method": "jacobi-block"}, "keeps its size"),
        ({"block_size": "auto", "forwards_per_sync": 2}, "forwards_per_sync excludes block_size"),
        ({"block_size": 4, "method": "lookahead"}, "block_size is not for lookahead"),
        ({"window": 3}, "choose method='lookahead', or leave window out"),
        ({"method": "lookahead", "window": 0}, "window must be an integer of at least 1, got 0"),
        ({"method": "lookahead", "temperature": 1.0}, "lookahead is for greedy requests and excludes sampling"),
        ({"method": "lookahead", "proposer": "model"}, "is not for lookahead"),
        ({"forwards_per_sync": 2, "logprobs": 0}, "excludes logprobs"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "regex excludes ignore_eos"),
        ({"proposer": "zeros"}, "proposer must be one of"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"top_p": 10**400}, "top_p must be a number"),
    ],
    ids=str,
)
def test_what_needs_no_model_is_refused_without_one(options, said):
    with pytest.raises(OptionError, match=said) as error:
        GenerateOptions(**options)
    assert error.value.fields


def test_single_options_stand_in_place_of_others_and_none_says_nothing():
    options = GenerateOptions(temperature=0.8, stop=(";",))
    assert override(options, {"temperature": 0.5, "stop": None}) == GenerateOptions(temperature=0.5, stop=(";",))
    assert override(None, {}) == GenerateOptions()


def test_an_unknown_option_is_refused_with_the_names_there_are():
    with pytest.raises(
        OptionError,
        match=r"no such option: tempereture; there are temperature, .*, grammar: did you mean temperature\?",
    ):
        override(None, {"tempereture": None})
    with pytest.raises(OptionError, match="options must be GenerateOptions, got dict"):
        override({"temperature": 1.0}, {})


@pytest.mark.parametrize("filtered", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_an_option_that_would_do_nothing_without_a_temperature_is_refused(filtered):
    """A client that sends temperature 0 means greedy, and a seed alone does no harm."""
    (name,) = filtered
    with pytest.raises(OptionError, match=f"{name} does nothing without a temperature, .* or leave {name} out"):
        GenerateOptions(**filtered)
    with pytest.raises(OptionError, match=name):
        override(GenerateOptions(max_new_tokens=3), filtered)
    assert settle(temperature=0, **filtered).needs_sampler is False
    assert settle(temperature=0.5, **filtered).needs_sampler
    assert override(GenerateOptions(temperature=0.5), filtered)
    assert GenerateOptions(seed=5, top_p=1.0, top_k=0, min_p=0.0).is_greedy


@pytest.mark.parametrize(
    ("call", "given", "meant"),
    [
        ("GenerateOptions", "temprature", "temperature"),
        ("GenerateOptions", "maxnewtokens", "max_new_tokens"),
        ("BuildOptions", "fixed_shape", "fixed_shapes"),
        ("VerifyOptions", "thread", "threads"),
        ("load", "thread", "threads"),
        ("load", "slots", "num_slots"),
        ("verify", "prompt", "prompts"),
        ("build", "forced", "force"),
        ("Service", "que_size", "queue_size"),
    ],
)
def test_an_option_that_does_not_exist_is_answered_with_the_nearest_one(call, given, meant):
    """Python's TypeError would name none."""
    with pytest.raises(OptionError, match=rf"no such option: {given}; there are .*: did you mean {meant}\?"):
        getattr(cllm_export, call)(**{given: 1})


def test_an_option_like_no_other_is_answered_with_all_there_are():
    with pytest.raises(OptionError, match=r"no such option: zzz; there are path, threads, .*, plan$"):
        cllm_export.load("bundle", zzz=1)


def test_lookahead_and_fixed_shapes_exclude_each_other():
    with pytest.raises(OptionError, match="lookahead and fixed_shapes exclude each other"):
        cllm_export.BuildOptions(lookahead=True, fixed_shapes=True)
