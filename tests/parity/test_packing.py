"""One packed forward gives what an ordinary forward over each window's own tokens gives, for every family.

The tolerance is ``LOGIT_TOLERANCE``: the same sums, rounded over other columns of zeros. A row that saw one token more
or less would be off by more than 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.training.data.samples import Sample
from cllm_export.training.data.windows import Window
from cllm_export.training.model.attention import CPU_ATTENTION, register_cpu_attention
from cllm_export.training.model.packed_model import PackedModel
from cllm_export.training.model.packing import Packed, pack
from cllm_export.training.model.torch_engine import load_weights
from tests.checkpoints import TRAINABLE
from tests.conftest import THREADS, Workshop
from tests.parity.compare import LOGIT_TOLERANCE

VOCABULARY = 280
"""Tokens of random samples are below it; the tiny checkpoints have a few more."""
Windows = Sequence[Sequence[Window]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(THREADS)


@pytest.fixture
def model(workshop: Workshop) -> PackedModel:
    return load(workshop, "llama")


@cache
def load(workshop: Workshop, name: str, attention: str = "sdpa") -> PackedModel:
    decoder = load_weights(open_checkpoint(workshop.checkpoint(name)))
    register_cpu_attention()
    decoder.set_attn_implementation(attention)
    return PackedModel(decoder).eval()


def make_samples(*shapes: tuple[int, int], seed: int = 0) -> list[Sample]:
    """Samples of random tokens, for each its tokens of prompt and answer."""
    generator = random.Random(seed)
    return [
        Sample(id=str(index), tokens=random_tokens(generator, prompt + answer), num_prompt=prompt)
        for index, (prompt, answer) in enumerate(shapes)
    ]


def random_tokens(generator: random.Random, count: int) -> tuple[int, ...]:
    return tuple(generator.randrange(3, VOCABULARY) for _ in range(count))


def make_window(sample: Sample, start: int, count: int, *, right: int = 0, seed: int = 0) -> Window:
    """A window of random guesses, the first ``right`` of them the sample's own tokens."""
    own = sample.tokens[start + 1 : start + 1 + right]
    guesses = (*own, *random_tokens(random.Random(seed + start), count - right))
    return Window(block_size=16, start=start, guesses=guesses)


@torch.no_grad()
def run(
    model: PackedModel, samples: Sequence[Sample], windows: Windows, *, local: bool = False
) -> tuple[Packed, Tensor]:
    packed = pack(samples, windows, local=local)
    logits = model(packed)
    assert torch.isfinite(logits).all()
    return packed, logits


