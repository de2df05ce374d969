"""The cache of a TensorRT engine as its tests look at it: whole tensors, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cllm_export.bundle.contract import cache_names
from cllm_export.tensorrt.engine import TrtEngine


def read_cache(engine: TrtEngine) -> dict[str, np.ndarray]:
    """Every cache tensor [B, K, C, D] by past name; bf16 comes as its bits, uint16."""
    length = engine.geometry.cache_length
    slots = [engine.read_rows(slot, 0, length) for slot in range(engine.num_slots)]
    return {past: np.stack([rows[index] for rows in slots]) for index, past in enumerate(past_names(engine))}


def write_cache(engine: TrtEngine, cache: Mapping[str, np.ndarray]) -> None:
    """Replace every cache tensor, as ``read_cache`` gives them."""
    for slot in range(engine.num_slots):
        rows = np.stack([cache[past][slot] for past in past_names(engine)])
        engine.write_rows(slot, 0, engine.geometry.cache_length, rows)


def cache_addresses(engine: TrtEngine) -> dict[str, int]:
    """Where on the device each cache tensor lies, by past name: the address of past and present."""
    return {past: engine._addresses[past] for past in past_names(engine)}


def past_names(engine: TrtEngine) -> list[str]:
    return [past for past, _ in cache_names(engine.geometry.num_layers)]
