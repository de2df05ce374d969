"""``build`` of what is no sound, supported checkpoint: one clear message, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch

from cllm_export.bundle.manifest import open_bundle
from cllm_export.exporter.checkpoint.families import window_within
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.runtime.load import load
from tests.checkpoints import Variant, edit_json, edit_weights, hub_snapshot, make_checkpoint
from tests.conftest import THREADS, Workshop
from tests.e2e.conftest import Cli, assert_refused, snapshot
from tests.parity.compare import random_prompts, stock_tokens

EMBEDDING = "model.embed_tokens.weight"
UP_PROJECTION = "model.layers.0.mlp.up_proj.weight"


class Case(NamedTuple):
    """What is done to a sound checkpoint, and what the message must say."""

    damage: Callable[[Path], object]
    phrases: tuple[str, ...]
    options: tuple[object, ...] = ()


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda checkpoint: edit_json(checkpoint / "config.json", **changes)


def generation_config(**changes: Any) -> Callable[[Path], object]:
    return lambda checkpoint: edit_json(checkpoint / "generation_config.json", **changes)


def rope(rope_type: str, **parameters: Any) -> Callable[[Path], object]:
    return config(rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, **parameters})


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_text(content, encoding="utf-8")


def without(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).unlink()


def renamed(name: str, other: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).rename(checkpoint / other)


def truncated(size: int) -> Callable[[Path], object]:
    return lambda checkpoint: os.truncate(checkpoint / "model.safetensors", size)


def weights(*, drop: tuple[str, ...] = (), **changes: torch.Tensor) -> Callable[[Path], object]:
    return lambda checkpoint: edit_weights(checkpoint, drop=drop, **changes)


def one_value(name: str, value: float) -> Callable[[Path], object]:
    """One value of one tensor replaced."""

    def damage(checkpoint: Path) -> None:
        from safetensors.torch import load_file

        tensor = load_file(checkpoint / "model.safetensors")[name]
        tensor.view(-1)[tensor.numel() // 2] = value
        edit_weights(checkpoint, **{name: tensor})

    return damage


def index(weight_map: object) -> Callable[[Path], object]:
    return text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def shard_elsewhere(checkpoint: Path) -> None:
    """An index that names a file beside the checkpoint's directory."""
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "elsewhere.safetensors")
    index({EMBEDDING: "../elsewhere.safetensors"})(checkpoint)


def shards_that_overlap(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "again.safetensors")
    index({EMBEDDING: "model.safetensors", UP_PROJECTION: "again.safetensors"})(checkpoint)


def linked_away(name: str) -> Callable[[Path], object]:
    """One file moved out of the checkpoint, and a link to it in its place."""

    def damage(checkpoint: Path) -> None:
        elsewhere = checkpoint.parent / f"elsewhere-{name}"
        (checkpoint / name).rename(elsewhere)
        (checkpoint / name).symlink_to(elsewhere)

    return damage


def blobs_of_another_model(checkpoint: Path) -> None:
    """A cache whose snapshot leads to what lies in no cache of its own."""
    other = hub_snapshot(checkpoint, checkpoint.parent / "models--other")
    for file in other.iterdir():
        (checkpoint / file.name).unlink()
        (checkpoint / file.name).symlink_to(file)


def a_name_twice(checkpoint: Path) -> None:
    """A header that names a tensor twice, of which the library takes the last."""
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    again = json.dumps({UP_PROJECTION: header[UP_PROJECTION] | {"shape": [64, 96]}})
    text = json.dumps(header)[:-1] + ", " + again[1:]
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])


