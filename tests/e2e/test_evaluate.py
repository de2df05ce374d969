"""``cllm-export evaluate``, on sound input and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.manifest import PROPOSERS
from cllm_export.bundle.storage import write_json
from cllm_export.errors import OutputError
from cllm_export.evaluation import probe
from cllm_export.extras import install_line
from cllm_export.runtime.decoding.block_size.measured_times import settle_times
from tests.conftest import PINNED, Workshop
from tests.e2e.conftest import Cli, assert_refused, run_process
from tests.e2e.test_missing_extras import without
from tests.evaluation_data import GSM8K, HUMANEVAL, write_lines, write_spider

FEW = ("--max-new-tokens", 6, "--threads", 1)
PROMPTS: list[dict[str, Any]] = [
    {"id": "first", "prompt": "the cat sat", "answer": "on the mat", "kind": "cats"},
    {"prompt": ""},
    {"prompt": "x" * 5000},
    {"messages": [{"role": "user", "content": "hi"}], "answer": "hello"},
]
TRAIN_INSTALL = install_line("train")


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Path:
    """A bundle with a chat template, trained with n = 8, proposer repeat and the sliding loop."""
    return workshop.bundle("llama").path


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


def test_a_prompt_file_gives_scores_measures_and_what_was_skipped(bundle: Path, prompt_file: Path, tmp_path: Path):
    output = tmp_path / "report.json"
    outcome = run_process(
        "evaluate", bundle, "--task", "prompts", "--data", prompt_file, "--output", output, *FEW, check=True
    )
    assert outcome.complaints == ""
    report = json.loads(output.read_text(encoding="utf-8"))
    entry = report["models"]["model"]
    assert report["settings"] == {"method": "jacobi", "block_size": 8, "proposer": "repeat", "max_new_tokens": 6}
    assert (entry["prompts"], entry["decoded"], entry["skipped"]) == (4, 2, {"empty": 1, "too_long": 1})
    assert entry["decoding"]["exact"] == {"equal": 2, "of": 2}
    assert entry["decoding"]["new_tokens"] >= entry["decoding"]["forwards"]
    assert [answer["id"] for answer in entry["answers"]] == ["first", "4"]
    assert entry["scores"]["all"]["exact_match"]["of"] == 2
    assert entry["scores"]["groups"]["kind cats"]["exact_match"]["of"] == 1
    for line in ("2 of 4", "empty 1, too_long 1", "tokens per forward", "2 of 2"):
        assert line in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "report.json"]


def test_a_checkpoint_gives_what_its_bundle_does(
    workshop: Workshop, bundle: Path, prompt_file: Path, tmp_path: Path, cli: Cli
):
    """The loop, the tokens and the measures are the same: only what runs a forward differs."""
    output = tmp_path / "report.json"
    arguments = ("--task", "prompts", "--data", prompt_file, "--output", output, *FEW)
    assert cli("evaluate", bundle, *arguments, "--parent", workshop.checkpoint("llama")).code == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    models, compared = report["models"], report["compared"]
    assert compared["same_text"] == {"equal": 2, "of": 2} and compared["general_agreement"]["share"] > 0.99  # near ties
    assert models["model"]["general_perplexity"] == pytest.approx(models["parent"]["general_perplexity"], rel=1e-3)
    assert [entry["kind"] for entry in models.values()] == ["bundle", "checkpoint"]
    for key in ("answers", "decoding", "skipped", "scores"):
        assert models["model"][key] == models["parent"][key]


def test_every_public_task_runs(workshop: Workshop, bundle: Path, tmp_path: Path, cli: Cli):
    """As text for the demo, which takes long prompts, and as messages for a model with a chat template."""
    demo = workshop.bundle("demo").path
    for path, task, data, *extra in (
        (demo, "spider", write_spider(tmp_path)),
        (bundle, "gsm8k", write_lines(tmp_path / "gsm8k.jsonl", GSM8K)),
        (demo, "humaneval", write_lines(tmp_path / "humaneval.jsonl", HUMANEVAL), "--allow-code-execution"),
    ):
        outcome = cli("evaluate", path, "--task", task, "--data", data, "--limit", 2, *extra, *FEW)
        assert outcome.code == 0, outcome
        assert "0.0%" in outcome.out


def test_options_reach_the_loop(bundle: Path, prompt_file: Path, cli: Cli):
    given = ("--method", "jacobi-block", "--block-size", 4, "--proposer", "prompt")
    outcome = cli("evaluate", bundle, "--task", "prompts", "--data", prompt_file, *given, *FEW)
    assert "method jacobi-block, block_size 4, proposer prompt, max_new_tokens 6" in outcome.out


def let_forwards_take(monkeypatch: pytest.MonkeyPatch, *rounds: dict[int, float]) -> None:
    """Let the probe measure these times: seconds of a forward by n, for each round."""
    times = settle_times({size: [each[size] for each in rounds] for size in rounds[0]})
    monkeypatch.setattr(probe, "time_in_turn", lambda *_, **__: [times])


def test_the_probe_tells_what_to_expect_of_a_checkpoint(
    workshop: Workshop, prompt_file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "report.json"
    let_forwards_take(monkeypatch, {1: 1.0, 4: 1.1, 8: 1.3, 16: 2.0, 32: 4.0})
    outcome = cli("evaluate", workshop.checkpoint("small"), "--probe", "--data", prompt_file, "--output", output, *FEW)
    assert outcome.code == 0, outcome
    assert "a product of two measurements" in outcome.out
    report = json.loads(output.read_text(encoding="utf-8"))
    assert [size["block_size"] for size in report["sizes"]] == [1, 4, 8, 16, 32]
    assert len(report["forms"]) == 2 * len(PROPOSERS)
    for size in report["sizes"]:
        expected = size["tokens_per_forward"] / size["relative_time"]
        assert size["expected_speedup"] == pytest.approx(expected, rel=0.01)


def test_an_untuned_model_gains_nothing_from_a_forward_of_four_tokens_that_was_timed_as_half_of_one(
    bundle: Path, prompt_file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "report.json"
    let_forwards_take(monkeypatch, {1: 1.0, 4: 0.53, 8: 1.5, 16: 2.0, 32: 4.0})
    cli("evaluate", bundle, "--probe", "--data", prompt_file, "--output", output, *FEW)
    report = json.loads(output.read_text(encoding="utf-8"))
    [four] = (size for size in report["sizes"] if size["block_size"] == 4)
    assert four["relative_time"] == 1
    assert four["expected_speedup"] == four["tokens_per_forward"]


def test_the_probe_says_when_the_machine_is_too_busy_to_tell(
    bundle: Path, prompt_file: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    slow = {1: 1.0, 4: 3.0, 8: 4.0, 16: 5.0, 32: 8.0}
    let_forwards_take(monkeypatch, *[slow | {1: each} for each in (1.0, 3.0, 1.0, 3.0)])
    outcome = cli("evaluate", bundle, "--probe", "--data", prompt_file, *FEW)
    assert outcome.code == 1, outcome
    assert "unknown: machine busy: the machine is too busy to tell" in " ".join(outcome.out.split())


def test_the_probe_refuses_what_it_has_no_use_for(workshop: Workshop, bundle: Path, prompt_file: Path, cli: Cli):
    given = ("evaluate", bundle, "--probe", "--data", prompt_file)
    assert_refused(cli(*given, "--task", "prompts"), "--task is not for --probe")
    assert_refused(cli(*given, "--parent", bundle), "--parent is not for --probe")
    assert_refused(cli(*given, "--block-size", 4), "--block-size is not for --probe")
    pinned = workshop.bundle("llama", **PINNED).path
    assert_refused(cli("evaluate", pinned, "--probe", "--data", prompt_file), "--fixed-shapes")


@pytest.mark.parametrize(
    ("task", "content", "phrase"),
    [
        ("spider", b"", "holds no example"),
        ("spider", b"[]", "holds no example"),
        ("spider", b"{", "malformed JSON"),
        ("spider", b"[1]", "expected an object"),
        ("spider", b"\x1f\x8b\x08broken", "damaged gzip"),
        ("spider", b"\xff\xfe", "not UTF-8"),
        ("gsm8k", b'{"question": "q"}', "lacks the text field(s) answer"),
        ("gsm8k", b'{"question": "q", "answer": "none"}', "ends with no number"),
        ("gsm8k", b'{"question": "q", "answer": "1"}\n{oops', ":2: malformed JSON"),
        ("gsm8k", b'{"question": "q", "query": "s", "db_id": "d"}', "--task spider"),
        ("prompts", b"", "holds no prompt"),
        ("prompts", b'{"question": "q"}', "needs a string `prompt`"),
        ("prompts", b'{"prompt": "q", "tables": [{}]}', "`tables`"),
        ("prompts", b'{"prompt": ""}', "none of 1 prompts can be decoded"),
    ],
)
def test_bad_data_is_refused_and_no_report_is_written(bundle: Path, tmp_path: Path, cli: Cli, task, content, phrase):
    data, output = tmp_path / "data.jsonl", tmp_path / "report.json"
    data.write_bytes(content)
    outcome = cli("evaluate", bundle, "--task", task, "--data", data, "--output", output, *FEW)
    assert_refused(outcome, phrase)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_truncated_gzip_is_refused(bundle: Path, tmp_path: Path, cli: Cli):
    data = tmp_path / "HumanEval.jsonl.gz"
    data.write_bytes(gzip.compress(json.dumps(HUMANEVAL[0]).encode())[:-12])
    given = ("--task", "humaneval", "--allow-code-execution", "--data", data)
    assert_refused(cli("evaluate", bundle, *given, *FEW), "damaged gzip")


def test_missing_things_are_refused(bundle: Path, prompt_file: Path, tmp_path: Path, cli: Cli):
    nowhere = tmp_path / "nowhere"
    prompts = ("--task", "prompts", "--data", prompt_file)
    assert_refused(cli("evaluate", bundle, "--task", "gsm8k", "--data", nowhere), "cannot read")
    assert_refused(cli("evaluate", bundle, "--task", "prompts", "--data", nowhere), "cannot read")
    assert_refused(cli("evaluate", nowhere, *prompts), "neither a bundle", "nor a checkpoint")
    assert_refused(cli("evaluate", bundle, *prompts, "--parent", nowhere), "neither a bundle")
    assert_refused(cli("evaluate", bundle, *prompts, "--output", nowhere / "report.json"), "cannot write")
    assert_refused(cli("evaluate", bundle, *prompts, "--output", tmp_path), "cannot write")
    assert_refused(cli("evaluate", bundle, "--data", prompt_file), "--task")
    spider = write_spider(tmp_path)
    (tmp_path / "tables.json").unlink()
    assert_refused(cli("evaluate", bundle, "--task", "spider", "--data", spider), "tables.json")


def test_options_that_do_not_fit_are_refused(bundle: Path, prompt_file: Path, tmp_path: Path, cli: Cli):
    prompts = ("evaluate", bundle, "--task", "prompts", "--data", prompt_file)
    assert "'jacobi-block'" in cli(*prompts, "--method", "autoregressive").err
    assert_refused(cli(*prompts, "--allow-code-execution"), "--task humaneval")
    assert_refused(cli(*prompts, "--block-size", 1000), "at most")
    assert_refused(cli(*prompts, "--block-size", 0), "--block-size must be")
    assert_refused(cli(*prompts, "--threads", 0), "threads")
    code = write_lines(tmp_path / "own.jsonl", HUMANEVAL)
    assert_refused(cli("evaluate", bundle, "--task", "humaneval", "--data", code), "--allow-code-execution")


def test_a_report_replaces_an_older_one_whole(tmp_path: Path):
    output = tmp_path / "report.json"
    output.write_text("old", encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(output, {"not": {"json"}})
    assert output.read_text(encoding="utf-8") == "old"
    with pytest.raises(OutputError, match="cannot write"):
        write_json(output / "below-a-file", {})
    write_json(output, {"new": 1})
    assert json.loads(output.read_text(encoding="utf-8")) == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_without_the_extras_each_thing_prints_its_install_line(
    workshop: Workshop, bundle: Path, prompt_file: Path, tmp_path: Path
):
    prompts = ("--task", "prompts", "--data", prompt_file, *FEW)
    lean = without("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "sqlglot")
    run_process("evaluate", bundle, *prompts, prelude=lean, check=True)
    checkpoint = workshop.checkpoint("llama")
    assert_refused(run_process("evaluate", checkpoint, *prompts, prelude=lean), TRAIN_INSTALL)
    assert_refused(run_process("evaluate", checkpoint, "--probe", "--data", prompt_file, prelude=lean), TRAIN_INSTALL)
    spider = ("--task", "spider", "--data", write_spider(tmp_path), *FEW)
    assert_refused(run_process("evaluate", bundle, *spider, prelude=lean), install_line("evaluate"))
