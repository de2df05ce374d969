"""Writes the tokenizer of a GGUF file as the files of a checkpoint.

transformers converts the vocabulary and the merges. How text is split before the merges, a file says by a name alone.
transformers splits as GPT-2 where it does not know the name, and llama.cpp refuses. So every name is known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from cllm_export.errors import CheckpointError, OutputError, UnsupportedError
from cllm_export.exporter.gguf.header import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
_LLAMA3 = rf"(?i:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"(?i:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}" + r"|[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}"
)
_SLASHES = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = _CASES.replace("{0}", "") + r"|\p{N}" + _SLASHES
_GPT4O = _CASES.replace("{0}", f"(?i:{_SHORT})?") + r"|\p{N}{1,3}" + _SLASHES

SPLITS: dict[str, str] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("lfm2", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
}
"""Names of byte-level BPE -> the expression that splits text, as llama.cpp has it."""
GPT2_SPLITS = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling")
"""Names whose text is split as that of GPT-2."""
DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names for which each digit stands alone, and the rest is split as that of GPT-2."""
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Names for which a word of the vocabulary is one token whatever the merges are, and a text begins with BOS."""

END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Fields whose token ends a text in llama.cpp: end of sequence, of turn and of message."""
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>"),
    *("<|end_of_text|>", "<end_of_utterance>"),
)
"""Tokens that end a text in llama.cpp whatever the fields say, because many files leave them out."""


def ends_of(file: GgufFile) -> list[int]:
    """The tokens that end a text: those that the fields name, and then those with a text of an end."""
    named = [file.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    by_text = [token for token, text in enumerate(file.metadata["tokenizer.ggml.tokens"]) if text in END_TEXTS]
    return list(dict.fromkeys(token for token in (*named, *by_text) if token is not None))


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template, as transformers saves them.

    The class that every fast tokenizer has is named, because ``AutoTokenizer`` would read the file with ``GGUFReader``.

    Raises:
        CheckpointError: transformers cannot convert the tokenizer.
        OutputError: the directory cannot hold a symbolic link.
    """
    with _alone(file, directory) as path:
        try:
            tokenizer = _converted(file, path)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # many unrelated types, and a panic of tokenizers is no Exception
            raise CheckpointError(
                f"{file.path} has a tokenizer that cannot be converted: {type(error).__name__}: {error}; take another "
                "file of the model"
            ) from None
    tokenizer.save_pretrained(directory)


@contextmanager
def _alone(file: GgufFile, directory: Path) -> Iterator[Path]:
    """A link to the file in an empty directory below ``directory``, for the time of the block.

    transformers prefers a ``tokenizer.json`` beside a GGUF file to the tokenizer in it.
    """
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        link = Path(scratch) / "model.gguf"
        try:
            link.symlink_to(file.path.resolve())
        except OSError as error:
            raise OutputError(
                f"cannot link {file.path} into {directory.parent}: {error.strerror or error}; choose an output on a "
                "file system that has symbolic links"
            ) from None
        yield link


def _converted(file: GgufFile, path: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    begins = {} if "tokenizer.ggml.add_bos_token" in file.metadata else _bos(file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name, **begins)
    if file.metadata["tokenizer.ggml.model"] == "gpt2":
        _split(tokenizer.backend_tokenizer, _name_of_split(file))
    elif not file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        _begin_without_space(tokenizer.backend_tokenizer)
    return tokenizer


def check_split(file: GgufFile) -> None:
    """Refuse a way to split text that is not known.

    Raises:
        UnsupportedError: as said.
    """
    name = _name_of_split(file)
    if file.metadata["tokenizer.ggml.model"] == "gpt2" and name not in (*SPLITS, *GPT2_SPLITS, *DIGIT_SPLITS):
        raise UnsupportedError(
            f"{file.path} splits text as {name!r} (tokenizer.ggml.pre), which is not known here: build the Hugging "
            "Face checkpoint of the model, which has its tokenizer"
        )


def _name_of_split(file: GgufFile) -> str:
    return str(file.metadata.get("tokenizer.ggml.pre", "default"))


def _bos(file: GgufFile) -> dict[str, Any]:
    is_whole = _name_of_split(file) in WHOLE_WORDS and file.metadata["tokenizer.ggml.model"] == "gpt2"
    return {"add_bos_token": True} if is_whole else {}


def _split(tokenizer: Tokenizer, name: str) -> None:
    """Let a tokenizer split text by a name."""
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    elif name in DIGIT_SPLITS:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name in WHOLE_WORDS:
        tokenizer.model.ignore_merges = True


def _begin_without_space(tokenizer: Tokenizer) -> None:
    """Let a sentencepiece tokenizer put no space before a text, and take none away after decoding."""
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        tokenizer.pre_tokenizer.prepend_scheme = "never"
    if isinstance(tokenizer.normalizer, normalizers.Sequence):
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
