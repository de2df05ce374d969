"""What an engine of ONNX Runtime keeps in memory besides weights and cache."""

from __future__ import annotations

import re
from contextlib import closing

import numpy as np
import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import WEIGHTS_NAME
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.engines.resident_memory import SMAPS
from tests.conftest import THREADS, Workshop
from tests.unit.runtime.engines.test_resident_memory import needs_smaps, resident_bytes


def forward_of(engine: OrtEngine, size: int) -> np.ndarray:
    logits = engine.forward(Batch([[7] * size], [size], [0]), with_logits=True).logits
    assert logits is not None
    return logits


def test_logits_of_every_n_share_one_buffer(workshop: Workshop) -> None:
    """Each n had its own: 200 MB for one slot and a vocabulary of 262,144. The bits of a row stay those of n = 1."""
    with closing(OrtEngine(workshop.bundle("llama"), num_slots=1, threads=THREADS)) as engine:
        one = forward_of(engine, 1)
        first = one[0, 0].copy()
        many = forward_of(engine, 4)
        assert np.shares_memory(one, many)
        assert many.shape[1] == 4
        assert np.array_equal(many[0, 0], first)
        assert np.array_equal(forward_of(engine, 1)[0, 0], first)


@needs_smaps
def test_pages_of_the_weights_leave_memory_once_they_are_packed(workshop: Workshop) -> None:
    bundle = workshop.bundle("llama")
    with closing(OrtEngine(bundle, num_slots=1, threads=THREADS)) as engine:
        path = bundle.path / WEIGHTS_NAME
        if not re.search(re.escape(str(path)), SMAPS.read_text(encoding="utf-8")):
            pytest.skip("this ONNX Runtime does not map the file")
        assert resident_bytes(path) == 0
        forward_of(engine, 1)
        assert resident_bytes(path) > 0
