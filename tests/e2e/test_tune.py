"""``tune`` from the command line: what it writes, killed at any moment, on a full disk, in several processes, and asked
for nonsense or given it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cllm_export import progress
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import TuningError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.training.data.samples import Sample
from cllm_export.training.model.torch_engine import load_checkpoint
from cllm_export.training.options import TuneOptions
from cllm_export.training.prepare import prepare
from cllm_export.training.tune import _Run, tune
from tests.checkpoints import EOS, MAX_POSITIONS, PAD, Variant, edit_json, edit_weights
from tests.conftest import THREADS, Workshop
from tests.e2e.conftest import Cli, Outcome, assert_refused, environment, snapshot
from tests.e2e.test_output import mounted, proposer  # noqa: F401 - a fixture
from tests.e2e.tuning_worker import Orders, run, run_together

ROOT = Path(__file__).parent.parent.parent
WORDS = ("the", "cat", "sat", "on", "mat", "select", "name", "where", "city")
FEW = ("--batch-size", 4, "--num-held-out", 6, "--block-size", 8, "--learning-rate", 1e-3, "--threads", THREADS)
SIX_STEPS = (*FEW, "--steps", 6, "--evaluate-every", 0.34)
"""Held-out decodes, and saves, at the steps 0, 3 and 6."""
Weights = Mapping[str, Tensor]


def write_prompts(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def questions(count: int = 40, *, seed: int = 0) -> list[dict[str, str]]:
    generator = random.Random(seed)
    texts = [generator.choices(WORDS, k=generator.randint(1, 6)) for _ in range(count)]
    return [
        {"id": f"q{index}", "prompt": " ".join(words) + " ?", "answer": " " + " ".join(reversed(words))}
        for index, words in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", questions())


@pytest.fixture(scope="module")
def llama(workshop: Workshop) -> Path:
    return workshop.checkpoint("llama")


def arguments(checkpoint: Path, prompts: Path, output: Path, *options: object) -> list[str]:
    return [str(part) for part in ("tune", checkpoint, "--prompts", prompts, "--output", output, *options)]


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_weights(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "tuning.json").read_text())


@pytest.fixture(scope="module")
def whole(llama: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What six steps give when nothing comes between; beside it, in ``events``, what the run did to files."""
    place = tmp_path_factory.mktemp("whole")
    orders = Orders(
        arguments=arguments(llama, prompts, place / "out", *SIX_STEPS), log=place / "log", watched=place / "out.tuning"
    )
    outcome = run(orders)
    assert outcome.code == 0, outcome
    return place / "out"


# What it says


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_what_was_saved_and_goes_on_to_the_same_weights(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path, sent: int, code: int
):
    """Its last state is of step 3, and the signal comes in step 5."""
    given = arguments(llama, prompts, tmp_path / "out", *SIX_STEPS)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 5, sent)
        stopped = cli(*given)
    assert stopped.code == code, stopped
    name = signal.Signals(sent).name
    assert stopped.err.splitlines()[-1] == (
        f"stopped by {name}: {tmp_path / 'out'}.tuning holds the state of step 3, and 2 later steps are lost: run the "
        "same command with --resume"
    )
    assert cli(*given, "--resume").code == 0
    assert_same_weights(weights_of(tmp_path / "out"), weights_of(whole))


def stop_in_step(patch: pytest.MonkeyPatch, step: int, sent: int) -> None:
    """Send this process a signal at the end of a step."""
    report = _Run._report_step

    def report_and_stop(run: _Run) -> None:
        report(run)
        if run._step == step:
            os.kill(os.getpid(), sent)

    patch.setattr(_Run, "_report_step", report_and_stop)


def test_a_run_that_is_stopped_before_it_saved_anything_says_to_start_again(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = arguments(llama, prompts, tmp_path / "out", *SIX_STEPS)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 2, signal.SIGINT)
        stopped = cli(*given)
    assert stopped.code == 130
    assert "no state was saved yet, and 2 steps are lost: run the same command again" in stopped.err
    assert cli(*given).code == 0


def test_a_run_says_first_what_it_keeps_and_drops_and_last_how_it_compares_with_its_parent(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "INTERVAL", 1e6)
    monkeypatch.setattr(progress, "STAGE_INTERVAL", 1e6)
    long = {"prompt": "the cat ?", "answer": " the cat sat on the mat" * 4}
    given = write_prompts(tmp_path / "p.jsonl", [*questions(20), *[long] * 10, {"prompt": "the cat ?"}])
    outcome = cli(*arguments(llama, given, tmp_path / "out", *FEW, "--steps", 2, "--max-length", 24))
    assert outcome.code == 0, outcome
    kept, too_long, no_answer, length, *_ = [
        line.split("] ", 1)[1] for line in outcome.err.splitlines() if "] " in line
    ]
    assert kept == "kept 20 of 31 prompts: 14 to train on, 6 to measure on"
    assert too_long.startswith(
        "dropped 10 (32%): too long; they take more than 24 tokens with their answers: --max-length 30 keeps all"
    )
    assert no_answer.startswith("dropped 1 (3%): no answer; give each row an answer")
    assert "14 steps an epoch, each sample 4 times; 2 steps of training are 0.14 epochs" in length
    assert re.fullmatch(
        r"(better than|worse than|equal to|.*, but .*, compared with) its parent on 6 held-out prompts: "
        r"tokens per forward .* -> .*, exact match .* -> .*, perplexity .* -> .*",
        outcome.out.splitlines()[-1],
    )


