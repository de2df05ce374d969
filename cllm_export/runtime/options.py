"""The options of a request, and what a model resolves them to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

from cllm_export.bundle.contract import check_block_size
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.checks import OptionGroup, documented, no_such_option, option
from cllm_export.errors import OptionError, PromptError
from cllm_export.runtime.decoding.constraint import GrammarKind
from cllm_export.runtime.decoding.drafts.sources import SOURCES, parse_proposers
from cllm_export.runtime.decoding.lookahead.layout import LookaheadShape
from cllm_export.runtime.decoding.request import LOOKAHEAD, METHOD_OF_LOOP, METHODS, Method
from cllm_export.runtime.decoding.sampling import MAX_LOGPROBS, Sampling
from cllm_export.runtime.decoding.shared_options import max_new_tokens_option
from cllm_export.runtime.engines.base import Engine

BlockSize = int | Literal["auto"]
"""n, or ``auto``: n is chosen for each forward."""

GRAMMARS: tuple[GrammarKind, ...] = ("json_schema", "regex", "grammar")

FILTERS = ("top_k", "top_p", "min_p")
"""The options of sampling that do nothing without a temperature."""

LONGER = "build with a larger max_length if the checkpoint has more positions"
SHAPE = ("window", "ngram", "guesses")


@documented
@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampling):
    """All options of a request. Those of ``Sampling`` are among them.

    Raises:
        OptionError: an option is out of range, or excludes another one.
    """

    GROUP: ClassVar[OptionGroup] = "Decoding"

    max_new_tokens: int | None = max_new_tokens_option(None, otherwise="as many as fit")
    """The length limit, exact. By default as many tokens as still fit into the model's max length."""
    method: Method | None = option(
        None,
        choices=(*METHODS, LOOKAHEAD),
        help="The decoding method.",
        otherwise="the loop that the model was trained with",
    )
    """``jacobi`` is the sliding loop, ``jacobi-block`` the loop of the paper. ``speculative`` takes every draft from
    ``proposer`` and reuses none of the model's own predictions. ``autoregressive`` decodes token by token.
    ``lookahead`` is for greedy requests, runs one at a time, and needs a bundle with a lookahead graph.

    By default it is the loop that the model was trained with, else ``jacobi``. If ``block_size`` is ``auto``, the
    default is ``jacobi``."""
    block_size: BlockSize | None = option(
        None,
        help="Block size n, in tokens, or auto, which chooses n forward by forward.",
        otherwise="auto for jacobi, else the bundle's own",
    )
    """n, from 1 to the model's largest, or ``auto``. ``auto`` chooses n for each forward, for the most tokens per
    second; n may be 1. Later requests profit from what it has learned about the model.

    By default it is ``auto`` for ``jacobi``, 1 for ``autoregressive``, and the model's own n for ``jacobi-block`` and
    ``speculative``. A block of ``jacobi-block`` keeps its size, so ``auto`` is refused there. An engine with fixed
    shapes has one n, and ``auto`` means that n.

    At every fixed n the tokens are those of autoregressive decoding at that n. ``auto`` gives those of n = 1: it uses
    only sizes that are bit-equal to n = 1 on the engine. Where none is, it means the n of the training, else 1, and a
    warning says so."""
    window: int | None = option(None, help="For lookahead: W, the number of columns of its window.", group="Lookahead")
    """W of ``lookahead``. ``window``, ``ngram`` and ``guesses`` give the size of its block: see ``LookaheadShape``."""
    ngram: int | None = option(None, help="For lookahead: N, the number of tokens of an n-gram.", group="Lookahead")
    """N of ``lookahead``."""
    guesses: int | None = option(
        None, help="For lookahead: G, the number of n-grams that a forward tries.", group="Lookahead"
    )
    """G of ``lookahead``."""
    deterministic: bool = option(
        False, help="Use the bundle's own block size instead of auto, so that a request gives its tokens again."
    )
    """Use the model's own n (1 for ``autoregressive``) unless a number is given. A repeated request then runs the same
    forwards. If n is chosen, it gives the same tokens, of n = 1, in other forwards."""
    proposer: str | None = option(
        None, help=f"Draft sources, joined by + and asked in this order: {', '.join(SOURCES)}."
    )
    """The draft source: ``pad``, ``repeat``, ``prompt``, ``lookup``, ``pool`` or ``model``. ``pool`` drafts from the
    n-grams of the texts and rejected drafts of all requests that use it. ``model`` drafts with a draft model. Several
    sources are joined by ``+`` and asked in order: ``pool+lookup``.

    By default it is the one that the model was trained with, else ``pad``. For ``speculative`` it is ``model`` if a
    draft model is loaded, else ``lookup``. For ``lookahead``, which fills its window once, it is ``prompt``."""
    stop: Sequence[str] = option((), help="Stop before this text; repeat the option for several.")
    """Strings to stop at. The text is cut before the first one. A special token gives no text, but its own text stops
    here too."""
    deadline: float | None = option(
        None, above=0, help="End a request after this many seconds, with the tokens that it has by then."
    )
    """Seconds until the request ends with what it has, and the finish reason ``deadline``. They count from ``submit``,
    over queue and decoding; without a service, from the first forward. A forward that runs is not interrupted."""
    ignore_eos: bool = option(False, help="Decode on past an end-of-sequence token, up to the limit.", hidden=True)
    """Continue after an end-of-sequence token, up to the limit. For measurements."""
    logprobs: int | None = option(
        None,
        minimum=0,
        maximum=MAX_LOGPROBS,
        help="With --json: add the log-probability of each token, and of this many alternatives.",
        group="Output",
    )
    """Return the log-probability of each new token, and of this many of the most probable alternatives."""
    forwards_per_sync: int | None = option(
        None,
        minimum=1,
        help="For tensorrt: decode on the device, and let the host look once in this many forwards.",
        group="Machine",
    )
    """k: the loop runs on the device, and the host reads results once in k forwards. The text of a stream then comes in
    steps of k forwards.

    It is for greedy requests on a TensorRT engine, one at a time, with the method ``jacobi`` and the proposer ``pad``
    or ``repeat``. ``block_size`` must be one of the plan's. It is by default the model's own, and never ``auto``."""
    json_schema: str | Mapping[str, Any] | None = option(
        None, help="A JSON schema that the text must match; on the command line, a file that holds it.", group="Grammar"
    )
    """The schema that the text must match, as text or as a mapping (extra ``grammar``). A request can have at most one
    grammar. If a limit or a stop string cuts the text, it is only the beginning of a match. A grammar that no text
    matches is refused with ``GrammarError``, and a text that comes to a dead end ends with it."""
    regex: str | None = option(None, help="A regular expression that the whole text must match.", group="Grammar")
    """The expression that the whole text must match (extra ``grammar``)."""
    grammar: str | None = option(
        None,
        help="A Lark grammar that the text must match; on the command line, a file that holds it.",
        group="Grammar",
    )
    """A Lark grammar, as llguidance takes it, that the text must match (extra ``grammar``)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("deterministic", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}", fields=(name,))
        is_list = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        if not is_list or not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop must be a list of non-empty strings, got {self.stop!r}", fields=("stop",))
        self._check_filters()
        self._check_grammars()
        self._check_block_size()
        self._check_lookahead()
        if self.forwards_per_sync is not None:
            self._require_greedy("forwards_per_sync", "leave one of them out")
        if self.proposer is not None:
            self._check_proposer(self.proposer)

    @property
    def lookahead_shape(self) -> LookaheadShape:
        """W, N and G. Each one that is not given has its default."""
        given = {name: value for name in SHAPE if (value := getattr(self, name)) is not None}
        return LookaheadShape(**given)

    @property
    def given_grammar(self) -> tuple[GrammarKind, str | Mapping[str, Any]] | None:
        """The grammar that the text must follow."""
        return next(((kind, source) for kind in GRAMMARS if (source := getattr(self, kind)) is not None), None)

    def _check_filters(self) -> None:
        """Refuse options that choose among tokens to draw from where nothing is drawn, unless 0 was asked for.

        A seed alone is taken: it is also the seed of a proposer, and it changes no token of a greedy request.
        """
        defaults = {field.name: field.default for field in fields(Sampling)}
        for name in FILTERS if self.temperature is None else ():
            if getattr(self, name) != defaults[name]:
                raise OptionError(
                    f"{name} does nothing without a temperature, since decoding is greedy: give temperature too (0 "
                    f"if greedy is meant), or leave {name} out",
                    fields=(name, "temperature"),
                )

    def _check_grammars(self) -> None:
        given = [kind for kind in GRAMMARS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise OptionError(f"{given[0]} and {given[1]} exclude each other: leave one out", fields=given[:2])
        if given and self.ignore_eos:
            raise OptionError(
                f"{given[0]} excludes ignore_eos: a complete text ends with an end-of-sequence token",
                fields=(given[0], "ignore_eos"),
            )

    def _check_block_size(self) -> None:
        if self.block_size is None:
            return
        if self.method == LOOKAHEAD:
            raise OptionError(
                "block_size is not for lookahead: window, ngram and guesses give the size of its block",
                fields=("block_size", *SHAPE),
            )
        if self.block_size != "auto":
            check_block_size(self.block_size)
            return
        if self.deterministic:
            raise OptionError(
                "block_size 'auto' and deterministic exclude each other: leave one out",
                fields=("block_size", "deterministic"),
            )
        if self.method == "jacobi-block":
            raise OptionError(
                "block_size 'auto' is for jacobi: a block of jacobi-block keeps its size; give a number",
                fields=("block_size",),
            )
        if self.forwards_per_sync is not None:
            raise OptionError(
                "forwards_per_sync excludes block_size 'auto': n is one in all of them; give a number",
                fields=("forwards_per_sync", "block_size"),
            )

    def _check_lookahead(self) -> None:
        if self.method == LOOKAHEAD:
            _ = self.lookahead_shape
            self._require_greedy(LOOKAHEAD, "choose another method")
            return
        if given := next((name for name in SHAPE if getattr(self, name) is not None), None):
            method = self.method or "another one"
            raise OptionError(
                f"{given} is for the method lookahead, and the method is {method}: choose method='lookahead', or leave "
                f"{given} out",
                fields=(given, "method"),
            )

    def _require_greedy(self, what: str, instead: str) -> None:
        """Refuse options that need logits: sampling, logprobs and grammars."""
        if not self.is_greedy:
            raise OptionError(f"{what} is for greedy requests and excludes sampling: {instead}", fields=(what,))
        if self.logprobs is not None:
            raise OptionError(
                f"{what} is for greedy requests and excludes logprobs: {instead}", fields=(what, "logprobs")
            )
        if self.given_grammar:
            raise OptionError(f"{what} is for greedy requests and excludes a grammar: {instead}", fields=(what,))

    def _check_proposer(self, proposer: str) -> None:
        if self.method == "autoregressive" and self.block_size in (None, 1, "auto"):  # a larger block is filled by it
            raise OptionError(
                "proposer is for methods that draft, and the method is autoregressive: leave proposer out, or choose "
                "another method",
                fields=("proposer", "method"),
            )
        if "model" in parse_proposers(proposer) and self.method == LOOKAHEAD:
            raise OptionError(
                f"proposer {proposer!r} is not for lookahead, whose window is filled once: leave model out",
                fields=("proposer",),
            )


PREFILL_ONLY = GenerateOptions(max_new_tokens=1, method="autoregressive", ignore_eos=True)
"""Options of a request that only prefills: its last forward writes the KV of the prompt's last token, and no more."""


