"""Tokens that only the settings beside ``tokenizer.json`` add: a bundle has those of transformers, with their ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import CheckpointError, PromptError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.runtime.decoding.text import TextCodec, TextStream
from cllm_export.runtime.load import load
from tests.checkpoints import SPECIAL_TOKENS, edit_json
from tests.conftest import THREADS, Workshop

TOOL, END, THINK = "<|tool|>", "<|im_end|>", "<think>"
TEXTS = (
    "the cat",
    f"the {TOOL}cat{END}",
    f"{THINK} the  {TOOL}  cat </s>{END} x",
    f"{TOOL}{TOOL}<s>{THINK}{END}",
    f"the{TOOL}cat THE {THINK.upper()}",
)


def added(content: str, **flags: Any) -> dict[str, Any]:
    """A token as ``added_tokens_decoder`` lists it."""
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def typed(content: str, **flags: Any) -> dict[str, Any]:
    return added(content, __type="AddedToken", **flags)


def listed(**tokens: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {index.removeprefix("at_"): token for index, token in tokens.items()}}


SETTINGS: dict[str, dict[str, Any]] = {
    "a name": {"eos_token": END},
    "names": {"eos_token": END, "pad_token": TOOL, "unk_token": THINK},
    "one token of two names": {"eos_token": END, "pad_token": END},
    "a name with flags": {"eos_token": typed(END, rstrip=True, special=False)},
    "other special tokens": {"additional_special_tokens": [TOOL, THINK], "eos_token": END},
    "special tokens with flags": {"additional_special_tokens": [typed(TOOL, lstrip=True, rstrip=True), THINK]},
    "extra and additional": {"extra_special_tokens": [TOOL], "additional_special_tokens": [THINK]},
    "extra names": {"extra_special_tokens": {"image_token": TOOL}, "tool_token": THINK, "mask_token": END},
    "own names in both ways": {"tool_token": TOOL, "think_token": typed(THINK), "eos_token": END},
    "listed": listed(at_287=added(TOOL, special=True), at_288=added(THINK, special=False)),
    "listed beyond the next id": listed(at_299=added(TOOL, special=True)),
    "listed in another order": listed(at_300=added(TOOL), at_9=added(THINK), at_40=added(END, special=True)),
    "listed and named": {**listed(at_287=added(END, special=False)), "eos_token": END, "tool_token": TOOL},
    "listed, normalized": listed(at_287=added(TOOL, normalized=True, special=True)),
    "listed, few flags": listed(at_287={"content": TOOL}, at_288={"content": THINK, "special": True}),
    "a listed word": listed(at_287=added("cat", special=True)),
    "other flags of a special token": listed(at_2=added("</s>", special=True, lstrip=True)),
    "a special token that is listed as none": listed(at_2=added("</s>", special=False)),
    "an empty list": {"added_tokens_decoder": {}, "eos_token": END},
}
FILES: dict[str, dict[str, dict[str, Any]]] = {
    "no file": {},
    "a list": {"added_tokens.json": {TOOL: 288, END: 287, "</s>": 2}},
    "a map": {"special_tokens_map.json": {"eos_token": added(END), "additional_special_tokens": [THINK]}},
    "a map of a name and nothing": {"special_tokens_map.json": {"eos_token": THINK, "pad_token": None}},
    "both": {
        "special_tokens_map.json": {"pad_token": TOOL, "cls_token": added(THINK, rstrip=True)},
        "added_tokens.json": {TOOL: 290, END: 300, THINK: 289},
    },
}
HELD: dict[str, list[dict[str, Any]]] = {
    "new": [],
    "held": [{"id": 287, **added(TOOL, special=False)}, {"id": 288, **added(END, special=True, rstrip=True)}],
}


@pytest.fixture
def checkpoint(workshop: Workshop, tmp_path: Path) -> Path:
    return shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")


def codec_of(checkpoint: Path, directory: Path) -> TextCodec:
    """What a bundle of this checkpoint encodes with."""
    opened = open_checkpoint(checkpoint)
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(opened.tokenizer_json)
    return TextCodec(directory, chat_template=None, special_tokens=opened.special_tokens)


def hold(checkpoint: Path, tokens: list[dict[str, Any]]) -> None:
    """Add tokens to ``tokenizer.json`` itself."""
    raw = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    edit_json(checkpoint / "tokenizer.json", added_tokens=[*raw["added_tokens"], *tokens])


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("stated", SETTINGS)
def test_the_tokens_are_those_of_transformers(checkpoint: Path, tmp_path: Path, stated: str, files: str, held: str):
    """Ids, and the text without special tokens, over settings, older files, and tokens that the tokenizer has."""
    from transformers import PreTrainedTokenizerFast

    hold(checkpoint, HELD[held])
    settings = {**SPECIAL_TOKENS, **SETTINGS[stated], "tokenizer_class": "PreTrainedTokenizerFast"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, content in FILES[files].items():
        (checkpoint / name).write_text(json.dumps(content), encoding="utf-8")
    theirs = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ours = codec_of(checkpoint, tmp_path / "bundle")
    assert ours.tokenizer.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    words = ours.encode_continuation("the cat")
    for index in range(287, ours.tokenizer.get_vocab_size()):
        if theirs.decode([index], skip_special_tokens=True) == "":
            assert ours.decode([*words, index, *words]) == ours.decode([*words, *words])


def test_what_the_settings_alone_mark_as_special_leaves_no_text_and_may_stop(checkpoint: Path, tmp_path: Path):
    hold(checkpoint, [{"id": 287, **added(END, special=False)}])
    edit_json(checkpoint / "tokenizer_config.json", **listed(at_287=added(END, special=True)))
    codec = codec_of(checkpoint, tmp_path / "bundle")
    words = codec.encode_continuation("the cat")
    assert codec.decode([*words, 287]) == "the cat"
    stream = TextStream(codec, [END])
    assert stream.push([*words, 287, *words]) == "the cat"
    assert stream.stopped


def test_a_token_outside_the_embedding_forbids_only_the_prompts_that_hold_it(workshop: Workshop, checkpoint: Path):
    vocabulary = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert vocabulary == 287
    extra = [f"<extra_{index}>" for index in range(vocabulary)]
    edit_json(checkpoint / "tokenizer_config.json", additional_special_tokens=extra)
    model = load(workshop.build(checkpoint).path, threads=THREADS)
    assert len(model.generate("the cat", max_new_tokens=4).token_ids) == 4
    with pytest.raises(PromptError, match=r"holds '<extra_286>', token 573 .* leave it out"):
        model.generate("the <extra_286> cat", max_new_tokens=4)


def test_without_settings_that_add_a_token_the_file_is_kept_byte_for_byte(checkpoint: Path):
    assert open_checkpoint(checkpoint).tokenizer_json == (checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        listed(at_287={"content": 5}),
        {"added_tokens_decoder": {"287": "<x>", "first": "<y>"}},
        {"added_tokens_decoder": {"287": None}},
        {"additional_special_tokens": [7]},
    ],
)
def test_settings_that_list_no_token_are_refused(checkpoint: Path, settings: dict[str, Any]):
    edit_json(checkpoint / "tokenizer_config.json", **settings)
    with pytest.raises(CheckpointError, match=r"the settings of the tokenizer in .* list"):
        open_checkpoint(checkpoint)


def test_a_list_without_numbers_is_refused(checkpoint: Path):
    (checkpoint / "added_tokens.json").write_text(json.dumps({TOOL: "next", END: 3}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the settings of the tokenizer in .* list"):
        open_checkpoint(checkpoint)
