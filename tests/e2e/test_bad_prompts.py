"""Prompts and options of ``generate``, ``verify`` and ``bench`` that cannot be served: refused, with the line or the
numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import MAX_POSITIONS
from tests.conftest import PINNED, Workshop
from tests.e2e.conftest import Cli, assert_refused, run_process

LONG = "word " * MAX_POSITIONS

PROMPT_FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "no prompt at all": ("prompts.txt", b"\n \n", ("prompts.txt", "holds no prompt")),
    "no bytes": ("prompts.jsonl", b"", ("prompts.jsonl", "holds no prompt")),
    "text not UTF-8": ("prompts.txt", b"one\ntwo\nthr\xffee\n", ("prompts.txt:3", "UTF-8", "byte 3")),
    "JSON Lines not UTF-8": ("p.jsonl", b'{"prompt": "one"}\n{"prompt": "\xe4"}\n', ("p.jsonl:2", "UTF-8")),
    "JSON Lines cut short": ("p.jsonl", b'{"prompt": "one"}\n\n{"prompt": "tw', ("p.jsonl:3", "malformed JSON")),
    "JSON Lines by its brace": ("p.txt", b'{"prompt": "one"}\nplain text\n', ("p.txt:2", "malformed JSON")),
    "a line that is a list": ("p.jsonl", b'["one"]\n', ("p.jsonl:1", "expected an object", "list")),
    "a line nested beyond measure": ("p.jsonl", b'{"prompt": "one"}\n' + b"[" * 100_000, ("p.jsonl:2",)),
    "a line without a prompt": ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', ("p.jsonl:2", "`prompt`", "text")),
    "a prompt that is a number": ("p.jsonl", b'{"prompt": 5}\n', ("p.jsonl:1", "`prompt` must be text, got 5")),
    "an answer of a number": (
        "p.jsonl",
        b'{"prompt": "a", "answer": 5}\n',
        ("p.jsonl:1", "`answer` must be text"),
    ),
    "an unknown key": ("p.jsonl", b'{"prompt": "a", "answr": "b"}\n', ("p.jsonl:1", "unknown key 'answr'", "answer")),
    "tools for a text": ("p.jsonl", b'{"prompt": "a", "tools": []}\n', ("p.jsonl:1", "`tools` is for `messages`")),
    "half a surrogate pair": (
        "p.jsonl",
        b'{"prompt": "\\ud83d"}\n{"prompt": "b"}\n',
        ("p.jsonl:1", "`prompt` is not valid Unicode"),
    ),
    "no messages": ("p.jsonl", b'{"messages": []}\n', ("p.jsonl:1", "messages must not be empty")),
    "a message without a role": ("p.jsonl", b'{"messages": [{"content": "a"}]}\n', ("p.jsonl:1", '"role"')),
    "a message that is text": ("p.jsonl", b'{"messages": ["a"]}\n', ("p.jsonl:1", '"role"')),
    "an empty prompt": ("p.jsonl", b'{"prompt": ""}\n', ("prompt is empty",)),
    "an empty prompt of several": (
        "p.jsonl",
        b'{"prompt": "", "id": "x7"}\n{"prompt": "a"}\n',
        ("x7", "prompt is empty"),
    ),
}


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Path:
    return workshop.bundle("llama").path


@pytest.mark.parametrize(("name", "content", "phrases"), PROMPT_FILES.values(), ids=PROMPT_FILES)
def test_a_bad_prompt_file_is_refused_with_its_line(
    cli: Cli, bundle: Path, tmp_path: Path, name: str, content: bytes, phrases: tuple[str, ...]
):
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(cli("generate", bundle, "--prompts", path, "--max-new-tokens", 2), *phrases)


@pytest.mark.parametrize(
    ("stdin", "phrases"),
    [
        (b"", ("prompt is empty",)),
        (b"caf\xe9", ("standard input", "UTF-8", "byte 3")),
        (b'{"prompt": "one"}\n{"prompt": ', ("standard input:2", "malformed JSON")),
        (b'{"prompt": "one"}\n{"prompt": "\xff"}', ("standard input:2", "UTF-8")),
    ],
    ids=["nothing", "not UTF-8", "JSON Lines cut short", "JSON Lines not UTF-8"],
)
def test_a_bad_standard_input_is_refused(cli: Cli, bundle: Path, stdin: bytes, phrases: tuple[str, ...]):
    assert_refused(cli("generate", bundle, stdin=stdin), *phrases)


@pytest.mark.parametrize("command", ["generate", "verify", "bench"])
def test_a_prompt_file_that_is_not_there_is_refused(cli: Cli, bundle: Path, tmp_path: Path, command: str):
    assert_refused(cli(command, bundle, "--prompts", tmp_path / "none.jsonl"), "none.jsonl", "No such file")
    assert_refused(cli(command, bundle, "--prompts", tmp_path), str(tmp_path), "directory")


def test_an_empty_prompt_is_refused(cli: Cli, bundle: Path):
    assert_refused(cli("generate", bundle, ""), "prompt is empty", "at least one token")


def test_a_prompt_argument_that_is_not_utf8_is_refused(bundle: Path):
    """A shell passes any bytes; Python hands them on as lone surrogates, which no tokenizer takes."""
    prelude = "import sys; sys.argv.append(b'caf\\xe9'.decode('utf-8', 'surrogateescape'))"
    assert_refused(run_process("generate", bundle, prelude=prelude), "not valid Unicode", "character 3")


def test_a_prompt_that_fills_the_bundle_is_refused_with_the_numbers(cli: Cli, bundle: Path):
    outcome = cli("generate", bundle, LONG)
    assert_refused(outcome, f"holds {MAX_POSITIONS}", "--max-length")
    assert any(int(word) > MAX_POSITIONS for word in outcome.err.split() if word.isdigit()), outcome


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "JSON"])
def test_every_prompt_is_checked_before_the_first_answer(
    cli: Cli, bundle: Path, tmp_path: Path, num_slots: int, form: tuple[str, ...]
):
    """So that no answer is printed by a command that then fails, whatever the number of slots."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "hello"}] * 6 + [{"prompt": LONG, "id": "x7"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ("--prompts", path, "--num-slots", num_slots, "--max-new-tokens", 2, *form)
    assert_refused(cli("generate", bundle, *options), "prompt x7", f"holds {MAX_POSITIONS}", "has more positions")


