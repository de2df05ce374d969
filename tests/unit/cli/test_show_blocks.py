"""`--show-blocks` tells the fate of each token by marks, which a pipe and a terminal without colours keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cllm_export.bundle.manifest import Bundle
from cllm_export.cli.entry import app
from cllm_export.cli.generate import EngineChoice
from cllm_export.cli.show.decoding import show_blocks, show_if_cut, show_legend
from cllm_export.runtime.decoding.statistics import ForwardRecord
from cllm_export.runtime.options import GenerateOptions
from tests.fakes import HashModel, Row, byte_level_tokenizer, make_model, write_bundle

WORDS = SimpleNamespace(decode=lambda ids, skip_special_tokens: chr(ord("a") + ids[0]))
MODEL: Any = SimpleNamespace(codec=SimpleNamespace(tokenizer=WORDS))
FIRST = ForwardRecord(write_index=4, block=[0, 9, 2, 8], next_ids=[1, 7, 7, 7], num_accepted=1, new=[1])
"""Token 1 follows 0. Of the draft, 2 was right after it, which the next forward finds."""
SECOND = ForwardRecord(write_index=5, block=[1, 2, 3, 9], next_ids=[2, 3, 4, 7], num_accepted=3, new=[2, 3, 4])
LAST = ForwardRecord(write_index=8, block=[4, 5, 9, 9], next_ids=[5, 6, 7, 7], num_accepted=2, new=[5])
"""The request ends at token 5, so that what comes after it is not shown."""


def shown(capsys: pytest.CaptureFixture[str], *records: ForwardRecord) -> list[str]:
    tokens = [token for record in records for token in record.new]
    show_legend()
    show_blocks(MODEL, SimpleNamespace(forwards=records, token_ids=tokens))  # type: ignore[arg-type]
    return capsys.readouterr().out.splitlines()


def test_brackets_hold_what_a_forward_gave_and_marks_tell_the_rest(capsys):
    legend, *lines = shown(capsys, FIRST, SECOND, LAST)
    assert legend.startswith("block: [fast-forwarded|+accepted] ~stationary -rejected")
    assert lines == ["  1 [+b] -j ~c -i", "  2 [c|d|+e] -j", "  3 [f]"]


def test_the_tokens_in_brackets_are_the_text(capsys):
    _, *lines = shown(capsys, FIRST, SECOND, LAST)
    given = [line.split("[")[1].split("]")[0] for line in lines]
    assert "".join(given).replace("|", "").replace("+", "") == "bcdef"


class Echo(HashModel):
    """A model that repeats the last letter, but ends a text after `c`."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(vocab_size=bundle.manifest.geometry.vocab_size)
        self._eos, self._end = bundle.manifest.eos_token_ids[0], byte_level_tokenizer().token_to_id("c")

    def predict(self, rows: Sequence[Row]) -> int:
        return self._eos if rows[-1].token == self._end else rows[-1].token


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `generate` on a fake engine whose model ends `c` and what follows it at once."""
    bundle = write_bundle(tmp_path / "bundle")
    monkeypatch.setattr(EngineChoice, "load", lambda *_, **__: make_model(bundle, Echo(bundle)))
    options = ["--max-new-tokens", "2", "--block-size", "2", "--method", "jacobi"]
    return lambda *given: CliRunner().invoke(app, ["generate", str(bundle.path), *options, *given])


def test_several_prompts_have_one_legend_and_a_heading_each(run: Any, tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "id": "first"}\n{"prompt": "b", "id": "second"}\n')
    done = run("--prompts", str(tmp_path / "prompts.jsonl"), "--show-blocks")
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [
        "block: [fast-forwarded|+accepted] ~stationary -rejected; the forward gave the tokens in brackets",
        *("prompt first", "text: aa", "prompt second", "text: bb"),
    ]


def test_a_text_that_is_empty_because_the_model_ended_at_once_says_so(run: Any):
    assert "the text is empty, since the model ended it at once" in run("c").stderr
    assert "empty" not in run("a").stderr


def test_a_text_that_a_limit_cuts_before_its_grammar_ends_it_says_so(run: Any, tmp_path: Path):
    """Its prompt is named if there are several, and lines of JSON are no exception."""
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"const": "a long text"}')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "id": "first"}\n{"prompt": "b", "id": "second"}\n')
    cut = "warning: the limit of new tokens cut the text before its grammar let it end, so it is no whole JSON"
    schema = ("--json-schema", str(tmp_path / "schema.json"))
    alone = run("a", *schema)
    assert f"{cut}: allow more with --max-new-tokens" in alone.stderr, alone.output
    several = run("--prompts", str(tmp_path / "prompts.jsonl"), "--json", *schema).stderr
    assert f"prompt first: {cut}" in several and f"prompt second: {cut}" in several
    assert "cut the text before its grammar let it end, so it is perhaps no match" in run("a", "--regex", "a+").stderr


def test_a_text_that_its_grammar_ends_or_that_has_none_is_not_said_to_be_cut(run: Any):
    pytest.importorskip("llguidance")
    assert "cut the text" not in run("a", "--regex", "a").stderr + run("a").stderr


@pytest.mark.parametrize(("text", "is_said"), [("[1, 2]", False), ('{"a": 1', True), ("12", True)])
def test_whole_json_at_the_limit_is_no_cut_text(capsys: pytest.CaptureFixture[str], text: str, is_said: bool):
    """A number is: it might have had more digits."""
    generation: Any = SimpleNamespace(text=text, finish_reason="length")
    show_if_cut(generation, GenerateOptions(json_schema="{}"))
    assert ("no whole JSON" in capsys.readouterr().err) == is_said
