"""A checkpoint with a ``tokenizer.model`` alone: its bundle's ``tokenizer.json`` gives sentencepiece's own tokens."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from cllm_export.errors import CheckpointError, MissingExtraError, UnsupportedError
from cllm_export.exporter.checkpoint.files import read_json
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.checkpoint.sentencepiece_convert import build_tokenizer
from cllm_export.exporter.checkpoint.sentencepiece_model import read_model
from cllm_export.exporter.checkpoint.tokenizer import convert_tokenizer, require_equal
from cllm_export.exporter.parity.tokenization import ReferenceTokenizer
from cllm_export.extras import install_line
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.verification.encoding import compare_tokenizers
from tests.checkpoints import BOS, edit_json
from tests.conftest import Workshop
from tests.fakes import llama_style_tokenizer

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


CODE = [line for line in Path(open_checkpoint.__code__.co_filename).read_text(encoding="utf-8").splitlines() if line]
CORPUS = [*CODE, *["naïve café Größe 漢字", "-----", "a    b        c", "anananana banana"] * 20]
FAMILIES = ("llama", "mistral", "ministral", "qwen2", "phi3", "granite", "olmo2", "stablelm", "gemma", "smollm3")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"allow_whitespace_only_pieces": True, "split_digits": True},
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "spaces removed": {"remove_extra_whitespaces": True},
    "across words": {"split_by_whitespace": False},
    "symbols": {
        "user_defined_symbols": ["<tool>", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n", "ab", "abc", "x=y"],
        "control_symbols": ["<|im_end|>", "[INST]"],
    },
}


def train(**options: Any) -> bytes:
    """A small sentencepiece model, by default of the kind that LLaMA-2 has."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra 'sentencepiece'")
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "sentence_iterator": iter(CORPUS),
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **(defaults | options))
    return model.getvalue()


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the kind of tokenizer that LLaMA-2 has: BPE, bytes for the unknown, no normalising."""
    model = train(
        sentence_iterator=iter(["the cat sat on the mat", "select the name where the city is one"] * 3),
        vocab_size=284,
        **MODELS["llama"],
    )
    path = shutil.copytree(workshop.checkpoint("small"), tmp_path_factory.mktemp("slow") / "checkpoint")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(model)
    settings(path)
    return path


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    return {name: train(**options) for name, options in MODELS.items()}


def directory_of(path: Path, model: bytes, **changes: Any) -> Path:
    """A directory with a sentencepiece model and its settings, and no weights."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    settings(path, **changes)
    return path


def random_texts(count: int) -> list[str]:
    """Words, code, indentation, Unicode and runs, put together at random."""
    chance = random.Random(7)
    parts = [*" \n\t-=#()aé漢🙂", "  ", "    ", "an", "ana", "abc", "<tool>", "x=y", "return", *CODE[:200]]
    return ["".join(chance.choices(parts, k=chance.randrange(1, 12))) for _ in range(count)]


def settings(checkpoint: Path, **changes: Any) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    edit_json(checkpoint / "tokenizer_config.json", **(LLAMA_SETTINGS | changes))


def read_settings(path: Path) -> dict[str, Any]:
    return read_json(path / "tokenizer_config.json")


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
    """``legacy`` concerns only what follows a special token in a text."""
    settings(checkpoint, **({} if legacy is None else {"legacy": legacy}))
    codec = codec_of(checkpoint, tmp_path / "bundle")
    for text in (*SAMPLES, *LED_BY_SPACE):
        tokens = codec.encode(text)
        assert tokens == slow_tokens(checkpoint, text), f"{text!r}"
        assert codec.tokenizer.decode(tokens) == text


