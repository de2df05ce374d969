"""Every command on sound input, each in a process of its own with pipes for its streams, as a script would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cllm_export import __version__, progress
from cllm_export.bundle.manifest import open_bundle
from tests.checkpoints import hub_snapshot
from tests.conftest import DEMO, PINNED, Workshop
from tests.e2e.conftest import Cli, Outcome, assert_refused, environment, run_process

LOOPS = ("autoregressive", "jacobi", "jacobi-block")
LOOP_KEYS = {"tokens_per_second", "tokens_per_forward", "forwards", "new_tokens", "speedup", "overhead"}
STATS_KEYS = {
    "prompt_tokens",
    "reused_tokens",
    "new_tokens",
    "forwards",
    "tokens_per_forward",
    "acceptance_histogram",
    "fast_forwarded",
    "stationary",
    "prefill_seconds",
    "decode_seconds",
    "engine_seconds",
}
PROMPTS = [
    {"id": "first", "prompt": "the cat sat", "answer": "on the mat"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
    {"prompt": "sélect 🙂 the name"},
]
ESCAPE = "\x1b"
FEW = ("--max-new-tokens", 6, "--threads", 1)


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Path:
    """A bundle with a chat template, trained with n = 8, proposer repeat and the sliding loop."""
    return workshop.bundle("llama").path


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in PROMPTS), encoding="utf-8")
    return path


def run(*arguments: object, stdin: bytes = b"") -> Outcome:
    """A run that must succeed and be plain: no escape sequence, and nothing on standard error."""
    outcome = run_process(*arguments, stdin=stdin, check=True)
    assert ESCAPE not in outcome.out + outcome.err
    assert outcome.complaints == ""
    return outcome


def lines_of(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_build_inspect_and_verify_hand_a_bundle_on_with_its_proof(
    workshop: Workshop, prompt_file: Path, tmp_path: Path
):
    path, checkpoint = tmp_path / "bundle", hub_snapshot(workshop.checkpoint("llama"), tmp_path / "models--llama")
    built = run_process("build", checkpoint, "--output", path, "--weights", "copy", check=True)
    assert ESCAPE not in built.out + built.err
    assert "predicted peak memory" in built.err, "a build says what it takes, a line at a time"
    bundle = open_bundle(path)
    assert str(path) in built.out
    assert bundle.fingerprint[:12] in built.out
    assert bundle.fingerprint == workshop.bundle("llama").fingerprint, "another process builds other bytes"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "models--llama", "prompts.jsonl"]

    described = json.loads(run("inspect", path, "--json").out)
    assert described["fingerprint"] == bundle.fingerprint
    assert "not verified" in described["parity"]
    assert described["trained_with"] == {"block_size": 8, "proposer": "repeat", "loop": "sliding"}
    memory = described["memory"]
    assert memory["kv_per_token"] == 2 * 2 * 2 * 16 * 4, "2 layers of keys and values, 2 heads of 16, 4 bytes"
    assert memory["kv_cache"] == memory["kv_per_token"] * bundle.manifest.geometry.cache_length
    parts = ("weights", "kv_cache", "activations", "prefix_cache")
    assert memory["total"] == sum(memory[part] for part in parts)

    verified = run("verify", path, "--checkpoint", checkpoint, "--prompts", prompt_file, *FEW)
    assert "FAIL" not in verified.out
    parity = json.loads((path / "parity.json").read_text())
    assert parity["passed"] is True
    assert parity["bundle_fingerprint"] == bundle.fingerprint
    assert "parity.json" not in bundle.manifest.files
    assert all(check["passed"] is not False for check in parity["checks"])
    described = json.loads(run("inspect", path, "--json").out)["parity"]
    assert described.startswith("verified; provider cpu on ")
    assert ", fp32, ONNX Runtime " in described
    assert parity["conditions"]["provider"] == "cpu"
    assert parity["exact_sizes"]["equal"] == [2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert "bit-equal to n = 1: 2, 4, 8, 12, 16, 24, 32, 48, 64" in described
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "models--llama", "prompts.jsonl"]


def test_a_bundle_is_as_readable_as_any_directory_its_maker_creates(cli: Cli, bundle: Path, tmp_path: Path):
    (tmp_path / "ordinary").mkdir()
    assert oct(bundle.stat().st_mode) == oct((tmp_path / "ordinary").stat().st_mode)


def test_a_prompt_streams_its_text(bundle: Path):
    text = run("generate", bundle, "the cat", *FEW).out
    [line] = lines_of(run("generate", bundle, "the cat", "--json", *FEW))
    assert text == line["text"] + "\n"


def test_generate_json_gives_a_line_for_each_prompt(bundle: Path, prompt_file: Path):
    lines = lines_of(run("generate", bundle, "--prompts", prompt_file, "--json", *FEW))
    assert [line["id"] for line in lines] == ["first", "2", "3"]
    for line in lines:
        assert line.keys() == {"id", "text", "token_ids", "finish_reason", "seed", "stats"}
        assert line["finish_reason"] == ("eos" if line["token_ids"][-1] == 2 else "length")
        assert line["stats"].keys() >= STATS_KEYS
        assert line["stats"]["new_tokens"] == len(line["token_ids"]) <= 6
        histogram = line["stats"]["acceptance_histogram"]
        assert sum(histogram.values()) == line["stats"]["forwards"]


@pytest.mark.parametrize("method", LOOPS)
def test_every_source_of_prompts_and_every_method_give_the_same_tokens(
    cli: Cli, bundle: Path, prompt_file: Path, method: str
):
    common = ("--json", "--method", method, "--block-size", 4, *FEW)
    from_file = lines_of(cli("generate", bundle, "--prompts", prompt_file, *common))
    from_stdin = lines_of(cli("generate", bundle, *common, stdin=prompt_file.read_bytes()))
    [from_argument] = lines_of(cli("generate", bundle, "the cat sat", *common))
    [from_text] = lines_of(cli("generate", bundle, *common, stdin=b"the cat sat"))
    [limited] = lines_of(cli("generate", bundle, "--prompts", prompt_file, "--limit", 1, *common))
    tokens = [line["token_ids"] for line in from_file]
    assert [line["token_ids"] for line in from_stdin] == tokens
    assert from_argument["token_ids"] == from_text["token_ids"] == limited["token_ids"] == tokens[0]
    baseline = lines_of(cli("generate", bundle, "--prompts", prompt_file, "--json", *FEW))
    assert [line["token_ids"] for line in baseline] == tokens


def test_a_prompt_on_standard_input_does_not_end_in_the_newline_that_echo_adds(cli: Cli, bundle: Path):
    with_newline = lines_of(cli("generate", bundle, "--json", *FEW, stdin=b"the cat sat\n"))
    without = lines_of(cli("generate", bundle, "--json", *FEW, stdin=b"the cat sat"))
    assert with_newline[0]["token_ids"] == without[0]["token_ids"]


def test_messages_are_rendered_with_the_chat_template_and_one_bos(cli: Cli, workshop: Workshop, bundle: Path):
    messages = [{"role": "user", "content": "hi"}]
    stdin = json.dumps({"messages": messages}).encode()
    [line] = lines_of(cli("generate", bundle, "--json", *FEW, stdin=stdin))
    codec = workshop.model("llama").codec
    rendered = codec.tokenizer.encode("<s>[user] hi\n[assistant] ", add_special_tokens=False).ids
    assert line["stats"]["prompt_tokens"] == len(rendered)
    assert line["token_ids"] == list(workshop.model("llama").generate(rendered, max_new_tokens=6).token_ids)


def test_a_row_passes_the_arguments_of_the_chat_template_on(cli: Cli, workshop: Workshop, bundle: Path, tmp_path: Path):
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}
    rows = {
        "[user] hi\n[assistant] ": {"messages": [user], "chat_template_kwargs": {"bos_token": ""}},
        "<s>[user] hi\n": {"messages": [user], "add_generation_prompt": False},
        "<s>[user] hi\n[assistant] so": {"messages": [user, answer], "continue_final_message": True, "tools": []},
    }
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    lines = lines_of(cli("generate", bundle, "--prompts", path, "--json", *FEW))
    model = workshop.model("llama")
    for line, text in zip(lines, rows, strict=True):
        ids = model.codec.encode_continuation(text)
        assert line["stats"]["prompt_tokens"] == len(ids)
        assert line["token_ids"] == list(model.generate(ids, max_new_tokens=6).token_ids)


def test_plain_prompt_files_hold_a_prompt_a_line(cli: Cli, bundle: Path, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\n\nthe mat\r\n", encoding="utf-8")
    lines = lines_of(cli("generate", bundle, "--prompts", path, "--json", *FEW))
    assert [line["id"] for line in lines] == ["1", "3"]
    for line, prompt in zip(lines, ("the cat", "the mat"), strict=True):
        assert lines_of(cli("generate", bundle, prompt, "--json", *FEW))[0]["token_ids"] == line["token_ids"]


def test_a_stop_string_cuts_text_and_reports_it(cli: Cli, bundle: Path):
    [whole] = lines_of(cli("generate", bundle, "the cat", "--json", *FEW))
    stop = whole["text"][2:4]
    [cut] = lines_of(cli("generate", bundle, "the cat", "--json", "--stop", stop, *FEW))
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].find(stop)]
    assert cli("generate", bundle, "the cat", "--stop", stop, *FEW).out == cut["text"] + "\n"


def test_a_grammar_that_cannot_be_matched_ends_generate_with_an_error_and_never_as_a_success(
    cli: Cli, bundle: Path, tmp_path: Path
):
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    assert_refused(cli("generate", bundle, "the cat", "--regex", r"[^\s\S]", *FEW), "--regex matches no text")
    (tmp_path / "dead.lark").write_text('start: "a" /[^\\s\\S]/', encoding="utf-8")
    grammar = ("--grammar", tmp_path / "dead.lark")
    dead = "--grammar leads to a dead end at new token 2"
    assert_refused(cli("generate", bundle, "the cat", "--json", *grammar, *FEW), dead)
    (tmp_path / "prompts.txt").write_text("the cat\nthe mat\n", encoding="utf-8")
    assert_refused(cli("generate", bundle, "--prompts", tmp_path / "prompts.txt", "--json", *grammar, *FEW), dead)


def test_statistics_go_to_standard_error_and_the_text_stays_clean(bundle: Path):
    outcome = run_process("generate", bundle, "the cat", "--stats", *FEW, check=True)
    assert outcome.out == run("generate", bundle, "the cat", *FEW).out
    assert ESCAPE not in outcome.err
    for word in ("tokens in", "forwards", "per forward", "fast-forwarded", "stationary", "prefill"):
        assert word in outcome.err


def test_a_prompts_state_is_saved_and_the_next_command_starts_with_it(bundle: Path, cli: Cli, tmp_path: Path):
    longer = "the cat sat on the mat"
    [plain] = lines_of(cli("generate", bundle, longer, "--json", *FEW))
    [first] = lines_of(cli("generate", bundle, "the cat sat", "--save-prefix", tmp_path / "prefix", "--json", *FEW))
    [line] = lines_of(cli("generate", bundle, longer, "--load-prefix", tmp_path / "prefix", "--json", *FEW))
    assert plain["stats"]["reused_tokens"] == first["stats"]["reused_tokens"] == 0
    assert line["stats"]["reused_tokens"] > 0
    assert line["token_ids"] == plain["token_ids"]
    outcome = cli("generate", bundle, longer, "--load-prefix", tmp_path / "prefix", "--stats", *FEW)
    assert "tokens reused)" in " ".join(outcome.err.split())
    again = ("generate", bundle, "the cat", "--save-prefix", tmp_path / "prefix", *FEW)
    assert_refused(cli(*again), "exists; replace it with --force or choose another --save-prefix")
    assert cli(*again, "--force").code == 0


def test_a_chat_keeps_the_turns_before(bundle: Path, cli: Cli):
    done = cli("chat", bundle, *FEW, "--deterministic", stdin="hi\nsélect\n/reset\nhi\n".encode())
    assert done.code == 0, done.err
    first, second, again = (line for line in done.err.splitlines() if "tokens in" in line)
    assert "reused" not in first and "tokens reused" in second
    first, _, again = done.out.splitlines()
    assert first == again


def test_a_chat_needs_a_template(cli: Cli, workshop: Workshop):
    assert_refused(cli("chat", workshop.bundle("demo").path, stdin=b"hi\n"), "has no chat template", "generate")


def test_a_prompts_state_is_refused_by_name(bundle: Path, cli: Cli, tmp_path: Path, prompt_file: Path):
    (tmp_path / "text").write_text("mine")
    outcome = cli("generate", bundle, "the cat", "--load-prefix", tmp_path / "text", *FEW)
    assert (outcome.code, outcome.out) == (2, "")
    assert "is no snapshot of a prompt" in " ".join(outcome.err.split())
    outcome = cli("generate", bundle, "the cat", "--save-prefix", tmp_path / "text", *FEW)
    assert (outcome.code, outcome.out) == (2, "")
    assert (tmp_path / "text").read_text() == "mine"
    outcome = cli("generate", bundle, "--prompts", prompt_file, "--save-prefix", tmp_path / "new", *FEW)
    assert outcome.code == 2
    assert "keeps the state of one prompt" in " ".join(outcome.err.split())


def test_show_blocks_gives_a_line_for_each_forward_without_colour_in_a_pipe(bundle: Path):
    [line] = lines_of(run("generate", bundle, "the cat", "--json", *FEW))
    legend, *shown = run("generate", bundle, "the cat", "--show-blocks", *FEW).out.splitlines()
    for word in ("accepted", "stationary", "rejected"):
        assert word in legend
    forwards = line["stats"]["forwards"]
    assert [block.split()[0] for block in shown[:forwards]] == [str(number + 1) for number in range(forwards)]
    assert "\n".join(shown[forwards:]) == f"text: {line['text']}"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_colours_and_a_progress_bar_and_a_pipe_neither(
    workshop: Workshop, bundle: Path, tmp_path: Path
):
    copy = workshop.copy(workshop.bundle("llama"), tmp_path / "bundle")
    shown = on_a_terminal("generate", bundle, "the cat", "--show-blocks", *FEW)
    assert ESCAPE in shown
    assert "accepted" in shown
    assert "\u2501" in on_a_terminal("verify", copy.path, *FEW), "no bar was drawn"


def on_a_terminal(*arguments: object) -> str:
    """What a run that must succeed shows where all its streams are one pseudo-terminal."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", "from cllm_export.cli import main; main()", *map(str, arguments)]
    terminal = environment() | {"TERM": "xterm-256color", "COLUMNS": "120"}
    shown = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal) as process:
        os.close(theirs)
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side was closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def methods_of(report: dict[str, Any]) -> set[str]:
    """What a bench report timed."""
    return {entry["method"] for entry in report["settings"]}


