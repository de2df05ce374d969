"""Merges a LoRA adapter, as PEFT saves it, into its base while the weights are streamed: W + scale * B A, in fp32.

An adapter that uses a feature this merge does not support is refused, and the error names the feature. It is also
refused if it adapts a matrix that its base does not have, or has not exactly the matrices of the modules that its
config names.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm_export.bundle.manifest import TOKENIZER_NAME
from cllm_export.errors import CheckpointError, UnsupportedError
from cllm_export.exporter.checkpoint.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_adapter,
    is_adapter,
    refuse_base,
    stated_base,
)
from cllm_export.exporter.checkpoint.adapter_targets import targeted
from cllm_export.exporter.checkpoint.files import TensorInfo, read_tensors
from cllm_export.exporter.checkpoint.read import HEAD, Checkpoint, open_checkpoint
from cllm_export.exporter.checkpoint.stream import Piece

PREFIX = "base_model.model."
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations of the matrices that leave the base unchanged; others (pissa, olora, loftq, ...) change it."""

REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained whole (modules_to_save)",
    "lora_bias": "biases in its matrices (lora_bias)",
    "layer_replication": "repeated layers (layer_replication)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "adapted parameters (target_parameters)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "arrow_config": "routing among adapters (arrow)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal matrices (BD-LoRA)",
    "kasa_config": "singular values as weights (KaSA)",
    "monteclora_config": "sampled matrices (MonteCLoRA)",
    "velora_config": "compressed activations (VeLoRA)",
    "megatron_config": "the parallel layers of Megatron (megatron_config)",
}
"""Key of ``adapter_config.json`` -> the unsupported feature that it turns on."""

READ = (
    *("peft_type", "base_model_name_or_path", "bias", "init_lora_weights", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
"""Keys that decide what is merged."""
HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
)
"""Keys that change no merged weight: notes, settings of the training, and settings of what ``READ`` and ``REFUSED``
turn on. PEFT ignores ``fan_in_fan_out`` for a linear layer."""


class Matrices(NamedTuple):
    """The two LoRA matrices of one weight, and the scale of their product."""

    down: TensorInfo
    """A [r, in]."""
    up: TensorInfo
    """B [out, r]."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An opened adapter: the matrices that it adds to the tensors of its base."""

    path: Path
    matrices: Mapping[str, Matrices]
    """Tensor of the base -> the matrices whose product is added to it."""

    def merge(self, piece: Piece, rows: Tensor) -> Tensor:
        """Rows of a tensor of the base, after the adapter's part is added."""
        matrices = self.matrices.get(piece.name)
        if matrices is None:
            return rows
        down, up = _read(matrices.down), _read(matrices.up, piece.start, piece.stop)
        merged = rows.float() + (up @ down) * matrices.scale
        if not torch.isfinite(merged).all():
            raise CheckpointError(f"{self.path} merged into tensor {piece.name} gives NaN or infinity: it is damaged")
        return merged


def open_source(path: Path, base: Path | None, *, max_length: int | None) -> tuple[Checkpoint, Adapter | None]:
    """The checkpoint at ``path``; if ``path`` is an adapter, its base and the adapter to merge into it.

    Raises:
        OptionError: a base was given, but ``path`` is not an adapter.
    """
    if is_adapter(path):
        return open_adapter(path, base, max_length=max_length)
    refuse_base(path, base)
    return open_checkpoint(path, max_length=max_length), None


def open_adapter(path: Path, base: Path | None, *, max_length: int | None) -> tuple[Checkpoint, Adapter]:
    """Open an adapter and its base. The checkpoint uses the adapter's tokenizer if there is one.

    Raises:
        CheckpointError: either is missing or damaged, or they do not fit together.
        UnsupportedError: the adapter uses a feature that is not supported.
    """
    config = check_adapter(path)
    _refuse(config, path)
    base = base or stated_base(config, path)
    text_path = path if (path / TOKENIZER_NAME).is_file() else None
    checkpoint = open_checkpoint(base, max_length=max_length, text_path=text_path)
    adapter = Adapter(path=path, matrices=_matrices(config, path, checkpoint))
    return checkpoint.with_adapter((path / CONFIG_NAME, path / WEIGHTS_NAME)), adapter


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path} is an adapter of type {config.get('peft_type')!r}; only LORA is merged")
    for key, what in REFUSED.items():
        if config.get(key):
            raise UnsupportedError(f"{path} uses {what}, which is not merged here; merge it with peft first")
    for key in sorted(config.keys() - REFUSED.keys() - {*READ, *HARMLESS}):
        if config[key] is True or (isinstance(config[key], dict | list) and config[key]):
            raise UnsupportedError(
                f"{path / CONFIG_NAME} sets {key} to {reprlib.repr(config[key])}, which may turn on what is not merged "
                "here; merge it with peft first"
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{path} trains biases (bias {config['bias']!r}), which is not merged here")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise UnsupportedError(
            f"{path} starts from {config['init_lora_weights']!r}, which changes its base; merge it with peft first"
        )


