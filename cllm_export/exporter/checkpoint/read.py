"""Opens a Hugging Face checkpoint directory, and checks that the graph can express it.

All checks run before any work: a checkpoint that cannot be exported is refused, and the error names the reason.
Nothing is unpickled, and no code of a checkpoint runs except its chat template, which renders one message in a sandbox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from cllm_export.bundle.manifest import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    TOKENIZER_NAME,
    Loop,
    ProposerName,
    TrainedWith,
)
from cllm_export.bundle.storage import sha256_of
from cllm_export.errors import CheckpointError, CllmExportError, OptionError, UnsupportedError
from cllm_export.exporter.checkpoint.added_tokens import with_added_tokens
from cllm_export.exporter.checkpoint.families import (
    refuse_layers,
    refuse_rope,
    refuse_unsupported,
    truncated_config,
    window_within,
)
from cllm_export.exporter.checkpoint.files import (
    TensorInfo,
    find_tensors,
    import_advice,
    layer_of,
    read_json,
    refuse_links,
    weight_files,
)
from cllm_export.exporter.checkpoint.sentencepiece_model import SENTENCEPIECE_NAME
from cllm_export.exporter.checkpoint.tokenizer import convert_tokenizer
from cllm_export.exporter.checkpoint.tokenizer_settings import refuse_contradictions
from cllm_export.runtime.decoding.chat_template import ChatTemplate
from cllm_export.runtime.decoding.text import DEFAULT, templates_by_name

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


DEFAULT_MAX_LENGTH_CAP = 2048

MORE_CHAT_TEMPLATES = "additional_chat_templates"
"""Directory of the chat templates other than the default."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint with an architecture that the exporter supports."""

    path: Path
    raw_config: Mapping[str, Any]
    """The unchanged contents of ``config.json``."""
    config: PretrainedConfig
    """The config as transformers reads it."""
    tensors: Mapping[str, TensorInfo]
    weight_files: tuple[Path, ...]
    text_path: Path
    """Directory of the tokenizer and the chat template: ``path``, or an adapter that has its own tokenizer."""
    adapter_files: tuple[Path, ...] = ()
    """Config and weights of the adapter to merge into this checkpoint."""

    @property
    def family(self) -> str:
        return str(self.raw_config["model_type"])

    @property
    def trained_with(self) -> TrainedWith | None:
        """The ``cllm`` section of ``config.json``: how the model was consistency-tuned."""
        section = self.raw_config.get("cllm")
        if section is None:
            return None
        return _trained_with(section, self.path)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        path = self.path / GENERATION_CONFIG_NAME
        return read_json(path) if path.exists() else {}

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        path = self.text_path / "tokenizer_config.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The contents of ``tokenizer.json`` with the tokens that the settings beside it add.

        If there is none, ``tokenizer.model`` is converted.

        Raises:
            CheckpointError: the settings list what is no token.
            MissingExtraError: the packages for the conversion are not installed.
            UnsupportedError: the converted tokenizer would give other tokens than sentencepiece.
        """
        if (self.text_path / TOKENIZER_NAME).is_file():
            return with_added_tokens((self.text_path / TOKENIZER_NAME).read_bytes(), self.text_path)
        return convert_tokenizer(self.text_path, self.tokenizer_config).to_str(pretty=True).encode()

    @property
    def tokenizer_sha256(self) -> str:
        """That of ``tokenizer_json``, which is the file of a bundle."""
        return hashlib.sha256(self.tokenizer_json).hexdigest()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids. Those of ``generation_config.json`` take precedence, as in transformers.

        If that file names none, those of ``config.json`` count. transformers would then never end a text.
        """
        for source in (self.generation_config, self.raw_config):
            value = source.get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
        return ()

    @property
    def pad_token_id(self) -> int | None:
        for source in (self.generation_config, self.raw_config):
            if isinstance(value := source.get("pad_token_id"), int) and 0 <= value < self.config.vocab_size:
                return value
        return None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Name (bos_token, eos_token and so on) -> token, for chat templates.

        The older ``special_tokens_map.json`` is handled as in transformers. It takes precedence if
        ``tokenizer_config.json`` lists no added tokens, and is ignored otherwise. A null in it removes a token.
        """
        sources: list[Mapping[str, Any]] = [self.tokenizer_config]
        path = self.text_path / "special_tokens_map.json"
        if "added_tokens_decoder" not in self.tokenizer_config and path.exists():
            sources.append(read_json(path))
        tokens: dict[str, str] = {}
        for source in sources:
            named = {name: value for name, value in source.items() if name.endswith("_token")}
            extra = source.get("extra_special_tokens")
            for name, value in (named | (extra if isinstance(extra, dict) else {})).items():
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    tokens[name] = text
                elif text is None:
                    tokens.pop(name, None)
        return tokens

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The text of the chat template, or texts by name if there are several, as in transformers.

        ``chat_template.jinja`` is the default, and each ``additional_chat_templates/NAME.jinja`` has its name. Without
        these files the templates are those in ``tokenizer_config.json``.

        Raises:
            CheckpointError: a file of a template is a link that leaves the checkpoint.
        """
        files = self._chat_template_files()
        templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        given = templates or self.tokenizer_config.get("chat_template")
        if isinstance(given, list):
            given = {entry["name"]: entry["template"] for entry in given}
        if not isinstance(given, dict):
            return given if isinstance(given, str) else None
        if bad := next((name for name, text in given.items() if not isinstance(text, str)), None):
            raise TypeError(f"the template {bad!r} is no text")
        return given[DEFAULT] if set(given) == {DEFAULT} else given or None

    def _chat_template_files(self) -> dict[str, Path]:
        """The files of chat templates by name."""
        path, more = self.text_path / CHAT_TEMPLATE_NAME, self.text_path / MORE_CHAT_TEMPLATES
        files = {DEFAULT: path} if path.exists() else {}
        if more.is_dir():
            if more.is_symlink():
                raise CheckpointError(f"{more} is a link; put the directory itself there")
            refuse_links(more)
            files |= {path.name.removesuffix(".jinja"): path for path in sorted(more.glob("*.jinja"))}
        return files

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read through a memory map, so that only this tensor is loaded into memory.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        from safetensors import SafetensorError, safe_open

        info = self.tensors[name]
        try:
            with safe_open(info.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(info.stored_name or name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {info.file}: {error}") from None

    def fingerprint(self, known: Mapping[Path, str] | None = None) -> str:
        """The sha256 over ``config.json`` and every weight file. It does not depend on where the checkpoint is.

        ``known`` holds checksums of files that were computed already.
        """
        digest = hashlib.sha256()
        for path in sorted({self.path / "config.json", *self.weight_files, *self.adapter_files}):
            name = path.relative_to(self.path).as_posix() if path in self.weight_files else path.name
            digest.update(f"{name}:{(known or {}).get(path) or sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def with_adapter(self, files: tuple[Path, ...]) -> Checkpoint:
        """This checkpoint, with the files of an adapter to merge into it."""
        return replace(self, adapter_files=files)

    def with_layers(self, num_layers: int) -> Checkpoint:
        """This checkpoint, reduced to its first ``num_layers`` layers.

        Raises:
            OptionError: it has fewer layers.
        """
        require_layers(num_layers, int(self.config.num_hidden_layers), self.path)
        kept = {name: info for name, info in self.tensors.items() if layer_of(name) < num_layers}
        return replace(self, config=truncated_config(self.config, num_layers), tensors=kept)


def require_layers(num_layers: int, total: int, path: Path) -> None:
    """Raise OptionError if a checkpoint has fewer layers than are asked for."""
    if num_layers > total:
        raise OptionError(f"num_layers={num_layers} is more than the {total} layers of {path}")


def default_max_length(config: PretrainedConfig) -> int:
    """The model's own maximum length, but at most 2048."""
    return min(int(config.max_position_embeddings), DEFAULT_MAX_LENGTH_CAP)


def open_checkpoint(path: str | Path, *, max_length: int | None = None, text_path: Path | None = None) -> Checkpoint:
    """Open a checkpoint. If it cannot be exported, the error names the reason.

    ``max_length`` is the length that the bundle will be built for; rope type ``dynamic`` is refused beyond the model's
    own length. ``text_path`` is the directory of the tokenizer, if it is not the directory of the weights.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
        UnsupportedError: the graph cannot express the architecture yet.
    """
    path = Path(path)
    text_path = text_path or path
    raw = check_directory(path, text_path)
    config = _read_config(path)
    refuse_layers(config, path)
    refuse_rope(config, path, max_length)
    files = weight_files(path)
    checkpoint = Checkpoint(
        path=path,
        raw_config=raw,
        config=config,
        tensors=_with_embedding(find_tensors(files), config),
        weight_files=tuple(files),
        text_path=text_path,
    )
    _check_sections(checkpoint)
    return checkpoint


def check_directory(path: Path, text_path: Path) -> dict[str, Any]:
    """Check the config and the text files of a checkpoint without torch, and return the contents of ``config.json``.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedError: the graph cannot express the architecture yet.
    """
    if not (path / "config.json").is_file() and (advice := import_advice(path)):
        raise CheckpointError(advice)
    if not path.is_dir():
        missing = "there is no such file" if path.suffix.lower() == ".gguf" else "there is no such directory"
        what = "it is a file" if path.is_file() else missing
        raise CheckpointError(f"{path} is not a checkpoint: {what}")
    for directory in dict.fromkeys((path, text_path)):
        refuse_links(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")
    raw = read_json(path / "config.json")
    refuse_unsupported(raw, path)
    if not (text_path / TOKENIZER_NAME).is_file() and not (text_path / SENTENCEPIECE_NAME).is_file():
        raise CheckpointError(
            f"{text_path} has no {TOKENIZER_NAME} and no {SENTENCEPIECE_NAME}; save a fast tokenizer into it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return raw


def refuse_in_torch(checkpoint: Checkpoint, max_length: int) -> None:
    """Refuse a checkpoint that a bundle can express, but training and decoding in PyTorch cannot.

    In PyTorch the mask is only causal, attention has no softcap, and the tokenizer is read from ``tokenizer.json``.

    Raises:
        UnsupportedError: PyTorch would train or decode a different model than the checkpoint holds.
    """
    if (window := window_within(checkpoint.config, max_length)) is not None:
        raise UnsupportedError(
            f"{checkpoint.path} has layers with a sliding window of {window} tokens, and training and decoding in "
            f"PyTorch know no window: choose max_length={window} or less (it is {max_length}), or build a bundle"
        )
    if getattr(checkpoint.config, "attn_logit_softcapping", None):
        raise UnsupportedError(
            f"{checkpoint.path} caps its attention scores (attn_logit_softcapping), which training and decoding in "
            "PyTorch cannot do yet: build a bundle, which can"
        )
    if not (checkpoint.path / TOKENIZER_NAME).is_file():
        raise UnsupportedError(
            f"{checkpoint.path} has no {TOKENIZER_NAME}, only {SENTENCEPIECE_NAME}: build a bundle, which converts it, "
            f"and copy the bundle's {TOKENIZER_NAME} into the checkpoint"
        )


def _read_config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types for a bad config
        raise CheckpointError(f"{path / 'config.json'} is not a valid config: {error}") from None


def _with_embedding(tensors: dict[str, TensorInfo], config: PretrainedConfig) -> dict[str, TensorInfo]:
    """The tensors; if the config ties head and embedding and only the head is stored, it stands for both."""
    if not config.tie_word_embeddings or HEAD not in tensors or EMBEDDING in tensors:
        return tensors
    head = tensors[HEAD]
    others = {name: info for name, info in tensors.items() if name != HEAD}
    return {**others, EMBEDDING: replace(head, stored_name=head.stored_name or HEAD)}


def _check_sections(checkpoint: Checkpoint) -> None:
    """Access the values that are read late, so that a bad value is found before any work."""
    config = checkpoint.config
    ids = checkpoint.eos_token_ids
    if any(type(token) is not int or not 0 <= token < config.vocab_size for token in ids):
        raise CheckpointError(
            f"{checkpoint.path} has eos_token_id {ids}, outside its vocabulary of {config.vocab_size}"
        )
    _ = checkpoint.trained_with, checkpoint.special_tokens
    _check_chat_template(checkpoint)
    try:
        tokenizer = Tokenizer.from_buffer(checkpoint.tokenizer_json)
        if (checkpoint.text_path / TOKENIZER_NAME).is_file():
            settings, tokens = checkpoint.tokenizer_config, checkpoint.special_tokens
            refuse_contradictions(tokenizer, settings, tokens, checkpoint.text_path)
    except CllmExportError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{checkpoint.text_path / TOKENIZER_NAME} is not a tokenizer: {error}") from None
    _check_tied_head(checkpoint)


def _check_chat_template(checkpoint: Checkpoint) -> None:
    """Render one user message, so that a template that can render nothing is found before any work.

    A template that rejects this message with ``raise_exception`` is valid: it may accept other messages.
    """
    try:
        templates = templates_by_name(checkpoint.chat_template)
        "".join(templates.values()).encode()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the chat template of {checkpoint.text_path} cannot be read: {type(error).__name__}: {error}"
        ) from None
    for name, text in templates.items():
        try:
            fault = ChatTemplate(text, checkpoint.special_tokens).fault()
        except ValueError as error:
            fault = f"it is no valid template: {error}"
        if fault is not None:
            raise CheckpointError(
                f"the chat template of {checkpoint.text_path} ({_place_of_template(checkpoint, name)}) cannot be used: "
                f"{fault}; mend it, or remove it to give prompts as text alone"
            )


def _place_of_template(checkpoint: Checkpoint, name: str) -> str:
    if (checkpoint.text_path / MORE_CHAT_TEMPLATES / f"{name}.jinja").exists():
        return f"{MORE_CHAT_TEMPLATES}/{name}.jinja"
    if (checkpoint.text_path / CHAT_TEMPLATE_NAME).exists():
        return CHAT_TEMPLATE_NAME
    return "chat_template in tokenizer_config.json" if name == DEFAULT else f"{name!r} in tokenizer_config.json"


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """Refuse a stored head that differs from the embedding its config ties it to: transformers would untie them."""
    if not checkpoint.config.tie_word_embeddings or not {HEAD, EMBEDDING} <= set(checkpoint.tensors):
        return
    head, table = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
    if head.shape != table.shape or head.dtype != table.dtype or not _same_bytes(head, table):
        raise CheckpointError(
            f"{HEAD} of {checkpoint.path} differs from {EMBEDDING}, though its config ties them "
            "(tie_word_embeddings): set that to false if the stored head is meant, else remove the tensor"
        )


def _same_bytes(first: TensorInfo, second: TensorInfo, *, piece_bytes: int = 1 << 24) -> bool:
    """Whether two tensors are equal byte for byte. Reads them in pieces, because a head may have gigabytes."""
    with first.file.open("rb") as a, second.file.open("rb") as b:
        a.seek(first.offset)
        b.seek(second.offset)
        for start in range(0, first.length, piece_bytes):
            size = min(piece_bytes, first.length - start)
            if a.read(size) != b.read(size):
                return False
    return True


def _trained_with(section: Any, path: Path) -> TrainedWith:
    where = f"the cllm section of {path / 'config.json'}"
    if not isinstance(section, dict) or set(section) - {"n", "proposer", "loop"}:
        raise CheckpointError(
            f'{where} must look like {{"n": 16, "proposer": "pad", "loop": "sliding"}}, got {section!r}'
        )
    proposer: ProposerName = section.get("proposer", "pad")
    loop: Loop = section.get("loop", "sliding")
    try:
        return TrainedWith(block_size=section.get("n", 0), proposer=proposer, loop=loop)
    except OptionError as error:
        raise CheckpointError(f"{where}: {error}") from None
