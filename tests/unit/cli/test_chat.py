"""`chat`: several turns with the model's template, typed or from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cllm_export.cli.entry  # it has all commands
from cllm_export.bundle.manifest import Bundle
from cllm_export.cli.app import app
from cllm_export.cli.chat import Conversation
from cllm_export.cli.generate import EngineChoice
from cllm_export.errors import BundleError, PromptError
from cllm_export.prompts import Message
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions
from tests.fakes import HashModel, Row, byte_level_tokenizer, make_geometry, make_model, write_bundle, write_chat_bundle

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
CAPITALS = byte_level_tokenizer().encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ").ids
"""Tokens of one letter each, which the tokenizer never merges: an answer is encoded as it was decoded."""
FEW = ("--max-new-tokens", "5", "--threads", "1")
OPTIONS = GenerateOptions(max_new_tokens=5)
LENGTH = 256


class Capitals(HashModel):
    """A model that answers in capital letters, which depend on all that it saw. ``interrupt`` sends Ctrl-C once."""

    def __init__(self) -> None:
        super().__init__(vocab_size=len(CAPITALS))
        self.interrupt = False

    def predict(self, rows: Sequence[Row]) -> int:
        if self.interrupt:
            self.interrupt = False
            signal.raise_signal(signal.SIGINT)
        return CAPITALS[super().predict(rows)]


@pytest.fixture
def letters() -> Capitals:
    return Capitals()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    geometry = make_geometry(vocab_size=byte_level_tokenizer().get_vocab_size(), max_length=LENGTH)
    return write_chat_bundle(tmp_path / "bundle", TEMPLATE, geometry=geometry, max_length=LENGTH)


@pytest.fixture
def model(bundle: Bundle, letters: Capitals) -> Model:
    return make_model(bundle, letters, prefix_cache_bytes=1 << 20)


@pytest.fixture
def chat(bundle: Bundle, letters: Capitals, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `chat` with these options and this standard input, on the fake engine."""
    load = lambda *_, **__: make_model(bundle, letters, prefix_cache_bytes=1 << 20)  # noqa: E731
    monkeypatch.setattr(EngineChoice, "load", load)

    def run(stdin: str | bytes, *options: str) -> Any:
        assert cllm_export.cli.entry.main
        return CliRunner().invoke(app, ["chat", str(bundle.path), *FEW, *options], input=stdin)

    return run


def answers(model: Model, *texts: str, system: str | None = None) -> list[str]:
    """The answers to these messages, each generated from the whole conversation before it."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    found = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        found.append(model.generate(messages, OPTIONS).text)
        messages.append({"role": "assistant", "content": found[-1]})
    return found


@pytest.fixture
def expected(bundle: Bundle) -> Any:
    """What a model without a prefix cache answers."""
    return lambda *texts, **system: answers(make_model(bundle, Capitals()), *texts, **system)


def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(chat, expected):
    done = chat("one\n\ntwo\nthree")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == expected("one", "two", "three")


def test_a_turn_tells_its_tokens_a_forward_and_reuses_the_turns_before_it(chat):
    first, second = chat("one\ntwo\n").stderr.splitlines()
    assert "5 tokens in" in first and "per forward" in first and "reused" not in first
    assert "tokens reused" in second


def test_the_kv_of_all_earlier_turns_is_kept(model):
    conversation = Conversation(model, OPTIONS, None)
    conversation.answer("one")
    before = len(model.encode(conversation.messages)) - len("assistant:")
    conversation.answer("two")
    statistics = model.prefix_cache.statistics  # type: ignore[union-attr]
    assert statistics.reused_tokens >= before - 2


def test_reset_forgets_all_but_the_system_message(chat, expected):
    done = chat("one\ntwo\n/reset\none\n", "--system", "be brief")
    first, second, again = done.stdout.splitlines()
    assert [first, second] == expected("one", "two", system="be brief")
    assert again == first != expected("one")[0]


def test_exit_ends_the_chat(chat, expected):
    done = chat("one\n/exit\ntwo\n")
    assert (done.exit_code, done.stdout.splitlines()) == (0, expected("one"))


def test_sampling_options_reach_the_answers(chat, expected):
    options = ("--temperature", "1", "--seed", "3")
    assert chat("one\n", *options).stdout == chat("one\n", *options).stdout != chat("one\n").stdout
    assert chat("one\n", "--stop", expected("one")[0][2]).stdout.strip() == expected("one")[0][:2]


def test_ctrl_c_stops_the_answer_and_not_the_chat(model, letters, capsys):
    conversation = Conversation(model, GenerateOptions(max_new_tokens=60, method="autoregressive"), None)
    letters.interrupt = True
    conversation.answer("one")
    out, err = capsys.readouterr()
    stopped = out.strip()
    assert 0 < len(stopped) < 60 and "stopped" in err
    assert conversation.messages[-1] == {"role": "assistant", "content": stopped}
    conversation.answer("two")
    assert len(capsys.readouterr().out.strip()) == 60
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_message_that_does_not_fit_leaves_the_conversation_as_it_was(model):
    conversation = Conversation(model, OPTIONS, None)
    conversation.answer("one")
    before = conversation.messages
    with pytest.raises(PromptError, match="tokens"):
        conversation.answer("x" * LENGTH)
    assert conversation.messages == before


class Terminal:
    """Standard input of someone who types."""

    def isatty(self) -> bool:
        return True


def test_at_a_terminal_the_chat_goes_on_after_an_error_and_after_ctrl_c(
    bundle: Bundle, chat, expected, monkeypatch: pytest.MonkeyPatch, capsys
):
    typed: Iterator[Any] = iter(["y" * LENGTH, KeyboardInterrupt(), " ", "one", EOFError()])

    def type_next(_: str) -> str:
        entry = next(typed)
        if isinstance(entry, str):
            return entry
        raise entry

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(sys, "stdin", Terminal())
    app(["chat", str(bundle.path), *FEW], standalone_mode=False)
    out, err = capsys.readouterr()
    assert out.split() == expected("one")
    assert "error: " in err and "/reset makes room" in err and err.count("Ctrl-D") == 2


def test_a_line_that_is_not_utf_8_is_named(chat):
    done = chat(b"one\n\xff\n")
    assert isinstance(done.exception, PromptError)
    assert "standard input:2: not valid UTF-8" in str(done.exception)


def test_a_bundle_without_a_template_is_refused_by_name(tmp_path):
    path = write_bundle(tmp_path / "plain").path
    done = CliRunner().invoke(app, ["chat", str(path)], input="hello\n")
    assert isinstance(done.exception, BundleError)
    assert f"{path} has no chat template: use cllm-export generate" in str(done.exception)


def test_a_template_that_takes_no_system_message_says_so_at_once(tmp_path):
    model = make_model(write_chat_bundle(tmp_path / "strict", STRICT), HashModel(vocab_size=9))
    with pytest.raises(PromptError, match="no system"):
        Conversation(model, OPTIONS, "be brief")
