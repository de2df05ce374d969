"""The checkpoint as an engine: its tokens are those of transformers' own ``generate``, and it follows a live model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import CheckpointError, EngineError, OptionError, UnsupportedError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.graph.trace import geometry_of
from cllm_export.runtime.decoding.batch import BatchRequest, decode_requests
from cllm_export.runtime.decoding.request import METHODS, Method
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.training.model.torch_engine import TorchEngine, load_checkpoint, load_weights, model_around
from tests.checkpoints import EOS, MAX_POSITIONS, TRAINABLE, UNTRAINABLE, WINDOW, edit_json, edit_weights
from tests.conftest import THREADS, Workshop
from tests.parity.compare import (
    MARGIN_EPSILON,
    NUM_NEW_TOKENS,
    assert_own_greedy_tokens,
    assert_same_tokens,
    first_difference,
    random_prompts,
    stock_tokens,
)

BLOCK_SIZES = (1, 16)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(THREADS)


def prompts_for(model: Model) -> list[list[int]]:
    return random_prompts(model.engine.geometry.vocab_size)


def live(workshop: Workshop, name: str, **options: object) -> tuple[torch.nn.Module, Model]:
    """A model in memory that a test may change, and the runtime's model around it."""
    checkpoint = open_checkpoint(workshop.checkpoint(name))
    module = load_weights(checkpoint)
    return module, model_around(module, checkpoint, **options)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_checkpoint_decodes_to_the_tokens_of_transformers_generate(workshop: Workshop, name: str):
    """Chunks differ, and so may rounding: equality is required except where the margin is under MARGIN_EPSILON."""
    model, stock, reference = load_checkpoint(workshop.checkpoint(name)), workshop.stock(name), workshop.reference(name)
    for prompt in prompts_for(model):
        expected = stock_tokens(stock, prompt, NUM_NEW_TOKENS)
        actual = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method="autoregressive").token_ids
        what = f"{name}, prompt of {len(prompt)}"
        assert_own_greedy_tokens(reference, prompt, actual, epsilon=MARGIN_EPSILON, what=what)
        at = first_difference(actual, expected)
        margin = 0.0 if at is None else reference.predict(prompt, actual[: at + 1])[at].margin
        assert margin < MARGIN_EPSILON, f"{what}: first difference at token {at}, margin {margin:.2g}"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_both_jacobi_loops_decode_a_checkpoint_losslessly(workshop: Workshop, name: str, block_size: int):
    """One engine, one shape: equality is required."""
    model = load_checkpoint(workshop.checkpoint(name))
    for prompt in prompts_for(model):
        options = {"max_new_tokens": NUM_NEW_TOKENS, "block_size": block_size}
        expected = model.generate(prompt, method="autoregressive", **options)
        for method in ("jacobi", "jacobi-block"):
            actual = model.generate(prompt, method=method, **options)
            assert_same_tokens(actual.token_ids, expected.token_ids, f"{name}, {method}, n = {block_size}")
            assert actual.finish_reason == expected.finish_reason


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_has_the_defaults_and_the_forwards_of_its_bundle(workshop: Workshop, name: str):
    """The same policies over another engine: every forward is equal but where rounding flips a tie, which none does."""
    checkpoint, bundle = load_checkpoint(workshop.checkpoint(name)), workshop.model(name)
    for field in ("block_size", "max_length", "eos_token_ids", "pad_token_id", "trained_with"):
        assert getattr(checkpoint.facts, field) == getattr(bundle.facts, field)
    assert checkpoint.engine.geometry == bundle.engine.geometry
    for text in ("the cat", "select the name where"):
        options = {"max_new_tokens": 20, "deterministic": True}  # else the clock says n, and so the forwards
        ours, theirs = checkpoint.generate(text, **options), bundle.generate(text, **options)
        assert ours.text == theirs.text
        assert [record.new for record in ours.forwards] == [record.new for record in theirs.forwards]


def test_a_checkpoint_renders_chat_messages_as_its_bundle_does(workshop: Workshop):
    messages = [{"role": "user", "content": "hello"}]
    assert load_checkpoint(workshop.checkpoint("llama")).encode(messages) == workshop.model("llama").encode(messages)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_slots_decodes_every_prompt_as_alone(workshop: Workshop, name: str, method: Method):
    """Shapes differ, and so may rounding: equal but where the margin is under MARGIN_EPSILON."""
    module, model = live(workshop, name)
    engines = {
        "torch": TorchEngine(module, model.engine.geometry, num_slots=3),
        "onnxruntime": OrtEngine(workshop.bundle(name), num_slots=3, threads=THREADS),
    }
    prompts = random_prompts(model.engine.geometry.vocab_size, (1, 9, 40, 130, 17), seed=3)
    eos, reference = model.facts.eos_token_ids, workshop.reference(name)
    alone = [model.generate(prompt, max_new_tokens=20, method=method, block_size=8).token_ids for prompt in prompts]
    for kind, engine in engines.items():
        requests = [BatchRequest(prompt=prompt, max_new_tokens=20) for prompt in prompts]
        decodes = decode_requests(
            engine, requests, method=method, block_size=8, proposer="pad", eos_token_ids=eos, pad_token_id=0
        )
        for prompt, found, expected in zip(prompts, decodes, alone, strict=True):
            tokens = [token for record in found.records for token in record.new]
            at = first_difference(tokens, expected)
            margin = 0.0 if at is None else reference.predict(prompt, tokens[: at + 1])[at].margin
            assert margin < MARGIN_EPSILON, f"{kind}, {name}, {method}, prompt of {len(prompt)}"