def override(options: GenerateOptions | None, overrides: Mapping[str, Any]) -> GenerateOptions:
    """The options, with single ones replaced by name. An override of None replaces nothing.

    Raises:
        OptionError: there is no such option, or one is out of range.
    """
    if not isinstance(options, GenerateOptions | None):
        raise OptionError(
            f"options must be GenerateOptions, got {type(options).__name__}: give options by name, or "
            "GenerateOptions(...)",
            fields=("options",),
        )
    names = [field.name for field in fields(GenerateOptions)]
    if unknown := sorted(overrides.keys() - set(names)):
        raise no_such_option(unknown[0], names)
    given = {name: value for name, value in overrides.items() if value is not None}
    return replace(options, **given) if options else GenerateOptions(**given)


class ModelFacts(Protocol):
    """The facts about a model that its engine and codec do not have. A bundle's manifest has them all."""

    @property
    def block_size(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def trained_with(self) -> TrainedWith | None: ...


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Limits and defaults of a model on its engine. The options of a request are resolved against them."""

    block_size: int
    """The model's own n."""
    max_block_size: int
    fixed_block_size: int | None
    """n of an engine with fixed shapes, else None."""
    max_length: int
    """Largest number of tokens of a prompt and its new tokens together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    """Fills unused rows."""
    trained_with: TrainedWith | None
    has_draft_model: bool

    @classmethod
    def of(cls, facts: ModelFacts, engine: Engine, *, has_draft_model: bool) -> ModelLimits:
        fixed = engine.fixed_shapes
        return cls(
            block_size=facts.block_size,
            max_block_size=engine.geometry.max_block_size,
            fixed_block_size=fixed.block_size if fixed else None,
            max_length=facts.max_length,
            vocab_size=engine.geometry.vocab_size,
            eos_token_ids=facts.eos_token_ids,
            pad_token_id=pad_token(facts),
            trained_with=facts.trained_with,
            has_draft_model=has_draft_model,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request for one model. Every option has a value that is in range."""

    prompt: list[int]
    method: Method
    block_size: BlockSize
    """n of every forward, or ``auto``. For ``lookahead`` it is the number of rows of the largest forward."""
    lookahead: LookaheadShape | None
    """W, N and G if the method is ``lookahead``, else None."""
    proposer: str
    sampling: Sampling
    logprobs: int | None
    grammar: tuple[GrammarKind, str | Mapping[str, Any]] | None
    max_new_tokens: int
    stop: tuple[str, ...]
    eos_token_ids: frozenset[int]
    """The tokens that end the request. Empty with ``ignore_eos``."""
    forwards_per_sync: int | None
    """k if the loop runs on the device, else None."""
    deadline: float | None
    """Seconds that the request may take in all, else None."""

    @property
    def seed(self) -> int:
        """The seed of the sampler; 0 if none was given."""
        return self.sampling.seed or 0

    @property
    def needs_sampler(self) -> bool:
        """Whether a token may differ from the graph's argmax: with a grammar, or if its sampling is not greedy."""
        return self.grammar is not None or not self.sampling.is_greedy

    @property
    def draft_kind(self) -> str | None:
        """The kind of drafts that it decodes with; None without drafts. Drafts of one kind gain about the same."""
        if self.method == "autoregressive":
            return None
        return f"{self.method}, {self.proposer}, {'drawn' if self.needs_sampler else 'greedy'}"


def resolve(options: GenerateOptions, limits: ModelLimits, prompt: list[int]) -> ResolvedRequest:
    """The request for a prompt, with all options resolved against the model's limits.

    This is a pure function: a missing seed is not drawn here, it counts as 0.

    Raises:
        OptionError: an option is out of range for the model.
        PromptError: the prompt and its new tokens do not fit.
    """
    method = options.method or _default_method(options, limits)
    proposer = _resolve_proposer(options, method, limits)
    options.check_tokens(limits.vocab_size)
    shape = options.lookahead_shape if method == LOOKAHEAD else None
    if shape:
        shape.require_fitting(limits.max_block_size)
    on_device = options.forwards_per_sync is not None
    if on_device:
        _check_on_device(method, proposer)
    block_size = (
        shape.max_rows
        if shape
        else resolve_block_size(
            options.block_size, limits, method=method, deterministic=options.deterministic or on_device
        )
    )
    return ResolvedRequest(
        prompt=prompt,
        method=method,
        block_size=block_size,
        lookahead=shape,
        proposer=proposer,
        sampling=options,
        logprobs=options.logprobs,
        grammar=options.given_grammar,
        max_new_tokens=_fit(len(prompt), options.max_new_tokens, limits.max_length),
        stop=tuple(options.stop),
        eos_token_ids=frozenset(() if options.ignore_eos else limits.eos_token_ids),
        forwards_per_sync=options.forwards_per_sync,
        deadline=options.deadline,
    )


def resolve_block_size(
    block_size: BlockSize | None, limits: ModelLimits, *, method: Method = "jacobi", deterministic: bool = False
) -> BlockSize:
    """n of a request's forwards, or ``auto``.

    Raises:
        OptionError: n is out of range for the model.
    """
    if block_size is not None and block_size != "auto":
        return check_block_size(block_size, largest=limits.max_block_size, pinned=limits.fixed_block_size)
    if limits.fixed_block_size is not None:
        return limits.fixed_block_size
    if method == "autoregressive":
        return 1
    if method == "jacobi" and not deterministic:
        return "auto"
    return block_size or limits.block_size


def _default_method(options: GenerateOptions, limits: ModelLimits) -> Method:
    """The loop that the model was trained with; with ``auto`` the sliding loop, as the block loop needs a fixed n."""
    trained = limits.trained_with
    return METHOD_OF_LOOP[trained.loop if trained and options.block_size != "auto" else "sliding"]


def _resolve_proposer(options: GenerateOptions, method: Method, limits: ModelLimits) -> str:
    proposer = options.proposer
    if proposer is None:
        if method == LOOKAHEAD:
            return "prompt"
        if method == "speculative":
            return "model" if limits.has_draft_model else "lookup"
        return limits.trained_with.proposer if limits.trained_with else "pad"
    if "model" in parse_proposers(proposer) and not limits.has_draft_model:
        raise OptionError(
            f"proposer {proposer!r} needs a draft model: give draft_model, another bundle with the same tokenizer",
            fields=("proposer", "draft_model"),
        )
    return proposer


def _check_on_device(method: Method, proposer: str) -> None:
    """Refuse a method or proposer that the loop on the device does not support."""
    from cllm_export.tensorrt.loop.device_request import PROPOSERS

    if method != "jacobi":
        raise OptionError(
            f"forwards_per_sync is for the method jacobi, and the method is {method}: say jacobi",
            fields=("forwards_per_sync", "method"),
        )
    if proposer not in PROPOSERS:
        raise OptionError(
            f"forwards_per_sync is for the proposers {' and '.join(PROPOSERS)}, and the proposer is {proposer!r}",
            fields=("forwards_per_sync", "proposer"),
        )


def pad_token(facts: ModelFacts) -> int:
    """The token that fills blocks: the pad token, else an end-of-sequence token, else 0. Any token would be safe."""
    if facts.pad_token_id is not None:
        return facts.pad_token_id
    return facts.eos_token_ids[0] if facts.eos_token_ids else 0


def _fit(prompt_length: int, max_new_tokens: int | None, max_length: int) -> int:
    room = max_length - prompt_length
    if room < 1:
        raise PromptError(
            f"the prompt has {prompt_length} tokens and this model holds {max_length} in all, "
            f"at least one of them new: shorten the prompt, or {LONGER}"
        )
    if max_new_tokens is None:
        return room
    if max_new_tokens > room:
        raise PromptError(
            f"{prompt_length} prompt tokens and {max_new_tokens} new ones need {prompt_length + max_new_tokens}, this "
            f"model holds {max_length}: ask for at most {room}, or {LONGER}"
        )
    return max_new_tokens
