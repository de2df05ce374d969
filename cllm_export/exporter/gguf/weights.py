"""Writes the weights of a GGUF file as safetensors, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.safetensors_header import ITEM_BYTES, make_header
from cllm_export.bundle.storage import write_json
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.files import SINGLE_WEIGHTS, WEIGHTS_INDEX
from cllm_export.exporter.gguf.header import GgufFile
from cllm_export.exporter.gguf.names import Imported
from cllm_export.exporter.gguf.values import Values, read_rows
from cllm_export.progress import Voice

SHARD_BYTES = 5_000_000_000
"""Largest size of a weight file, in bytes. Only a tensor that is larger itself makes a larger one."""

_DTYPES: dict[Precision, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


class GgufWeights:
    """The weights that a GGUF file gives.

    Args:
        tensors: those of the checkpoint, in the order in which they are written.
        dtype: what they are written in.
    """

    def __init__(self, file: GgufFile, tensors: Sequence[Imported], dtype: Precision) -> None:
        self._file, self._precision = file, dtype
        self._dtype = _DTYPES[dtype]
        self._shards = self._divided(tensors)
        self._total = sum(each.tensor.length for each in tensors)
        self._done = 0
        self.num_bytes = sum(map(self._size, tensors))
        """Bytes of the values that are written."""

    def write(self, directory: Path, voice: Voice) -> None:
        """Write the weight files, and their index if there are several.

        Raises:
            OptionError: a value is beyond the range of fp16.
        """
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            count = len(self._shards)
            name = SINGLE_WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._write_shard(directory / name, shard, voice)
            weight_map |= {each.name: name for each in shard}
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            write_json(directory / WEIGHTS_INDEX, index)

    def _size(self, each: Imported) -> int:
        return math.prod(each.tensor.shape) * ITEM_BYTES[self._dtype]

    def _divided(self, tensors: Sequence[Imported]) -> list[list[Imported]]:
        """The tensors of each weight file."""
        shards: list[list[Imported]] = [[]]
        used = 0
        for each in tensors:
            size = self._size(each)
            if shards[-1] and used + size > SHARD_BYTES:
                shards.append([])
                used = 0
            shards[-1].append(each)
            used += size
        return shards

    def _write_shard(self, path: Path, shard: Sequence[Imported], voice: Voice) -> None:
        header = {each.name: (self._dtype, each.tensor.shape) for each in shard}
        with path.open("wb") as out:
            out.write(make_header(header, {"format": "pt"}))
            for each in shard:
                for values in self._values(each):
                    out.write(self._cast(values, each))
                    self._done += values.size // each.tensor.shape[-1] * each.tensor.row_bytes
                    voice.progress("weights", self._done, self._total, each.tensor.name)

    def _values(self, each: Imported) -> Iterator[Values]:
        """The values of a tensor of the checkpoint, a few rows at a time."""
        order, is_bias = each.order, len(each.tensor.shape) == 1
        for rows in read_rows(self._file, each.tensor, None if is_bias else order):
            values = rows[:, order] if is_bias and order is not None else rows
            yield values - each.offset if each.offset else values

    def _cast(self, values: Values, each: Imported) -> bytes:
        """The bytes of values in the dtype of the checkpoint."""
        if self._precision == "fp32":
            return values.tobytes()
        target = torch.float16 if self._precision == "fp16" else torch.bfloat16
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(target)
        if np.isfinite(values).all() and not rounded.isfinite().all():
            raise OptionError(
                f"dtype='{self._precision}' cannot hold {np.abs(values).max():g}, a value of {each.tensor.name} in "
                f"{self._file.path}: choose dtype='bf16' or dtype='fp32'",
                fields=("dtype",),
            )
        return rounded.view(torch.int16).numpy().tobytes()