@torch.no_grad()
def plain(model: PackedModel, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of an ordinary forward of transformers."""
    logits: Tensor = model.decoder(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def three_samples() -> tuple[list[Sample], list[list[Window]]]:
    """Of different lengths, so that there is padding, with windows that overlap, repeat and end at the end."""
    samples = make_samples((5, 20), (1, 9), (12, 3))
    first, second, third = samples
    windows = [
        [make_window(first, 4, 15, right=3), make_window(first, 9, 15), make_window(first, 9, 14, seed=5)],
        [make_window(second, 0, 8), make_window(second, 7, 1)],
        [make_window(third, 11, 2, right=1)],
    ]
    return samples, windows


@pytest.mark.parametrize("attention", ["sdpa", CPU_ATTENTION])
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_guess_has_the_logits_of_a_forward_over_what_it_sees(workshop: Workshop, name: str, attention: str):
    model, reference = load(workshop, name, attention), load(workshop, name)
    samples, windows = three_samples()
    packed, logits = run(model, samples, windows)
    guesses = logits[packed.num_clean :]
    for sample, own, places in zip(samples, windows, packed.windows, strict=True):
        for window, place in zip(own, places, strict=True):
            expected = plain(reference, (*sample.tokens[: window.start + 1], *window.guesses))[window.start + 1 :]
            torch.testing.assert_close(guesses[place.start : place.stop], expected, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", TRAINABLE)
def test_clean_rows_have_the_logits_of_the_sample_alone_and_its_next_tokens_as_targets(workshop: Workshop, name: str):
    model = load(workshop, name)
    samples, windows = three_samples()
    packed, logits = run(model, samples, windows)
    expected = [plain(model, sample.tokens[:-1])[sample.first_start :] for sample in samples]
    torch.testing.assert_close(logits[: packed.num_clean], torch.cat(expected), rtol=0, atol=LOGIT_TOLERANCE)
    answers = [token for sample in samples for token in sample.tokens[sample.num_prompt :]]
    assert packed.targets.tolist() == answers


def test_right_guesses_reproduce_the_logits_of_the_clean_rows_they_are_compared_with(model: PackedModel):
    samples = make_samples((4, 20), (2, 30))
    windows = [[make_window(s, s.first_start, 12, right=12), make_window(s, 9, 10, right=10)] for s in samples]
    packed, logits = run(model, samples, windows)
    torch.testing.assert_close(logits[packed.num_clean :], logits[packed.teacher], rtol=0, atol=LOGIT_TOLERANCE)
    assert not packed.weight.any(), "there is nothing to learn from them"


def test_a_guess_counts_from_the_first_wrong_one_on(model: PackedModel):
    (sample,) = make_samples((4, 20))
    packed, _ = run(model, [sample], [[make_window(sample, 3, 6, right=2), make_window(sample, 8, 3, right=3)]])
    assert packed.weight.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_a_teacher_is_the_clean_row_at_the_position_of_the_guess():
    samples = make_samples((5, 20), (3, 12))
    windows = [[make_window(samples[0], 8, 6)], [make_window(samples[1], 2, 4), make_window(samples[1], 6, 5)]]
    packed = pack(samples, windows)
    flat = packed.positions.flatten()
    assert torch.equal(flat[packed.rows[packed.teacher]], flat[packed.rows[packed.num_clean :]])
    assert torch.equal(packed.owners[packed.teacher], packed.owners[packed.num_clean :])
    assert (packed.teacher < packed.num_clean).all()


def test_ranges_tell_the_guesses_of_every_window():
    samples, windows = three_samples()
    packed = pack(samples, windows)
    tokens = packed.input_ids.flatten()[packed.rows[packed.num_clean :]].tolist()
    for own, places in zip(windows, packed.windows, strict=True):
        assert [tuple(tokens[place.start : place.stop]) for place in places] == [window.guesses for window in own]
    assert packed.weight.shape == packed.teacher.shape == (len(tokens),)
    assert packed.owners.tolist() == sorted(packed.owners[: packed.num_clean].tolist()) + [0] * 44 + [1] * 9 + [2] * 2


def test_windows_and_samples_do_not_see_each_other(model: PackedModel):
    """The same shapes run, so equality is required."""
    samples, windows = three_samples()
    packed, before = run(model, samples, windows)
    changed = [list(own) for own in windows]
    changed[0][1] = make_window(samples[0], 9, 15, seed=77)
    after = run(model, samples, changed)[1]
    place = packed.windows[0][1]
    differs = (before != after).any(-1)[packed.num_clean :]
    assert differs[place.start : place.stop].all()
    differs[place.start : place.stop] = False
    assert not differs.any()
    assert torch.equal(before[: packed.num_clean], after[: packed.num_clean]), "clean rows see no guess"


def test_a_window_does_not_see_the_clean_tokens_that_it_guesses(model: PackedModel):
    (sample,) = make_samples((4, 20))
    window = make_window(sample, 8, 6)
    other = Sample(id="s", tokens=(*sample.tokens[:9], *random_tokens(random.Random(3), 15)), num_prompt=4)
    (packed, one), (_, two) = run(model, [sample], [[window]]), run(model, [other], [[window]])
    assert torch.equal(one[packed.num_clean :], two[packed.num_clean :])
    assert not torch.equal(one[: packed.num_clean], two[: packed.num_clean])


def test_padding_of_any_length_is_neither_nan_nor_seen(model: PackedModel):
    """Every row of the whole batch is finite, wanted or not: a NaN beside them would spoil the gradient."""
    short, long = make_samples((2, 4), (30, 90))
    windows = [make_window(short, 1, 3)]
    packed = pack([short, long], [windows, []])
    with torch.no_grad():
        hidden = model.decoder.model(
            input_ids=packed.input_ids, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert packed.mask.any(-1).all()
    alone, both = run(model, [short], [windows])[1], model(packed)
    kept = packed.owners == 0
    torch.testing.assert_close(both[kept], alone, rtol=0, atol=LOGIT_TOLERANCE)


def test_the_gradient_of_a_padded_batch_is_finite(model: PackedModel):
    samples, windows = three_samples()
    model.zero_grad()
    model(pack(samples, windows)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    model.zero_grad()


def test_a_batch_without_windows_has_no_guesses(model: PackedModel):
    samples = make_samples((3, 5), (4, 6))
    packed, logits = run(model, samples, [[], []])
    assert logits.shape[0] == packed.num_clean == 11
    assert (packed.windows, packed.weight.shape, packed.teacher.dtype) == (((), ()), (0,), torch.int64)


def local_pair(sample: Sample) -> Window:
    """A sliding window that moved by three, with the state it came from: two of its guesses were right."""
    before = make_window(sample, 6, 8, right=2, seed=1)
    after = make_window(sample, 9, 8, right=1, seed=2)
    return Window(block_size=9, start=after.start, guesses=after.guesses, previous=before)


def test_the_local_teacher_of_a_state_is_the_state_after_it_where_that_reaches(model: PackedModel):
    sample, other = make_samples((5, 30), (3, 30))
    window = local_pair(sample)
    packed, _ = run(model, [other, sample], [[make_window(other, 4, 5)], [window]], local=True)
    (own,) = packed.windows[1]
    assert [len(places) for places in packed.windows] == [1, 1], "the state before is not the pool's to move"
    flat, guess_rows = packed.positions.flatten(), packed.rows[packed.num_clean :]
    tokens = packed.input_ids.flatten()
    before = range(own.stop, own.stop + 8)
    assert tokens[guess_rows[before.start : before.stop]].tolist() == list(window.previous.guesses)
    for index in before:
        position = int(flat[guess_rows[index]])
        teacher = int(packed.teacher[index])
        assert int(flat[packed.rows[teacher]]) == position
        assert int(packed.owners[teacher]) == 1
        covered = window.start < position <= window.start + len(window.guesses)
        assert (teacher >= packed.num_clean) is covered
        if covered:
            assert teacher - packed.num_clean in range(own.start, own.stop)
    assert packed.weight[before.start : before.stop].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert not packed.weight[: before.start].any(), "windows themselves train nothing here"


def test_a_state_beyond_the_reach_of_the_next_one_does_not_count():
    """The block loop's next block is cut at the end of the sample before its predecessor is."""
    (sample,) = make_samples((3, 10))
    before = make_window(sample, 4, 6, seed=3)
    window = Window(block_size=8, start=5, guesses=random_tokens(random.Random(1), 3), previous=before)
    packed = pack([sample], [[window]], local=True)
    assert packed.weight.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_without_the_local_loss_the_state_before_is_not_packed():
    (sample,) = make_samples((5, 30))
    window = local_pair(sample)
    packed = pack([sample], [[window]])
    assert packed.weight.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_autocast_and_a_call_as_the_decoder_give_the_decoders_own_logits(model: PackedModel):
    (sample,) = make_samples((5, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        through = model(input_ids=torch.tensor([sample.tokens]), use_cache=False).logits
    assert torch.equal(through[0], plain(model, sample.tokens)), "held-out decoding runs what will be exported"


def test_a_guess_counts_less_the_further_it_stands_behind_the_first_wrong_one():
    (sample,) = make_samples((5, 20))
    window = make_window(sample, 6, 5, right=2)
    packed = pack([sample], [[window]], distance_weight=0.5)
    assert packed.weight.tolist() == [0.0, 0.0, 1.0, 0.5, 0.25]


def test_the_local_loss_weighs_the_state_before_by_its_own_first_wrong_guess():
    (sample,) = make_samples((5, 20))
    before = make_window(sample, 6, 5, right=1)
    window = replace(make_window(sample, 8, 5, right=3), previous=before)
    packed = pack([sample], [[window]], local=True, distance_weight=0.5)
    assert packed.weight.tolist() == [0.0] * 5 + [0.0, 1.0, 0.5, 0.25, 0.125]
