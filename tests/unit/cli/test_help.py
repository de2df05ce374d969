"""Help texts: plain sentences in groups, whole at 80 columns, with an example; and options that mean one thing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

import cllm_export.cli.entry  # it has all commands
from cllm_export.checks import OptionGroup
from cllm_export.cli.app import EXIT_CODES, ORDER, app
from cllm_export.cli.show.help import section_of

MAX_WORDS = 24
QUICKSTART = Path(__file__).parents[3] / "docs" / "quickstart.md"


def group() -> TyperGroup:
    """The application with all its commands."""
    assert cllm_export.cli.entry.main
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    assert set(found.commands) == set(ORDER)
    return found


COMMANDS: dict[str, Any] = dict(group().commands)
PARAMETERS: dict[str, Any] = {
    f"{name} {given.opts[0]}": given
    for name, command in {"cllm-export": group(), **COMMANDS}.items()
    for given in command.params
}
"""Every argument and option, under the name of its command and its own."""
OPTIONS = {name: given for name, given in PARAMETERS.items() if given.param_type_name == "option"}


def help_of(name: str, flag: str = "--help", columns: int = 80) -> str:
    outcome = CliRunner().invoke(app, [name, flag], env={"COLUMNS": str(columns), "TERMINAL_WIDTH": None})
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


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


@pytest.mark.parametrize("name", ORDER)
def test_every_option_of_a_command_stands_in_a_group(name: str):
    assert {section_of(given) for given in COMMANDS[name].params} <= {"Arguments", *get_args(OptionGroup)}


def test_a_flag_stands_in_one_group_whatever_the_command():
    """But for those that a command gives another subject."""
    groups: dict[str, set[str]] = {}
    for given in OPTIONS.values():
        groups.setdefault(given.opts[0], set()).add(section_of(given))
    for flag in ("--threads", "--limit", "--prompts", "--output", "--force", "--json", "--method", "--max-new-tokens"):
        assert len(groups[flag]) == 1, (flag, groups[flag])


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("name", ORDER)
def test_no_flag_is_cut_and_no_line_is_too_long(name: str, columns: int):
    shown = help_of(name, columns=columns)
    assert "\u2026" not in shown
    for given in COMMANDS[name].params:
        for flag in (*given.opts, *given.secondary_opts):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown), flag
    if columns == 80:
        assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", OPTIONS)
def test_a_default_is_shown_behind_the_sentence_and_never_in_it(name: str):
    assert "default" not in OPTIONS[name].help.lower()


def test_a_default_that_stands_for_something_is_shown_in_words():
    shown = " ".join(help_of("generate").split())
    for default in ("[default: (all)]", "[default: (as many as fit)]", "[default: cpu]", "[default: 1.0]"):
        assert default in shown


@pytest.mark.parametrize("name", ORDER)
def test_h_is_help(name: str):
    assert help_of(name, "-h") == help_of(name)
    assert "-h, --help" in help_of(name)


@pytest.mark.parametrize("name", ORDER)
def test_a_command_ends_its_help_with_an_example_that_it_takes(name: str):
    """Parsing the example refuses an option that does not exist, a wrong value and a missing one."""
    head, _, example = help_of(name).rpartition("Example:\n")
    assert head
    program, called, *arguments = shlex.split(example.replace("\\\n", " "))
    assert (program, called) == ("cllm-export", name)
    assert COMMANDS[name].make_context(name, arguments).args == []


def test_an_example_with_an_option_that_does_not_exist_would_be_noticed():
    with pytest.raises(typer.TyperException, match="No such option"):
        COMMANDS["bench"].make_context("bench", ["my-bundle", "--sped"])


def test_json_is_a_switch_and_output_a_path_in_all_commands():
    """`--json` prints, `--output` writes."""
    for name, given in OPTIONS.items():
        if name.endswith(" --json"):
            assert given.is_flag and "JSON" in given.help, name
        if given.name == "output":
            assert given.type_descriptor.is_path and given.opts == ["--output", "-o"], name


@pytest.mark.parametrize("name", [name for name in ORDER if f"{name} --output" in OPTIONS and name != "collect"])
def test_a_command_that_writes_replaces_only_with_force(name: str):
    """`collect` goes on with what is there, and replaces nothing."""
    assert f"{name} --force" in OPTIONS


def test_exit_codes_are_in_the_help_and_in_the_documents():
    shown = " ".join(CliRunner().invoke(app, ["-h"]).stdout.split())
    page = QUICKSTART.read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in shown
        assert f"| {code} | {meaning} |" in page


def test_completion_gives_the_options_of_a_command():
    """The script of a shell asks the program in this way."""
    asked = {"_CLLM_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": "cllm-export tune --gradient-", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['cllm-export']; from cllm_export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["--gradient-accumulation", "--gradient-checkpointing"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_a_script_for_each_shell(shell: str):
    """The program prints it; `--show-completion` and `--install-completion` find out which shell is at work."""
    code = "import sys; sys.argv = ['cllm-export']; from cllm_export.cli import main; main()"
    asked = {"_CLLM_EXPORT_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "_CLLM_EXPORT_COMPLETE" in done.stdout
    assert {"cllm-export --install-completion", "cllm-export --show-completion"} <= set(PARAMETERS)
