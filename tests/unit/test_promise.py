"""Whatever promises the tokens of autoregressive decoding says at which n: a fixed one, or n = 1 for ``auto``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cllm_export

PACKAGE = Path(cllm_export.__file__).parent
PROMISE = re.compile(
    r"token for token|changes? a token|never a token|the same tokens|that autoregressive decoding (gives|draws)"
    r"|equal to autoregressive decoding"
)
CONDITION = re.compile(r"fixed (n|block size)\b|same n\b|n = 1\b|near ties?\b")
TEXTS = [
    pytest.param(node.value, id=f"{path.relative_to(PACKAGE)}:{node.lineno}")
    for path in sorted(PACKAGE.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and PROMISE.search(" ".join(node.value.split()))
]
"""Docstrings, help texts and messages that promise."""


def test_the_package_promises_the_tokens_of_autoregressive_decoding():
    assert PROMISE.search(cllm_export.__doc__ or "")


@pytest.mark.parametrize("text", TEXTS)
def test_a_promise_of_tokens_names_its_condition(text: str):
    """n that is chosen forward by forward gives the tokens of n = 1; another fixed n may round a near tie otherwise."""
    assert CONDITION.search(" ".join(text.split())), text


def test_nothing_excepts_processors_from_the_promise_of_auto():
    """``auto`` uses only sizes that were compared with n = 1 on the engine that runs."""
    texts = {path: " ".join(path.read_text(encoding="utf-8").split()) for path in PACKAGE.rglob("*.py")}
    assert [path for path, text in texts.items() if "where this was not checked" in text] == []
