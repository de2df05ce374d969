"""Each help text is a plain sentence, for whoever reads English as a second language."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.core import TyperGroup

import cllm_export.cli  # its modules add their commands
from cllm_export.cli.app import ORDER, app

MAX_WORDS = 24


def parameters() -> dict[str, Any]:
    """Every argument and option, under the name of its command and its own."""
    assert cllm_export.cli.main
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert set(group.commands) == set(ORDER)
    commands = {"cllm-export": group, **group.commands}
    return {f"{name} {given.opts[0]}": given for name, command in commands.items() for given in command.params}


PARAMETERS = parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_help_of_a_parameter_is_a_sentence(name: str):
    """It begins with a capital letter, says what it is of, ends with a period, and is read at once."""
    text = PARAMETERS[name].help
    assert text, "it has no help"
    assert text[0].isupper(), text
    assert not text.startswith("Of "), text
    assert text.endswith(".") and not text.endswith(".."), text
    assert len(text.split()) <= MAX_WORDS, text


def test_top_p_is_a_cumulative_probability():
    assert "cumulative probability" in PARAMETERS["generate --top-p"].help
