"""Wrong commands: each ends with one message that names the option and its value, before anything heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from tests.fakes import byte_level_tokenizer, write_bundle
from tests.unit.cli.wrong_commands import Case, Outcome, cases

ROOT = Path(__file__).parents[3]
KINDS = ("missing", "numbers", "words", "inputs", "outputs", "pairs")
CASES = {f"{kind}: {case}": case for kind in KINDS for case in cases(kind)}
CONFIG = {"model_type": "llama", "max_position_embeddings": 64, "num_hidden_layers": 2, "vocab_size": 300}


def make_checkpoint(directory: Path) -> None:
    """Files of a checkpoint, without a model."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))


def make_gguf(path: Path) -> None:
    """A GGUF file of two layers, without a model."""
    writer = GGUFWriter(path, "llama")
    for key, value in {"block_count": 2, "context_length": 64, "embedding_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.1.attn_norm.weight"):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_place(place: Path) -> None:
    """What right commands name, and what wrong ones do."""
    write_bundle(place / "bundle")
    make_checkpoint(place / "checkpoint")
    make_gguf(place / "model.gguf")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    (place / "adapter" / "adapter_model.safetensors").write_bytes(bytes(8))
    make_checkpoint(place / "example" / "checkpoint")
    rows = [json.dumps({"prompt": f"count to {number}", "answer": "so be it"}) for number in range(100)]
    (place / "prompts.jsonl").write_text("\n".join(rows))
    (place / "example" / "prompts.jsonl").write_text("\n".join(rows))
    (place / "schema.json").write_text("{}")
    (place / "grammar.lark").write_text('start: "a"')
    (place / "taken.txt").write_text("years of work")
    (place / "taken.bin").write_bytes(bytes(range(128, 256)))
    for name in ("taken", "empty", "damaged"):
        (place / name).mkdir()
    (place / "taken" / "thesis.tex").write_text("years of work")
    for name in ("bundle.json", "config.json", "trajectories.json"):
        (place / "damaged" / name).write_bytes(bytes(range(128, 256)))
    (place / "dangling").symlink_to("nowhere")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    """Every wrong command, run by one process: an import of torch by another test would hide one here."""
    place = tmp_path_factory.mktemp("wrong")
    make_place(place)
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.cli.wrong_commands"],
        input=json.dumps([case.arguments for case in CASES.values()]),
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [Outcome(**each) for each in json.loads(run.stdout)]
    return dict(zip(CASES.values(), found, strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_command_is_refused_at_once(outcomes: dict[Case, Outcome], case: Case):
    """It names the option and the value, imports nothing heavy before, and leaves nothing."""
    outcome = outcomes[case]
    assert outcome.heavy is None, f"{outcome.heavy} was imported first"
    assert outcome.code == 2, outcome
    assert outcome.out == "", outcome
    assert outcome.left == [], outcome
    for word in ("Traceback", "defect", "Value error"):
        assert word not in outcome.err, outcome
    text = " ".join(outcome.err.replace("│", " ").split())
    for name in case.names:
        assert name in text, f"{name!r} is not in: {text}"


def test_there_are_enough_wrong_commands():
    assert len(CASES) >= 200