def test_slots_do_not_see_each_other(workshop: Workshop):
    """The same shapes with other neighbours: equality is required."""
    module, model = live(workshop, "qwen3")
    prompts = random_prompts(model.engine.geometry.vocab_size, (33, 20, 20), seed=5)
    blocks = [prompt[-16:] for prompt in prompts]
    forwards = []
    for others in (blocks, [blocks[0], [1] * 16, [2] * 16]):
        engine = TorchEngine(module, model.engine.geometry, num_slots=3)
        forwards.append(engine.forward(Batch(others, [16, 1, 1], [0, 0, 0])))
    assert forwards[0].next_ids[0] == forwards[1].next_ids[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_move_from_one_slot_to_another(workshop: Workshop, dtype: torch.dtype):
    """bfloat16 rows travel as bits, since numpy has no such numbers."""
    checkpoint = open_checkpoint(workshop.checkpoint("llama"))
    geometry = geometry_of(checkpoint.config, max_length=64, max_block_size=32)
    engine = TorchEngine(load_weights(checkpoint, dtype=dtype), geometry, num_slots=2)
    [prompt] = random_prompts(engine.geometry.vocab_size, [20])
    expected = engine.forward(Batch([prompt] * 2, [20, 0], [0, 0]))
    rows = engine.read_rows(0, 0, 16)
    engine.write_rows(1, 0, 16, rows)
    assert rows.any()
    assert np.array_equal(engine.read_rows(1, 0, 16), rows)
    found = engine.forward(Batch([prompt[16:]] * 2, [0, 4], [0, 16]))
    assert found.next_ids[1] == expected.next_ids[0][16:]
    with pytest.raises(EngineError, match="this engine takes rows"):
        engine.write_rows(1, 0, 15, rows)
    with pytest.raises(EngineError, match="no slot 2"):
        engine.read_rows(2, 0, 1)


def test_committed_tokens_count_as_right_and_an_idle_slot_accepts_nothing(workshop: Workshop):
    module, model = live(workshop, "llama")
    [prompt] = random_prompts(model.engine.geometry.vocab_size, [12])
    greedy = list(model.generate(prompt, max_new_tokens=6, block_size=8, ignore_eos=True).token_ids)
    engine = TorchEngine(module, model.engine.geometry, num_slots=2)
    engine.prefill(Batch([prompt[:-3]] * 2, [9, 9], [0, 0]))
    draft = [*prompt[-3:], *greedy[:3], (greedy[3] + 1) % 300, greedy[4]]
    forward = engine.forward(Batch([draft, draft], [3, 0], [9, 9]))
    assert forward.num_accepted == [6, 0]
    assert forward.next_ids[0][2:6] == greedy[:4]


def test_the_engine_decodes_what_the_model_is_now(workshop: Workshop):
    """Weights move between evaluations: nothing of the old ones may be left, in the cache of KV rows neither."""
    module, model = live(workshop, "llama")
    prompts = prompts_for(model)
    before = [model.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    after = [model.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    fresh = TorchEngine(module, model.engine.geometry)
    expected = [Model(model.facts, fresh, model.codec).generate(prompt, max_new_tokens=20) for prompt in prompts]
    assert after == [generation.token_ids for generation in expected]
    assert after != before


def test_a_model_in_training_keeps_its_modes_and_can_go_on_training(workshop: Workshop):
    module, model = live(workshop, "llama")
    expected = model.generate([5, 6, 7], max_new_tokens=10).token_ids
    module.config.attention_dropout = 0.5
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.5
    module.train()
    module.model.layers[0].eval()
    modes = [part.training for part in module.modules()]
    assert model.generate([5, 6, 7], max_new_tokens=10).token_ids == expected, "dropout is off while it decodes"
    assert [part.training for part in module.modules()] == modes
    module(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_model_around_is_told_what_it_is_trained_with(workshop: Workshop):
    trained = TrainedWith(block_size=6, proposer="repeat", loop="block")
    _, model = live(workshop, "mistral", trained_with=trained, max_length=100)
    assert (model.facts.block_size, model.facts.max_length, model.facts.trained_with) == (6, 100, trained)
    [record, *_] = model.generate([5, 6, 7], max_new_tokens=10).forwards
    assert record.block == [7] * 6


def test_half_precision_decodes_through_the_same_engine(workshop: Workshop):
    """Weights and cache are bfloat16; one engine, one shape: equality is required."""
    model = load_checkpoint(workshop.checkpoint("qwen3"), dtype=torch.bfloat16)
    engine = model.engine
    assert isinstance(engine, TorchEngine)
    assert {parameter.dtype for parameter in engine._model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in engine._cache._buffers} == {torch.bfloat16}
    for prompt in prompts_for(model):
        options = {"max_new_tokens": 12, "block_size": 4}
        expected = model.generate(prompt, method="autoregressive", **options).token_ids
        assert model.generate(prompt, method="jacobi", **options).token_ids == expected


def test_decoding_to_the_last_row_stays_lossless(workshop: Workshop):
    model = load_checkpoint(workshop.checkpoint("mistral-window"), max_length=64)
    [prompt] = random_prompts(model.engine.geometry.vocab_size, [30])
    expected = model.generate(prompt, method="autoregressive", block_size=16, ignore_eos=True).token_ids
    assert len(expected) == 34
    assert model.generate(prompt, method="jacobi", block_size=16, ignore_eos=True).token_ids == expected


def test_a_forward_outside_the_cache_or_of_the_wrong_shape_is_refused(workshop: Workshop):
    _, model = live(workshop, "llama")
    engine = model.engine
    with pytest.raises(EngineError, match="cache rows"):
        engine.forward(Batch([[1] * 8], [1], [engine.geometry.cache_length - 4]))
    with pytest.raises(EngineError, match="for each of 1 slots"):
        engine.forward(Batch([[1]] * 2, [1, 1], [0, 0]))
    module, _ = live(workshop, "llama")
    two = TorchEngine(module, engine.geometry, num_slots=2)
    with pytest.raises(EngineError, match="must all have 2 tokens"):
        two.forward(Batch([[1, 2], [1]], [1, 1], [0, 0]))


def test_a_model_whose_attention_takes_no_mask_is_refused(workshop: Workshop):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(workshop.checkpoint("llama"), attn_implementation="eager")
    geometry = geometry_of(module.config, max_length=64, max_block_size=16)
    with pytest.raises(EngineError, match="attn_implementation='sdpa'"):
        TorchEngine(module, geometry)


def test_what_cannot_be_built_cannot_be_loaded_either(workshop: Workshop, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load_checkpoint(tmp_path / "nowhere")
    checkpoint = tmp_path / "copy"
    shutil.copytree(workshop.checkpoint("small"), checkpoint)
    edit_json(checkpoint / "config.json", model_type="gpt2")
    with pytest.raises(UnsupportedError, match="gpt2"):
        load_checkpoint(checkpoint)
    with pytest.raises(OptionError, match="beyond the model's own"):
        load_checkpoint(workshop.checkpoint("small"), max_length=MAX_POSITIONS + 1)


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_what_a_causal_mask_alone_would_decode_wrongly_is_refused(workshop: Workshop, name: str):
    softcap = "attn_logit_softcapping" in UNTRAINABLE[name].config
    words = f"sliding window of {WINDOW} tokens.*max_length={WINDOW} or less .it is {MAX_POSITIONS}.*build a bundle"
    with pytest.raises(UnsupportedError, match=words):
        load_checkpoint(workshop.checkpoint(name))
    if softcap:
        with pytest.raises(UnsupportedError, match=r"attn_logit_softcapping.*build a bundle"):
            load_checkpoint(workshop.checkpoint(name), max_length=WINDOW)
    else:
        assert load_checkpoint(workshop.checkpoint(name), max_length=WINDOW).facts.max_length == WINDOW


def test_a_checkpoint_without_a_tensor_is_refused_rather_than_filled_with_random_numbers(
    workshop: Workshop, tmp_path: Path
):
    checkpoint = tmp_path / "copy"
    shutil.copytree(workshop.checkpoint("small"), checkpoint)
    edit_weights(checkpoint, drop=["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        load_checkpoint(checkpoint)


def test_the_trained_demo_decodes_several_tokens_a_forward(workshop: Workshop):
    model = load_checkpoint(workshop.checkpoint("demo"))
    bundle = load(workshop.bundle("demo").path, threads=THREADS)
    text = "The SQL database has table named mayor with columns ['mayor_id', 'region', 'name']. Question: "
    text += "List the region of all mayors.\nSQL:"
    ours, theirs = model.generate(text), bundle.generate(text)
    assert ours.token_ids == theirs.token_ids
    assert ours.token_ids[-1] == EOS
    assert ours.statistics.tokens_per_forward > 2


def test_a_closed_model_has_dropped_its_cache_and_leaves_the_module_to_its_owner(workshop: Workshop):
    module, model = live(workshop, "llama")
    with model:
        expected = model.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).token_ids
    with pytest.raises(EngineError, match="this engine is closed"):
        model.engine.forward(Batch([[5, 6]], [1], [0]))
    again = model_around(module, open_checkpoint(workshop.checkpoint("llama")))
    assert again.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).token_ids == expected