def test_a_log_file_gets_lines_of_a_run_that_is_slow(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is slow here: the lines come as if half a minute lay between two reports."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "STAGE_INTERVAL", 0.0)
    outcome = cli(*arguments(llama, prompts, tmp_path / "out", *SIX_STEPS))
    for line in ("loading the model", "held-out prompts: 6 of 6 (100%)", "training: 5 of 6 (83%)", "saving"):
        assert f"] {line}" in outcome.err
    assert "to go; loss" in outcome.err


# What it writes


def test_the_output_is_a_checkpoint_like_its_parent_that_builds_and_verifies(
    cli: Cli, workshop: Workshop, prompts: Path, tmp_path: Path
):
    """Its parent's weights are bf16, in shards, with a head of their own."""
    parent, output = workshop.checkpoint("llama-llama3-bf16-sharded"), tmp_path / "out"
    outcome = cli(*arguments(parent, prompts, output, *FEW, "--steps", 3, "--proposer", "repeat", "--loop", "block"))
    assert outcome.code == 0, outcome
    assert outcome.complaints == "", "quiet in a pipe"
    for phrase in ("34 samples (dropped: none), 3 steps", "tokens/forward", f"wrote {output}"):
        assert phrase in outcome.out
    tuned, source = open_checkpoint(output), open_checkpoint(parent)
    assert tuned.trained_with == TrainedWith(block_size=8, proposer="repeat", loop="block")
    assert {name: (t.dtype, t.shape) for name, t in tuned.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in source.tensors.items()
    }
    changed = [name for name in tuned.tensors if not torch.equal(tuned.read(name), source.read(name))]
    assert len(changed) > 10
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (parent / name).read_bytes()
    kept = {k: v for k, v in tuned.raw_config.items() if k != "cllm"}
    assert kept == source.raw_config
    assert sorted(path.name for path in output.iterdir() if "safetensors" in path.name) == ["model.safetensors"]
    assert cli("build", output, "--output", tmp_path / "bundle").code == 0
    verdict = cli("verify", tmp_path / "bundle", "--checkpoint", output, "--max-new-tokens", 8, "--threads", THREADS)
    assert verdict.code == 0, verdict


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3-untied-bias"])
def test_every_family_is_tuned(cli: Cli, workshop: Workshop, prompts: Path, tmp_path: Path, name: str):
    parent = workshop.checkpoint(name)
    outcome = cli(*arguments(parent, prompts, tmp_path / "out", *FEW, "--steps", 2))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome
    assert load_checkpoint(tmp_path / "out").generate("the cat", max_new_tokens=4).token_ids
    stored = {name for path in parent.glob("*.safetensors") for name in load_file(path)}
    assert set(weights_of(tmp_path / "out")) == stored


VARIATIONS = {
    "bf16": ("--mixed-precision", "bf16"),
    "muon": ("--optimizer", "muon"),
    "accumulation": ("--gradient-accumulation", 2),
    "local": ("--objective", "local"),
    "global, block loop": ("--objective", "global", "--loop", "block", "--proposer", "prompt"),
    "autoregressive": ("--objective", "autoregressive", "--label-smoothing", 0.1),
    "mixed block sizes": ("--block-size", 4, "--block-size", 16, "--num-windows", 2),
    "blocks longer than any sample": ("--block-size", 100),
    "minutes": (),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_every_way_of_tuning_learns_the_answers(cli: Cli, llama: Path, prompts: Path, tmp_path: Path, name: str):
    """Two samples, again and again: whatever the way, the loss falls."""
    limit = ("--minutes", 0.02) if name == "minutes" else ("--steps", 30)
    options = (*FEW, *limit, "--limit", 3, "--num-held-out", 1, "--evaluate-every", 0.5, *VARIATIONS[name])
    outcome = cli(*arguments(llama, prompts, tmp_path / "out", *options))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome
    report = report_of(tmp_path / "out")
    if name == "minutes":  # how many steps they hold is the machine's
        assert report["minutes"] >= 0.02
    else:
        first, last = (report["curve"][index]["autoregressive"] for index in (1, -1))
        assert last < first
        assert report["samples_seen"] == 30 * 4 * (2 if name == "accumulation" else 1)


def test_two_forwards_a_step_are_one_of_twice_the_samples(cli: Cli, llama: Path, tmp_path: Path):
    """Of equal samples, where the mean of means is the mean. The sums differ in order: 1e-6 of a gradient, which the
    first steps of Adam, of the size of the learning rate whatever the gradient's, turn into 1e-5 of a weight at most.
    """
    same = write_prompts(tmp_path / "p.jsonl", [questions()[3] | {"id": str(copy)} for copy in range(12)])
    options = (*FEW, "--objective", "autoregressive", "--steps", 3)
    one = (*options, "--batch-size", 4)
    two = (*options, "--batch-size", 2, "--gradient-accumulation", 2)
    for name, chosen in (("one", one), ("two", two)):
        assert cli(*arguments(llama, same, tmp_path / name, *chosen)).code == 0
    reports = [report_of(tmp_path / name) for name in ("one", "two")]
    assert reports[0]["samples_seen"] == reports[1]["samples_seen"]
    losses = [[entry["loss"] for entry in report["curve"][1:]] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_trained_no_block_claims_none(cli: Cli, llama: Path, prompts: Path, tmp_path: Path):
    options = (*FEW, "--steps", 1, "--objective", "autoregressive", "--proposer", "prompt")
    assert cli(*arguments(llama, prompts, tmp_path / "out", *options)).code == 0
    assert open_checkpoint(tmp_path / "out").trained_with == open_checkpoint(llama).trained_with


def test_gradient_checkpointing_changes_memory_and_not_the_result(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path
):
    """The same sums in the same order: equality is required."""
    assert cli(*arguments(llama, prompts, tmp_path / "out", *SIX_STEPS, "--gradient-checkpointing")).code == 0
    assert_same_weights(weights_of(tmp_path / "out"), weights_of(whole))


@pytest.mark.parametrize("checkpointing", [(), ("--gradient-checkpointing",)], ids=["", "with checkpointing"])
def test_lora_leaves_a_plain_checkpoint_in_which_only_projections_changed(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path, checkpointing: tuple[str, ...]
):
    output = tmp_path / "out"
    outcome = cli(*arguments(llama, prompts, output, *FEW, "--steps", 4, "--lora-rank", 2, *checkpointing))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome
    before, after = weights_of(llama), weights_of(output)
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if not checkpointing:
        assert cli("build", output, "--output", tmp_path / "bundle").code == 0


def test_a_run_without_progress_stops_by_patience(cli: Cli, llama: Path, prompts: Path, tmp_path: Path):
    options = (*FEW, "--steps", 10, "--learning-rate", 0, "--patience", 2)
    outcome = cli(*arguments(llama, prompts, tmp_path / "out", *options))
    assert outcome.code == 0
    assert "no further progress" in outcome.out
    report = report_of(tmp_path / "out")
    assert (report["stopped"], report["steps"]) == ("patience", 2)


def test_tensorboard_reads_the_log(whole: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(whole.with_name("out.tuning") / "tensorboard"))
    log.Reload()
    assert [point.step for point in log.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in log.Scalars("held-out/tokens_per_forward")] == [0, 3, 6]


def test_a_model_without_a_pad_token_is_trained_on_the_proposer_it_will_decode_with(
    workshop: Workshop, prompts: Path, tmp_path: Path
):
    """Which is then the end-of-sequence token, as in the runtime."""
    parent = tmp_path / "parent"
    shutil.copytree(workshop.checkpoint("small"), parent)
    for name in ("config.json", "generation_config.json"):
        edit_json(parent / name, drop=["pad_token_id"])
    work = tmp_path / "out.tuning"
    orders = Orders(
        arguments=arguments(parent, prompts, tmp_path / "out", *FEW, "--steps", 1), log=tmp_path / "log", watched=work
    )
    assert run(orders).code == 0
    events = Path(f"{orders.log}.events").read_text().splitlines()
    shutil.rmtree(tmp_path / "out")
    killed = Orders(
        arguments=(*orders.arguments, "--force"), log=tmp_path / "log", watched=work, kill_at=len(events) - 1
    )
    while not (work / "state" / "pool_0.json").exists() and killed.kill_at:
        killed = Orders(**{**vars(killed), "kill_at": killed.kill_at - 1})
        assert run(killed).code == -signal.SIGKILL
    entries = json.loads((work / "state" / "pool_0.json").read_text())["entries"]
    fresh = [window["guesses"] for entry in entries if entry["visits"] == 0 for window in entry["windows"]]
    assert {token for guesses in fresh for token in guesses} == {EOS}


def test_an_answer_ends_with_the_tokenizers_own_token_where_a_model_stops_at_several(
    workshop: Workshop, prompts: Path, tmp_path: Path
):
    parent = tmp_path / "parent"
    shutil.copytree(workshop.checkpoint("small"), parent)
    options = TuneOptions(steps=1)
    for ends, expected in (([50, EOS], EOS), ([50, 51], 50)):
        edit_json(parent / "generation_config.json", eos_token_id=ends)
        data = prepare(parent, prompts, options, num_held_out=1, collected=tmp_path)
        assert {sample.tokens[-1] for sample in data.samples} == {expected}


def test_held_out_prompts_may_be_as_long_as_the_model_holds(cli: Cli, llama: Path, tmp_path: Path):
    """There is then no room for as many new tokens as the longest answer has."""
    lines = [*questions(10), {"prompt": "e " * 120, "answer": "x"}, {"prompt": "x", "answer": " e" * 120}]
    given = write_prompts(tmp_path / "p.jsonl", lines)
    data = prepare(llama, given, TuneOptions(steps=1), num_held_out=2, collected=tmp_path)
    assert max(len(sample.tokens) for sample in data.held_out) > MAX_POSITIONS - 20
    outcome = cli(*arguments(llama, given, tmp_path / "out", *FEW, "--steps", 1, "--num-held-out", 2))
    assert outcome.code == 0, outcome


def test_fewer_samples_than_a_batch_are_enough(cli: Cli, llama: Path, prompts: Path, tmp_path: Path):
    options = (*FEW, "--steps", 2, "--limit", 2, "--num-held-out", 1, "--batch-size", 8)
    outcome = cli(*arguments(llama, prompts, tmp_path / "out", *options))
    assert outcome.code == 0, outcome
    assert "1 sample (" in outcome.out


# Interrupted and resumed


def kill(checkpoint: Path, prompts: Path, output: Path, at: int, *options: object, log: Path) -> Outcome:
    orders = Orders(
        arguments=arguments(checkpoint, prompts, output, *options),
        log=log,
        watched=output.with_name(f"{output.name}.tuning"),
        kill_at=at,
    )
    return run(orders)


def events_of(whole: Path) -> list[str]:
    return whole.with_name("log.events").read_text().splitlines()


def moment(whole: Path, event: str, which: int) -> int:
    """The number of one event of the whole run."""
    return [index for index, found in enumerate(events_of(whole)) if found == event][which]


SAVING = {
    "open curve.jsonl": -1,
    "open state.new/pool_0.json": -1,
    "open state.new/counters.json": -1,
    "os.rename state": 0,
    "os.rename state.new": -1,
    "os.mkdir checkpoint.new": 1,
    "os.rename checkpoint": 0,
    "os.rename checkpoint.new": -1,
}
"""Events of a save, and which of them: after step 3, whose state is the first, or step 6."""


def resume(cli: Cli, llama: Path, prompts: Path, output: Path) -> None:
    outcome = cli(*arguments(llama, prompts, output, *SIX_STEPS, "--resume"))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome


@pytest.mark.parametrize("event", SAVING)
def test_a_run_killed_while_it_saves_goes_on_to_the_weights_of_one_that_was_not(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path, event: str
):
    at = moment(whole, event, SAVING[event])
    output = tmp_path / "out"
    assert kill(llama, prompts, output, at, *SIX_STEPS, log=tmp_path / "log").code == -signal.SIGKILL
    assert not output.exists()
    resume(cli, llama, prompts, output)
    assert_same_weights(weights_of(output), weights_of(whole))
    assert [entry["step"] for entry in report_of(output)["curve"]] == [0, 3, 6], "none twice"
    assert len((tmp_path / "out.tuning" / "curve.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_run_killed_at_any_moment_can_be_resumed_or_started_again(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path
):
    for at in range(len(events_of(whole))):
        output = tmp_path / str(at)
        assert kill(llama, prompts, output, at, *SIX_STEPS, log=tmp_path / "log").code == -signal.SIGKILL
        if not output.exists():
            outcome = cli(*arguments(llama, prompts, output, *SIX_STEPS, "--resume"))
            if outcome.code:
                assert_refused(outcome, "there is no run to resume", "start without --resume")
                assert cli(*arguments(llama, prompts, output, *SIX_STEPS)).code == 0
        assert_same_weights(weights_of(output), weights_of(whole))


@pytest.mark.parametrize("event", ["open .cllm-export.unfinished", "os.rename state"])
def test_a_run_killed_when_it_was_done_is_only_finished(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path, event: str
):
    at = moment(whole, event, -1)
    output = tmp_path / "out"
    assert kill(llama, prompts, output, at, *SIX_STEPS, log=tmp_path / "log").code == -signal.SIGKILL
    if not output.exists():
        resume(cli, llama, prompts, output)
    assert_same_weights(weights_of(output), weights_of(whole))
    assert [entry["step"] for entry in report_of(output)["curve"]] == [0, 3, 6]


def test_a_run_that_patience_stopped_does_not_go_on_when_it_is_resumed(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path
):
    options = (*FEW, "--steps", 10, "--learning-rate", 0, "--patience", 2)
    at = moment(whole, "open .cllm-export.unfinished", -1)
    assert kill(llama, prompts, tmp_path / "out", at, *options, log=tmp_path / "log").code == -signal.SIGKILL
    assert cli(*arguments(llama, prompts, tmp_path / "out", *options, "--resume")).code == 0
    assert report_of(tmp_path / "out")["steps"] == 2


@pytest.fixture
def interrupted(llama: Path, prompts: Path, whole: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed at its second save."""
    at = moment(whole, "os.rename state", 0)
    assert kill(llama, prompts, tmp_path / "out", at, *SIX_STEPS, log=tmp_path / "log").code == -signal.SIGKILL
    return tmp_path / "out"


def test_the_last_good_checkpoint_of_an_interrupted_run_loads(interrupted: Path):
    model = load_checkpoint(interrupted.with_name("out.tuning") / "checkpoint")
    assert model.generate("the cat", max_new_tokens=4).token_ids


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        (("--learning-rate", 0.5), ["--learning-rate 0.001, not 0.5"]),
        (("--seed", 3, "--steps", 7), ["seed 0, not 3", "steps 6, not 7"]),
        (("--lora-rank", 2), ["lora None"]),
        (("--num-held-out", 7), ["another set of samples and another held-out set"]),
        (("--limit", 30), ["another set of samples"]),
    ],
)
def test_a_resume_with_other_settings_is_refused_by_their_names(
    cli: Cli, llama: Path, prompts: Path, interrupted: Path, options: tuple[object, ...], phrases: list[str]
):
    state = interrupted.with_name("out.tuning") / "state"
    before = snapshot(state)
    assert_refused(cli(*arguments(llama, prompts, interrupted, *SIX_STEPS, *options, "--resume")), *phrases)
    assert snapshot(state) == before


def test_a_resume_from_another_checkpoint_is_refused(cli: Cli, workshop: Workshop, prompts: Path, interrupted: Path):
    other = workshop.new_checkpoint("other-seed", Variant(seed=5))
    outcome = cli(*arguments(other, prompts, interrupted, *SIX_STEPS, "--resume"))
    assert_refused(outcome, "another checkpoint", "resume it with that")


def test_an_interrupted_run_is_neither_lost_nor_taken_for_one_that_never_was(
    cli: Cli, llama: Path, prompts: Path, whole: Path, interrupted: Path
):
    before = snapshot(interrupted.parent)
    assert_refused(cli(*arguments(llama, prompts, interrupted, *SIX_STEPS)), "interrupted run", "--resume", "--force")
    assert snapshot(interrupted.parent) == before
    assert cli(*arguments(llama, prompts, interrupted, *SIX_STEPS, "--force")).code == 0
    assert_same_weights(weights_of(interrupted), weights_of(whole))


def test_a_damaged_state_is_refused(cli: Cli, llama: Path, prompts: Path, interrupted: Path):
    (interrupted.with_name("out.tuning") / "state" / "optimizer.bin").write_bytes(b"half")
    outcome = cli(*arguments(llama, prompts, interrupted, *SIX_STEPS, "--resume"))
    assert_refused(outcome, "is damaged", "start over with --force")


def test_two_runs_do_not_share_a_working_directory(cli: Cli, llama: Path, prompts: Path, interrupted: Path):
    import fcntl

    work = os.open(interrupted.with_name("out.tuning"), os.O_RDONLY)
    fcntl.flock(work, fcntl.LOCK_EX)
    try:
        outcome = cli(*arguments(llama, prompts, interrupted, *SIX_STEPS, "--resume"))
        assert_refused(outcome, "another run is at work")
    finally:
        os.close(work)


@pytest.mark.parametrize("left", ["nothing", "settings"])
def test_a_resume_with_nothing_to_resume_says_so_and_a_start_is_then_allowed(
    cli: Cli, llama: Path, prompts: Path, whole: Path, tmp_path: Path, left: str
):
    """A run that was killed before its first save left nothing worth keeping."""
    output = tmp_path / "out"
    if left == "settings":
        at = moment(whole, "open state.new/pool_0.json", 0)
        assert kill(llama, prompts, output, at, *SIX_STEPS, log=tmp_path / "log").code == -signal.SIGKILL
    outcome = cli(*arguments(llama, prompts, output, *SIX_STEPS, "--resume"))
    assert_refused(outcome, "there is no run to resume", "start without --resume")
    assert cli(*arguments(llama, prompts, output, *SIX_STEPS)).code == 0


# Outputs


def test_an_output_is_replaced_only_with_force_and_only_if_it_is_ours(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path
):
    output = tmp_path / "out"
    assert cli(*arguments(llama, prompts, output, *FEW, "--steps", 1)).code == 0
    before = snapshot(output)
    assert_refused(cli(*arguments(llama, prompts, output, *FEW, "--steps", 1)), "exists", "--force")
    assert snapshot(output) == before
    assert cli(*arguments(llama, prompts, output, *FEW, "--steps", 2, "--force")).code == 0
    assert report_of(output)["steps"] == 2
    (output / "tuning.json").unlink()
    outcome = cli(*arguments(llama, prompts, output, *FEW, "--steps", 1, "--force"))
    assert_refused(outcome, "will not be replaced", "choose another --output")


def test_a_directory_of_the_users_own_is_never_worked_in(cli: Cli, llama: Path, prompts: Path, tmp_path: Path):
    (tmp_path / "out.tuning").mkdir()
    (tmp_path / "out.tuning" / "thesis.tex").write_text("years of work")
    for force in ((), ("--force",)):
        outcome = cli(*arguments(llama, prompts, tmp_path / "out", *FEW, "--steps", 1, *force))
        assert_refused(outcome, "out.tuning", "is no run's", "move it")
    assert (tmp_path / "out.tuning" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", [".", "..", "/", "a-file/out"])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("in the way")
    before = snapshot(tmp_path)
    outcome = cli(*arguments(llama, prompts, Path(place), *FEW, "--steps", 1))
    assert_refused(outcome)
    assert snapshot(tmp_path) == before


def test_a_parent_may_be_tuned_in_place_again(cli: Cli, llama: Path, prompts: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert cli(*arguments(llama, prompts, output, *FEW, "--steps", 1)).code == 0
    outcome = cli(*arguments(output, prompts, output, *FEW, "--steps", 1, "--force"))
    assert outcome.code == 0, outcome
    assert open_checkpoint(output).trained_with is not None


# What goes wrong


def test_a_learning_rate_out_of_all_measure_stops_the_run_and_keeps_the_last_good_checkpoint(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path
):
    options = (*FEW, "--learning-rate", 1e30, "--steps", 40)
    outcome = cli(*arguments(llama, prompts, tmp_path / "out", *options))
    kept = tmp_path / "out.tuning" / "checkpoint"
    assert_refused(outcome, "at step", "sample 'q", "the last good checkpoint", str(kept), "lower the learning rate")
    assert not (tmp_path / "out").exists()
    assert load_checkpoint(kept).generate("the cat", max_new_tokens=4).token_ids
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(kept).values())


def spoil(parent: Path, target: Path, token: int, value: float) -> Path:
    """A copy of a checkpoint whose embedding of one token is not finite."""
    shutil.copytree(parent, target)
    table = weights_of(parent)["model.embed_tokens.weight"].clone()
    table[token] = value
    edit_weights(target, **{"model.embed_tokens.weight": table})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_breaks_the_loss_is_named(
    cli: Cli, workshop: Workshop, prompts: Path, tmp_path: Path, value: float
):
    """Untied, so that only the sample with that token meets its embedding."""
    variant = Variant(tied=False, num_layers=1)
    parent = workshop.new_checkpoint("untied", variant)
    token = load_checkpoint(parent).encode("z")[-1]
    broken = spoil(parent, tmp_path / "broken", token, value)
    lines = [*questions(30), {"id": "the culprit", "prompt": "z", "answer": "a b"}]
    held_out = write_prompts(tmp_path / "h.jsonl", questions(4, seed=9))
    given = write_prompts(tmp_path / "p.jsonl", lines)
    outcome = cli(*arguments(broken, given, tmp_path / "out", *FEW, "--steps", 40, "--held-out", held_out))
    assert_refused(outcome, "the loss is nan", "first at sample 'the culprit'", "the last good checkpoint, of step")
    assert open_checkpoint(tmp_path / "out.tuning" / "checkpoint")


def test_a_checkpoint_that_is_broken_from_the_start_is_not_blamed_on_training(
    cli: Cli, llama: Path, prompts: Path, tmp_path: Path
):
    broken = spoil(llama, tmp_path / "broken", PAD + 1, math.nan)
    outcome = cli(*arguments(broken, prompts, tmp_path / "out", *FEW, "--steps", 2))
    assert_refused(outcome, "before any training", "the checkpoint or that sample is broken")


def test_collapse_into_repetition_stops_the_run_and_keeps_the_checkpoint_before_it(
    cli: Cli, llama: Path, tmp_path: Path
):
    """The parent's outputs are as varied as its weights are random; what it is taught is one word, again and again."""
    lines = [{"prompt": entry["prompt"], "answer": " the" * 40} for entry in questions()]
    given = write_prompts(tmp_path / "p.jsonl", lines)
    output = tmp_path / "out"
    options = ("--objective", "autoregressive", "--learning-rate", 0.01, "--steps", 60)
    outcome = cli(*arguments(llama, given, output, *FEW, *options))
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.err
    assert "collapsed into repetition" in outcome.out
    report = report_of(output)
    assert report["stopped"] == "collapse"
    assert report["curve"][0]["repetitive"] == 0
    assert report["curve"][-1]["repetitive"] > 0.2 >= report["curve"][-2]["repetitive"]
    model = load_checkpoint(output)
    texts = [model.generate(entry["prompt"], max_new_tokens=40).token_ids for entry in questions()[-6:]]
    assert sum(len(set(ids)) > 2 for ids in texts) >= 4, "what was published had not collapsed"


def test_prompts_that_are_of_no_use_are_counted_and_reported(cli: Cli, llama: Path, tmp_path: Path):
    useless = [
        {"prompt": "", "answer": "x"},
        {"prompt": "word " * 300, "answer": "x"},
        {"prompt": "no answer"},
    ]
    given = write_prompts(tmp_path / "p.jsonl", [*useless, *questions(20)])
    held_out = write_prompts(tmp_path / "h.jsonl", [*questions(3), {"prompt": "", "answer": "x"}])
    outcome = cli(*arguments(llama, given, tmp_path / "out", *FEW, "--steps", 1, "--held-out", held_out))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome
    text = " ".join(outcome.out.split())
    for phrase in ("20 samples", "empty prompt 1", "too long 1", "no answer 1"):
        assert phrase in text
    assert "empty prompt (held out) 1" in text


@pytest.mark.parametrize(
    ("lines", "options", "phrases"),
    [
        (questions(5), (), ["0 samples are left to train on", "5 to measure on", "--num-held-out"]),
        ([{"prompt": "", "answer": "x"}] * 3, (), ["0 samples", "3 empty prompt"]),
        (questions(5), ("--limit", 0), ["--limit"]),
        (questions(5), ("--num-held-out", 0), ["--num-held-out", "got 0"]),
    ],
)
def test_nothing_to_train_on_is_an_error_that_says_why(cli: Cli, llama: Path, tmp_path: Path, lines, options, phrases):
    given = write_prompts(tmp_path / "p.jsonl", lines)
    assert_refused(cli(*arguments(llama, given, tmp_path / "out", *FEW, "--steps", 1, *options)), *phrases)
    assert not (tmp_path / "out.tuning").exists()


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ((), "either --steps or --minutes"),
        (("--steps", 1, "--minutes", 1), "either --steps or --minutes"),
        (("--minutes", "nan"), "minutes must be"),
        (("--steps", 1, "--learning-rate", "nan"), "--learning-rate must be"),
        (("--steps", 1, "--decay", 2), "--decay must be"),
        (("--steps", 1, "--patience", 0), "patience must be"),
        (("--steps", 1, "--seed", -1), "seed must be"),
        (("--steps", 1, "--threads", 0), "threads must be"),
        (("--steps", 1, "--lora-alpha", 3), "--lora-alpha needs --lora-rank"),
        (("--steps", 1, "--lora-rank", 2, "--lora-alpha", 0), "--lora-alpha must be"),
        (("--steps", 1, "--mixed-precision", "fp16"), "fp16 needs a GPU"),
        (("--steps", 1, "--max-length", 100000), "100000"),
        (("--steps", 1, "--block-size", 1), "--block-size must be"),
        (("--steps", 1, "--block-size", 5000), "smaller --block-size"),
    ],
)
def test_options_that_make_no_sense_are_refused(cli: Cli, llama: Path, prompts: Path, tmp_path: Path, options, phrase):
    kept = [part for part in FEW if "--block-size" not in options or part not in ("--block-size", 8)]
    assert_refused(cli(*arguments(llama, prompts, tmp_path / "out", *kept, *options)), phrase)
    assert not (tmp_path / "out").exists()


def test_too_few_samples_for_the_library_call_is_an_error(llama: Path, tmp_path: Path):
    sample = Sample(id="a", tokens=(5, 6, EOS), num_prompt=1)
    for samples, held_out in (([], [sample]), ([sample], [])):
        with pytest.raises(TuningError, match="needs a held-out set and samples"):
            tune(llama, tmp_path / "out", samples, held_out, TuneOptions(steps=1))


# A full disk


def test_a_full_disk_keeps_the_earlier_state_whole(
    cli: Cli, llama: Path, prompts: Path, whole: Path, interrupted: Path, tmp_path: Path
):
    """Any file above a limit cannot be written, as on a disk with too little room for it."""
    work = interrupted.with_name("out.tuning")
    resumed = arguments(llama, prompts, interrupted, *SIX_STEPS, "--resume")
    outcome = run(Orders(arguments=resumed, log=tmp_path / "full", largest_file=100_000))
    assert_refused(outcome, f"cannot write to {work}", "what was saved before is whole", "go on with --resume")
    assert not list(work.glob("*.new")), "what was half written gives its room back"
    resume(cli, llama, prompts, interrupted)
    assert_same_weights(weights_of(interrupted), weights_of(whole))


@pytest.mark.parametrize("leaving", [0, 30_000, 500_000])
def test_a_disk_that_fills_up_is_named(cli: Cli, llama: Path, prompts: Path, mounted: Path, leaving: int):  # noqa: F811
    """No room for anything, for the first state, and for what replaces it."""
    proposer(mounted, leaving=leaving)
    outcome = cli(*arguments(llama, prompts, mounted / "out", *FEW, "--steps", 3))
    assert_refused(outcome, "cannot write to", str(mounted / "out.tuning"))
    assert not (mounted / "out").exists()


# Answers that the model gives first, and trajectories


ENDING = "qwen2"
"""The variant whose answers end: it has many end-of-sequence ids."""


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"id": str(index), "prompt": entry["prompt"]} for index, entry in enumerate(questions(60, seed=4))]
    return write_prompts(tmp_path_factory.mktemp("unanswered") / "prompts.jsonl", lines)


@pytest.mark.parametrize("objective", ["packed", "global", "local"])
def test_prompts_without_answers_are_answered_by_the_model_first(
    cli: Cli, workshop: Workshop, unanswered: Path, tmp_path: Path, objective: str
):
    output = tmp_path / "out"
    options = (*FEW, "--steps", 2, "--max-length", 80, "--objective", objective)
    outcome = cli(*arguments(workshop.checkpoint(ENDING), unanswered, output, *options))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome
    collections = list((tmp_path / "out.trajectories").iterdir())
    assert len(collections) == 1
    assert report_of(output)["curve"][0]["exact_match"] == 1.0, "its own answers, before it learnt anything"


def test_a_run_interrupted_while_the_model_answers_goes_on_with_what_it_has(
    cli: Cli, workshop: Workshop, unanswered: Path, tmp_path: Path
):
    """Killed in the collection: there is no state yet, so it is started again, and finds the collection."""
    options = (*FEW, "--steps", 2, "--max-length", 80)
    parent = workshop.checkpoint(ENDING)
    place = tmp_path / "out.trajectories"
    orders = Orders(
        arguments=arguments(parent, unanswered, tmp_path / "out", *options),
        log=tmp_path / "log",
        watched=place,
        kill_at=5,
    )
    assert run(orders).code == -signal.SIGKILL
    assert place.exists()
    assert not (tmp_path / "out.tuning").exists()
    assert cli(*orders.arguments).code == 0
    assert cli(*arguments(parent, unanswered, tmp_path / "whole", *options)).code == 0
    assert_same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole"))


def test_two_files_of_one_name_are_answered_apart(cli: Cli, workshop: Workshop, unanswered: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    lines = [{"prompt": entry["prompt"]} for entry in questions(20, seed=8)]
    held_out = write_prompts(tmp_path / "other" / unanswered.name, lines)
    options = (*FEW, "--steps", 1, "--max-length", 80, "--held-out", held_out)
    outcome = cli(*arguments(workshop.checkpoint(ENDING), unanswered, tmp_path / "out", *options))
    assert outcome.code == 0, outcome
    assert len(list((tmp_path / "out.trajectories").iterdir())) == 2


@pytest.fixture(scope="module")
def trajectories(workshop: Workshop, unanswered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cllm_export.training.collection.collect import collect
    from cllm_export.training.collection.options import CollectOptions
    from cllm_export.training.collection.source import open_source

    output = tmp_path_factory.mktemp("collected") / "trajectories"
    collect(open_source(workshop.checkpoint(ENDING)), unanswered, output, CollectOptions(max_new_tokens=60))
    return output


def test_trajectories_are_trained_on_instead_of_answers(
    cli: Cli, workshop: Workshop, unanswered: Path, trajectories: Path, tmp_path: Path
):
    options = (*FEW, "--steps", 2, "--trajectories", trajectories, "--objective", "global", "--limit", 40)
    outcome = cli(*arguments(workshop.checkpoint(ENDING), unanswered, tmp_path / "out", *options))
    assert (outcome.code, outcome.complaints) == (0, ""), outcome
    assert not (tmp_path / "out.trajectories").exists()


def test_trajectories_of_something_else_are_refused(
    cli: Cli, workshop: Workshop, prompts: Path, unanswered: Path, trajectories: Path, tmp_path: Path
):
    def attempt(parent: Path, given: Path) -> Outcome:
        options = (*FEW, "--steps", 1, "--trajectories", trajectories)
        return cli(*arguments(parent, given, tmp_path / "out", *options))

    parent = workshop.checkpoint(ENDING)
    assert_refused(attempt(workshop.checkpoint("llama"), unanswered), "trajectories of another model", "collect")
    assert_refused(attempt(parent, prompts), "trajectories of other prompts", str(prompts))
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(raw, indent=1))
    assert_refused(attempt(other, unanswered), "trajectories of another tokenizer")
    outcome = cli(*arguments(parent, unanswered, tmp_path / "out", *FEW, "--steps", 1, "--trajectories", tmp_path))
    assert_refused(outcome, "is not a collection of trajectories")
    assert not (tmp_path / "out.tuning").exists()


# Several processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def two(given: list[str], tmp_path: Path, *, changes: Mapping[str, str] | None = None, **orders: Any) -> list[Outcome]:
    """A run of two processes on this machine, with the environment that a launcher gives them."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        **(changes or {}),
    }
    return run_together(
        [
            Orders(
                arguments=given,
                log=tmp_path / f"rank-{rank}",
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{name: value(rank) for name, value in orders.items()},
            )
            for rank in range(2)
        ]
    )


def launched_environment(config: Path) -> dict[str, str]:
    """What ``accelerate launch`` tells its processes of a configuration file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args(["--config_file", str(config), "-m", "cllm_export"])
    told = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def test_two_processes_tune_one_model_with_samples_of_their_own(llama: Path, prompts: Path, tmp_path: Path):
    output, work = tmp_path / "out", tmp_path / "out.tuning"
    given = arguments(llama, prompts, output, *SIX_STEPS)
    outcomes = two(given, tmp_path, weights=lambda rank: tmp_path / f"weights-{rank}.pt")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert [outcome.complaints for outcome in outcomes] == ["", ""]
    assert f"wrote {output}" in outcomes[0].out
    assert outcomes[1].out == "", "the first process speaks for all"
    assert report_of(output)["samples_seen"] == 2 * 6 * 4
    own = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    assert_same_weights(own[0], own[1])
    published = weights_of(output)
    assert_same_weights({name: own[0][f"decoder.{name}"] for name in published}, published)
    assert not work.joinpath("state").exists()


def assert_killed_and_resumed(llama: Path, prompts: Path, tmp_path: Path, **options: Any) -> None:
    """Killed at the second save and resumed, two processes give the weights that they gave without."""
    output, work = tmp_path / "out", tmp_path / "out.tuning"
    given = arguments(llama, prompts, output, *SIX_STEPS)
    outcomes = two(given, tmp_path, watched=lambda _: work, **options)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    expected = weights_of(output)
    events = (tmp_path / "rank-0.events").read_text().splitlines()
    at = events.index("os.rename state")
    for path in (output, work):
        shutil.rmtree(path)
    two(given, tmp_path, watched=lambda _: work, kill_at=lambda rank: None if rank else at, **options)
    pools = [json.loads((work / "state" / f"pool_{rank}.json").read_text()) for rank in range(2)]
    seen = [{entry["index"] % 2 for entry in pool["entries"]} for pool in pools]
    assert seen == [{0}, {1}], "every other sample is the other's"
    outcomes = two([*given, "--resume"], tmp_path, **options)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert_same_weights(weights_of(output), expected)


def test_two_processes_killed_and_resumed_give_the_weights_of_a_run_that_was_not(
    llama: Path, prompts: Path, tmp_path: Path
):
    assert_killed_and_resumed(llama, prompts, tmp_path)


def test_an_error_of_one_process_is_told_once_and_ends_both(llama: Path, prompts: Path, interrupted: Path, tmp_path):
    """Saved by one process, a state is not for two."""
    outcomes = two(arguments(llama, prompts, interrupted, *SIX_STEPS, "--resume"), tmp_path)
    assert_refused(outcomes[0], "another number of processes")
    assert outcomes[1] == Outcome(2, "", "")


def test_the_sample_that_breaks_one_process_is_named_by_the_first(workshop: Workshop, tmp_path: Path):
    parent = workshop.new_checkpoint("untied-too", Variant(tied=False, num_layers=1))
    broken = spoil(parent, tmp_path / "broken", load_checkpoint(parent).encode("z")[-1], math.nan)
    lines = questions(20)
    lines[3] = {"id": "the culprit", "prompt": "z", "answer": "a b"}  # an odd one: the second process's
    given = write_prompts(tmp_path / "p.jsonl", lines)
    outcomes = two(arguments(broken, given, tmp_path / "out", *FEW, "--steps", 40), tmp_path)
    assert_refused(outcomes[0], "the loss is nan", "first at sample 'the culprit'")
    assert outcomes[1] == Outcome(2, "", "")


def test_a_process_that_loses_the_other_says_so(llama: Path, prompts: Path, whole: Path, tmp_path: Path):
    at = moment(whole, "os.rename state", 0)
    given = arguments(llama, prompts, tmp_path / "out", *SIX_STEPS)
    work = tmp_path / "out.tuning"
    outcomes = two(given, tmp_path, watched=lambda _: work, kill_at=lambda rank: None if rank else at)
    assert outcomes[0].code == -signal.SIGKILL
    assert_refused(outcomes[1], "another process of the run is gone", "--resume")


def sharding() -> dict[str, Any]:
    """The environment of the configuration for many GPUs. accelerate shards on accelerators alone, and is told that
    these CPUs are some; the sharding is PyTorch's own."""
    changes = launched_environment(ROOT / "examples" / "accelerate" / "fsdp.yaml")
    return {"changes": changes, "accelerator": lambda _: True}


def test_sharded_over_two_processes_a_model_is_tuned_as_in_two_copies(llama: Path, prompts: Path, tmp_path: Path):
    """Without windows, whose states one tie could change. Sums over shards round in another order, which Adam, whose
    steps are of one size whatever the gradient's, may turn into 1e-4 of a weight where a gradient is about zero.
    """
    options = (*SIX_STEPS, "--objective", "autoregressive")
    for name in ("copies", "sharded"):
        given = arguments(llama, prompts, tmp_path / name, *options)
        outcomes = two(given, tmp_path, **(sharding() if name == "sharded" else {}))
        assert [(outcome.code, outcome.complaints) for outcome in outcomes] == [(0, "")] * 2, outcomes
    copies, sharded = weights_of(tmp_path / "copies"), weights_of(tmp_path / "sharded")
    for name, tensor in copies.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=1e-4)
        assert (sharded[name] - tensor).abs().mean() < 1e-6, name
    losses = [[entry["loss"] for entry in report_of(tmp_path / n)["curve"][1:]] for n in ("copies", "sharded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_sharded_run_killed_and_resumed_gives_the_weights_of_one_that_was_not(
    llama: Path, prompts: Path, tmp_path: Path
):
    assert_killed_and_resumed(llama, prompts, tmp_path, **sharding())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--mixed-precision", "bf16", "--gradient-accumulation", 2, "--minutes", 0.01),
        ("--lora-rank", 2, "--gradient-checkpointing", "--steps", 2),
    ],
    ids=["bf16, minutes", "lora"],
)
def test_a_sharded_run_takes_the_other_options(llama: Path, prompts: Path, tmp_path: Path, options: tuple[object, ...]):
    outcomes = two(arguments(llama, prompts, tmp_path / "out", *FEW, *options), tmp_path, **sharding())
    assert [(outcome.code, outcome.complaints) for outcome in outcomes] == [(0, "")] * 2, outcomes
    assert load_checkpoint(tmp_path / "out").generate("the cat", max_new_tokens=4).token_ids