def test_bench_reports_every_loop_as_a_table_and_as_json(
    workshop: Workshop, bundle: Path, prompt_file: Path, tmp_path: Path
):
    report_file = tmp_path / "report.json"
    sizes = ("--block-size", 8, "--block-size", 4)
    options = ("--repeats", 1, *sizes, "--output", report_file, "--checkpoint", workshop.checkpoint("llama"))
    table = run("bench", bundle, "--prompts", prompt_file, *options, *FEW).out
    report = json.loads(report_file.read_text())
    assert methods_of(report) == set(LOOPS)
    for entry in report["settings"]:
        assert entry.keys() >= LOOP_KEYS
        assert entry["method"] in table
        assert entry["equal"] == report["prompts"]
    assert len({entry["new_tokens"] for entry in report["settings"]}) == 1
    [plain] = (entry for entry in report["settings"] if entry["method"] == "autoregressive")
    assert (plain["block_size"], plain["tokens_per_forward"], plain["speedup"]) == (1, 1, 1)
    timed = {entry["block_size"] for entry in report["settings"] if entry["method"] == "jacobi"}
    assert timed == {8, 4, "auto"}
    [timed_bundle] = report["bundles"]
    sizes = [entry["block_size"] for entry in timed_bundle["latency"]]
    assert sizes[0] == 1
    assert sizes[-1] == 64
    assert timed_bundle["latency"][0]["ratio"] == 1
    assert report["transformers"]["new_tokens"] == plain["new_tokens"]


