"""Options that several commands share, so that each is defined once."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm_export.checks import OptionGroup, OptionSpec, check_option
from cllm_export.errors import OptionError
from cllm_export.exporter.options import BuildOptions
from cllm_export.runtime.decoding.drafts.sources import parse_proposers
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.decoding.shared_options import (
    block_size_option,
    limit_option,
    max_new_tokens_option,
    threads_option,
)

COUNT = "<int x>=1>"


def shared(flag: str, field: Any, metavar: str | None = None) -> Any:
    """The command line's form of an option that is worded and bounded for options classes."""
    spec: OptionSpec = field.metadata["option"]

    def check(value: Any) -> Any:
        if value is not None:
            check_option(flag.removeprefix("--").replace("-", "_"), value, spec)
        return value

    return typer.Option(
        flag,
        help=spec.help,
        callback=check,
        metavar=metavar,
        show_default=spec.otherwise or True,
        rich_help_panel=spec.group,
    )


def given(flag: str, help: str, group: OptionGroup, *short: str, default: str | bool = True) -> Any:  # noqa: A002
    """An option of the command line alone.

    Args:
        short: short forms of the flag.
        default: words that the help shows as the default, or False for none.
    """
    return typer.Option(flag, *short, help=help, rich_help_panel=group, show_default=default)


BundleArgument = Annotated[
    Path, typer.Argument(help="The bundle, a directory that `cllm-export build` wrote.", show_default=False)
]


PromptsOption = Annotated[
    Path | None,
    given(
        "--prompts",
        "A file of JSON Lines (`prompt` or `messages`, optional `id`, `answer`), or of one prompt a line.",
        "Input",
    ),
]


PromptFileOption = Annotated[Path, given("--prompts", "A prompt file, in the format that `generate` takes.", "Input")]


CheckpointOption = Annotated[
    Path | None, given("--checkpoint", "The Hugging Face checkpoint that the bundle was built from.", "Input")
]


BaseOption = Annotated[Path | None, shared("--base", next(f for f in fields(BuildOptions) if f.name == "base"))]


BlockSizeOption = Annotated[int | None, shared("--block-size", block_size_option(), COUNT)]


ThreadsOption = Annotated[int | None, shared("--threads", threads_option(), COUNT)]


LimitOption = Annotated[int | None, shared("--limit", limit_option(), COUNT)]


MaxNewTokensOption = Annotated[int, shared("--max-new-tokens", max_new_tokens_option(), COUNT)]


JsonOption = Annotated[
    bool, given("--json", "Print the result on standard output as JSON, instead of for people.", "Output")
]


ReportOption = Annotated[Path | None, given("--output", "Write the result to this file too, as JSON.", "Output", "-o")]


BundleOutputOption = Annotated[Path, given("--output", "The directory to write the bundle to.", "Output", "-o")]


ForceOption = Annotated[
    bool, given("--force", "Replace what the command wrote before; without it, nothing is replaced.", "Output")
]


def require_use(draft_model: Path | None, method: Method | None, proposer: str | None) -> None:
    """Refuse a draft model that no method or proposer would use."""
    is_asked = "model" in parse_proposers(proposer) if proposer else method == "speculative"
    if draft_model and not is_asked:
        raise OptionError("--draft-model needs --method speculative, or --proposer with model among its sources")


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def parse_size(text: str, *, name: str) -> int:
    """Parse a size such as 512MB, 1GB or 1GiB into bytes. ``name`` is the option's name.

    Raises:
        OptionError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None:
        raise OptionError(f"{name} must be a size such as 512MB or 1GB, got {text!r}", fields=(name,))
    return int(float(match[1]) * UNITS[match[2] or ""])
