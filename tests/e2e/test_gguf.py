"""A GGUF file on the command line: imported, or built at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm_export.bundle.manifest import open_bundle
from cllm_export.extras import install_line
from tests.conftest import Workshop
from tests.e2e.conftest import Cli, assert_refused, run_process
from tests.e2e.test_missing_extras import without
from tests.unit.exporter.gguf.made import write_gguf

FEW = ("--max-new-tokens", 8, "--threads", 1, "--block-size", 4)
INT8 = ("--precision", "int8-dynamic")


@pytest.fixture
def file(workshop: Workshop, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", workshop.checkpoint("llama"))


def test_an_import_is_built_verified_and_decoded(cli: Cli, workshop: Workshop, file: Path, tmp_path: Path):
    """A build of the file itself gives the same bundle, and both give the tokens of the source."""
    checkpoint, bundle, direct = (tmp_path / name for name in ("checkpoint", "bundle", "direct"))
    outcome = cli("import", file, "--output", checkpoint)
    assert outcome.code == 0, outcome
    assert outcome.out.startswith(f"wrote {checkpoint} (")
    assert outcome.out.endswith(", llama, fp32)\n")
    assert cli("build", checkpoint, "--output", bundle).code == 0
    assert "verified" in cli("verify", bundle, "--checkpoint", checkpoint, *FEW).out
    assert cli("build", file, "--output", direct).code == 0
    assert open_bundle(direct).fingerprint == open_bundle(bundle).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint", "direct", "model.gguf"]
    rows = [
        json.loads(cli("generate", each, "the cat", "--json", *FEW).out)
        for each in (bundle, direct, workshop.bundle("llama").path)
    ]
    assert rows[0]["token_ids"] == rows[1]["token_ids"] == rows[2]["token_ids"]


def test_a_build_that_fails_leaves_neither_a_bundle_nor_a_checkpoint(cli: Cli, workshop: Workshop, tmp_path: Path):
    """The chat template is found out when the checkpoint is opened, and the message names the file."""
    file = write_gguf(tmp_path / "model.gguf", workshop.checkpoint("llama"), tokenizer__chat_template="{% if %}")
    assert_refused(cli("build", file, "--output", tmp_path / "bundle"), f"chat template of {file}")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["import", "build"])
def test_without_the_package_its_install_line_is_printed(file: Path, tmp_path: Path, command: str):
    """Before anything that takes long is imported."""
    hidden = without("gguf", "torch", "transformers")
    outcome = run_process(command, file, "--output", tmp_path / "out", prelude=hidden)
    assert_refused(outcome, "'gguf'", install_line("gguf"))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["tune", "quantize", "verify"])
def test_a_command_that_needs_a_checkpoint_says_how_to_import(
    cli: Cli, workshop: Workshop, file: Path, tmp_path: Path, command: str
):
    bundle, prompts = workshop.bundle("llama").path, tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello", "answer": "you"}')
    lines = {
        "tune": (file, "--prompts", prompts, "--output", tmp_path / "out", "--steps", 1),
        "quantize": (file, "--against", bundle, "--prompts", prompts, "--output", tmp_path / "out", *INT8),
        "verify": (bundle, "--checkpoint", file),
    }
    assert_refused(cli(command, *lines[command]), f"import it with: cllm-export import {file} --output my-checkpoint")
