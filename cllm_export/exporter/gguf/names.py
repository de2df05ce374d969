"""Gives each tensor of a GGUF file its name in the checkpoint, and says how its values are changed back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cllm_export.errors import CheckpointError, UnsupportedError
from cllm_export.exporter.checkpoint.read import HEAD
from cllm_export.exporter.gguf.header import GgufFile, GgufTensor
from cllm_export.exporter.gguf.rope import FACTOR_TENSORS
from cllm_export.exporter.gguf.values import Rows, unpermuted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OFFSET_NORMS = ("gemma2", "gemma3")
"""Architectures whose norms are stored as ``1 + weight``."""
_NO_WEIGHT = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|rope\.freqs")
"""Tables of rotary positions in old files, which every model computes itself."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One tensor of the checkpoint, and what it is made from."""

    name: str
    tensor: GgufTensor
    num_heads: int | None = None
    """Heads whose rows, or values of a bias, llama.cpp has in another order; None if the order is the same."""
    offset: float = 0.0
    """What is subtracted from each value."""

    @property
    def order(self) -> Rows | None:
        """The stored row of each row, or value of each value of a bias; None if they are in order."""
        return None if self.num_heads is None else unpermuted(self.tensor.shape[0], self.num_heads)


def imported_tensors(file: GgufFile, config: PretrainedConfig) -> list[Imported]:
    """Every tensor of the checkpoint, in the order of the file.

    Raises:
        CheckpointError: a tensor of the model is missing, or has another shape.
        UnsupportedError: a tensor has no place in the model.
    """
    names = _names(file, config)
    found = []
    for name, (stored, shape) in names.items():
        if stored not in file.tensors:
            raise CheckpointError(f"{file.path} has no tensor {stored!r}, which is {name}; download it again")
        if (tensor := file.tensors[stored]).shape != shape:
            raise CheckpointError(
                f"{file.path} is damaged: its tensor {stored!r} has the shape {list(tensor.shape)}, and its metadata "
                f"makes {name} {list(shape)}; download it again"
            )
        found.append(_imported(file, name, tensor, config))
    used = {each.tensor.name for each in found}
    for stored in file.tensors:
        if stored not in used and stored not in FACTOR_TENSORS and not _NO_WEIGHT.fullmatch(stored):
            raise UnsupportedError(
                f"{file.path} has a tensor {stored!r}, for which a {file.architecture!r} model has no place: build the "
                "Hugging Face checkpoint of the model"
            )
    return sorted(found, key=lambda each: each.tensor.offset)


def _imported(file: GgufFile, name: str, tensor: GgufTensor, config: PretrainedConfig) -> Imported:
    heads = None
    if file.architecture == "llama" and ".attn_q." in tensor.name:
        heads = int(config.num_attention_heads)
    elif file.architecture == "llama" and ".attn_k." in tensor.name:
        heads = int(config.num_key_value_heads)
    has_offset = file.architecture in _OFFSET_NORMS and tensor.name.endswith("norm.weight")
    return Imported(name=name, tensor=tensor, num_heads=heads, offset=1.0 if has_offset else 0.0)


def _names(file: GgufFile, config: PretrainedConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the checkpoint -> name in the file and shape, by the table of the package ``gguf``."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = get_tensor_name_map(architecture, int(config.num_hidden_layers))
    names = {}
    for name, shape in _shapes(file, config).items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        stored = table.get_name(stem)
        if stored is None:
            raise UnsupportedError(
                f"{file.path} would need the weight {name}, which GGUF of {file.architecture!r} has not; build the "
                "Hugging Face checkpoint of the model"
            )
        names[name] = (f"{stored}.{suffix}", shape)
    return names


def _shapes(file: GgufFile, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model, which is made without any values."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever sizes that do not fit each other lead to
        raise CheckpointError(
            f"{file.path} is damaged: its metadata describes no model ({error}); download it again"
        ) from None
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