def test_new_tokens_that_do_not_fit_are_refused_with_what_would(cli: Cli, bundle: Path):
    [line] = cli("generate", bundle, "hello", "--json", "--max-new-tokens", 1).out.splitlines()
    room = MAX_POSITIONS - json.loads(line)["stats"]["prompt_tokens"]
    assert cli("generate", bundle, "hello", "--max-new-tokens", room).code == 0
    assert_refused(cli("generate", bundle, "hello", "--max-new-tokens", room + 1), f"at most {room}", "--max-length")


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_prompt_too_long_to_verify_or_time_is_refused(cli: Cli, bundle: Path, tmp_path: Path, command: str):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": LONG}))
    assert_refused(cli(command, bundle, "--prompts", path), "too long for this bundle")


def test_messages_without_a_chat_template_are_refused(cli: Cli, workshop: Workshop):
    messages = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    assert_refused(cli("generate", workshop.bundle("qwen2").path, stdin=messages), "no chat template")


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (("--frobnicate",), ("no such option", "--frobnicate")),
        (("--method", "magic"), ("--method", "magic", "jacobi-block")),
        (("--proposer", "zeros"), ("--proposer", "zeros", "pool, model, or several joined by +")),
        (("--proposer", "pool+pool"), ("--proposer", "names pool twice")),
        (("--proposer", "pad+lookup"), ("--proposer", "pad always knows")),
        (("--proposer", "model"), ("proposer 'model'", "--draft-model")),
        (("--draft-model", "nowhere"), ("--draft-model", "--method speculative", "--proposer")),
        (("--draft-model", "nowhere", "--method", "speculative"), ("nowhere",)),
        (
            ("--draft-model", "nowhere", "--method", "speculative", "--proposer", "pool"),
            ("--draft-model", "model among"),
        ),
        (("--block-size", 0), ("--block-size", "at least 1")),
        (("--block-size", 65), ("--block-size", "at most 64", "65")),
        (("--max-new-tokens", 0), ("--max-new-tokens", "at least 1")),
        (("--threads", 0), ("threads", "at least 1")),
        (("--limit", 0), ("--limit", "at least 1")),
        (("--stop", ""), ("stop", "non-empty")),
        (("--prompts", "x.jsonl"), ("--prompts", "not both")),
        (("--json", "--show-blocks"), ("--show-blocks", "--json")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_an_option_out_of_range_is_refused(
    cli: Cli, bundle: Path, arguments: tuple[object, ...], phrases: tuple[str, ...]
):
    assert_refused(cli("generate", bundle, "hello", *arguments), *phrases)


@pytest.mark.parametrize(
    ("command", "arguments", "phrases"),
    [
        ("bench", ("--block-size", "x"), ("--block-size", "integer")),
        ("bench", ("--block-size", 4, "--block-size", 65), ("--block-size", "at most 64")),
        ("bench", ("--block-size", 0), ("--block-size", "at least 1")),
        ("bench", ("--block-size", 4, "--block-size", 4), ("--block-size", "twice")),
        ("bench", ("--method", "fast"), ("--method", "jacobi", "'fast'")),
        ("bench", ("--limit", 1), ("--limit", "--prompts")),
        ("bench", ("--repeats", 0), ("--repeats",)),
        ("bench", ("--proposer", "zeros"), ("--proposer", "zeros")),
        ("bench", ("--proposer", "pad", "--method", "autoregressive"), ("--proposer", "autoregressive")),
        ("bench", ("--draft-model", "x", "--method", "jacobi"), ("--draft-model", "--method speculative")),
        ("verify", ("--block-size", 65), ("--block-size", "at most 64")),
        ("verify", ("--block-size", 0), ("--block-size", "at least 1")),
        ("verify", ("--checkpoint", "nowhere"), ("nowhere", "not a checkpoint")),
        ("demo", ("--example", "nowhere"), ("nowhere", "no checkpoint/")),
    ],
)
def test_the_other_commands_refuse_their_options_too(
    cli: Cli, bundle: Path, command: str, arguments: tuple[object, ...], phrases: tuple[str, ...]
):
    target = () if command == "demo" else (bundle,)
    assert_refused(cli(command, *target, *arguments), *phrases)
    assert not (bundle / "parity.json").exists()


def test_bench_refuses_a_checkpoint_that_is_not_there(cli: Cli, workshop: Workshop):
    bundle = workshop.bundle("llama", **PINNED).path
    outcome = cli("bench", bundle, "--checkpoint", "nowhere", "--max-new-tokens", 1, "--repeats", 1)
    assert_refused(outcome, "nowhere", "not a checkpoint")


def test_an_unknown_command_is_refused(cli: Cli):
    assert_refused(cli("frobnicate"), "no such command", "frobnicate")
