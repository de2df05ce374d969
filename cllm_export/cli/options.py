"""Options that several commands share, so that each is defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cllm_export.checks import LARGEST_INTEGER, OptionSpec, option_specs
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

COUNT: Any = {"min": 1, "max": LARGEST_INTEGER}
"""The range of an option that counts something."""


def _help_of(field: Any) -> str:
    """The help of an option that is worded for options classes."""
    spec: OptionSpec = field.metadata["option"]
    return spec.help


BundleArgument = Annotated[
    Path, typer.Argument(help="The bundle, a directory that `cllm-export build` wrote.", show_default=False)
]


PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A file of JSON Lines (`prompt` or `messages`, optional `id`, `answer`), or of one prompt a line.",
    ),
]


PromptFileOption = Annotated[
    Path, typer.Option("--prompts", help="A prompt file, in the format that `generate` takes.", show_default=False)
]


CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="The Hugging Face checkpoint that the bundle was built from.")
]


BaseOption = Annotated[
    Path | None,
    typer.Option("--base", help=option_specs(BuildOptions)["base"].help),
]


BlockSizeOption = Annotated[int | None, typer.Option("--block-size", help=_help_of(block_size_option()))]


ThreadsOption = Annotated[int | None, typer.Option("--threads", help=_help_of(threads_option()))]


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ReportOption = Annotated[Path | None, typer.Option("--json", help="Write the report to this file as JSON.")]
LimitOption = Annotated[int | None, typer.Option("--limit", **COUNT, help=_help_of(limit_option()))]


MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", **COUNT, help=_help_of(max_new_tokens_option()))]


def require_use(draft_model: Path | None, method: Method | None, proposer: str | None) -> None:
    """Refuse a draft model that no method or proposer would use."""
    is_asked = "model" in parse_proposers(proposer) if proposer else method == "speculative"
    if draft_model and not is_asked:
        raise OptionError("--draft-model needs --method speculative, or --proposer with model among its sources")
