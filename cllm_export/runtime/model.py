"""Load a bundle and generate from it: the API that services embed."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import EngineError, OptionError, PromptError
from cllm_export.prompts import check_messages
from cllm_export.runtime.decoding.block_size.chooser import BLOCK_SIZES, PinnedSize, SizeChooser, SizePolicy
from cllm_export.runtime.decoding.block_size.time_forwards import time_forwards
from cllm_export.runtime.decoding.constraint import Constraint, GrammarCompiler
from cllm_export.runtime.decoding.draft_model import DraftModel
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.drafts.sources import make_fill, parse_fill
from cllm_export.runtime.decoding.jacobi import Decoder
from cllm_export.runtime.decoding.lookahead.layout import LookaheadShape
from cllm_export.runtime.decoding.lookahead.loop import LookaheadLoop
from cllm_export.runtime.decoding.lookahead.policy import Lookahead
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target, write_snapshot
from cllm_export.runtime.decoding.prefix.prompt_state import PromptState
from cllm_export.runtime.decoding.request import (
    LOOKAHEAD,
    METHOD_OF_LOOP,
    METHODS,
    Decode,
    Method,
    StopCut,
    make_decoder,
)
from cllm_export.runtime.decoding.sampling import MAX_SEED, Sampler, Sampling
from cllm_export.runtime.decoding.scheduler import Scheduler
from cllm_export.runtime.decoding.slot import memory_of
from cllm_export.runtime.decoding.task import Taker, Task
from cllm_export.runtime.decoding.text import Messages, TextCodec
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.options import (
    GRAMMARS,
    READING,
    SAMPLING,
    SHAPE,
    BlockSize,
    ModelFacts,
    Options,
    Prepared,
    fit,
    pad_token,
    refuse_beside,
    settle_logprobs,
    settle_stop,
)
from cllm_export.runtime.request_run import Generation, Loop, RequestRun, Stream

if TYPE_CHECKING:
    from cllm_export.tensorrt.loop.device_request import DeviceLoops


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
        """Decode one prompt.

        At every fixed n each method and fill gives the tokens that autoregressive decoding gives at that n: the model's
        greedy ones, or with a ``temperature`` those that the seed draws. Another n may round a near tie otherwise, and
        so may ``auto``, the default of ``jacobi``, on a processor where this was not checked.

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
            run = RequestRun(self, request)
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
        stop = settle_stop(options.get("stop"))
        sampling = self._settle_sampling(options)
        num_logprobs = settle_logprobs(options.get("logprobs"))
        constraint = self._compile_grammar(options)
        forwards_per_sync = options.get("forwards_per_sync")
        if shape or forwards_per_sync is not None:
            refuse_beside("forwards_per_sync" if shape is None else LOOKAHEAD, sampling, num_logprobs, constraint)
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
            max_new_tokens=fit(len(ids), options.get("max_new_tokens"), self.facts.max_length),
            stop=stop,
            ignore_eos=bool(options.get("ignore_eos")),
            forwards_per_sync=forwards_per_sync,
        )

    def _settle_on_device(self, options: Options, method: Method, fill: str) -> int:
        """n of a loop that stays on the device, everything that is asked for beside it checked."""
        from cllm_export.tensorrt.loop.device_request import FILLS, require_device_loop

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
            **{name: options[name] for name in SAMPLING if options.get(name) is not None},  # type: ignore[literal-required]
        )
        sampling.check_tokens(self.engine.geometry.vocab_size)
        return sampling

    def _settle_lookahead(self, method: Method, options: Options) -> LookaheadShape | None:
        """W, N and G where the method is lookahead, and the engine ready for it."""
        given = {name: options[name] for name in SHAPE if options.get(name) is not None}  # type: ignore[literal-required]
        if method != LOOKAHEAD:
            if given:
                raise OptionError(f"{next(iter(given))} is for the method lookahead, and the method is {method}")
            return None
        if options.get("block_size") is not None:
            raise OptionError("block_size is not for lookahead: window, ngram and guesses give the size of its block")
        shape = LookaheadShape(**given)
        shape.require_fitting(self.engine.geometry.max_block_size)
        self.engine.require_lookahead()
        return shape

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
            raise OptionError(f"fill {fill!r} needs a draft model: give draft_model where the bundle is loaded")
        return fill

    def _compile_grammar(self, options: Options) -> Constraint | None:
        given = [kind for kind in GRAMMARS if options.get(kind) is not None]
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
        size = request.lookahead.max_rows
        return task, LookaheadLoop(self.engine, task, decoder, block_size=size, pad_token_id=pad)

    def _make_device_loop(self, request: Prepared, stop_cut: StopCut | None, take: Taker) -> tuple[Task, Loop]:
        from cllm_export.tensorrt.loop.device_request import DeviceLoops, DeviceRequest, require_device_loop

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


def _is_indexed(prompt: object) -> bool:
    """Whether it has items from 0 on; an array without axes has none."""
    return hasattr(prompt, "__getitem__") and getattr(prompt, "ndim", 1) > 0
