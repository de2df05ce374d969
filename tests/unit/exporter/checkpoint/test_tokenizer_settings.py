"""``tokenizer_config.json``, ``special_tokens_map.json`` and ``tokenizer.json``: who is right where they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from tests.checkpoints import SPECIAL_TOKENS, edit_json
from tests.conftest import Workshop


def added(content: str, **more: Any) -> dict[str, Any]:
    """A token as transformers writes it into either file."""
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **more}


LISTED = {"added_tokens_decoder": {"1": added("<s>", special=True)}}

SETTINGS: dict[str, dict[str, Any] | None] = {
    "no settings": None,
    "names": SPECIAL_TOKENS,
    "objects": {"bos_token": added("<s>", __type="AddedToken"), "eos_token": "</s>"},
    "no names": {},
    "null": {"bos_token": None, "eos_token": "</s>"},
    "more names": {"tool_token": "<s>", "extra_special_tokens": {"image_token": "</s>"}},
    "added tokens": {**SPECIAL_TOKENS, **LISTED},
    "an empty list of added tokens": {**SPECIAL_TOKENS, "added_tokens_decoder": {}},
}
MAPS: dict[str, dict[str, Any] | None] = {
    "no map": None,
    "other names": {"bos_token": "</s>", "eos_token": "<pad>"},
    "objects": {"bos_token": added("</s>"), "eos_token": added("<s>", special=True)},
    "null": {"bos_token": "<pad>", "pad_token": None},
    "more names": {"think_token": added("<pad>"), "extra_special_tokens": {"image_token": "<pad>"}},
    "lists": {"additional_special_tokens": ["<s>"], "bos_token": "</s>"},
}
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast")


@pytest.fixture
def checkpoint(workshop: Workshop, tmp_path: Path) -> Path:
    return shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")


def write(path: Path, content: dict[str, Any] | None) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("mapped", MAPS)
@pytest.mark.parametrize("stated", SETTINGS)
def test_special_tokens_are_those_of_transformers(checkpoint: Path, stated: str, mapped: str):
    from transformers import AutoTokenizer

    write(checkpoint / "special_tokens_map.json", MAPS[mapped])
    for name in CLASSES:
        settings = SETTINGS[stated]
        write(checkpoint / "tokenizer_config.json", None if settings is None else {**settings, "tokenizer_class": name})
        theirs = AutoTokenizer.from_pretrained(checkpoint).special_tokens_map
        assert open_checkpoint(checkpoint).special_tokens == {
            key: value for key, value in theirs.items() if isinstance(value, str)
        }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(*pieces: str) -> dict[str, Any]:
    """A post-processor that puts these around a text, ``A``."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokens = {piece: {"id": piece, "ids": [ids[piece]], "tokens": [piece]} for piece in pieces if piece != "A"}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


@pytest.mark.parametrize("processor", [None, BYTE_LEVEL, template("A"), template("<pad>", "A")])
@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_token_that_a_setting_adds_and_the_tokenizer_does_not_is_missed(
    checkpoint: Path, name: str, key: str, processor: dict[str, Any] | None
):
    edit_json(checkpoint / "tokenizer.json", post_processor=processor)
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class=name, **{key: True})
    with pytest.raises(CheckpointError, match=rf"has {key} true, but its tokenizer.json does not add '</?s>'"):
        open_checkpoint(checkpoint)


def test_a_token_that_a_setting_forbids_and_the_tokenizer_adds_is_noticed(checkpoint: Path):
    """Only where transformers 4 obeys the setting: with the other classes both versions add the token."""
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", add_bos_token=False)
    with pytest.raises(CheckpointError, match=r"has add_bos_token false, but its tokenizer.json adds '<s>' to a text"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        (template("<s>", "A"), {"add_bos_token": True}),
        (template("<s>", "A", "</s>"), {"add_bos_token": True, "add_eos_token": True}),
        (template("<s>", "A"), {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}),
        (None, {"add_bos_token": False, "add_eos_token": False}),
        (None, {"add_bos_token": None}),
        (None, {"add_bos_token": True, "bos_token": None}),
    ],
)
def test_settings_that_contradict_nothing_give_the_tokens_of_transformers(
    checkpoint: Path, processor: dict[str, Any] | None, settings: dict[str, Any]
):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    edit_json(checkpoint / "tokenizer.json", post_processor=processor, truncation=truncation)
    edit_json(checkpoint / "tokenizer_config.json", **{"tokenizer_class": "LlamaTokenizerFast", **settings})
    ours = Tokenizer.from_buffer(open_checkpoint(checkpoint).tokenizer_json)
    ours.no_truncation()
    assert ours.encode("the cat").ids == AutoTokenizer.from_pretrained(checkpoint)("the cat")["input_ids"]
