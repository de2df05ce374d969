"""The tokenizer of a GGUF file: as transformers converts it, and text is split as llama.cpp splits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.gguf.convert import import_gguf
from cllm_export.exporter.gguf.tokenizer import DIGIT_SPLITS, GPT2_SPLITS, SPLITS, WHOLE_WORDS
from tests.checkpoints import CHAT_TEMPLATE, Variant
from tests.conftest import Workshop
from tests.unit.exporter.gguf.made import write_gguf

pytest.importorskip("transformers")

TEXTS = (
    "the cat sat on the mat",
    " select   the\n\n name 1234",
    "It's naïve, 日本語 🙂!",
    "<s>the</s> mat",
    "   12  x",
    "",
)
BYTES = "tokenizer__ggml__"


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop) -> Path:
    return workshop.checkpoint("llama")


def imported(checkpoint: Path, target: Path, **metadata: object) -> tuple[Path, Tokenizer]:
    target.mkdir()
    file = write_gguf(target / "model.gguf", checkpoint, **metadata)
    made = import_gguf(file, target / "imported").path
    return made, Tokenizer.from_file(str(made / "tokenizer.json"))


def test_the_tokens_are_those_of_the_checkpoint(checkpoint: Path, tmp_path: Path):
    """From which the file was made."""
    _, tokenizer = imported(checkpoint, tmp_path / "a")
    source = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == source.encode(text).ids, text


def test_a_tokenizer_beside_the_file_is_not_taken(checkpoint: Path, tmp_path: Path):
    """The file has its own, and a download of another model may lie there."""
    expected, own = imported(checkpoint, tmp_path / "alone")
    beside = tmp_path / "beside"
    beside.mkdir()
    foreign = Tokenizer(WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    foreign.save(str(beside / "tokenizer.json"))
    (beside / "chat_template.jinja").write_text("foreign")
    (beside / "tokenizer_config.json").write_text('{"eos_token": "[UNK]", "chat_template": "foreign"}')
    file = write_gguf(beside / "model.gguf", checkpoint)
    made = import_gguf(file, tmp_path / "imported").path
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes() or path.name == "import.json", path.name
    assert Tokenizer.from_file(str(made / "tokenizer.json")).to_str() == own.to_str()


def test_a_file_is_found_by_a_relative_path(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "model.gguf", checkpoint)
    monkeypatch.chdir(tmp_path)
    assert (import_gguf("model.gguf", "imported").path / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_the_tokens_are_those_of_transformers(checkpoint: Path, tmp_path: Path, name: str):
    """For the ways to split text that it knows, before and after saving."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made, tokenizer = imported(checkpoint, tmp_path / "a", tokenizer__ggml__pre=name)
    theirs = PreTrainedTokenizerFast.from_pretrained(made.parent, gguf_file="model.gguf")
    saved = AutoTokenizer.from_pretrained(made)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"] == saved(text)["input_ids"], text


def test_the_expressions_are_those_of_transformers():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    both = SPLITS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert len(both) > 15
    for name in both:
        assert SPLITS[name] == GGUF_PRE_TOKENIZER_SPLITS[name], name


def test_a_name_stands_for_one_way_to_split():
    names = (*SPLITS, *GPT2_SPLITS, *DIGIT_SPLITS)
    assert len(names) == len(set(names))
    assert set(WHOLE_WORDS) <= set(SPLITS)


@pytest.mark.parametrize("name", DIGIT_SPLITS)
def test_each_digit_stands_alone_where_llama_cpp_lets_it(checkpoint: Path, tmp_path: Path, name: str):
    """Of spaces before a digit, all stay together. transformers would split off the last, as GPT-2 does."""
    _, tokenizer = imported(checkpoint, tmp_path / "a", tokenizer__ggml__pre=name)
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a   12 b")]
    assert pieces == ["a", "ĠĠĠ", "1", "2", "Ġb"]


def test_a_word_of_the_vocabulary_is_one_token_where_llama_cpp_ignores_merges(checkpoint: Path, tmp_path: Path):
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    listed = [*sorted(model["vocab"], key=model["vocab"].__getitem__)[:-1], "zzz"]
    fields = {f"{BYTES}tokens": listed, f"{BYTES}merges": [" ".join(model["merges"][0])]}
    for name, expected in (("llama-bpe", 1), ("qwen2", 3)):
        _, tokenizer = imported(checkpoint, tmp_path / name, tokenizer__ggml__pre=name, **fields)
        assert len(tokenizer.encode("zzz", add_special_tokens=False).ids) == expected


@pytest.mark.parametrize(("name", "begins"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_a_file_that_does_not_say_begins_with_bos_as_llama_cpp_does(
    checkpoint: Path, tmp_path: Path, name: str, begins: bool
):
    (tmp_path / "a").mkdir()
    drop = ["tokenizer.ggml.add_bos_token"]
    file = write_gguf(tmp_path / "model.gguf", checkpoint, drop=drop, tokenizer__ggml__pre=name)
    tokenizer = Tokenizer.from_file(str(import_gguf(file, tmp_path / "out").path / "tokenizer.json"))
    assert (tokenizer.encode("the cat").ids[0] == 1) is begins


def test_special_tokens_and_the_chat_template_arrive(workshop: Workshop, tmp_path: Path):
    made, tokenizer = imported(workshop.checkpoint("llama"), tmp_path / "a")
    opened = open_checkpoint(made)
    assert (
        opened.special_tokens | {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} == opened.special_tokens
    )
    assert opened.chat_template == CHAT_TEMPLATE
    assert tokenizer.encode("the</s>", add_special_tokens=False).ids[-1] == 2


def sentencepiece(checkpoint: Path) -> tuple[dict[str, object], list[str]]:
    """The fields of a sentencepiece vocabulary, and those that it does not have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thecasonm"]
    pieces += ["▁t", "he", "▁the", "at", "▁c"]
    pieces += [f"filler{number}" for number in range(300 - len(pieces))]
    count = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    pieces = pieces[:count]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (count - 259)]
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": pieces,
        "scores": [-float(index) for index in range(count)],
        "token_type": kinds,
        "unknown_token_id": 0,
    }
    drop = ["tokenizer.ggml.merges", "tokenizer.ggml.padding_token_id"]
    return {f"{BYTES}{key}": value for key, value in fields.items()}, drop


def test_a_sentencepiece_vocabulary_gives_the_tokens_of_transformers(checkpoint: Path, tmp_path: Path):
    """Merges are derived from scores, bytes fall back, and a space comes first."""
    from transformers import PreTrainedTokenizerFast

    fields, drop = sentencepiece(checkpoint)
    file = write_gguf(tmp_path / "model.gguf", checkpoint, drop=drop, **fields)
    tokenizer = Tokenizer.from_file(str(import_gguf(file, tmp_path / "out").path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
    assert "▁the" in tokenizer.encode("the cat").tokens


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_no_space_comes_first_where_the_file_says_so(workshop: Workshop, tmp_path: Path, family: str):
    """A text gives what it gives inside a word, and decoding gives its own spaces back."""
    from transformers import AutoTokenizer

    checkpoint = workshop.new_checkpoint(f"gguf-space-{family}", Variant(family=family))
    fields, drop = sentencepiece(checkpoint)
    fields[f"{BYTES}add_space_prefix"] = False
    file = write_gguf(tmp_path / "model.gguf", checkpoint, drop=drop[:1], **fields)
    made = import_gguf(file, tmp_path / "out").path
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert tokenizer.encode("he cat", add_special_tokens=False).tokens == ["he", "▁c", "at"]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert AutoTokenizer.from_pretrained(made)(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