def _matrices(config: Mapping[str, Any], path: Path, checkpoint: Checkpoint) -> dict[str, Matrices]:
    held = read_tensors(path / WEIGHTS_NAME)
    found: dict[str, Matrices] = {}
    for name in sorted(held, key=lambda each: (each.endswith(".weight"), each)):  # not matrices: first
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name.removeprefix(PREFIX))
        if match is None or not name.startswith(PREFIX):
            raise UnsupportedError(
                f"{path / WEIGHTS_NAME} has a tensor {name}, which is no LoRA matrix of a linear layer"
            )
        module, target = match[1], f"{match[1]}.weight"
        pair = [held.get(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB"]
        if target == HEAD and checkpoint.config.tie_word_embeddings:
            raise UnsupportedError(
                f"{path} adapts {module}, which its base ties to the embedding, so both would change; merge it with "
                "peft first"
            )
        if target not in checkpoint.tensors:
            raise CheckpointError(f"{path} adapts {module}, which its base {checkpoint.path} has no weight for")
        if pair[0] is None or pair[1] is None:
            raise CheckpointError(f"{path / WEIGHTS_NAME} has only one of the two matrices on {module}")
        found[target] = _pair(config, path, module, pair[0], pair[1], checkpoint.tensors[target])
    if not found:
        raise CheckpointError(f"{path / WEIGHTS_NAME} holds no LoRA matrix")
    modules = {name.removesuffix(".weight") for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    try:
        named = targeted(config, modules | {HEAD.removesuffix(".weight")})
    except ValueError as error:
        raise UnsupportedError(f"{path / CONFIG_NAME} has {error}; merge it with peft first") from None
    _require_named(path, named, {name.removesuffix(".weight") for name in found})
    return found


def _require_named(path: Path, named: Set[str], found: Set[str]) -> None:
    """Refuse an adapter that has not exactly the matrices of the modules that its config names: PEFT ignores others."""
    if missing := sorted(named - found):
        raise CheckpointError(
            f"{path / CONFIG_NAME} adapts {missing[0]} ({len(missing)} such modules), which {WEIGHTS_NAME} has no "
            "matrices for: it is incomplete; copy it again, or correct target_modules"
        )
    if others := sorted(found - named):
        raise CheckpointError(
            f"{path / WEIGHTS_NAME} has matrices for {others[0]} ({len(others)} such modules), which {CONFIG_NAME} "
            "does not adapt, so that peft would ignore them: correct target_modules, exclude_modules or "
            "layers_to_transform, or copy the config that belongs to the matrices"
        )


def _pair(
    config: Mapping[str, Any], path: Path, module: str, down: TensorInfo, up: TensorInfo, weight: TensorInfo
) -> Matrices:
    rank = _setting(config, "r", "rank_pattern", module, path)
    alpha = _setting(config, "lora_alpha", "alpha_pattern", module, path)
    if down.shape != (rank, *weight.shape[1:]) or up.shape != (*weight.shape[:1], rank) or len(weight.shape) != 2:
        raise CheckpointError(
            f"{path} adapts {module} {list(weight.shape)} with matrices {list(down.shape)} and {list(up.shape)}, which "
            f"do not fit it at rank {rank:g}: it is of another base"
        )
    for info in (down, up):
        if info.dtype not in _DTYPES:
            raise CheckpointError(f"{path} holds the matrices of {module} in {info.dtype}; expected floating point")
    return Matrices(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _setting(config: Mapping[str, Any], key: str, patterns_key: str, module: str, path: Path) -> float:
    """The value for a module: that of the first pattern that its name ends with, else the adapter's default."""
    value, patterns = config.get(key), config.get(patterns_key) or {}
    for pattern, stated in patterns.items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UnsupportedError(f"{path} has {patterns_key} {pattern!r}; only plain module names are understood")
        if module == pattern or module.endswith(f".{pattern}"):
            value = stated
            break
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path / CONFIG_NAME} gives {module} the {key} {value!r}; expected a number above 0")
    return value


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read(info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
    """Some rows of a matrix, in fp32."""
    stop = info.shape[0] if stop is None else stop
    row_bytes = info.length // info.shape[0]
    with info.file.open("rb") as file:
        file.seek(info.offset + start * row_bytes)
        data = bytearray(file.read((stop - start) * row_bytes))
    if len(data) != (stop - start) * row_bytes:
        raise CheckpointError(f"{info.file} was cut short while it was read")
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).view(stop - start, info.shape[1]).float()
