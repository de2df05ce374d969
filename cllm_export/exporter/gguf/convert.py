"""Imports a GGUF file as a checkpoint. The weights are dequantised a few rows at a time, and streamed."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.storage import check_output, scratch_directory, sha256_of, staged_output, write_json
from cllm_export.errors import CheckpointError, CllmExportError
from cllm_export.exporter.gguf.architectures import check_gguf
from cllm_export.exporter.gguf.config import config_of
from cllm_export.exporter.gguf.header import GgufFile, read_gguf
from cllm_export.exporter.gguf.names import imported_tensors
from cllm_export.exporter.gguf.options import IMPORT_NAME, ImportOptions
from cllm_export.exporter.gguf.tokenizer import write_tokenizer
from cllm_export.exporter.weights.memory import watched_memory
from cllm_export.extras import needs_extra
from cllm_export.progress import SILENT, Voice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TEXT_BYTES = 1 << 24
"""Room for the tokenizer and the other files of text."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """A checkpoint that was imported."""

    path: Path
    family: str
    """Its model type."""
    num_bytes: int
    """Bytes of its weights."""
    peak: int
    """Peak of anonymous memory of the import, in bytes; 0 where the system does not report it."""


def import_gguf(
    path: str | Path,
    output: str | Path,
    options: ImportOptions | None = None,
    *,
    force: bool = False,
    voice: Voice = SILENT,
) -> Import:
    """Import a GGUF file as a checkpoint. An old import at ``output`` stays intact until the new one replaces it.

    Raises:
        OutputError: the output exists (and ``force`` is not set), cannot be written or does not fit on the disk.
        CheckpointError: the file is missing, damaged, or not the one that ``options.sha256`` names.
        UnsupportedError: the architecture, or a type of tensors, is not supported.
        MissingExtraError: the extra ``gguf`` is not installed.
    """
    path, output, options = Path(path), Path(output), options or ImportOptions()
    check_output(output, force=force, marker=IMPORT_NAME)
    file = read_gguf(path)
    check_gguf(file)
    with needs_extra("gguf"), watched_memory() as memory:
        done = _import(file, output, options, force=force, voice=voice)
    return replace(done, peak=memory.peak)


def _import(file: GgufFile, output: Path, options: ImportOptions, *, force: bool, voice: Voice) -> Import:
    before = file.path.stat()
    voice.progress("checksum", 0, 1)
    sha256 = require_sha256(file.path, options.sha256)
    from cllm_export.exporter.gguf.weights import GgufWeights
    from cllm_export.exporter.weights.weights import require_space

    config = config_of(file)
    weights = GgufWeights(file, imported_tensors(file, config), options.dtype)
    with staged_output(output, force=force, marker=IMPORT_NAME) as staging:
        require_space(staging, weights.num_bytes + _TEXT_BYTES, output, can_link=False)
        weights.write(staging, voice)
        voice.progress("tokenizer", 0, 1)
        _write_config(config, options.dtype, staging)
        write_tokenizer(file, staging)
        write_json(staging / IMPORT_NAME, _origin(file, sha256, options))
        _require_unchanged(file.path, before)
    return Import(path=output, family=str(config.model_type), num_bytes=weights.num_bytes, peak=0)


@contextmanager
def imported(path: Path, output: Path, *, voice: Voice = SILENT) -> Iterator[Path]:
    """A checkpoint beside ``output``, imported from a GGUF file, for the time of the block.

    Raises:
        CheckpointError: as ``import_gguf``.
        OutputError: as ``import_gguf``.
    """
    with scratch_directory(output) as scratch:
        checkpoint = import_gguf(path, scratch / path.stem, voice=voice).path
        try:
            yield checkpoint
        except CllmExportError as error:  # its user knows the file alone
            error.args = (str(error).replace(str(checkpoint), str(path)),)
            raise


def require_sha256(path: Path, expected: str | None) -> str:
    """The sha256 of a file, as hex.

    Raises:
        CheckpointError: it is not the expected one.
    """
    found = sha256_of(path)
    if expected is not None and found != expected.lower():
        raise CheckpointError(
            f"{path} has the sha256 {found}, and not {expected.lower()}: it is another version of the file, or it is "
            "damaged; download it again, or give the checksum of this version"
        )
    return found


def _require_unchanged(path: Path, before: os.stat_result) -> None:
    """Refuse a file that another process wrote to since ``before``."""
    after = path.stat()
    if (before.st_mtime_ns, before.st_size, before.st_ino) != (after.st_mtime_ns, after.st_size, after.st_ino):
        raise CheckpointError(f"{path} changed while it was read: wait until it is whole, and run the command again")


def _write_config(config: PretrainedConfig, precision: Precision, directory: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``, as transformers saves a model."""
    import torch
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)


def _origin(file: GgufFile, sha256: str, options: ImportOptions) -> dict[str, Any]:
    """What the checkpoint was made from, and by what."""
    return {
        "source": file.path.name,
        "sha256": sha256,
        "bytes": file.path.stat().st_size,
        "architecture": file.architecture,
        "name": file.metadata.get("general.name"),
        "license": file.metadata.get("general.license"),
        "types": dict(Counter(tensor.type_name for tensor in file.tensors.values()).most_common()),
        "dtype": options.dtype,
        "tool_versions": {name: importlib.metadata.version(name) for name in ("gguf", "transformers")},
    }