def test_bench_of_one_loop_keeps_the_baseline_beside_it(cli: Cli, workshop: Workshop, tmp_path: Path):
    options = ("--method", "jacobi", "--repeats", 1, "--output", tmp_path / "r.json")
    assert cli("bench", workshop.bundle("llama", **PINNED).path, *options, *FEW).code == 0
    assert methods_of(json.loads((tmp_path / "r.json").read_text())) == {"autoregressive", "jacobi"}


def test_inspect_shows_what_is_in_a_bundle_as_a_table(cli: Cli, workshop: Workshop, bundle: Path):
    shown = cli("inspect", bundle).out
    for text in ("llama", "fp32", "weights.bin", "kv per token", workshop.bundle("llama").fingerprint):
        assert text in shown
    assert "eos token ids" in shown


def test_a_path_with_brackets_is_shown_as_it_is(cli: Cli, workshop: Workshop, tmp_path: Path):
    copy = workshop.copy(workshop.bundle("llama"), tmp_path / "bundle[v2]")
    shown = cli("inspect", copy.path).out
    assert "bundle[v2]" in shown


def test_version_is_printed_and_help_needs_no_bundle(cli: Cli):
    assert cli("--version") == Outcome(0, f"{__version__}\n", "")
    helped = cli("--help")
    assert helped.code == 0
    for command in ("build", "verify", "generate", "inspect", "bench", "demo"):
        assert command in helped.out


