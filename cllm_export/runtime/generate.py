"""Load a bundle and generate from it: the API that services embed."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np

from cllm_export.bundle import FILLS, FillName, TrainedWith, open_bundle, require_one_of
from cllm_export.contract import require_at_least
from cllm_export.errors import EngineError, OptionError, PromptError
from cllm_export.prompts import check_messages
from cllm_export.runtime.constraint import Constraint, GrammarCompiler, GrammarKind
from cllm_export.runtime.engine import Engine
from cllm_export.runtime.ort_engine import OrtEngine
from cllm_export.runtime.providers import Provider, open_engine
from cllm_export.runtime.request import (
    METHOD_OF_LOOP,
    METHODS,
    Decode,
    FinishReason,
    Method,
    StopCut,
    make_decoder,
)
from cllm_export.runtime.sampling import MAX_LOGPROBS, MAX_SEED, Logprob, Sampler, Sampling
from cllm_export.runtime.statistics import ForwardRecord, Statistics, summarize
from cllm_export.runtime.text import Messages, TextCodec, TextStream

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
    "prefill",
]


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
        method: ``jacobi`` (sliding), ``jacobi-block`` (the paper's) or ``autoregressive``; by default the loop the
            model was trained with, else ``jacobi``.
        block_size: n, 1 to the model's largest; by default the model's, and 1 for ``autoregressive``.
        fill: ``pad``, ``repeat``, ``prompt`` or ``lookup``; by default what it was trained with, else ``pad``.
        seed: of the noise that samples, and of the ``prompt`` fill; by default a fresh one for each sampled request,
            which ``Generation.seed`` tells.
        stop: strings to stop at; the text is cut before the first one.
        ignore_eos: decode on past an end-of-sequence token, up to the limit: for measuring.
        temperature, top_k, top_p, min_p, repetition_penalty, logit_bias: see ``Sampling``; by default greedy.
        json_schema, regex, grammar: what the text must match (extra ``grammar``); one of them at most. ``grammar`` is a
            Lark grammar as llguidance takes it. A text that a limit or a stop string cuts is a beginning of a match.
        logprobs: log-probabilities of each new token, and this many of the most probable ones beside it, 0 to 20.
    """

    max_new_tokens: int | None
    method: Method | None
    block_size: int | None
    fill: FillName | None
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
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None


_GRAMMARS: tuple[GrammarKind, ...] = ("json_schema", "regex", "grammar")
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
    """What it was drawn with; the same request with it gives the same tokens."""
    logprobs: tuple[Logprob, ...] | None = field(repr=False)
    """One for each of ``token_ids``, where they were asked for."""
    forwards: tuple[ForwardRecord, ...] = field(repr=False)
    """Every decode forward: its block, its predictions and what it made known."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request in order: every option settled and in range."""

    prompt: list[int]
    method: Method
    block_size: int
    fill: FillName
    sampling: Sampling
    logprobs: int | None
    constraint: Constraint | None
    max_new_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool


