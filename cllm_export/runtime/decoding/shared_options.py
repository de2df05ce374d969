"""Options of decoding that several commands share. Each has its help text and its bounds only here."""

from __future__ import annotations

from typing import Any

from cllm_export.bundle.manifest import PROPOSERS
from cllm_export.checks import option
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP
from cllm_export.runtime.engines.machine import require_threads


def block_size_option(*, minimum: int = 1, whose: str = "the bundle's own") -> Any:
    """The block size n; by default the model's own."""
    return option(None, help="Block size n, in tokens.", otherwise=whose, minimum=minimum, group="Decoding")


def proposer_option() -> Any:
    """One of ``PROPOSERS``; by default the model's own."""
    return option(
        None,
        help="How guesses are first filled and refilled.",
        otherwise="as the model was trained",
        choices=PROPOSERS,
        group="Decoding",
    )


def method_option() -> Any:
    """One of the Jacobi methods; by default the model's own."""
    return option(
        None,
        help="The decoding method.",
        otherwise="the loop that the model was trained with",
        choices=tuple(METHOD_OF_LOOP.values()),
        group="Decoding",
    )


def max_new_tokens_option(default: int | None = 128, *, otherwise: str | None = None) -> Any:
    """The limit on new tokens. ``otherwise`` says in the help what a default of None means."""
    return option(
        default,
        help="Largest number of new tokens for each prompt.",
        otherwise=otherwise,
        minimum=1,
        group="Decoding",
    )


def limit_option(default: int | None = None) -> Any:
    """How many prompts of a file to use."""
    return option(default, help="Use only this many prompts, from the first.", minimum=1, group="Input")


def num_slots_option(*, help: str, otherwise: str) -> Any:  # noqa: A002 - as ``option`` calls it
    """B, the number of slots of an engine."""
    return option(None, help=help, otherwise=otherwise, minimum=1, group="Machine")


def threads_option() -> Any:
    """CPU threads of the engine."""
    return option(
        None,
        help="Number of CPU threads of the engine.",
        otherwise="all",
        minimum=1,
        check=require_threads,
        group="Machine",
    )
