"""Load a bundle and generate from it: the API that services embed."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack

import numpy as np

from cllm_export.bundle import Bundle, TrainedWith, open_bundle, require_one_of
from cllm_export.contract import require_at_least
from cllm_export.errors import EngineError, OptionError, PromptError
from cllm_export.prompts import check_messages
from cllm_export.runtime.choose import BLOCK_SIZES, PinnedSize, SizeChooser, SizePolicy
from cllm_export.runtime.constraint import Constraint, GrammarCompiler, GrammarKind
from cllm_export.runtime.draft import make_fill, parse_fill
from cllm_export.runtime.draft_model import DraftModel, check_pair
from cllm_export.runtime.engine import Engine, LookaheadEngine, RowEngine
from cllm_export.runtime.jacobi import Decoder
from cllm_export.runtime.latency_file import read_latency
from cllm_export.runtime.lookahead import Lookahead
from cllm_export.runtime.lookahead_layout import LookaheadShape
from cllm_export.runtime.lookahead_loop import LookaheadLoop
from cllm_export.runtime.ngram_pool import NgramPool
from cllm_export.runtime.ort_engine import OrtEngine
from cllm_export.runtime.prefix_cache import PrefixCache
from cllm_export.runtime.prefix_snapshot import check_target, write_snapshot
from cllm_export.runtime.prompt_state import PromptState
from cllm_export.runtime.providers import Provider, open_engine
from cllm_export.runtime.request import (
    LOOKAHEAD,
    METHOD_OF_LOOP,
    METHODS,
    Decode,
    FinishReason,
    Method,
    StopCut,
    make_decoder,
)
from cllm_export.runtime.sampling import MAX_LOGPROBS, MAX_SEED, Logprob, Sampler, Sampling
from cllm_export.runtime.scheduler import Scheduler, Taker, Task, memory_of
from cllm_export.runtime.statistics import ForwardRecord, Statistics
from cllm_export.runtime.text import Messages, TextCodec, TextStream
from cllm_export.runtime.time_forwards import time_forwards

if TYPE_CHECKING:
    from cllm_export.runtime.device_request import DeviceLoops

__all__ = [
    "METHODS",
    "FinishReason",
    "Generation",
    "Method",
    "Model",
    "ModelFacts",
    "Options",
    "Prepared",
    "Stream",
    "load",
    "pad_token",
]


BlockSize = int | Literal["auto"]
"""n, or n chosen forward by forward."""


class ModelFacts(Protocol):
    """What a model must be known by besides its engine and codec. A bundle's manifest has it all."""

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


class Options(TypedDict, total=False):
    """What a request may say beside its prompt; None is the same as nothing said.

    Keys:
        max_new_tokens: the length limit, exact; by default whatever still fits into the model's max length.
        method: ``jacobi`` (sliding), ``jacobi-block`` (the paper's), ``speculative`` (every block is what ``fill``
            guesses, none of it the model's own), ``autoregressive`` or ``lookahead``; by default the loop the model was
            trained with, else ``jacobi``, and that one where ``block_size`` says ``auto``. Lookahead is for greedy
            requests, one at a time, of a bundle that has a graph for it.
        block_size: n, 1 to the model's largest, or ``auto``: chosen forward by forward to make most tokens a second,
            1 included; what is learned of the model serves all its later requests. By default ``auto`` for
            ``jacobi``, the model's own for ``jacobi-block``, whose blocks keep their size, and for
            ``speculative``, and 1 for ``autoregressive``. An engine pinned to one shape has one n, and ``auto`` is it.
        deterministic: n is the model's own (1 for ``autoregressive``) unless a number is given, so that a request runs
            the same forwards again: where it is chosen, a near tie may round to another token at another time.
        window, ngram, guesses: W, N and G of ``lookahead``, which give the size of its block; see ``LookaheadShape``.
        fill: the draft source: ``pad``, ``repeat``, ``prompt``, ``lookup``, ``pool`` (n-grams of the texts and rejected
            drafts of all requests that say so), ``model`` (a draft model's tokens), or several joined by ``+``, asked
            in order: ``pool+lookup``. By default what the model was trained with, else ``pad``; for ``speculative``
            ``model`` where there is one, else ``lookup``; for ``lookahead``, whose window it fills once, ``prompt``.
        seed: of the noise that samples, and of the ``prompt`` fill; by default a fresh one for each sampled request,
            which ``Generation.seed`` tells.
        stop: strings to stop at; the text is cut before the first one.
        ignore_eos: decode on past an end-of-sequence token, up to the limit: for measuring.
        temperature, top_k, top_p, min_p, repetition_penalty, logit_bias: see ``Sampling``; by default greedy.
        json_schema, regex, grammar: what the text must match (extra ``grammar``); one of them at most. ``grammar`` is a
            Lark grammar as llguidance takes it. A text that a limit or a stop string cuts is a beginning of a match.
        forwards_per_sync: k: the loop stays on the device, and the host asks once in k forwards what they gave; the
            text of a stream then comes in steps of that. For greedy requests of a TensorRT engine, one at a time, with
            the method ``jacobi``, a ``block_size`` of the plan's (by default the model's own, never ``auto``) and the
            fill ``pad`` or ``repeat``; whatever else is asked for beside it is refused.
        logprobs: log-probabilities of each new token, and this many of the most probable ones beside it, 0 to 20.
    """

    max_new_tokens: int | None
    method: Method | None
    block_size: int | Literal["auto"] | None
    window: int | None
    ngram: int | None
    guesses: int | None
    deterministic: bool
    fill: str | None
    seed: int | None
    stop: Sequence[str]
    ignore_eos: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    forwards_per_sync: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None