@pytest.mark.parametrize("legacy", [None, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_gives_the_tokens_of_sentencepiece_or_is_refused(
    trained: dict[str, bytes], tmp_path: Path, name: str, legacy: bool | None
):
    """On thousands of texts that are not those of the comparison at build, and with the text that they came from."""
    from sentencepiece import SentencePieceProcessor

    path = directory_of(tmp_path / "model", trained[name], **({} if legacy is None else {"legacy": legacy}))
    processor = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    if (name, legacy) == ("spaces removed", False):
        with pytest.raises(UnsupportedError, match=r"' one space before' has the tokens \[1, .* in sentencepiece, and"):
            convert_tokenizer(path, read_settings(path))
        return
    tokenizer = convert_tokenizer(path, read_settings(path))
    for text in [*SAMPLES, *LED_BY_SPACE, *random_texts(2000)]:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, f"{text!r}"
        if processor.unk_id() not in ids:
            assert tokenizer.decode(ids) == processor.decode(ids), f"{text!r}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_does_not_change_the_tokens(trained: dict[str, bytes], tmp_path: Path, family: str):
    """transformers converts through the class of the family, and loses the space before a text in most."""
    path = directory_of(tmp_path / "model", trained["llama"])
    (path / "config.json").write_text(f'{{"model_type": "{family}"}}', encoding="utf-8")
    tokenizer = convert_tokenizer(path, read_settings(path))
    for text in ("Hello world", " led by a space", "    def f():\n        return  1"):
        assert tokenizer.encode(text).ids == slow_tokens(path, text)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram"}, "is a unigram model, and only BPE converts without a difference"),
        ({"model_type": "char", "vocab_size": 400}, "is a char model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "cannot be converted to tokenizer.json without a difference"),
        ({"treat_whitespace_as_suffix": True}, "in sentencepiece, and "),
    ],
)
def test_a_model_that_would_give_other_tokens_is_refused_with_what_to_do(
    tmp_path: Path, options: dict[str, Any], why: str
):
    path = directory_of(tmp_path / "model", train(**options))
    with pytest.raises(UnsupportedError, match=r"put the tokenizer\.json that the model was trained or published") as e:
        convert_tokenizer(path, read_settings(path))
    assert why in str(e.value)


def test_added_tokens_are_found_in_a_text_with_their_ids_and_the_space_they_take(
    trained: dict[str, bytes], tmp_path: Path
):
    listed = {
        "2": {"content": "</s>", "special": True},
        "800": {"content": "<|user|>", "special": True, "rstrip": True},
        "702": {"content": "<|end|>", "special": True},
    }
    path = directory_of(tmp_path / "model", trained["llama"], added_tokens_decoder=listed)
    tokenizer = convert_tokenizer(path, read_settings(path))
    name, end = slow_tokens(path, "name"), slow_tokens(path, "x")[1:]
    assert tokenizer.encode("name<|user|>  \n x<|end|></s>").ids == [*name, 800, *end, 702, 2]
    assert tokenizer.decode([*name, 800, 702, 2]) == "name"


def test_without_a_prefix_behind_special_tokens_only_the_beginning_of_the_text_has_one(
    trained: dict[str, bytes], tmp_path: Path
):
    """``legacy: false`` means this, and ``legacy: true`` the other."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(trained["llama"])
    first = SentencePieceProcessor(model_proto=proto.SerializeToString()).encode("name")
    proto.normalizer_spec.add_dummy_prefix = False
    later = SentencePieceProcessor(model_proto=proto.SerializeToString()).encode("name")
    for legacy, behind in ((True, first), (False, later)):
        path = directory_of(tmp_path / f"{legacy}", trained["llama"], legacy=legacy)
        tokenizer = convert_tokenizer(path, read_settings(path))
        assert tokenizer.encode("name</s>name", add_special_tokens=False).ids == [*first, 2, *behind]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, False), (None, None), (True, True)])
def test_the_settings_say_what_stands_around_a_text(
    trained: dict[str, bytes], tmp_path: Path, add_bos: bool | None, add_eos: bool | None
):
    path = directory_of(tmp_path / "model", trained["llama"], add_bos_token=add_bos, add_eos_token=add_eos)
    ids = convert_tokenizer(path, read_settings(path)).encode("name").ids
    assert ids == [*([1] if add_bos is not False else []), *slow_tokens(path, "name")[1:], *([2] if add_eos else [])]


def test_a_class_of_which_nothing_is_known_must_say_whether_it_adds_the_beginning(
    trained: dict[str, bytes], tmp_path: Path
):
    path = directory_of(tmp_path / "model", trained["llama"], tokenizer_class="OwnTokenizer", add_bos_token=None)
    with pytest.raises(UnsupportedError, match="set add_bos_token to true or false"):
        convert_tokenizer(path, read_settings(path))


def test_a_wrong_conversion_is_refused_with_the_text(trained: dict[str, bytes], tmp_path: Path):
    """A tokenizer that forgets the space before a text, as transformers' own for most families."""
    path = directory_of(tmp_path / "model", trained["llama"])
    model = read_model(path, read_settings(path))
    wrong = build_tokenizer(model)
    wrong.normalizer = normalizers.Replace(" ", "\u2581")
    with pytest.raises(UnsupportedError, match=r"'Hello world' has the tokens|' ' has the tokens"):
        require_equal(wrong, model)


def test_verify_compares_with_sentencepiece_and_finds_a_bundle_of_other_tokens(
    workshop: Workshop, checkpoint: Path, tmp_path: Path
):
    """Its reference must not be what build converted: here that lacks the space before a text."""
    settings(checkpoint)
    reference = ReferenceTokenizer(checkpoint, read_settings(checkpoint))
    contents = {"a": "the cat", "b": "<s>"}
    right = {key: reference.encode(text) for key, text in contents.items()}
    assert right["a"] == slow_tokens(checkpoint, "the cat")
    assert compare_tokenizers("x", contents, right, reference).passed is True
    check = compare_tokenizers("x", contents, right | {"a": right["a"][:1] + right["a"][2:]}, reference)
    assert check.passed is False
    assert "sentencepiece with the checkpoint's tokenizer.model" in check.detail
    assert "differs from token 1 on" in check.detail


def test_a_tokenizer_that_transformers_builds_anew_fails_no_bundle_and_is_named(tmp_path: Path):
    """LlamaTokenizer of transformers 5 takes the vocabulary of tokenizer.json, and forgets how the file sets spaces."""
    path = directory_of(tmp_path / "model", train(**MODELS["llama"]), legacy=True)
    convert_tokenizer(path, read_settings(path)).save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    codec = TextCodec(path, chat_template=None, special_tokens={})
    contents = {"plain": "name", "led": " led by a space"}
    bundle = {key: codec.encode(text) for key, text in contents.items()}
    reference = ReferenceTokenizer(path, read_settings(path))
    check = compare_tokenizers("x", contents, bundle, reference)
    assert check.passed is True
    assert [entry["prompt"] for entry in check.data["rebuilt"]] == ["led"]
    assert "(LlamaTokenizer) builds another tokenizer from that file" in check.detail
    assert "2 of 2 prompts give the token ids of the checkpoint's tokenizer.json" in check.detail
    check = compare_tokenizers("x", contents, bundle | {"led": check.data["rebuilt"][0]["rebuilt"]}, reference)
    assert check.passed is False
    assert "which is right: build the bundle again" in check.detail


def test_verify_names_the_settings_that_add_a_token(workshop: Workshop, tmp_path: Path):
    """A bundle that lost the token differs from ``tokenizer.json`` with its settings, not from the file alone."""
    path = shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")
    edit_json(path / "tokenizer_config.json", additional_special_tokens=["<tool>"])
    reference, contents = ReferenceTokenizer(path, read_settings(path)), {"a": "the <tool>"}
    right = {"a": codec_of(path, tmp_path / "bundle").encode(contents["a"])}
    assert compare_tokenizers("x", contents, right, reference).passed is True
    lost = TextCodec(path, chat_template=None, special_tokens={}).encode(contents["a"])
    check = compare_tokenizers("x", contents, {"a": lost}, reference)
    assert check.passed is False
    assert "the checkpoint's tokenizer.json with tokenizer_config.json [" in check.detail


def test_a_collection_and_training_read_the_tokens_that_the_settings_add(workshop: Workshop, tmp_path: Path):
    from cllm_export.training.collection.source import open_source

    path = shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")
    edit_json(path / "tokenizer_config.json", additional_special_tokens=["<tool>"])
    opened, bundle = open_checkpoint(path), workshop.build(path)
    source = open_source(path, batch_size=1)
    assert source.model.codec.encode("<tool>") == TextCodec.of_bundle(bundle).encode("<tool>") == [BOS, 287]
    assert source.tokenizer_sha256 == opened.tokenizer_sha256 == bundle.manifest.files["tokenizer.json"].sha256


def test_a_llama_tokenizer_that_does_not_say_so_puts_the_beginning_of_sequence_first(checkpoint: Path, tmp_path: Path):
    settings(checkpoint, add_bos_token=None)
    assert codec_of(checkpoint, tmp_path / "bundle").encode("the cat") == slow_tokens(checkpoint, "the cat")


def test_a_bundle_of_such_a_checkpoint_encodes_as_the_reference_does(workshop: Workshop, checkpoint: Path):
    from cllm_export.exporter.parity.reference import Reference

    settings(checkpoint)
    bundle = workshop.build(checkpoint, max_length=64)
    codec, reference = TextCodec.of_bundle(bundle), Reference(checkpoint, max_length=64)
    for text in (*SAMPLES, *LED_BY_SPACE):
        assert codec.encode(text) == reference.tokenizer.encode(text) == slow_tokens(checkpoint, text)


def test_decoding_is_that_of_transformers_where_it_knows_the_special_tokens(tmp_path: Path):
    """Those of ``normalized: false``. Of the others transformers and the tokenizers library leave the text in."""
    plain = json.loads(llama_style_tokenizer().to_str())
    for token in plain["added_tokens"]:
        token["normalized"] = False
    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)))
    llama_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path, chat_template=None, special_tokens={})
    chance, size = random.Random(3), llama_style_tokenizer().get_vocab_size()
    for _ in range(1000):
        special = chance.choices([0, 1, 2, size - 1], k=3)
        tokens = chance.sample([*special, *chance.choices(range(size), k=8)], k=8)
        assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


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
