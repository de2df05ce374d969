"""A Hugging Face checkpoint directory, opened and judged: what it holds, and whether the graph can express it.

Everything here happens before any work: a checkpoint that cannot be exported is refused by name. Nothing is
unpickled and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from cllm_export.bundle import (
    GENERATION_CONFIG_NAME,
    TOKENIZER_NAME,
    FillName,
    Loop,
    TrainedWith,
    require_plain_name,
    sha256_of,
)
from cllm_export.errors import BundleError, CheckpointError, CllmExportError, OptionError, UnsupportedError
from cllm_export.exporter.tokenizer import SENTENCEPIECE_NAME, convert_tokenizer
from cllm_export.linked import read_places

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

FAMILIES = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "smollm3",
    "starcoder2",
    "stablelm",
)
"""Model types the exporter has a parity test for."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
"""Rotary embeddings whose table depends on the position alone, or on the position and the length built for."""

DEFAULT_MAX_LENGTH_CAP = 2048

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255
"""Bytes that a file name may have on any file system in use."""

PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor of the checkpoint lies, its safetensors dtype (``BF16``, ``F32``, ...) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    length: int
    """In bytes."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint whose architecture the exporter supports."""

    path: Path
    raw_config: Mapping[str, Any]
    """``config.json`` as it stands."""
    config: PretrainedConfig
    """The same as transformers reads it."""
    tensors: Mapping[str, TensorInfo]
    weight_files: tuple[Path, ...]
    text_path: Path
    """Where tokenizer and chat template are: ``path``, or an adapter that brings its own."""
    adapter_files: tuple[Path, ...] = ()
    """Config and weights of the adapter that is merged into it."""

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
        """``tokenizer.json``, made of ``tokenizer.model`` where that is all there is.

        Raises:
            MissingExtraError: the packages for that are not installed.
        """
        if (self.text_path / TOKENIZER_NAME).is_file():
            return (self.text_path / TOKENIZER_NAME).read_bytes()
        text: str = convert_tokenizer(self.text_path, self.tokenizer_config).backend_tokenizer.to_str(pretty=True)
        return text.encode()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids; those of ``generation_config.json`` win, as in transformers."""
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
        """bos_token, eos_token and the like by name: what chat templates refer to."""
        tokens = {}
        path = self.text_path / "special_tokens_map.json"
        older = read_json(path) if path.exists() else {}
        for name, value in (*older.items(), *self.tokenizer_config.items()):
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        return tokens

    @property
    def chat_template(self) -> str | None:
        path = self.text_path / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default", next(iter(named.values()), None))
        return template if isinstance(template, str) else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read through a memory map; only this tensor enters memory.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.tensors[name].file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {self.tensors[name].file}: {error}") from None

    def fingerprint(self, known: Mapping[Path, str] | None = None) -> str:
        """sha256 over ``config.json`` and every weight file: equal for equal checkpoints, wherever they lie.

        ``known`` are sums of files that were taken already.
        """
        digest = hashlib.sha256()
        for path in sorted({self.path / "config.json", *self.weight_files, *self.adapter_files}):
            digest.update(f"{path.name}:{(known or {}).get(path) or sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def with_adapter(self, files: tuple[Path, ...]) -> Checkpoint:
        """The same, to be merged with an adapter of these files."""
        return replace(self, adapter_files=files)

    def with_layers(self, num_layers: int) -> Checkpoint:
        """The same with its first layers alone.

        Raises:
            OptionError: it has not that many.
        """
        total = int(self.config.num_hidden_layers)
        if num_layers > total:
            raise OptionError(f"--num-layers {num_layers} is more than the {total} layers of {self.path}")
        kept = {name: info for name, info in self.tensors.items() if _layer_of(name) < num_layers}
        return replace(self, config=truncated_config(self.config, num_layers), tensors=kept)


def truncated_config(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The config of its first layers."""
    short, total = copy.deepcopy(config), int(config.num_hidden_layers)
    for name, value in vars(short).items():
        if isinstance(value, list) and len(value) == total:
            setattr(short, name, value[:num_layers])
    short.num_hidden_layers = num_layers
    return short


def default_max_length(config: PretrainedConfig) -> int:
    """The model's own length, capped at 2048."""
    return min(int(config.max_position_embeddings), DEFAULT_MAX_LENGTH_CAP)


