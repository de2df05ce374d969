"""`--show-blocks` tells the fate of each token by marks, which a pipe and a terminal without colours keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cllm_export.cli.show.decoding import show_blocks
from cllm_export.runtime.decoding.statistics import ForwardRecord

WORDS = SimpleNamespace(decode=lambda ids, skip_special_tokens: chr(ord("a") + ids[0]))
MODEL: Any = SimpleNamespace(codec=SimpleNamespace(tokenizer=WORDS))
FIRST = ForwardRecord(write_index=4, block=[0, 9, 2, 8], next_ids=[1, 7, 7, 7], num_accepted=1, new=[1])
"""Token 1 follows 0. Of the draft, 2 was right after it, which the next forward finds."""
SECOND = ForwardRecord(write_index=5, block=[1, 2, 3, 9], next_ids=[2, 3, 4, 7], num_accepted=3, new=[2, 3, 4])
LAST = ForwardRecord(write_index=8, block=[4, 5, 9, 9], next_ids=[5, 6, 7, 7], num_accepted=2, new=[5])
"""The request ends at token 5, so that what comes after it is not shown."""


def shown(capsys: pytest.CaptureFixture[str], *records: ForwardRecord) -> list[str]:
    tokens = [token for record in records for token in record.new]
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