class Model:
    """A loaded model, of a bundle or of a checkpoint: one engine, one request at a time.

    A second request while one runs (another thread, or a stream that is not exhausted) is refused with EngineError
    rather than queued: queueing is a scheduler's work.

    Attributes:
        facts: its defaults and limits.
        engine: what runs the forwards.
        codec: tokenizer and chat template.
    """

    def __init__(self, facts: ModelFacts, engine: Engine, codec: TextCodec) -> None:
        self.facts = facts
        self.engine = engine
        self.codec = codec
        self._lock = threading.Lock()
        self._grammars: GrammarCompiler | None = None

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

    def encode(self, prompt: str | Sequence[int] | Messages) -> list[int]:
        """Token ids of a prompt in any of its forms.

        Raises:
            PromptError: empty, or holds something that is neither text, token ids nor messages.
        """
        if isinstance(prompt, str):
            ids = self.codec.encode(prompt) if prompt else []
        elif isinstance(prompt, bytes) or not hasattr(prompt, "__getitem__") or isinstance(prompt, Mapping):
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
        trained = self.facts.trained_with
        method = options.get("method")
        if method is None:
            method = METHOD_OF_LOOP[trained.loop if trained else "sliding"]
        require_one_of("method", method, METHODS)
        fill = options.get("fill")
        if fill is None:
            fill = trained.fill if trained else "pad"
        require_one_of("fill", fill, FILLS)
        stop = options.get("stop")
        if stop is None:
            stop = ()
        is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
        if not is_list or not all(isinstance(text, str) and text for text in stop):
            raise OptionError(f"stop must be a list of non-empty strings, got {stop!r}")
        seed = options.get("seed")
        if seed is None:
            seed = secrets.randbelow(MAX_SEED) if options.get("temperature") else 0
        sampling = Sampling(
            seed=seed,
            **{name: options[name] for name in _SAMPLING if options.get(name) is not None},  # type: ignore[literal-required]
        )
        sampling.check_tokens(self.engine.geometry.vocab_size)
        num_logprobs = options.get("logprobs")
        if num_logprobs is not None:
            require_at_least("logprobs", num_logprobs, 0)
            if num_logprobs > MAX_LOGPROBS:
                raise OptionError(f"logprobs must be an integer from 0 to {MAX_LOGPROBS}, got {num_logprobs}")
        constraint = self._compile_grammar(options)
        ids = self.encode(prompt)
        return Prepared(
            prompt=ids,
            method=method,
            block_size=self.settle_block_size(options.get("block_size"), method),
            fill=fill,
            sampling=sampling,
            logprobs=num_logprobs,
            constraint=constraint,
            max_new_tokens=_fit(len(ids), options.get("max_new_tokens"), self.facts.max_length),
            stop=tuple(stop),
            ignore_eos=bool(options.get("ignore_eos")),
        )

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
        )
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

    def eos_of(self, request: Prepared) -> frozenset[int]:
        """The tokens that end a request."""
        return frozenset(() if request.ignore_eos else self.facts.eos_token_ids)

    def settle_block_size(self, block_size: int | None, method: Method = "jacobi") -> int:
        """n of a request's forwards.

        Raises:
            OptionError: out of range for the model.
        """
        fixed, largest = self.engine.fixed_shapes, self.engine.geometry.max_block_size
        if block_size is None:
            pinned = fixed.block_size if fixed else None
            return pinned or (1 if method == "autoregressive" else self.facts.block_size)
        require_at_least("block_size", block_size, 1)
        if fixed and block_size != fixed.block_size:
            raise OptionError(
                f"block_size must be {fixed.block_size}, which this engine is pinned to, got {block_size}"
            )
        if block_size > largest:
            raise OptionError(f"block_size must be at most {largest} for this model, got {block_size}")
        return block_size

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the model for one user.

        Raises:
            EngineError: it is held already.
        """
        if not self._lock.acquire(blocking=False):
            raise EngineError("another request is running on this model: finish or close its stream first")
        try:
            yield
        finally:
            self._lock.release()


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
    """One request on its way: prefill, then forwards until it ends."""

    def __init__(self, model: Model, request: Prepared) -> None:
        self._model = model
        self._engine = model.engine
        self._request = request
        self._eos = model.eos_of(request)
        self._pad = pad_token(model.facts)
        self._stream = TextStream(model.codec, request.stop)
        self._num_read = 0
        self._delta = ""
        self._decode: Decode | None = None
        self._prefill_seconds = self._decode_seconds = self._engine_seconds = 0.0

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
        started = perf_counter()
        prefill(self._engine, self._request.prompt[:-1], self._pad)
        self._prefill_seconds = perf_counter() - started
        self._decode = self._model.make_decode(self._request, self._cut_at_stop if self._request.stop else None)
        yield from self._forwards(self._decode)

    def result(self) -> Generation:
        if self._decode is None:
            raise EngineError("this request never ran: its model was busy, or it was closed before its first forward")
        token_ids = [token for record in self._decode.records for token in record.new]
        self._read(token_ids[self._num_read :])
        self._stream.flush()
        return Generation(
            text=self._stream.text,
            token_ids=tuple(token_ids),
            finish_reason=self._decode.finish,
            seed=self._request.sampling.seed,
            logprobs=None if self._request.logprobs is None else tuple(self._decode.logprobs),
            forwards=tuple(self._decode.records),
            statistics=summarize(
                self._decode.records,
                prompt_tokens=len(self._request.prompt),
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                engine_seconds=self._engine_seconds,
            ),
        )

    def _forwards(self, decode: Decode) -> Iterator[list[int]]:
        """The loop: next block, one forward, commit, cut."""
        engine, idle = self._engine, self._engine.num_slots - 1
        with_logits, size = decode.needs_logits, self._request.block_size
        while decode.finish == "closed":
            started, engine_started = perf_counter(), engine.run_seconds
            write_index = decode.write_index
            tokens, num_committed = decode.next_block(size)
            if idle:
                blocks = [tokens] * (1 + idle)
                committed, indices = [num_committed] + [0] * idle, [write_index] + [0] * idle
                forward = engine.forward(blocks, committed, indices, with_logits=with_logits)
            else:
                forward = engine.forward((tokens,), (num_committed,), (write_index,), with_logits=with_logits)
            logits = None if forward.logits is None else forward.logits[0]
            new = decode.take(forward.next_ids[0], forward.num_accepted[0], logits)
            self._engine_seconds += engine.run_seconds - engine_started
            self._decode_seconds += perf_counter() - started
            yield new

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
    path: str | Path, *, threads: int | None = None, num_slots: int | None = None, provider: Provider = "cpu"
) -> Model:
    """Load a bundle for generation.

    Args:
        num_slots: B, the requests that a ``Service`` decodes at once; 1 by default. A bundle with fixed shapes has its
            own.
        path: a directory that ``cllm-export build`` wrote.
        threads: threads inside the engine; by default as many as the process may use. Of the CPU alone.
        provider: ``cpu`` and ``cuda`` are ONNX Runtime's; ``tensorrt`` runs the bundle's plan for this machine.

    Raises:
        GpuError, PlanError: no GPU, or no plan that runs on it.
        BundleError: not a bundle, or damaged (sizes are checked; ``cllm-export verify`` checks checksums).
        EngineError: the engine does not take the graph.
        MissingExtraError: no engine is installed.
    """
    if threads is not None:
        require_at_least("threads", threads, 1)
    bundle = open_bundle(path)
    if provider != "cpu":
        return Model(bundle.manifest, open_engine(bundle, provider, num_slots), TextCodec.of_bundle(bundle))
    pinned = bundle.manifest.graphs["greedy"].fixed_shapes
    engine = OrtEngine(bundle, num_slots=num_slots or (None if pinned else 1), threads=threads)
    return Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))


def prefill(engine: Engine, tokens: Sequence[int], pad_token_id: int) -> None:
    """Write the KV of the prompt minus its last token into slot 0, chunk by chunk; the other slots are empty.

    In an engine with fixed shapes the last chunk is padded; the rows of the padding are dead, as a rejected draft's.
    """
    fixed = engine.fixed_shapes
    size = engine.prefill_chunk
    for start in range(0, len(tokens), size):
        chunk = list(tokens[start : start + size])
        num_committed, write_index = [0] * engine.num_slots, [0] * engine.num_slots
        num_committed[0], write_index[0] = len(chunk), start
        padded = chunk + [pad_token_id] * (size - len(chunk)) if fixed else chunk
        engine.prefill([padded] * engine.num_slots, num_committed, write_index)


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