PREFIX_CACHE_BYTES = 256 << 20
"""KV that a loaded bundle keeps by default: some ten thousand tokens of a small model, two thousand of one of 7 B."""

READING: Options = {"max_new_tokens": 1, "method": "autoregressive", "ignore_eos": True}
"""Options of a request whose last forward writes the KV of the prompt's last token, and nothing beyond it."""

_GRAMMARS: tuple[GrammarKind, ...] = ("json_schema", "regex", "grammar")
_SHAPE = ("window", "ngram", "guesses")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one request gave."""

    text: str
    """Decoded text, special tokens left out, cut before a stop string."""
    token_ids: tuple[int, ...]
    """New tokens, the end-of-sequence token included where one was reached."""
    finish_reason: FinishReason
    """``closed`` is that of a stream that was closed before its end."""
    statistics: Statistics
    seed: int
    """What it was drawn with; the same request with it and the same n gives the same tokens."""
    logprobs: tuple[Logprob, ...] | None = field(repr=False)
    """One for each of ``token_ids``, where they were asked for."""
    forwards: tuple[ForwardRecord, ...] = field(repr=False)
    """Every decode forward: its block, its predictions and what it made known."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request in order: every option settled and in range."""

    prompt: list[int]
    method: Method
    block_size: BlockSize
    """n of every forward, or where ``lookahead`` is set, rows of the largest."""
    lookahead: LookaheadShape | None
    """W, N and G where that is the method."""
    fill: str
    sampling: Sampling
    logprobs: int | None
    constraint: Constraint | None
    max_new_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    forwards_per_sync: int | None
    """Where the loop stays on the device."""


