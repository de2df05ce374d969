"""``collect`` from the command line: from a bundle and a checkpoint, killed, on a full disk, and asked for nonsense."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import TrajectoryError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.extras import install_line
from cllm_export.runtime.load import load
from cllm_export.training.collection import collect
from cllm_export.training.collection.collection import MANIFEST_NAME, read_manifest
from cllm_export.training.collection.shards import write_shard
from cllm_export.training.collection.trajectories import read_trajectories
from tests.conftest import PINNED, THREADS, Workshop
from tests.e2e.conftest import Cli, assert_refused, environment, run_process, snapshot
from tests.e2e.test_missing_extras import without

NAME = "qwen2"
"""The variant whose answers end: it has many end-of-sequence ids. Its own loop is the block loop, its proposer the
prompt's."""
NUM_PROMPTS = 60
FEW = ("--max-new-tokens", 24, "--threads", THREADS)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    words = ("the", "cat", "sat", "on", "mat", "select", "name", "where", "city")
    generator = random.Random(0)
    lines = [{"prompt": " ".join(generator.choices(words, k=generator.randint(1, 12)))} for _ in range(NUM_PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Path:
    return workshop.bundle(NAME).path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_bundle_gives_a_collection_in_the_form_it_was_trained_with(cli: Cli, bundle: Path, prompts: Path, tmp_path):
    outcome = cli("collect", bundle, "--prompts", prompts, "--output", tmp_path / "out", *FEW)
    assert outcome.code == 0, outcome
    assert outcome.complaints == "", "no progress bar in a pipe"
    for phrase in (
        f"of {NUM_PROMPTS} prompts",
        "tokens per forward",
        "iterations per block",
        "p90",
        "cut by the length",
    ):
        assert phrase in outcome.out
    found = read_trajectories(tmp_path / "out")
    settings, model = found.manifest.settings, load(bundle, threads=THREADS)
    assert (settings.loop, settings.proposer, settings.block_size, settings.engine) == (
        "block",
        "prompt",
        4,
        "onnxruntime",
    )
    assert 5 < len(found) < NUM_PROMPTS
    for row in found.rows():
        generation = model.generate(list(row.prompt_ids), max_new_tokens=24)
        assert row.new_ids == list(generation.token_ids)
        assert row.finish_reason == generation.finish_reason


def test_a_checkpoint_gives_the_trajectories_of_its_bundle(
    cli: Cli, workshop: Workshop, bundle: Path, prompts, tmp_path
):
    """Two engines may flip a tie between them; on this machine's and any other's fixed prompts hardly ever."""
    for name, source in (("bundle", bundle), ("checkpoint", workshop.checkpoint(NAME))):
        assert cli("collect", source, "--prompts", prompts, "--output", tmp_path / name, *FEW).code == 0
    one, two = (read_trajectories(tmp_path / name) for name in ("bundle", "checkpoint"))
    theirs = {row.id: row.new_ids for row in one.rows()}
    same = [theirs.get(row.id) == row.new_ids for row in two.rows()]
    assert sum(same) >= 0.9 * len(same)
    assert two.manifest.settings.engine == "torch"
    two.require_same_model(one.manifest.settings.model_fingerprint, one.manifest.settings.tokenizer_sha256)
    fingerprint = open_checkpoint(workshop.checkpoint(NAME)).fingerprint()
    one.require_same_model(fingerprint, one.manifest.settings.tokenizer_sha256)


def test_the_summary_as_json_is_that_of_the_manifest(cli: Cli, bundle: Path, prompts: Path, tmp_path: Path):
    options = (
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        "--limit",
        8,
        "--method",
        "jacobi",
        "--proposer",
        "pad",
    )
    outcome = cli("collect", bundle, *options, "--block-size", 6, "--json", *FEW)
    summary = json.loads(outcome.out)
    assert summary == json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["summary"]
    assert summary["prompts"] == 8
    settings = read_trajectories(tmp_path / "out").manifest.settings
    assert (settings.loop, settings.proposer, settings.block_size) == ("sliding", "pad", 6)


def test_a_bundle_with_fixed_shapes_collects_in_its_own(cli: Cli, workshop: Workshop, prompts: Path, tmp_path: Path):
    bundle = workshop.bundle("llama", **PINNED).path
    options = ("--prompts", prompts, "--output", tmp_path / "out", "--limit", 4)
    cli("collect", bundle, *options, *FEW)
    settings = read_trajectories(tmp_path / "out").manifest.settings
    assert (settings.block_size, settings.batch_size) == (PINNED["block_size"], PINNED["batch_size"])
    assert_refused(
        cli("collect", bundle, *options, "--block-size", 4),
        "--block-size must be 8, which this engine is pinned to, got 4",
    )
    assert_refused(cli("collect", bundle, *options, "--batch-size", 2), "pinned to 1 slots")


def test_a_collection_without_a_sample_says_why_and_exits_with_1(cli: Cli, bundle: Path, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    lines = [{"id": "a", "prompt": ""}, {"id": "b", "prompt": "", "kind": "x"}, {"id": "c", "prompt": "word " * 300}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = cli("collect", bundle, "--prompts", path, "--output", tmp_path / "out", *FEW)
    assert outcome.code == 1
    for phrase in ("0 of 3 prompts", "empty prompt", "prompt c: it has"):
        assert phrase in outcome.out
    assert "Traceback" not in outcome.err


def start(bundle: Path, prompts: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from cllm_export.cli import main; main()", "collect", str(bundle)]
    options = ["--prompts", str(prompts), "--output", str(output), "--shard-size", "2", *map(str, FEW)]
    return subprocess.Popen(
        [*command, *options], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the collection ended before it got there"
        assert time.monotonic() < deadline, f"no {path.name} in two minutes"
        time.sleep(0.001)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", ["manifest", "first shard", "some shards"])
def test_a_killed_collection_goes_on_where_it_stopped_and_ends_with_the_same_bytes(
    cli: Cli, bundle: Path, prompts: Path, tmp_path: Path, stage: str, sent: signal.Signals
):
    arguments = ("--prompts", prompts, "--shard-size", 2, *FEW)
    assert cli("collect", bundle, *arguments, "--output", tmp_path / "whole").code == 0
    killed = tmp_path / "killed"
    awaited = {"manifest": MANIFEST_NAME, "first shard": "shard-00000.parquet", "some shards": "shard-00005.parquet"}
    with start(bundle, prompts, killed) as process:
        wait_for(process, killed / awaited[stage])
        process.send_signal(sent)
    found = read_manifest(killed)
    assert found is not None
    if found.summary is None:
        with pytest.raises(TrajectoryError, match="not complete"):
            read_trajectories(killed)
    assert cli("collect", bundle, *arguments, "--output", killed).code == 0
    assert contents(killed) == contents(tmp_path / "whole")
    read_trajectories(killed)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_collection_says_what_it_keeps_and_how_to_go_on(
    cli: Cli, bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int, code: int
):
    """The signal comes before the third shard is written."""

    def write_or_stop(directory: Path, number: int, *others: Any) -> Any:
        if number == 2:
            os.kill(os.getpid(), sent)
        return write_shard(directory, number, *others)

    monkeypatch.setattr(collect, "write_shard", write_or_stop)
    outcome = cli("collect", bundle, "--prompts", prompts, "--output", tmp_path / "out", "--shard-size", 2, *FEW)
    assert outcome.code == code
    assert f"stopped by {signal.Signals(sent).name}: {tmp_path / 'out'} keeps 2 of " in outcome.err
    assert "shards: run the same command again to go on" in outcome.err


def test_a_collection_killed_again_and_again_still_ends_with_the_same_bytes(cli: Cli, bundle, prompts, tmp_path: Path):
    """Each run is killed a moment after it has one more shard."""
    arguments = ("--prompts", prompts, "--shard-size", 2, *FEW)
    cli("collect", bundle, *arguments, "--output", tmp_path / "whole")
    killed, generator = tmp_path / "killed", random.Random(1)
    for number in (3, 8, 14):
        with start(bundle, prompts, killed) as process:
            wait_for(process, killed / f"shard-{number:05}.parquet")
            time.sleep(generator.uniform(0, 0.02))
            process.kill()
    cli("collect", bundle, *arguments, "--output", killed)
    assert contents(killed) == contents(tmp_path / "whole")


def test_two_runs_into_one_directory_do_not_mix(cli: Cli, bundle: Path, prompts: Path, tmp_path: Path):
    output = tmp_path / "out"
    with start(bundle, prompts, output) as process:
        wait_for(process, output / "shard-00000.parquet")
        process.send_signal(signal.SIGSTOP)
        outcome = cli("collect", bundle, "--prompts", prompts, "--output", output, "--shard-size", 2, *FEW)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
    assert_refused(outcome, "another run is collecting into", str(output))
    read_trajectories(output)


def test_the_same_directory_with_other_settings_is_refused_by_name(cli: Cli, workshop, bundle, prompts, tmp_path: Path):
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--limit", 4, *FEW)
    assert cli("collect", bundle, *arguments).code in (0, 1)
    before = snapshot(tmp_path)
    assert_refused(cli("collect", bundle, *arguments, "--seed", 1), "seed 0, this one has 1", "choose another --output")
    assert_refused(cli("collect", workshop.bundle("qwen3").path, *arguments), "model_fingerprint")
    assert snapshot(tmp_path) == before


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own: 128 kB."""
    place = tmp_path / "mounted"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"only root can mount a small file system here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("left", [0, 8_192, 32_768], ids=["at once", "in the first shard", "later"])
def test_a_full_disk_is_named_and_the_collection_goes_on_once_there_is_room(
    cli: Cli, bundle: Path, prompts: Path, mounted: Path, tmp_path: Path, left: int
):
    arguments = ("--prompts", prompts, "--shard-size", 2, *FEW)
    cli("collect", bundle, *arguments, "--output", tmp_path / "whole")
    statistics = os.statvfs(mounted)
    (mounted / "ballast").write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_frsize - left)))
    output = mounted / "out"
    assert_refused(cli("collect", bundle, *arguments, "--output", output), "disk is full", "run the command again")
    assert not list(output.glob(".*")), "what could not be written whole is gone"
    (mounted / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(mounted)], check=True)
    assert cli("collect", bundle, *arguments, "--output", output).code == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_what_is_neither_bundle_nor_checkpoint_is_refused(cli: Cli, prompts: Path, tmp_path: Path):
    options = ("--prompts", prompts, "--output", tmp_path / "out")
    assert_refused(cli("collect", tmp_path / "nowhere", *options), "neither a checkpoint nor a bundle", "no such dir")
    assert_refused(cli("collect", tmp_path, *options), "neither bundle.json nor config.json")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_exported_cannot_be_collected_from(cli: Cli, small: Path, prompts, tmp_path: Path):
    checkpoint = tmp_path / "copy"
    shutil.copytree(small, checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": "gpt2"}')
    options = ("--prompts", prompts, "--output", tmp_path / "out")
    assert_refused(cli("collect", checkpoint, *options), "gpt2", "supported are")
    (checkpoint / "model.safetensors").unlink()
    shutil.copy(small / "config.json", checkpoint)
    assert_refused(cli("collect", checkpoint, *options), "has no weights")


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (("--method", "autoregressive"), ("--method", "jacobi-block")),
        (("--proposer", "zeros"), ("--proposer", "zeros")),
        (("--block-size", 0), ("--block-size", "at least 1")),
        (("--block-size", 65), ("--block-size", "at most 64")),
        (("--batch-size", 0), ("--batch-size", "at least 1")),
        (("--shard-size", 0), ("--shard-size", "at least 1")),
        (("--threads", 0), ("threads", "at least 1")),
        (("--limit", 0), ("--limit",)),
        (("--max-new-tokens", 0), ("--max-new-tokens",)),
        (("--device", "cuda"), ("--device cuda is for checkpoints",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_an_option_out_of_range_is_refused(cli: Cli, bundle: Path, prompts, tmp_path: Path, arguments, phrases):
    options = ("--prompts", prompts, "--output", tmp_path / "out")
    assert_refused(cli("collect", bundle, *options, *arguments), *phrases)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_refused(cli: Cli, small: Path, prompts: Path, tmp_path: Path):
    for device in ("nonsense", "cuda:99"):
        options = ("--prompts", prompts, "--output", tmp_path / "out", "--device", device)
        assert_refused(cli("collect", small, *options), f"device '{device}'")


def test_a_bad_prompt_file_is_refused_with_its_line_before_anything_is_written(cli: Cli, bundle: Path, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ')
    assert_refused(cli("collect", bundle, "--prompts", path, "--output", tmp_path / "out"), "p.jsonl:2", "malformed")
    assert_refused(cli("collect", bundle, "--prompts", tmp_path / "none", "--output", tmp_path / "out"), "No such file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["directory", "file", "parent is a file"])
def test_an_output_that_is_no_collection_is_refused_before_any_work(cli: Cli, bundle, prompts, tmp_path: Path, kind):
    output = tmp_path / "out"
    if kind == "directory":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    else:
        output.write_text("years of work")
    before = snapshot(tmp_path)
    target = output / "below" if kind == "parent is a file" else output
    assert_refused(cli("collect", bundle, "--prompts", prompts, "--output", target, *FEW), str(target))
    assert snapshot(tmp_path) == before


def test_without_the_train_extra_the_install_line_is_printed(bundle: Path, prompts: Path, tmp_path: Path):
    options = ("--prompts", prompts, "--output", tmp_path / "out")
    outcome = run_process("collect", bundle, *options, prelude=without("pyarrow"))
    assert_refused(outcome, install_line("train"), "pyarrow")


def test_a_bundle_is_collected_from_without_torch(bundle: Path, prompts: Path, tmp_path: Path):
    options = ("--prompts", prompts, "--output", tmp_path / "out", "--limit", 4, *FEW)
    outcome = run_process("collect", bundle, *options, prelude=without("torch", "transformers"))
    assert outcome.code in (0, 1), outcome
    assert "of 4 prompts" in outcome.out