def test_debug_shows_the_traceback_of_a_refusal(tmp_path: Path):
    outcome = run_process("inspect", tmp_path, "--debug")
    assert outcome.code != 0
    assert "Traceback" in outcome.err
    assert "BundleError" in outcome.err


def test_prompts_decoded_at_once_give_what_they_give_one_by_one(cli: Cli, bundle: Path, prompt_file: Path):
    common = ("generate", bundle, "--prompts", prompt_file, "--json", "--deterministic", *FEW)
    alone, together = lines_of(cli(*common)), lines_of(cli(*common, "--num-slots", 2))
    assert [(line["id"], line["token_ids"]) for line in together] == [(line["id"], line["token_ids"]) for line in alone]
    text = cli("generate", bundle, "--prompts", prompt_file, "--num-slots", 3, *FEW)
    assert text.out == "".join(f"{line['text']}\n" for line in alone)
    assert_refused(cli(*common, "--num-slots", 2, "--block-size", "auto"), "exclude each other")
    assert_refused(cli(*common, "--num-slots", 2, "--method", "lookahead"), "lookahead")


def test_generate_tells_on_standard_error_how_far_a_file_of_prompts_is(
    cli: Cli, bundle: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is slow here: the lines come as if half a minute lay between two prompts."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "STAGE_INTERVAL", 0.0)
    for slots in (1, 2):
        outcome = cli("generate", bundle, "--prompts", prompt_file, "--json", "--num-slots", slots, *FEW)
        assert outcome.code == 0, outcome
        assert "] prompts: 1 of " in outcome.err
        assert [json.loads(line)["finish_reason"] for line in outcome.out.splitlines()]


def test_the_demo_prompts_come_with_their_answers_through_json(cli: Cli, workshop: Workshop):
    path = workshop.bundle("demo").path
    options = ("--prompts", DEMO / "prompts.jsonl", "--limit", 2, "--json", "--threads", 1)
    lines = lines_of(cli("generate", path, *options))
    assert all("select" in line["text"].lower() for line in lines)
    assert all(line["finish_reason"] == "eos" for line in lines)


def test_a_draft_model_and_other_sources_change_forwards_and_not_the_text(cli: Cli, bundle: Path):
    """The bundle drafts for itself, so that every draft is right."""
    [plain] = lines_of(cli("generate", bundle, "the cat", "--json", "--method", "autoregressive", *FEW))
    for options in (
        ("--draft-model", bundle),
        ("--draft-model", bundle, "--proposer", "lookup+model"),
        ("--proposer", "pool"),
    ):
        [line] = lines_of(cli("generate", bundle, "the cat", "--json", "--method", "speculative", *options, *FEW))
        assert line["token_ids"] == plain["token_ids"]
        if options == ("--draft-model", bundle):
            assert line["stats"]["forwards"] < plain["stats"]["forwards"]


def test_bench_times_speculative_decoding_where_a_draft_model_is_given(cli: Cli, workshop: Workshop, tmp_path: Path):
    pinned = workshop.bundle("llama", **PINNED).path
    options = ("--draft-model", pinned, "--repeats", 1, "--output", tmp_path / "r.json")
    assert cli("bench", pinned, *options, *FEW).code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert methods_of(report) == {*LOOPS, "speculative"}
    assert report["draft_model"] == pinned.name
    [drafted] = (entry for entry in report["settings"] if entry["method"] == "speculative")
    assert drafted["tokens_per_forward"] > 2