class Model:
    """A loaded model, of a bundle or of a checkpoint: one engine, one request at a time.

    What its engine holds is free after ``close``, or where a ``with`` ends: on a device, memory that nobody else gets
    meanwhile. A second request while one runs (another thread, or a stream that is not exhausted) is refused with
    EngineError rather than queued: queueing is a scheduler's work.

    Attributes:
        facts: its defaults and limits.
        engine: what runs the forwards.
        codec: tokenizer and chat template.
        draft_model: what answers the ``model`` fill, with as many lanes as the engine has slots.
        pool: n-grams that requests with the ``pool`` fill share.
        prompt_state: what it keeps of the prompts it has read; None where it reads each anew.

    Args:
        forward_seconds: seconds of a forward by block size, where they are known; else they are measured before the
            first request for which n is chosen.
    """

    def __init__(
        self,
        facts: ModelFacts,
        engine: Engine,
        codec: TextCodec,
        *,
        draft_model: DraftModel | None = None,
        prompt_state: PromptState | None = None,
        forward_seconds: Mapping[int, float] | None = None,
    ) -> None:
        if draft_model and draft_model.num_lanes < engine.num_slots:
            raise OptionError(f"a draft model for {engine.num_slots} slots has {draft_model.num_lanes} lanes")
        self.facts = facts
        self.engine = engine
        self.codec = codec
        self.draft_model = draft_model
        self.pool = NgramPool()
        self.prompt_state = prompt_state
        self._forward_seconds = forward_seconds
        self._chooser: SizeChooser | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._device_loops: DeviceLoops | None = None
        self._grammars: GrammarCompiler | None = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(EngineError) if kind else nullcontext():  # a stream that the error left open hides no error
            self.close()

    def close(self) -> None:
        """Free what its engine holds, and a draft model's. It cannot run afterwards; closing it again does nothing.

        Raises:
            EngineError: a request is running, or a service is open.
        """
        if self._is_closed:
            return
        with self.in_use():
            self._is_closed = True
            if self._device_loops:
                self._device_loops.close()
            if self.draft_model:
                self.draft_model.close()
            self.engine.close()

    def generate(self, prompt: str | Sequence[int] | Messages, **options: Unpack[Options]) -> Generation:
        """Decode one prompt. Every method, block size and fill gives the tokens that autoregressive decoding gives: the
        model's greedy ones, or with a ``temperature`` those that the seed draws.

        Args:
            prompt: text, token ids, or chat messages (``{"role", "content"}``) for the model's chat template.
            options: see ``Options``.

        Raises:
            PromptError: the prompt is empty, or does not fit together with its new tokens.
            OptionError: an option is out of range.
            EngineError: the engine failed, or another request is running.
        """
        request = self.prepare(prompt, **options)
        with self.in_use():
            run = _Run(self, request)
            for _ in run.tokens():
                pass
        return run.result()

    def stream(self, prompt: str | Sequence[int] | Messages, **options: Unpack[Options]) -> Stream:
        """Like ``generate``, but an iterator of text deltas that never split a character; ``result`` has the rest."""
        return Stream(self, self.prepare(prompt, **options))

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The KV of texts that were read before; its ``statistics`` tell what it is worth."""
        return self.prompt_state.cache if self.prompt_state else None

    def save_prefix(self, path: str | Path, prompt: str | Sequence[int] | Messages) -> int:
        """Write the KV of a prompt to a file, for ``load_prefix`` of the same bundle; the number of its tokens.

        What is kept of it is used, the rest is computed. A snapshot that is there is replaced, in one step.

        Raises:
            PromptError: the prompt is empty or too long.
            OptionError: the model keeps no prompts, or not as much as this one.
            OutputError: the file is something else, or cannot be written.
            EngineError: the engine failed, or another request is running.
        """
        state = self.require_prompt_state()
        check_target(path)
        tokens = self.encode(prompt)
        self.generate(tokens, **READING)
        with self.in_use():
            snapshot = state.snapshot(tokens)
        write_snapshot(path, snapshot)
        return len(tokens)

    def load_prefix(self, path: str | Path) -> int:
        """Keep the KV that ``save_prefix`` wrote, so that prompts that begin so need not read it; the number of tokens.

        It is dropped for room like everything else in the prefix cache: the least recently used first.

        Raises:
            SnapshotError: missing, damaged, or of another bundle or version.
            OptionError: the model keeps no prompts, or not as much as this one.
            EngineError: another request is running.
        """
        state = self.require_prompt_state()
        snapshot = state.read(path)
        with self.in_use():
            state.keep(snapshot)
        return len(snapshot.tokens)

    def require_prompt_state(self) -> PromptState:
        """What it keeps of prompts.

        Raises:
            OptionError: nothing.
        """
        if self.prompt_state is None:
            raise OptionError("this model keeps no prompts: load its bundle with prefix_cache_bytes above 0")
        return self.prompt_state

    def encode(self, prompt: str | Sequence[int] | Messages) -> list[int]:
        """Token ids of a prompt in any of its forms.

        Raises:
            PromptError: empty, or holds something that is neither text, token ids nor messages.
        """
        if isinstance(prompt, str):
            ids = self.codec.encode(prompt) if prompt else []
        elif isinstance(prompt, bytes | Mapping) or not _is_indexed(prompt):
            raise PromptError(f"a prompt is text, token ids or messages, got {type(prompt).__name__}")
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.codec.encode_chat(check_messages(prompt, "prompt"))
        else:
            ids = [self._check_token(token) for token in prompt]
        if not ids:
            raise PromptError("the prompt is empty: it must hold at least one token")
        if max(ids) >= (vocabulary := self.engine.geometry.vocab_size):
            raise PromptError(
                f"the tokenizer gives token {max(ids)}, but the model has {vocabulary}: they do not match"
            )
        return ids

    def _check_token(self, token: object) -> int:
        vocabulary = self.engine.geometry.vocab_size
        is_integer = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not is_integer or not 0 <= (index := int(token)) < vocabulary:  # type: ignore[call-overload]
            raise PromptError(f"a prompt of token ids must hold integers from 0 to {vocabulary - 1}, got {token!r}")
        return int(index)

    def prepare(self, prompt: str | Sequence[int] | Messages, **options: Unpack[Options]) -> Prepared:
        """Settle a request's options and check them, without running anything; see ``generate`` for each.

        Raises:
            PromptError, OptionError: what is wrong with it.
        """
        unknown = sorted(options.keys() - Options.__annotations__.keys())
        if unknown:
            raise OptionError(f"no such option: {unknown[0]}; there are {', '.join(Options.__annotations__)}")
        for name in ("deterministic", "ignore_eos"):
            if not isinstance(options.get(name), bool | None):
                raise OptionError(f"{name} must be True or False, got {options[name]!r}")
        method = self._settle_method(options.get("method"), options.get("block_size"))
        shape = self._settle_lookahead(method, options)
        fill = self._settle_fill(options.get("fill"), method)
        stop = _settle_stop(options.get("stop"))
        sampling = self._settle_sampling(options)
        num_logprobs = _settle_logprobs(options.get("logprobs"))
        constraint = self._compile_grammar(options)
        forwards_per_sync = options.get("forwards_per_sync")
        if shape or forwards_per_sync is not None:
            _refuse_beside("forwards_per_sync" if shape is None else LOOKAHEAD, sampling, num_logprobs, constraint)
        if forwards_per_sync is not None:
            require_at_least("forwards_per_sync", forwards_per_sync, 1)
            block_size: BlockSize = self._settle_on_device(options, method, fill)
        elif shape:
            block_size = shape.max_rows
        else:
            block_size = self.settle_block_size(
                options.get("block_size"), method, deterministic=bool(options.get("deterministic"))
            )
        ids = self.encode(prompt)
        return Prepared(
            prompt=ids,
            method=method,
            block_size=block_size,
            lookahead=shape,
            fill=fill,
            sampling=sampling,
            logprobs=num_logprobs,
            constraint=constraint,
            max_new_tokens=_fit(len(ids), options.get("max_new_tokens"), self.facts.max_length),
            stop=stop,
            ignore_eos=bool(options.get("ignore_eos")),
            forwards_per_sync=forwards_per_sync,
        )

    def _settle_on_device(self, options: Options, method: Method, fill: str) -> int:
        """n of a loop that stays on the device, everything that is asked for beside it checked."""
        from cllm_export.runtime.device_request import FILLS, require_device_loop

        if method != "jacobi":
            raise OptionError(f"forwards_per_sync is for the method jacobi, and the method is {method}: say jacobi")
        if fill not in FILLS:
            raise OptionError(f"forwards_per_sync is for the fills {' and '.join(FILLS)}, and the fill is {fill!r}")
        asked = options.get("block_size")
        if asked == "auto":
            raise OptionError("forwards_per_sync excludes block_size 'auto': n is one in all of them; give a number")
        size = self.settle_block_size(asked, method, deterministic=True)
        assert size != "auto", "it is not chosen where a request is deterministic"
        num_eos = 0 if options.get("ignore_eos") else len(self.facts.eos_token_ids)
        require_device_loop(self.engine, block_size=size, num_eos=num_eos)
        return size

    def _settle_method(self, method: Method | None, block_size: object) -> Method:
        if method is None:
            trained = self.facts.trained_with
            is_chosen = block_size == "auto"  # blocks of the block loop keep their size
            return METHOD_OF_LOOP[trained.loop if trained and not is_chosen else "sliding"]
        require_one_of("method", method, (*METHODS, LOOKAHEAD))
        return method

    def _settle_sampling(self, options: Options) -> Sampling:
        seed = options.get("seed")
        if seed is None:
            seed = secrets.randbelow(MAX_SEED) if options.get("temperature") else 0
        sampling = Sampling(
            seed=seed,
            **{name: options[name] for name in _SAMPLING if options.get(name) is not None},  # type: ignore[literal-required]
        )
        sampling.check_tokens(self.engine.geometry.vocab_size)
        return sampling

    def _settle_lookahead(self, method: Method, options: Options) -> LookaheadShape | None:
        """W, N and G where the method is lookahead, and the engine ready for it."""
        given = {name: options[name] for name in _SHAPE if options.get(name) is not None}  # type: ignore[literal-required]
        if method != LOOKAHEAD:
            if given:
                raise OptionError(f"{next(iter(given))} is for the method lookahead, and the method is {method}")
            return None
        if options.get("block_size") is not None:
            raise OptionError("block_size is not for lookahead: window, ngram and guesses give the size of its block")
        shape = LookaheadShape(**given)
        shape.require_fitting(self.engine.geometry.max_block_size)
        self._lookahead_engine().require_lookahead()
        return shape

    def _lookahead_engine(self) -> LookaheadEngine:
        if not isinstance(self.engine, LookaheadEngine):
            raise OptionError(f"{type(self.engine).__name__} runs no lookahead graph: choose another method")
        return self.engine

    def _settle_fill(self, fill: str | None, method: Method) -> str:
        if fill is None:
            if method == LOOKAHEAD:
                return "prompt"
            if method == "speculative":
                return "model" if self.draft_model else "lookup"
            return self.facts.trained_with.fill if self.facts.trained_with else "pad"
        asks_model = "model" in parse_fill(fill)
        if asks_model and method == LOOKAHEAD:
            raise OptionError(f"fill {fill!r} is not for lookahead, whose window is filled once: leave model out")
        if asks_model and not self.draft_model:
            raise OptionError(
                f"fill {fill!r} needs a draft model: load(path, draft_model=...), --draft-model on the command line"
            )
        return fill

    def _compile_grammar(self, options: Options) -> Constraint | None:
        given = [kind for kind in _GRAMMARS if options.get(kind) is not None]
        if not given:
            return None
        if len(given) > 1:
            raise OptionError(f"{given[0]} and {given[1]} exclude each other: a text follows one grammar")
        if options.get("ignore_eos"):
            raise OptionError(f"{given[0]} excludes ignore_eos: a complete text ends with an end-of-sequence token")
        if self._grammars is None:
            self._grammars = GrammarCompiler(
                self.codec, vocab_size=self.engine.geometry.vocab_size, eos_token_ids=self.facts.eos_token_ids
            )
        return self._grammars.compile(given[0], options[given[0]])

    def make_decode(self, request: Prepared, stop_cut: StopCut | None = None) -> Decode:
        """What decodes a prepared request, once the KV of its prompt less the last token is written."""
        decoder = make_decoder(
            request.method,
            request.prompt,
            fill=request.fill,
            seed=request.sampling.seed,
            pad_token_id=pad_token(self.facts),
            pool=self.pool,
        )
        return self._decode_with(decoder, request, stop_cut)

    def make_loop(self, request: Prepared, *, stop_cut: StopCut | None, take: Taker) -> tuple[Task, Loop]:
        """The task of one request and what runs it, with the engine for itself."""
        if request.forwards_per_sync is not None:
            return self._make_device_loop(request, stop_cut, take)
        if request.lookahead is None:
            decode = self.make_decode(request, stop_cut)
            task = Task(request.prompt, decode, drafts=self.drafts_of(request), take=take)
            scheduler = self.make_scheduler(request.block_size)
            scheduler.submit(task)
            return task, scheduler
        pad = pad_token(self.facts)
        seed = request.sampling.seed
        fill = make_fill(request.fill, prompt=request.prompt, pad_token_id=pad, seed=seed, pool=self.pool)
        decoder = Lookahead(prompt=request.prompt, shape=request.lookahead, fill=fill)
        task = Task(request.prompt, self._decode_with(decoder, request, stop_cut), take=take)
        engine = self._lookahead_engine()
        return task, LookaheadLoop(engine, task, decoder, block_size=request.lookahead.max_rows, pad_token_id=pad)

    def _make_device_loop(self, request: Prepared, stop_cut: StopCut | None, take: Taker) -> tuple[Task, Loop]:
        from cllm_export.runtime.device_request import DeviceLoops, DeviceRequest, require_device_loop

        eos = self.eos_of(request)
        assert isinstance(request.block_size, int), "n of such a request is a number"
        assert request.forwards_per_sync, "and so is k"
        engine = require_device_loop(self.engine, block_size=request.block_size, num_eos=len(eos))
        self._device_loops = self._device_loops or DeviceLoops()
        loop = self._device_loops.find(
            engine, block_size=request.block_size, forwards_per_sync=request.forwards_per_sync
        )
        task = Task(request.prompt, self.make_decode(request, stop_cut), take=take)
        return task, DeviceRequest(
            loop,
            task,
            num_slots=engine.num_slots,
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=eos,
            fill_token=None if request.fill == "repeat" else pad_token(self.facts),
            memory=memory_of(engine, 0, self.prefix_cache),
        )

    def _decode_with(self, decoder: Decoder, request: Prepared, stop_cut: StopCut | None) -> Decode:
        sampler = None
        if request.constraint or not request.sampling.is_greedy:
            sampler = Sampler(
                request.sampling,
                prompt=request.prompt,
                vocab_size=self.engine.geometry.vocab_size,
                constraint=request.constraint,
            )
        return Decode(
            decoder,
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=self.eos_of(request),
            stop_cut=stop_cut,
            sampler=sampler,
            num_logprobs=request.logprobs,
        )

    def drafts_of(self, request: Prepared) -> str | None:
        """What kind of drafts a request decodes with: those of a kind are worth much the same. None for no drafts."""
        if request.method == "autoregressive":
            return None
        is_greedy = request.sampling.is_greedy and not request.constraint
        return f"{request.method}, {request.fill}, {'greedy' if is_greedy else 'drawn'}"

    def make_scheduler(self, block_size: BlockSize) -> Scheduler:
        """A scheduler for one request: it reads the prompt in the engine's own chunks."""
        return Scheduler(
            self.engine,
            block_size=self.size_policy(block_size),
            pad_token_id=pad_token(self.facts),
            reading_width=self.engine.prefill_chunk,
            drafter=self.draft_model,
            prefix_cache=self.prefix_cache,
        )

    def eos_of(self, request: Prepared) -> frozenset[int]:
        """The tokens that end a request."""
        return frozenset(() if request.ignore_eos else self.facts.eos_token_ids)

    def settle_block_size(
        self, block_size: BlockSize | None, method: Method = "jacobi", *, deterministic: bool = False
    ) -> BlockSize:
        """n of a request's forwards, or that it is to be chosen.

        Raises:
            OptionError: out of range for the model, or not to be chosen.
        """
        if block_size is not None and block_size != "auto":
            return self._check_block_size(block_size)
        if block_size == "auto" and deterministic:
            raise OptionError("block_size 'auto' and deterministic exclude each other: leave one out")
        if block_size == "auto" and method == "jacobi-block":
            raise OptionError("block_size 'auto' is for jacobi: a block of jacobi-block keeps its size; give a number")
        if self.engine.fixed_shapes:
            return self.engine.fixed_shapes.block_size
        if method == "autoregressive":
            return 1
        if method == "jacobi" and not deterministic:
            return "auto"
        return block_size or self.facts.block_size

    def _check_block_size(self, block_size: object) -> int:
        fixed, largest = self.engine.fixed_shapes, self.engine.geometry.max_block_size
        if not isinstance(block_size, int):
            raise OptionError(f"block_size must be an integer or 'auto', got {block_size!r}")
        require_at_least("block_size", block_size, 1)
        if fixed and block_size != fixed.block_size:
            raise OptionError(
                f"block_size must be {fixed.block_size}, which this engine is pinned to, got {block_size}"
            )
        if block_size > largest:
            raise OptionError(f"block_size must be at most {largest} for this model, got {block_size}")
        return block_size

    def size_policy(self, block_size: BlockSize) -> SizePolicy:
        """Who says n. The chooser is one for all requests; where T(n) is not known, it is measured here, once.

        Raises:
            EngineError: the engine failed.
        """
        if isinstance(block_size, int):
            return PinnedSize(block_size)
        if self._chooser is None:
            trained, largest = self.facts.trained_with, self.engine.geometry.max_block_size
            first = min(trained.block_size, largest) if trained else 1
            others = (size for size in BLOCK_SIZES if size <= largest and size not in (1, first))
            sizes = (1, *([first] if first > 1 else []), *others)
            seconds = self._forward_seconds or time_forwards(self.engine, sizes, pad_token_id=pad_token(self.facts))
            self._chooser = SizeChooser(sizes, first=first, known_times=seconds)
        return self._chooser

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the model for one user.

        Raises:
            EngineError: it is held already, or closed.
        """
        if not self._lock.acquire(blocking=False):
            raise EngineError("another request is running on this model: finish or close its stream first")
        try:
            if self._is_closed:
                raise EngineError("this model is closed; load its bundle again")
            yield
        finally:
            self._lock.release()


class Loop(Protocol):
    """Runs what it was given, a forward a step."""

    @property
    def is_idle(self) -> bool: ...

    def step(self) -> object: ...

    def cancel(self, task: Task) -> object:
        """End what runs, as where nobody reads on."""
        ...


class Stream(Iterator[str]):
    """Text deltas of one request, which starts with the first one read.

    Close it (or use it in a ``with``) to stop early; ``result`` reads what is left and gives the whole.
    """

    def __init__(self, model: Model, request: Prepared) -> None:
        self._run = _Run(model, request)
        self._deltas = self._iterate(model)

    def __next__(self) -> str:
        return next(self._deltas)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop here; the model is free for the next request."""
        self._deltas.close()

    def result(self) -> Generation:
        """The whole generation; runs what was not yet read.

        Raises:
            EngineError: the request never ran, because the model was busy or the stream was closed first.
        """
        for _ in self._deltas:
            pass
        return self._run.result()

    def _iterate(self, model: Model) -> Generator[str]:  # closing it unwinds the lock
        with model.in_use():
            for delta in self._run.text():
                if delta:
                    yield delta


