"""Every error of the command line has one form: a line on standard error, and an exit code."""

from __future__ import annotations

import sys

import pytest

from cllm_export.cli import main

WRONG = [
    (("build", "x"), "error: missing option '--output' / '-o'; see cllm-export build --help"),
    (("inspect",), "error: missing argument 'bundle'; see cllm-export inspect --help"),
    (("genrate",), "error: no such command 'genrate'. Did you mean 'generate'?; see cllm-export --help"),
    (("bench", "x", "--sped", "1"), "error: no such option: --sped"),
    (("bench", "x", "--repeats", "many"), "error: invalid value for '--repeats'"),
    (("bench", "x", "--repeats", "0"), "error: --repeats must be an integer of at least 1, got 0"),
    (("trace", "x", "--limit", "0"), "error: --limit must be an integer of at least 1, got 0"),
    (
        ("generate", "x", "hi", "--json-schema", '{"type": "object"}'),
        "error: --json-schema takes a file, and this is the",
    ),
    (("evaluate", "x", "--task", "foo", "--data", "y"), "error: invalid value for '--task': 'foo' is not one of"),
    (("inspect", "nowhere"), "error: nowhere is not a bundle"),
]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cllm-export", *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    code = error.value.code
    assert code is None or isinstance(code, int)
    return (code or 0, *capsys.readouterr())


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_an_error_is_one_line_that_begins_with_error(monkeypatch, capsys, arguments, message):
    """What the parser finds looks like what the command finds."""
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


def test_without_arguments_the_help_is_shown(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys)
    assert (code, out) == (2, "") and err.startswith("Usage: cllm-export") and "Commands:" in err


def test_help_is_no_error(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "build", "-h")
    assert (code, err) == (0, "") and out.startswith("Usage: cllm-export build")
