"""What the files of a checkpoint or of an adapter show before torch and transformers are imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cllm_export.bundle.manifest import TOKENIZER_NAME
from cllm_export.errors import CheckpointError, OptionError
from cllm_export.exporter.checkpoint.files import find_tensors, read_json, refuse_links, weight_files
from cllm_export.exporter.checkpoint.read import check_directory

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and not a whole checkpoint."""
    return (path / CONFIG_NAME).is_file() and not (path / "config.json").is_file()


def refuse_base(path: Path, base: Path | None) -> None:
    """Refuse a base for what is no adapter.

    Raises:
        OptionError: a base was given.
    """
    if base is not None:
        raise OptionError(
            f"base {base} is for adapters; {path} has no {CONFIG_NAME}, or has a config.json as well", fields=("base",)
        )


def stated_base(config: Mapping[str, Any], path: Path) -> Path:
    """The directory of the base that an adapter's config names.

    Raises:
        OptionError: there is no such directory.
    """
    stated = config.get("base_model_name_or_path")
    if not isinstance(stated, str) or not Path(stated).is_dir():
        raise OptionError(
            f"{path} names its base as {stated!r}, which is no directory here; give the base with base=CHECKPOINT"
        )
    return Path(stated)


def check_checkpoint(path: Path) -> Mapping[str, Any]:
    """Check the files of a whole checkpoint, and return the contents of its ``config.json``.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedError: the graph cannot express the architecture.
    """
    config = check_directory(path, path)
    find_tensors(weight_files(path))
    return config


def check_adapter(path: Path) -> Mapping[str, Any]:
    """Check the files of an adapter without its base, and return the contents of its config.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    refuse_links(path)
    config = read_json(path / CONFIG_NAME)
    if not (path / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{path} has no {WEIGHTS_NAME}; an adapter saved as a pickle is never loaded")
    return config


def check_base(path: Path, base: Path | None) -> None:
    """Check the base of an adapter: the one given, else the one that its config names.

    Raises:
        OptionError: ``path`` is no adapter, or names no base that is here.
        CheckpointError: the base is not a checkpoint.
    """
    if not is_adapter(path):
        refuse_base(path, base)
        return
    base = base or stated_base(read_json(path / CONFIG_NAME), path)
    check_directory(base, path if (path / TOKENIZER_NAME).is_file() else base)
    find_tensors(weight_files(base))


def require_tensors(path: Path, names: Collection[str]) -> None:
    """Refuse a name in ``keep`` that no tensor of a whole checkpoint has.

    Raises:
        OptionError: a tensor is not in the checkpoint.
    """
    matrices = {name for name, info in find_tensors(weight_files(path)).items() if len(info.shape) == 2}
    if unknown := sorted(set(names) - matrices):
        layers = sorted(name for name in matrices if ".layers." in name)
        example = f", such as {layers[0]}" if layers else ""
        raise OptionError(
            f"keep='{unknown[0]}' names no linear layer of {path}; give a weight's name as the checkpoint has it"
            f"{example}"
        )