class _Run:
    """One request on its way: a scheduler with nothing else to do, and the text of what it gives."""

    def __init__(self, model: Model, request: Prepared) -> None:
        self._model = model
        self._request = request
        self._eos = model.eos_of(request)
        self._stream = TextStream(model.codec, request.stop)
        self._num_read = 0
        self._delta = ""
        self._new: list[int] = []
        self._task: Task | None = None

    def text(self) -> Iterator[str]:
        """Text deltas, one for each forward."""
        for tokens in self.tokens():
            if not self._request.stop:
                self._read(tokens)
            delta, self._delta = self._delta, ""
            yield delta
        yield self._stream.flush()

    def tokens(self) -> Iterator[list[int]]:
        """New tokens, one list for each forward."""
        stop_cut = self._cut_at_stop if self._request.stop else None
        task, loop = self._model.make_loop(self._request, stop_cut=stop_cut, take=self._take)
        self._task = task
        try:
            while not loop.is_idle:
                loop.step()
                if task.error:
                    raise task.error
                if self._new:
                    new, self._new = self._new, []
                    yield new
        finally:
            loop.cancel(task)  # a stream that is closed early; nothing where it has ended

    def result(self) -> Generation:
        if self._task is None:
            raise EngineError("this request never ran: its model was busy, or it was closed before its first forward")
        decode = self._task.decode
        token_ids = [token for record in decode.records for token in record.new]
        self._read(token_ids[self._num_read :])
        self._stream.flush()
        return Generation(
            text=self._stream.text,
            token_ids=tuple(token_ids),
            finish_reason=decode.finish,
            seed=self._request.sampling.seed,
            logprobs=None if self._request.logprobs is None else tuple(decode.logprobs),
            forwards=tuple(decode.records),
            statistics=self._task.statistics(),
        )

    def _take(self, new: list[int]) -> None:
        self._new = new

    def _cut_at_stop(self, new: list[int]) -> int | None:
        for index in range(len(new)):
            self._read(new[index : index + 1])
            if self._stream.stopped:
                return index + 1
        return None

    def _read(self, tokens: list[int]) -> None:
        """Turn tokens into text; an end-of-sequence token is no text."""
        self._num_read += len(tokens)
        self._delta += self._stream.push([token for token in tokens if token not in self._eos])


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    num_slots: int | None = None,
    draft_model: str | Path | None = None,
    prefix_cache_bytes: int | None = None,
    provider: Provider = "cpu",
    cuda_graphs: bool = False,
) -> Model:
    """Load a bundle for generation.

    Args:
        path: a directory that ``cllm-export build`` wrote.
        num_slots: B, the requests that a ``Service`` decodes at once; by default the bundle's batch size, which one
            with fixed shapes is pinned to.
        threads: threads inside the engine; by default as many as the process may use. Of the CPU alone.
        draft_model: another bundle with the same tokenizer, smaller or a CLLM, for requests with the ``model`` fill.
        prefix_cache_bytes: KV to keep of texts that were read and given, in the host's memory, so that a prompt that
            begins alike is read from where they part; 0 reads every prompt anew. By default 256 MiB, and none where the
            engine cannot hand out its rows (``cuda``).
        provider: ``cpu`` and ``cuda`` are ONNX Runtime's; ``tensorrt`` runs the bundle's plan for this machine.
        cuda_graphs: of ``cuda`` alone: ONNX Runtime records the forward of each n and extent, and replays it.

    Raises:
        OptionError: an option is out of range, or the draft model does not fit the model: which and how is told.
        GpuError, PlanError: no GPU, or no plan that runs on it.
        BundleError: not a bundle, or damaged (sizes are checked; ``cllm-export verify`` checks checksums).
        EngineError: the engine does not take the graph.
        MissingExtraError: no engine is installed.
    """
    if threads is not None:
        require_at_least("threads", threads, 1)
    if prefix_cache_bytes is not None:
        require_at_least("prefix_cache_bytes", prefix_cache_bytes, 0)
    bundle = open_bundle(path)
    draft = open_bundle(draft_model) if draft_model else None
    if draft:
        check_pair(bundle, draft)
    engine = open_engine(bundle, provider, num_slots=num_slots, threads=threads, cuda_graphs=cuda_graphs)
    is_cpu = isinstance(engine, OrtEngine)
    return Model(
        bundle.manifest,
        engine,
        TextCodec.of_bundle(bundle),
        draft_model=_load_draft_model(draft, engine.num_slots, threads, provider, cuda_graphs) if draft else None,
        prompt_state=_make_prompt_state(bundle, engine, prefix_cache_bytes),
        forward_seconds=read_latency(bundle, num_slots=engine.num_slots, threads=threads) if is_cpu else None,
    )