def open_checkpoint(path: str | Path, *, max_length: int | None = None, text_path: Path | None = None) -> Checkpoint:
    """Open a checkpoint and refuse, by name, what cannot be exported.

    ``max_length`` is the length the bundle is to be built for: a sliding window is accepted where it cannot matter.
    ``text_path`` is where the tokenizer is, if not beside the weights.

    Raises:
        CheckpointError: missing, partial or damaged.
        UnsupportedError: an architecture the graph cannot express yet.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint: there is no such directory")
    for directory in dict.fromkeys((path, text_path or path)):
        refuse_links(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")
    raw = read_json(path / "config.json")
    _refuse_unsupported(raw, path)
    text_path = text_path or path
    if not (text_path / TOKENIZER_NAME).is_file() and not (text_path / SENTENCEPIECE_NAME).is_file():
        raise CheckpointError(
            f"{text_path} has no {TOKENIZER_NAME} and no {SENTENCEPIECE_NAME}; save a fast tokenizer into it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    config = _read_config(path)
    _refuse_layers(config, path)
    _refuse_rope(config, path, max_length)
    files = _weight_files(path)
    checkpoint = Checkpoint(
        path=path,
        raw_config=raw,
        config=config,
        tensors=_find_tensors(files),
        weight_files=tuple(files),
        text_path=text_path,
    )
    _check_sections(checkpoint)
    return checkpoint


def layer_types_of(config: PretrainedConfig) -> list[str] | None:
    """The type of each layer; None for a family that knows no types, whatever its ``config.json`` says."""
    return list(config.layer_types) if hasattr(type(config), "layer_types") else None


def window_within(config: PretrainedConfig, max_length: int) -> int | None:
    """The sliding window, in tokens, of the layers that have one; None where no text of ``max_length`` is longer."""
    layer_types = layer_types_of(config)
    slides = hasattr(type(config), "sliding_window") if layer_types is None else "sliding_attention" in layer_types
    window: int | None = config.sliding_window if slides else None
    return window if window is not None and window < max_length else None


def refuse_in_torch(checkpoint: Checkpoint, max_length: int) -> None:
    """Refuse what a bundle can express, but training and decoding in PyTorch cannot: their mask is causal alone,
    PyTorch's attention has no softcap, and they read ``tokenizer.json``.

    Raises:
        UnsupportedError: such a checkpoint would be trained, or decoded, as another model than it is.
    """
    if (window := window_within(checkpoint.config, max_length)) is not None:
        raise UnsupportedError(
            f"{checkpoint.path} has layers with a sliding window of {window} tokens, and training and decoding in "
            f"PyTorch know no window: choose --max-length {window} or less (it is {max_length}), or build a bundle"
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


def refuse_links(path: Path) -> None:
    """Refuse a file that is a link to elsewhere: what it leads to is no part of the checkpoint, and might be private.

    In a Hugging Face cache, ``MODEL/snapshots/REVISION/FILE`` is a link into ``MODEL/blobs``, which is.
    """
    root = Path(os.path.realpath(path))
    homes = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    for file in sorted(path.iterdir()):
        target = Path(os.path.realpath(file))
        if file.is_symlink() and not target.is_dir() and not any(home in target.parents for home in homes):
            raise CheckpointError(
                f"{file} is a link that leaves the checkpoint, to {target}; put the file itself there"
            )


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    family = raw.get("model_type")
    for reason, applies in _REFUSALS.items():
        if applies(raw):
            raise UnsupportedError(f"{path} (model type {family!r}) uses {reason}, which is not supported yet")
    if _has_experts(raw):
        raise UnsupportedError(
            f"{path} (model type {family!r}) is a mixture of experts, which is not supported: its graph would have to "
            "compute and read every expert, masked, in every forward, and lose what the experts are for; "
            "choose a dense model"
        )
    if family == "gemma3":
        raise UnsupportedError(
            f"{path} has model type 'gemma3', which holds a vision encoder too; supported is its text model alone "
            "(model type 'gemma3_text'): save that with Gemma3ForCausalLM"
        )
    if family not in FAMILIES:
        raise UnsupportedError(f"{path} has model type {family!r}; supported are {', '.join(FAMILIES)}")


EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_FAMILIES = ("mixtral", "dbrx", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "jamba")
"""Model types of mixtures of experts whose name does not say so."""


def _has_experts(raw: Mapping[str, Any]) -> bool:
    family = str(raw.get("model_type"))
    return "moe" in family or family in EXPERT_FAMILIES or any(raw.get(key) for key in EXPERT_KEYS)


_REFUSALS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "quantised weights (quantization_config)": lambda raw: bool(raw.get("quantization_config")),
    "weights of another name (transformers_weights)": lambda raw: bool(raw.get("transformers_weights")),
    "an encoder (is_encoder_decoder)": lambda raw: bool(raw.get("is_encoder_decoder")),
    "bidirectional attention (use_bidirectional_attention)": lambda raw: bool(raw.get("use_bidirectional_attention")),
}


def _refuse_layers(config: PretrainedConfig, path: Path) -> None:
    if unknown := sorted(set(layer_types_of(config) or ()) - LAYER_TYPES):
        raise UnsupportedError(
            f"{path} has layers of type {unknown[0]!r}; supported are {', '.join(sorted(LAYER_TYPES))}"
        )


def _refuse_rope(config: PretrainedConfig, path: Path, max_length: int | None) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [part for name, part in parameters.items() if name in LAYER_TYPES and part]
    rope_types = {part.get("rope_type", "default") for part in nested or [parameters]}
    if unknown := sorted(rope_types - set(ROPE_TYPES)):
        raise UnsupportedError(f"{path} has rope type {unknown[0]!r}; supported are {', '.join(ROPE_TYPES)}")
    limit = int(config.max_position_embeddings)
    if "dynamic" in rope_types and (max_length or 0) > limit:
        raise UnsupportedError(
            f"{path} has rope type 'dynamic', which beyond {limit} positions has other frequencies for every length, "
            f"and a graph has one table: choose --max-length {limit} or less, where it scales nothing (it is "
            f"{max_length})"
        )


def _read_config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types for a bad config
        raise CheckpointError(f"{path / 'config.json'} is not a valid config: {error}") from None


def _check_sections(checkpoint: Checkpoint) -> None:
    """Touch what is read late, so that a bad value is found before any work."""
    config = checkpoint.config
    ids = checkpoint.eos_token_ids
    if any(type(token) is not int or not 0 <= token < config.vocab_size for token in ids):
        raise CheckpointError(
            f"{checkpoint.path} has eos_token_id {ids}, outside its vocabulary of {config.vocab_size}"
        )
    _ = checkpoint.trained_with, checkpoint.special_tokens
    try:
        (checkpoint.chat_template or "").encode()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the chat template of {checkpoint.path} cannot be read: {type(error).__name__}: {error}"
        ) from None
    try:
        Tokenizer.from_buffer(checkpoint.tokenizer_json)
    except CllmExportError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{checkpoint.text_path / TOKENIZER_NAME} is not a tokenizer: {error}") from None
    _check_tied_head(checkpoint)


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """Refuse a stored head that differs from the table its config ties it to: transformers would then untie them."""
    if not checkpoint.config.tie_word_embeddings or not {HEAD, EMBEDDING} <= set(checkpoint.tensors):
        return
    head, table = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
    if head.shape != table.shape or head.dtype != table.dtype or not _same_bytes(head, table):
        raise CheckpointError(
            f"{HEAD} of {checkpoint.path} differs from {EMBEDDING}, though its config ties them "
            "(tie_word_embeddings): set that to false if the stored head is meant, else remove the tensor"
        )


def _same_bytes(first: TensorInfo, second: TensorInfo, *, piece_bytes: int = 1 << 24) -> bool:
    """Whether two tensors are equal byte for byte, read in pieces: a head may have gigabytes."""
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
    if not isinstance(section, dict) or set(section) - {"n", "fill", "loop"}:
        raise CheckpointError(f'{where} must look like {{"n": 16, "fill": "pad", "loop": "sliding"}}, got {section!r}')
    fill: FillName = section.get("fill", "pad")
    loop: Loop = section.get("loop", "sliding")
    try:
        return TrainedWith(block_size=section.get("n", 0), fill=fill, loop=loop)
    except OptionError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _find_tensors(files: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} stands in both {tensors[name].file} and {file}")
            tensors[name] = info
    return tensors


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS_INDEX).is_file():
        return _shards(path)
    if (path / SINGLE_WEIGHTS).is_file():
        return [path / SINGLE_WEIGHTS]
    if pickled := [name for name in PICKLED_WEIGHTS if (path / name).exists()]:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickled[0]}), which are never loaded because a pickle can run code; "
            "convert them with save_pretrained(..., safe_serialization=True) on a machine you trust"
        )
    if (path / "adapter_config.json").exists():
        raise UnsupportedError(
            f"{path} is a LoRA adapter, where a whole checkpoint is needed; merge it first (merge_and_unload)"
        )
    raise CheckpointError(f"{path} has no weights: neither {SINGLE_WEIGHTS} nor {WEIGHTS_INDEX}")


def _shards(path: Path) -> list[Path]:
    weight_map = read_json(path / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / WEIGHTS_INDEX} has no weight_map; download the checkpoint again")
    for name in weight_map.values():
        _require_shard_name(path, name)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(
                f"shard {name} of {path} is missing, though {WEIGHTS_INDEX} names it; download it again"
            )
    if (path / SINGLE_WEIGHTS).is_file() and SINGLE_WEIGHTS not in names:
        raise CheckpointError(
            f"{path} has both {SINGLE_WEIGHTS} and {WEIGHTS_INDEX}, which may hold different weights: remove one"
        )
    return [path / name for name in names]


def _require_shard_name(path: Path, name: object) -> None:
    """What stands in the index as a shard must be the plain name of a file beside it."""
    index = path / WEIGHTS_INDEX
    if not isinstance(name, str) or not name.isprintable() or len(os.fsencode(name)) > LONGEST_NAME:
        raise CheckpointError(f"{index} names a shard {reprlib.repr(name)}, which is no file name; download it again")
    try:
        require_plain_name(name)
    except BundleError:
        raise CheckpointError(f"{index} names a shard outside the checkpoint: {name!r}") from None


def _layer_of(name: str) -> int:
    """Number of the layer that a tensor belongs to; -1 for one that belongs to none."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file. The library checks that they lie inside it, end to end and apart.

    Raises:
        CheckpointError: it is damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
        return {
            name: TensorInfo(file=file, dtype=dtype, shape=shape, offset=offset, length=length)
            for name, (offset, length, dtype, shape) in read_places(file).items()
        }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(f"{file} ({size} bytes) is damaged or cut short: {error}; download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
