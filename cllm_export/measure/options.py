"""Options of ``bench``. Importing this module loads no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.drafts.sources import SOURCES, parse_proposers
from cllm_export.runtime.decoding.lookahead.layout import MIN_NGRAM
from cllm_export.runtime.decoding.request import LOOKAHEAD, METHODS, Method
from cllm_export.runtime.decoding.shared_options import max_new_tokens_option, threads_option
from cllm_export.runtime.load import Provider, plan_option, provider_option

HAVE_NO_BLOCK: tuple[Method, ...] = ("autoregressive", LOOKAHEAD)
"""Methods that take no block size."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How bundles are timed.

    Raises:
        OptionError: an option is out of its range, or no timed method would use it.
    """

    GROUP: ClassVar[OptionGroup] = "Decoding"

    methods: tuple[Method, ...] = option(
        (),
        help="Time this method and autoregressive alone; repeat the option for several methods.",
        choices=(*METHODS, LOOKAHEAD),
        flag="--method",
    )
    """For one bundle the default is ``jacobi``, ``jacobi-block`` and ``autoregressive``, and ``speculative`` if there
    is a draft model. For several bundles the default is the loop that each was trained with: T(1) stands for
    autoregressive decoding."""
    block_sizes: tuple[int, ...] = option(
        (), help="Block size n, in tokens; repeat the option for several.", minimum=1, flag="--block-size"
    )
    """Each method that takes an n is timed with each of these. The default is the bundle's own n. For several bundles
    it is 4, 8, 12, 16, 24 and 32, as far as all bundles take them."""
    proposer: str | None = option(
        None, help=f"Draft sources, joined by + and asked in this order: {', '.join(SOURCES)}."
    )
    """The default is each method's own proposer. Autoregressive decoding has none."""
    draft_model: Path | None = option(
        None, help="Another bundle with the same tokenizer, which drafts for --method speculative or --proposer model."
    )
    window: int | None = option(
        None, help="For lookahead: W, the number of columns of its window.", minimum=1, group="Lookahead"
    )
    ngram: int | None = option(
        None, help="For lookahead: N, the number of tokens in an n-gram.", minimum=MIN_NGRAM, group="Lookahead"
    )
    guesses: int | None = option(
        None, help="For lookahead: G, the number of n-grams tried in a forward.", minimum=1, group="Lookahead"
    )
    max_new_tokens: int = max_new_tokens_option()
    repeats: int = option(3, help="Number of passes over the prompts; the report gives medians.", minimum=1)
    """A warm-up pass runs before these passes."""
    threads: int | None = threads_option()
    provider: Provider = provider_option()
    plan: str | None = plan_option()
    ignore_eos: bool = option(False, help="Decode every prompt to the limit.", hidden=True)
    """Needed to time random tokens, which reach eos at once."""

    def __post_init__(self) -> None:
        check_options(self)
        for name, given in (("block_sizes", self.block_sizes), ("methods", self.methods)):
            if len(set(given)) < len(given):
                raise OptionError(f"{name} has a value twice: {', '.join(map(str, given))}", fields=(name,))
        asked = parse_proposers(self.proposer) if self.proposer else ()
        if (
            self.draft_model
            and "model" not in asked
            and (self.proposer or "speculative" not in self.timed("speculative"))
        ):
            raise OptionError(
                "draft_model needs methods speculative, or proposer with model among its sources",
                fields=("draft_model", "methods", "proposer"),
            )
        if self.lookahead and LOOKAHEAD not in self.methods:
            self._refuse(next(iter(self.lookahead)), "is for lookahead; give methods lookahead")
        if not self.methods:
            return
        if self.block_sizes and set(self.methods) <= set(HAVE_NO_BLOCK):
            self._refuse("block_sizes", f"is for the Jacobi loops; leave it out with methods {self.methods[0]}")
        if self.proposer and set(self.methods) == {"autoregressive"}:
            self._refuse("proposer", "is for loops that draft; leave it out with methods autoregressive")

    @property
    def lookahead(self) -> dict[str, int]:
        """The given values of W, N and G. Missing ones keep their defaults."""
        given = {"window": self.window, "ngram": self.ngram, "guesses": self.guesses}
        return {name: value for name, value in given.items() if value is not None}

    def timed(self, *default: Method) -> tuple[Method, ...]:
        """The methods to time: the requested ones and the baseline, else the default."""
        if not self.methods:
            return default
        return self.methods if "autoregressive" in self.methods else (*self.methods, "autoregressive")

    def _refuse(self, field: str, why: str) -> None:
        raise OptionError(f"{field} {why}", fields=(field, "methods"))