def test_muon_is_refused_where_matrices_are_in_shards(llama: Path, prompts: Path, tmp_path: Path):
    changes = launched_environment(ROOT / "examples" / "accelerate" / "fsdp.yaml")
    given = arguments(llama, prompts, tmp_path / "out", *FEW, "--steps", 1, "--optimizer", "muon")
    outcomes = two(given, tmp_path, changes=changes, accelerator=lambda _: True)
    assert_refused(outcomes[0], "muon needs whole matrices", "--optimizer adamw")


def test_the_configurations_of_the_examples_are_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    found = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "examples" / "accelerate").glob("*.yaml")}
    assert {name: config.distributed_type for name, config in found.items()} == {
        "fsdp": DistributedType.FSDP,
        "two_processes": DistributedType.MULTI_GPU,
    }
    assert launched_environment(ROOT / "examples" / "accelerate" / "fsdp.yaml")["FSDP_VERSION"] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_launcher_starts_two_processes(llama: Path, prompts: Path, tmp_path: Path, launcher: str):
    config = ROOT / "examples" / "accelerate" / "two_processes.yaml"
    commands = {
        "accelerate": ["accelerate.commands.launch", "--config_file", str(config)],
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    }
    given = arguments(llama, prompts, tmp_path / "out", *FEW, "--steps", 2)
    done = subprocess.run(
        [sys.executable, "-m", *commands[launcher], "-m", "cllm_export", *given],
        env=environment() | {"MASTER_PORT": str(free_port())},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert report_of(tmp_path / "out")["samples_seen"] == 2 * 2 * 4