def _make_prompt_state(bundle: Bundle, engine: Engine, max_bytes: int | None) -> PromptState | None:
    if not isinstance(engine, RowEngine):
        if max_bytes:
            raise OptionError(f"{type(engine).__name__} keeps no prompts: leave prefix_cache_bytes out, or give 0")
        return None
    if max_bytes == 0:
        return None
    return PromptState(
        engine,
        max_bytes=PREFIX_CACHE_BYTES if max_bytes is None else max_bytes,
        fingerprint=bundle.fingerprint,
        max_length=bundle.manifest.max_length,
    )


def _load_draft_model(
    bundle: Bundle, num_slots: int, threads: int | None, provider: Provider, cuda_graphs: bool
) -> DraftModel:
    pinned = bundle.manifest.graphs["greedy"].fixed_shapes
    if pinned and pinned.batch_size < num_slots:
        raise OptionError(
            f"draft model {bundle.path} is pinned to {pinned.batch_size} slots and the model has {num_slots}: "
            f"build it with --batch-size {num_slots}, or without --fixed-shapes"
        )
    return DraftModel(
        open_engine(
            bundle,
            provider,
            num_slots=None if pinned else num_slots,
            threads=threads,
            cuda_graphs=cuda_graphs,
        ),
        max_length=bundle.manifest.max_length,
        pad_token_id=pad_token(bundle.manifest),
        trained_with=bundle.manifest.trained_with,
    )