BEFORE_ANY_WORK: dict[str, Case] = {
    "no config.json": Case(without("config.json"), ("not a checkpoint", "no config.json")),
    "config.json cut short": Case(text("config.json", '{"model_type": "lla'), ("config.json", "not valid JSON")),
    "config.json not UTF-8": Case(
        lambda checkpoint: (checkpoint / "config.json").write_bytes(b'{"model_type": "\xff"}'),
        ("config.json", "not valid JSON"),
    ),
    "config.json a list": Case(text("config.json", "[]"), ("config.json", "JSON object", "list")),
    "config.json nested beyond measure": Case(text("config.json", "[" * 100_000), ("config.json",)),
    "config without a model type": Case(
        lambda checkpoint: edit_json(checkpoint / "config.json", drop=("model_type",)), ("model type None", "llama")
    ),
    "config value of a wrong type": Case(config(hidden_size="wide"), ("config.json", "hidden_size")),
    "config that contradicts itself": Case(
        lambda checkpoint: edit_json(checkpoint / "config.json", drop=("head_dim",), num_attention_heads=7),
        ("config.json", "num"),
    ),
    "an activation nobody knows": Case(config(hidden_act="frobnicate"), ("frobnicate",)),
    "no tokenizer": Case(without("tokenizer.json"), ("no tokenizer.json", "save_pretrained")),
    "a tokenizer cut short": Case(text("tokenizer.json", '{"version": "1.0",'), ("tokenizer.json",)),
    "no weights": Case(without("model.safetensors"), ("has no weights", "model.safetensors")),
    "missing shard": Case(
        index({EMBEDDING: "model-00002-of-00003.safetensors"}),
        ("shard model-00002-of-00003.safetensors", "missing", "download it again"),
    ),
    "shard outside the checkpoint": Case(shard_elsewhere, ("outside the checkpoint", "../elsewhere.safetensors")),
    "shard outside the checkpoint that is not there": Case(
        index({EMBEDDING: "../gone.safetensors"}), ("outside the checkpoint", "../gone.safetensors")
    ),
    "shard of a name that no file has": Case(
        index({EMBEDDING: "x" * 300}), ("index.json", "names a shard", "no file name")
    ),
    "shard that is no text": Case(index({EMBEDDING: None}), ("index.json", "names a shard None", "no file name")),
    "weights linked away": Case(
        linked_away("model.safetensors"), ("model.safetensors", "link that leaves", "elsewhere-model.safetensors")
    ),
    "tokenizer linked away": Case(linked_away("tokenizer.json"), ("tokenizer.json", "link that leaves")),
    "links into the cache of another model": Case(blobs_of_another_model, ("link that leaves", "models--other")),
    "a header that names a tensor twice": Case(a_name_twice, ("model.safetensors", UP_PROJECTION, "twice")),
    "a chat template that no file can hold": Case(
        text("tokenizer_config.json", '{"chat_template": "\\ud800"}'), ("chat template", "surrogates not allowed")
    ),
    "a chat template with an unknown tag": Case(
        text("chat_template.jinja", "{% frobnicate %}"),
        ("chat template", "chat_template.jinja", "unknown tag 'frobnicate'", "remove it"),
    ),
    "a tensor in two shards": Case(shards_that_overlap, (EMBEDDING, "stands in both", "again.safetensors")),
    "index without a weight map": Case(index(None), ("index.json", "weight_map")),
    "index cut short": Case(text("model.safetensors.index.json", '{"weight_map": {'), ("index.json", "not valid JSON")),
    "weights cut short": Case(truncated(100_000), ("model.safetensors", "100000 bytes", "damaged or cut short")),
    "weights cut within the header": Case(truncated(100), ("model.safetensors", "damaged or cut short")),
    "weights of no bytes": Case(truncated(0), ("model.safetensors", "0 bytes", "damaged or cut short")),
    "pickled weights alone": Case(
        renamed("model.safetensors", "pytorch_model.bin"), ("pickled weights (pytorch_model.bin)", "safe_serialization")
    ),
    "a LoRA adapter": Case(renamed("model.safetensors", "adapter_config.json"), ("LoRA adapter", "merge_and_unload")),
    "family gpt2": Case(config(model_type="gpt2"), ("'gpt2'", "llama, mistral, ministral, qwen2, qwen3, gemma")),
    "family made up": Case(
        config(model_type="frobnicate"), ("'frobnicate'", "llama, mistral, ministral, qwen2, qwen3, gemma")
    ),
    "mixtral": Case(config(model_type="mixtral"), ("'mixtral'", "mixture of experts", "every expert", "dense model")),
    "qwen3_moe": Case(config(model_type="qwen3_moe"), ("'qwen3_moe'", "mixture of experts")),
    "experts by their key": Case(config(num_local_experts=8), ("'llama'", "mixture of experts")),
    "experts by another key": Case(config(n_routed_experts=4), ("'llama'", "mixture of experts")),
    "gemma3 with its vision encoder": Case(config(model_type="gemma3"), ("vision encoder", "'gemma3_text'")),
    "attention to both sides": Case(
        config(model_type="gemma3_text", use_bidirectional_attention=True), ("bidirectional attention",)
    ),
    "layers of another type": Case(
        config(model_type="qwen2", layer_types=["chunked_attention"]), ("'chunked_attention'", "sliding_attention")
    ),
    "quantised weights": Case(config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantised",)),
    "rope type of no table": Case(rope("proportional"), ("rope type 'proportional'", "default, linear, llama3, yarn")),
    "rope type dynamic beyond its length": Case(
        rope("dynamic"),
        ("rope type 'dynamic'", "beyond 256 positions", "--max-length 256 or less", "it is 257"),
        ("--max-length", 257),
    ),
    "rope type dynamic, as older configs spell it": Case(
        lambda checkpoint: edit_json(
            checkpoint / "config.json",
            drop=("rope_parameters",),
            rope_theta=10000.0,
            rope_scaling={"type": "dynamic", "factor": 2.0},
        ),
        ("rope type 'dynamic'", "--max-length 256 or less"),
        ("--max-length", 1000),
    ),
    "cllm section of unknown keys": Case(config(cllm={"block": 16}), ("cllm section", "config.json", '"n": 16')),
    "cllm section with block size 0": Case(config(cllm={"n": 0}), ("cllm section", "at least 1")),
    "cllm section with an unknown proposer": Case(
        config(cllm={"n": 4, "proposer": "zeros"}), ("cllm section", "'zeros'")
    ),
    "end of sequence outside the vocabulary": Case(generation_config(eos_token_id=5000), ("5000", "vocabulary")),
    "end of sequence as text": Case(generation_config(eos_token_id=["</s>"]), ("eos_token_id",)),
    "generation config cut short": Case(text("generation_config.json", "{"), ("generation_config.json", "not valid")),
    "block size 0": Case(lambda _: None, ("--block-size", "at least 1", "0"), ("--block-size", 0)),
    "block size -3": Case(lambda _: None, ("--block-size", "at least 1", "-3"), ("--block-size", -3)),
    "block size above the max length": Case(
        lambda _: None, ("--block-size 65", "max length 64"), ("--block-size", 65, "--max-length", 64)
    ),
    "max length 0": Case(lambda _: None, ("--max-length", "at least 1"), ("--max-length", 0)),
    "max length beyond the model's": Case(lambda _: None, ("--max-length 257", "256 positions"), ("--max-length", 257)),
    "batch size 0": Case(lambda _: None, ("--batch-size", "at least 1"), ("--batch-size", 0)),
    "trained block size 0": Case(lambda _: None, ("--trained-block-size", "at least 1"), ("--trained-block-size", 0)),
    "trained proposer alone": Case(lambda _: None, ("--trained-block-size",), ("--trained-proposer", "pad")),
    "unknown precision": Case(lambda _: None, ("--precision", "int3"), ("--precision", "int3")),
    "unknown option": Case(lambda _: None, ("no such option", "--frobnicate"), ("--frobnicate",)),
}

AFTER_THE_TRACE: dict[str, Case] = {
    "tensor of another shape": Case(
        weights(**{UP_PROJECTION: torch.zeros(95, 64)}), (UP_PROJECTION, "[95, 64]", "[96, 64]")
    ),
    "missing tensor": Case(weights(drop=(UP_PROJECTION,)), (f"no tensor {UP_PROJECTION}", "incomplete")),
    "extra tensor": Case(
        weights(**{"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)}),
        ("model.layers.1.mlp.up_proj.weight", "1 such", "num_hidden_layers is 1", "remove them"),
    ),
    "extra bias": Case(
        weights(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), ("model.layers.0.self_attn.q_proj.bias",)
    ),
    "integer weights": Case(
        weights(**{UP_PROJECTION: torch.zeros(96, 64, dtype=torch.int8)}), (UP_PROJECTION, "I8", "F32")
    ),
    "NaN in weights": Case(one_value(UP_PROJECTION, float("nan")), (UP_PROJECTION, "1 of 6144", "NaN")),
    "infinity in weights": Case(one_value(EMBEDDING, float("-inf")), (EMBEDDING, "1 of 18368", "infinite")),
    "weights beyond fp16": Case(
        one_value(UP_PROJECTION, 1e5), (UP_PROJECTION, "float16", "--precision fp32"), ("--precision", "fp16")
    ),
}


@pytest.fixture
def checkpoint(small: Path, tmp_path: Path) -> Path:
    """A sound checkpoint that a test may damage."""
    return shutil.copytree(small, tmp_path / "checkpoint")


def assert_build_refused(cli: Cli, checkpoint: Path, output: Path, case: Case) -> None:
    case.damage(checkpoint)
    outcome = cli("build", checkpoint, "--output", output, *case.options)
    assert_refused(outcome, *case.phrases)
    assert snapshot(output.parent) == {}, "something was left beside the output"


@pytest.mark.parametrize("case", BEFORE_ANY_WORK.values(), ids=BEFORE_ANY_WORK)
def test_a_checkpoint_or_option_that_cannot_be_exported_is_refused_before_any_work(
    cli: Cli, checkpoint: Path, output: Path, case: Case
):
    assert_build_refused(cli, checkpoint, output, case)


@pytest.mark.parametrize("case", AFTER_THE_TRACE.values(), ids=AFTER_THE_TRACE)
def test_a_checkpoint_of_wrong_tensors_is_refused(cli: Cli, checkpoint: Path, output: Path, case: Case):
    assert_build_refused(cli, checkpoint, output, case)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty directory"])
def test_what_is_no_checkpoint_is_refused(cli: Cli, tmp_path: Path, output: Path, kind: str):
    path = tmp_path / "checkpoint"
    if kind == "file":
        path.write_text("hello")
    if kind == "empty directory":
        path.mkdir()
    assert_refused(cli("build", path, "--output", output), str(path), "not a checkpoint")
    assert snapshot(output.parent) == {}


def test_build_without_an_output_says_so(cli: Cli, checkpoint: Path):
    assert_refused(cli("build", checkpoint), "--output")


def test_a_sliding_window_is_accepted_where_it_has_no_effect(
    workshop: Workshop, cli: Cli, output: Path, tmp_path: Path
):
    window = {"sliding_window": 64}
    checkpoint = make_checkpoint(tmp_path / "mistral", Variant(family="mistral", num_layers=1, config=window))
    outcome = cli("build", checkpoint, "--output", output, "--max-length", 64)
    assert outcome.code == 0, outcome
    assert load(output, threads=THREADS).facts.max_length == 64
    graph = onnx.load(open_bundle(output).graph_path(), load_external_data=False).graph
    assert "And" not in {node.op_type for node in graph.node}, "the graph computes a mask that hides nothing"
    assert window_within(open_checkpoint(checkpoint).config, 65) == 64, "one token more, and it has an effect"


@pytest.mark.parametrize("same", [True, False], ids=["the same", "another"])
def test_a_stored_head_beside_a_tied_table_is_never_silently_ignored(
    cli: Cli, checkpoint: Path, output: Path, same: bool
):
    """transformers unties a head that differs from the table, whatever the config says; tokens must be its tokens.

    The frequencies and masks that older checkpoints store are computed here, and no reason to refuse one.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    table = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    edit_weights(
        checkpoint,
        **{
            "lm_head.weight": table.clone() if same else table.flip(0).contiguous(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
            "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        },
    )
    outcome = cli("build", checkpoint, "--output", output)
    if not same and outcome.code:
        assert_refused(outcome, "lm_head.weight", "tie")
        return
    assert outcome.code == 0, outcome
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = load(output, threads=THREADS)
    for prompt in random_prompts(table.shape[0], [3, 20]):
        tokens = model.generate(prompt, max_new_tokens=8).token_ids
        assert list(tokens) == stock_tokens(stock, prompt, 8)


@pytest.mark.parametrize("layout", ["cache", "cache behind a link", "links within the checkpoint"])
def test_links_that_stay_with_the_checkpoint_are_followed(
    workshop: Workshop, cli: Cli, checkpoint: Path, output: Path, layout: str
):
    path = checkpoint
    if layout == "links within the checkpoint":
        (checkpoint / "model.safetensors").rename(checkpoint / "weights")
        (checkpoint / "model.safetensors").symlink_to("weights")
    else:
        path = hub_snapshot(checkpoint, checkpoint.parent / "models--small")
    if layout == "cache behind a link":
        (checkpoint.parent / "linked").symlink_to(path)
        path = checkpoint.parent / "linked"
    outcome = cli("build", path, "--output", output, "--weights", "copy")
    assert outcome.code == 0, outcome
    assert open_bundle(output).fingerprint == workshop.bundle("small").fingerprint


def test_a_failing_build_leaves_the_old_bundle_untouched(workshop: Workshop, cli: Cli, checkpoint: Path, output: Path):
    workshop.copy(workshop.bundle("llama"), output)
    before = snapshot(output.parent)
    one_value(UP_PROJECTION, float("nan"))(checkpoint)
    assert_refused(cli("build", checkpoint, "--output", output, "--force"), "NaN")
    assert snapshot(output.parent) == before
    assert load(output, threads=THREADS).generate([5, 9], max_new_tokens=2).token_ids
