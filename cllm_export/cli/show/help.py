"""The layout of help texts: options in groups, nothing cut at 80 columns, an example last."""

from __future__ import annotations

from typing import Any, get_args

from typer.core import TyperCommand

from cllm_export.checks import OptionGroup

ARGUMENTS, OTHER = "Arguments", "Other"
SECTIONS = (ARGUMENTS, *get_args(OptionGroup), OTHER)
"""Headings in the order of the help."""
FIRST_COLUMN = 24
"""Columns for a flag and its type. The text of a longer one begins on the next line."""


class Command(TyperCommand):
    """A command whose help has a section for each group of options. Its epilog is an example, a command line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_sections(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def write_sections(command: Any, ctx: Any, formatter: Any) -> None:
    """Write the arguments and options of a command, group by group."""
    records: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
    for given in command.get_params(ctx):
        if record := given.get_help_record(ctx):
            records[section_of(given)].append(record)
    for name, found in records.items():
        if found:
            with formatter.section(name):
                formatter.write_dl(found, col_max=FIRST_COLUMN)


def section_of(given: Any) -> str:
    """The heading that an argument or option of a command stands under."""
    if given.param_type_name == "argument":
        return ARGUMENTS
    return given.rich_help_panel or OTHER
