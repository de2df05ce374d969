"""The files of a checkpoint: finds them, reads their headers, and checks where links lead."""

from __future__ import annotations

import json
import os
import re
import reprlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cllm_export.bundle.safetensors_header import read_header
from cllm_export.checks import require_plain_name
from cllm_export.errors import BundleError, CheckpointError, UnsupportedError

SINGLE_WEIGHTS = "model.safetensors"

WEIGHTS_INDEX = "model.safetensors.index.json"

LONGEST_NAME = 255
"""Largest length of a file name, in bytes, on the file systems in use."""

GGUF_MAGIC = b"GGUF"

PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor of the checkpoint is stored, its safetensors dtype (``BF16``, ``F32``, ...) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Offset from the start of the file, in bytes."""
    length: int
    """Length in bytes."""
    stored_name: str | None = None
    """The name in the file, if the model has another name for the tensor."""


def refuse_links(path: Path) -> None:
    """Refuse a file that links to a place outside the checkpoint: the target is not part of it and might be private.

    In a Hugging Face cache, ``MODEL/snapshots/REVISION/FILE`` links into ``MODEL/blobs``, which counts as inside.
    """
    for file in sorted(path.iterdir()):
        if file.is_symlink() and not Path(os.path.realpath(file)).is_dir():
            _require_inside(path, file)


def _require_inside(path: Path, file: Path) -> None:
    """Check that a file of the checkpoint, after all links, is in the checkpoint or in the blobs of its cache."""
    root, target = Path(os.path.realpath(path)), Path(os.path.realpath(file))
    homes = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    if not any(home in target.parents for home in homes):
        raise CheckpointError(f"{file} is a link that leaves the checkpoint, to {target}; put the file itself there")


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does, or that is named as one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC or path.suffix.lower() == ".gguf"


def import_advice(path: Path) -> str | None:
    """What to do with a GGUF file, or a directory of one, where a checkpoint is needed; None if it is neither."""
    found = [path] if is_gguf(path) else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found:
        return None
    what = "a GGUF file" if path.is_file() else f"no checkpoint: it holds the GGUF file {found[0].name}"
    return f"{path} is {what}; import it with: cllm-export import {shlex.quote(str(found[0]))} --output my-checkpoint"


def find_tensors(files: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor of the files, by its name in the model."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for stored, info in read_tensors(file).items():
            name = model_name(stored)
            if name in tensors:
                first = tensors[name]
                raise CheckpointError(
                    f"tensor {name!r} stands in both {first.file} (as {first.stored_name or name}) and {file} (as "
                    f"{stored}): remove one"
                )
            tensors[name] = info if name == stored else replace(info, stored_name=stored)
    return tensors


def model_name(stored: str) -> str:
    """The name that the whole model has for a stored tensor.

    As in transformers, the names of a base model that was saved alone lack ``model.``, those of a model that was
    wrapped in another have it twice, and a head may have one.
    """
    part = r"(layers\.\d+|embed_tokens|norm)\."
    if re.match(part, stored):
        return f"model.{stored}"
    return stored.removeprefix("model.") if re.match(rf"model\.(model\.{part}|lm_head\.)", stored) else stored


def weight_files(path: Path) -> list[Path]:
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
        _require_inside(path, path / name)
    _require_different_names(path, names)
    if (path / SINGLE_WEIGHTS).is_file() and SINGLE_WEIGHTS not in names:
        raise CheckpointError(
            f"{path} has both {SINGLE_WEIGHTS} and {WEIGHTS_INDEX}, which may hold different weights: remove one"
        )
    return [path / name for name in names]


def _require_shard_name(path: Path, name: object) -> None:
    """Check that a shard name in the index is a file name, or the path of a file below the same directory."""
    index = path / WEIGHTS_INDEX
    parts = name.split("/") if isinstance(name, str) and name.isprintable() else []
    if not parts or any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        raise CheckpointError(f"{index} names a shard {reprlib.repr(name)}, which is no file name; download it again")
    try:
        for part in parts:
            require_plain_name(part)
    except BundleError:
        raise CheckpointError(f"{index} names a shard outside the checkpoint: {name!r}") from None


def _require_different_names(path: Path, names: list[str]) -> None:
    """Check that no two shards have one file name: a bundle that links them knows them by it."""
    by_name: dict[str, str] = {}
    for name in names:
        other = by_name.setdefault(name.rpartition("/")[2], name)
        if other != name:
            raise CheckpointError(
                f"{path / WEIGHTS_INDEX} names the shards {other} and {name}, which have one file name: rename one"
            )


def layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 if it belongs to none."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file.

    Raises:
        CheckpointError: the file is damaged or truncated.
    """
    try:
        places = read_header(file).places
    except (OSError, ValueError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(f"{file} ({size} bytes) is damaged or cut short: {error}; download it again") from None
    return {name: TensorInfo(file=file, **place._asdict()) for name, place in places.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