def _refuse_beside(what: str, sampling: Sampling, logprobs: int | None, constraint: Constraint | None) -> None:
    """Refuse what none but a loop that asks for logits can do."""
    given = {"sampling": not sampling.is_greedy, "logprobs": logprobs is not None, "a grammar": constraint is not None}
    if asked := next((name for name, is_given in given.items() if is_given), None):
        instead = "choose another method" if what == LOOKAHEAD else "leave one of them out"
        raise OptionError(f"{what} is for greedy requests and excludes {asked}: {instead}")


def _settle_stop(stop: Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
    if not is_list or not all(isinstance(text, str) and text for text in stop):
        raise OptionError(f"stop must be a list of non-empty strings, got {stop!r}")
    return tuple(stop)


def _settle_logprobs(count: int | None) -> int | None:
    if count is not None:
        require_at_least("logprobs", count, 0)
        if count > MAX_LOGPROBS:
            raise OptionError(f"logprobs must be an integer from 0 to {MAX_LOGPROBS}, got {count}")
    return count


def _is_indexed(prompt: object) -> bool:
    """Whether it has items from 0 on; an array without axes has none."""
    return hasattr(prompt, "__getitem__") and getattr(prompt, "ndim", 1) > 0


def pad_token(facts: ModelFacts) -> int:
    """Any token fills a block safely: the pad token, else an end-of-sequence token, else token 0."""
    if facts.pad_token_id is not None:
        return facts.pad_token_id
    return facts.eos_token_ids[0] if facts.eos_token_ids else 0


def _fit(prompt_length: int, max_new_tokens: int | None, max_length: int) -> int:
    room = max_length - prompt_length
    if room < 1:
        raise PromptError(
            f"the prompt has {prompt_length} tokens and this model holds {max_length} in all, "
            "at least one of them new: shorten the prompt or build with a larger --max-length"
        )
    if max_new_tokens is None:
        return room
    require_at_least("max_new_tokens", max_new_tokens, 1)
    if max_new_tokens > room:
        raise PromptError(
            f"{prompt_length} prompt tokens and {max_new_tokens} new ones need {prompt_length + max_new_tokens}, this "
            f"model holds {max_length}: ask for at most {room}, or build with a larger --max-length"
        )
    return max_new_tokens
