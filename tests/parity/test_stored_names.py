"""Checkpoints stored in the ways of older tools: what is read of them is what transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.read import EMBEDDING, HEAD, open_checkpoint
from cllm_export.runtime.load import load
from tests.checkpoints import edit_json, edit_weights
from tests.conftest import THREADS, Workshop
from tests.parity.compare import random_prompts, stock_tokens

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def renamed(checkpoint: Path, name_of: Callable[[str], str]) -> None:
    """Store every tensor under another name."""
    tensors = {name_of(name): tensor for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def head_alone(checkpoint: Path) -> None:
    renamed(checkpoint, lambda name: HEAD if name == EMBEDDING else name)


def without_prefix(checkpoint: Path) -> None:
    renamed(checkpoint, lambda name: name.removeprefix("model."))


def with_two_prefixes(checkpoint: Path) -> None:
    """As a model that was wrapped in another: all names of the base, and then that of the head."""
    renamed(checkpoint, lambda name: f"model.{name}")


def two_prefixes_and_a_head(checkpoint: Path) -> None:
    untied(checkpoint)
    renamed(checkpoint, lambda name: name if "lm_head" in name else f"model.{name}")


def head_alone_without_prefix(checkpoint: Path) -> None:
    head_alone(checkpoint)
    without_prefix(checkpoint)


def head_with_prefix(checkpoint: Path) -> None:
    renamed(checkpoint, lambda name: f"model.{HEAD}" if name == EMBEDDING else name)


def untied(checkpoint: Path) -> None:
    """A head of its own, with the prefix that only the base model should have."""
    head = load_file(checkpoint / WEIGHTS)[EMBEDDING].flip(0).contiguous()
    edit_weights(checkpoint, **{f"model.{HEAD}": head})
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)


def in_subfolders(checkpoint: Path) -> None:
    """Two shards below the checkpoint's directory; the index gives their paths."""
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"shards/a.safetensors": names[::2], "shards/more/b.safetensors": names[1::2]}
    for shard, held in shards.items():
        (checkpoint / shard).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in held}, checkpoint / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def in_subfolders_without_prefix(checkpoint: Path) -> None:
    without_prefix(checkpoint)
    in_subfolders(checkpoint)


LAYOUTS = (
    head_alone,
    without_prefix,
    with_two_prefixes,
    two_prefixes_and_a_head,
    head_alone_without_prefix,
    head_with_prefix,
    untied,
    in_subfolders,
    in_subfolders_without_prefix,
)


@pytest.fixture
def checkpoint(workshop: Workshop, tmp_path: Path) -> Path:
    """A sound checkpoint of one layer, tied, that a test may store in another way."""
    return shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")


@pytest.mark.parametrize("store", LAYOUTS)
def test_every_tensor_is_the_one_that_transformers_loads(checkpoint: Path, store: Callable[[Path], None]):
    from transformers import AutoModelForCausalLM

    store(checkpoint)
    opened = open_checkpoint(checkpoint)
    stock = dict(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).named_parameters())
    assert opened.tensors.keys() == stock.keys()
    for name, parameter in stock.items():
        assert torch.equal(opened.read(name), parameter), name


@pytest.mark.parametrize("weights", ["copy", "link"])
@pytest.mark.parametrize("store", [head_alone_without_prefix, in_subfolders])
def test_a_bundle_of_it_decodes_what_transformers_decodes(
    workshop: Workshop, checkpoint: Path, store: Callable[[Path], None], weights: str
):
    from transformers import AutoModelForCausalLM

    store(checkpoint)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = load(workshop.build(checkpoint, weights=weights).path, threads=THREADS)
    for prompt in random_prompts(stock.config.vocab_size, [3, 20]):
        assert list(model.generate(prompt, max_new_tokens=8).token_ids) == stock_tokens(stock, prompt, 8)


def test_a_checkpoint_in_training_is_the_same(checkpoint: Path):
    from cllm_export.training.model.torch_engine import load_weights

    head_alone_without_prefix(checkpoint)
    opened = open_checkpoint(checkpoint)
    weights = load_weights(opened).state_dict()
    for name in opened.tensors:
        assert torch.equal(weights[name], opened.read(name)), name


@pytest.mark.parametrize("prefix", ["module.", "model.model.", "transformer."])
def test_names_that_transformers_does_not_know_are_not_known_here(checkpoint: Path, prefix: str):
    renamed(checkpoint, lambda name: prefix + name)
    assert not open_checkpoint(checkpoint).tensors.keys() & {EMBEDDING, "model.norm.weight"}


def test_a_tensor_stored_under_both_names_is_refused(checkpoint: Path):
    tensors = load_file(checkpoint / WEIGHTS)
    edit_weights(checkpoint, **{"norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight'.*as model\.norm\.weight.*as norm\.weight"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("shard", ["../gone.safetensors", "a/../../gone", "/etc/passwd", "a//b", "a/./b", "a\\b", ""])
def test_a_shard_whose_path_leaves_the_checkpoint_is_refused(checkpoint: Path, shard: str):
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: shard}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="names a shard outside the checkpoint"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("linked", ["shards", "shards/a.safetensors"])
def test_a_shard_behind_a_link_that_leaves_the_checkpoint_is_refused(checkpoint: Path, linked: str):
    """A link of a folder is no file, so only the shards in it tell where it leads."""
    in_subfolders(checkpoint)
    elsewhere = checkpoint.parent / "elsewhere"
    (checkpoint / linked).rename(elsewhere)
    (checkpoint / linked).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link that leaves the checkpoint"):
        open_checkpoint(checkpoint)


def test_shards_of_one_file_name_are_refused(checkpoint: Path):
    in_subfolders(checkpoint)
    (checkpoint / "shards" / "more" / "b.safetensors").rename(checkpoint / "shards" / "more" / "a.safetensors")
    raw = json.loads((checkpoint / INDEX).read_text())
    moved = {name: shard.replace("b.s", "a.s") for name, shard in raw["weight_map"].items()}
    edit_json(checkpoint / INDEX, weight_map=moved)
    with pytest.raises(CheckpointError, match=r"shards/a\.safetensors and shards/more/a\.safetensors.*rename one"):
        open_checkpoint(checkpoint)
