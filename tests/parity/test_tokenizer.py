"""A checkpoint with a ``tokenizer.model`` alone: its bundle's ``tokenizer.json`` gives sentencepiece's own tokens."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cllm_export.errors import CheckpointError, MissingExtraError, UnsupportedError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.extras import install_line
from cllm_export.runtime.decoding.text import TextCodec
from tests.checkpoints import BOS, edit_json
from tests.conftest import Workshop

LLAMA_SETTINGS: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": True, "rstrip": False},
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
    "sp_model_kwargs": {},
}
"""As LLaMA-2 checkpoints of transformers 4 have them."""
SAMPLES = (
    "the cat sat on the mat",
    "a",
    "",
    "select 'x' where n = 1234567",
    "def f(x):\n    return x + 1\n\n\tdone",
    "two  spaces,   three",
    "naïve 漢字 🙂",
    "trailing space ",
)
LED_BY_SPACE = (" one space", "   three spaces", "\n newline first", " ")


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the kind of tokenizer that LLaMA-2 has: BPE, bytes for the unknown, no normalising."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra 'sentencepiece'")
    path = shutil.copytree(workshop.checkpoint("small"), tmp_path_factory.mktemp("slow") / "checkpoint")
    (path / "tokenizer.json").unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "select the name where the city is one"] * 3),
        model_writer=model,
        vocab_size=284,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    settings(path)
    return path


def settings(checkpoint: Path, **changes: Any) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    edit_json(checkpoint / "tokenizer_config.json", **(LLAMA_SETTINGS | changes))


def slow_tokens(checkpoint: Path, text: str) -> list[int]:
    """What sentencepiece itself gives, behind the beginning of sequence that Llama puts first."""
    from sentencepiece import SentencePieceProcessor

    return [BOS, *SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model")).encode(text)]


def codec_of(checkpoint: Path, directory: Path) -> TextCodec:
    """What a bundle of this checkpoint encodes with."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(open_checkpoint(checkpoint).tokenizer_json)
    return TextCodec(directory, chat_template=None, special_tokens={})


@pytest.mark.parametrize("legacy", [None, True, False])
def test_the_converted_tokenizer_gives_the_tokens_of_sentencepiece_and_the_text_back(
    checkpoint: Path, tmp_path: Path, legacy: bool | None
):
    """A legacy tokenizer, which is the default, also where a text begins with a space."""
    settings(checkpoint, **({} if legacy is None else {"legacy": legacy}))
    codec = codec_of(checkpoint, tmp_path / "bundle")
    for text in (*SAMPLES, *(() if legacy is False else LED_BY_SPACE)):
        tokens = codec.encode(text)
        assert tokens == slow_tokens(checkpoint, text), f"{text!r}"
        assert codec.tokenizer.decode(tokens) == text


def test_a_llama_tokenizer_that_does_not_say_so_puts_the_beginning_of_sequence_first(checkpoint: Path, tmp_path: Path):
    settings(checkpoint, add_bos_token=None)
    assert codec_of(checkpoint, tmp_path / "bundle").encode("the cat") == slow_tokens(checkpoint, "the cat")


def test_a_bundle_of_such_a_checkpoint_encodes_as_the_reference_does(workshop: Workshop, checkpoint: Path):
    from cllm_export.exporter.parity.reference import Reference

    settings(checkpoint)
    bundle = workshop.build(checkpoint, max_length=64)
    codec, reference = TextCodec.of_bundle(bundle), Reference(checkpoint, max_length=64)
    for text in (*SAMPLES, *LED_BY_SPACE):
        assert codec.encode(text) == reference.encode(text) == slow_tokens(checkpoint, text)


def test_training_asks_for_the_converted_tokenizer(checkpoint: Path):
    from cllm_export.training.model.torch_engine import load_checkpoint

    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json, only tokenizer\.model: build a bundle"):
        load_checkpoint(checkpoint)


def test_a_damaged_sentencepiece_model_is_refused(checkpoint: Path, tmp_path: Path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "tokenizer.model").write_bytes(b"\x0a\xff\xff nonsense")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is no sentencepiece model"):
        open_checkpoint(copy)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_without_a_package_that_converts_it_the_error_says_what_to_install(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    path = shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    for name in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, name, None if name == package else ModuleType(name))
    line = re.escape(install_line("sentencepiece"))
    with pytest.raises(MissingExtraError, match=f"'{package}', which is not.*{line}"):
        open_checkpoint(path)
