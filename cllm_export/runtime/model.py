"""Load a bundle and generate from it: the API that services embed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cllm_export.errors import EngineError, OptionError, PromptError
from cllm_export.prompts import Chat, as_chat, is_message, split_chat_arguments
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.draft_model import DraftModel
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target, write_snapshot
from cllm_export.runtime.decoding.prefix.prompt_state import PromptState, require_prompt_state
from cllm_export.runtime.decoding.text import Messages, TextCodec
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.lease import Lease
from cllm_export.runtime.loops import LoopMaker
from cllm_export.runtime.options import PREFILL_ONLY, GenerateOptions, ModelFacts, ModelLimits, override
from cllm_export.runtime.request_run import Generation, RequestMaker, RequestRun, Stream


class Model:
    """A loaded model, of a bundle or of a checkpoint: one engine, one request at a time.

    The engine holds memory, on a GPU the device's. ``close``, or the end of a ``with``, frees it. While a request runs,
    a second one is refused with EngineError. It is not queued: queueing is a scheduler's work. A stream that is not
    exhausted counts as running.

    Attributes:
        facts: the model's defaults and limits.
        engine: runs the forwards.
        codec: tokenizer and chat template.
        draft_model: serves the ``model`` proposer. It has at least as many lanes as the engine has slots.
        pool: n-grams that requests with the ``pool`` proposer share.
        prompt_state: the kept KV of earlier prompts; None if every prompt is prefilled in full.
        limits: the limits that the options of a request are resolved against.
        requests: makes the runs of the model's requests.
        loops: makes the loops that run them on the engine.
        lease: lends the engine to one user at a time.

    Args:
        forward_seconds: seconds of a forward by block size, if they are known. Otherwise they are measured before the
            first request for which n is chosen.
        exact_sizes: block sizes that were compared with n = 1 on such an engine; by default none. The others are
            compared before the first request for which n is chosen, as many as a moment allows.
        keep_sizes: takes the compared sizes then, to know them another time.
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
        exact_sizes: ExactSizes | None = None,
        keep_sizes: Callable[[ExactSizes], None] = lambda _: None,
    ) -> None:
        if draft_model and draft_model.num_lanes < engine.num_slots:
            raise OptionError(f"a draft model for {engine.num_slots} slots has {draft_model.num_lanes} lanes")
        self.facts = facts
        self.engine = engine
        self.codec = codec
        self.draft_model = draft_model
        self.pool = NgramPool()
        self.prompt_state = prompt_state
        self.limits = ModelLimits.of(facts, engine, has_draft_model=draft_model is not None)
        self.requests = RequestMaker(self.limits, codec, self.pool)
        self.loops = LoopMaker(
            engine,
            self.limits,
            draft_model=draft_model,
            prefix_cache=self.prefix_cache,
            forward_seconds=forward_seconds,
            exact_sizes=exact_sizes or ExactSizes(),
            keep_sizes=keep_sizes,
        )
        self.lease = Lease()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(EngineError) if kind else nullcontext():  # an open stream must not hide the first error
            self.close()

    def close(self) -> None:
        """Free the memory of the engine and of the draft model. The model cannot run afterwards.

        Closing it again does nothing.

        Raises:
            EngineError: a request is running, or a service is open.
        """
        if self.lease.is_closed:
            return
        with self.lease.hold():
            self.lease.is_closed = True
            self.loops.close()
            if self.draft_model:
                self.draft_model.close()
            self.engine.close()

    def generate(
        self, prompt: str | Sequence[int] | Messages, options: GenerateOptions | None = None, **overrides: Any
    ) -> Generation:
        """Decode one prompt.

        At every fixed n each method and proposer gives the tokens that autoregressive decoding gives at that n. These
        are the model's greedy tokens, or with a ``temperature`` the tokens that the seed draws. Another n may round a
        near tie differently. ``auto``, the default of ``jacobi``, gives the tokens of n = 1: it uses only sizes that
        are bit-equal to n = 1 on this engine, see ``auto_sizes``.

        Args:
            prompt: text, token ids, or chat messages (``{"role", "content"}``) for the model's chat template.
            options: options of the request; by default ``GenerateOptions()``.
            overrides: single options by name, such as ``temperature=0.8``. Names and values are those of
                ``GenerateOptions``, which checks them. For messages, arguments of the chat template too, such as
                ``tools``: see ``Chat``. None means not given.

        Raises:
            PromptError: the prompt is empty, or does not fit together with its new tokens.
            OptionError: there is no such option, or one is out of range.
            GrammarError: the grammar matches no text, or leads the text to a dead end.
            EngineError: the engine failed, or another request is running.
        """
        run = self._make_run(prompt, options, overrides)
        with self.lease.hold():
            for _ in run.drive(self.loops):
                pass
        return run.result()

    def stream(
        self, prompt: str | Sequence[int] | Messages, options: GenerateOptions | None = None, **overrides: Any
    ) -> Stream:
        """Like ``generate``, but returns an iterator of text deltas, which never split a character.

        Its ``result`` returns the whole generation.
        """
        return Stream(self._make_run(prompt, options, overrides), self.loops, self.lease)

    def _make_run(
        self, prompt: str | Sequence[int] | Messages, options: GenerateOptions | None, overrides: Mapping[str, Any]
    ) -> RequestRun:
        arguments, overrides = split_chat_arguments(overrides)
        given = override(options, overrides)
        run = self.requests.make(self.encode(prompt, **arguments), given)
        self.loops.require(run.request)
        return run

    def compare_sizes(self) -> tuple[int, ...]:
        """Compare every block size that ``auto`` may choose with n = 1, however long that takes.

        For a model whose forwards are too slow to compare them all before a first request. A 7 B model takes minutes on
        a CPU. Call it once, before a ``Service``: on the CPU, ``latency.json`` keeps what was found for the next load
        with as many slots and threads. Sizes that were compared before are not compared again. Returns ``auto_sizes``.

        Raises:
            OptionError: the engine has fixed shapes, so that n is one number.
            EngineError: the engine failed, a request is running, or a service is open.
        """
        if fixed := self.engine.fixed_shapes:
            raise OptionError(f"this model has the block size {fixed.block_size} alone: there is no other to compare")
        with self.lease.hold():
            return self.loops.compare_sizes().sizes

    @property
    def auto_sizes(self) -> tuple[int, ...] | None:
        """The block sizes that ``auto`` chooses among: those whose rows are bit-equal to those of n = 1 here.

        Where there is no other than 1, it is the one n that ``auto`` means. None until the first request for which n is
        chosen, because its sizes are compared then.
        """
        return self.loops.auto_sizes

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The cache of the KV of earlier texts. Its ``statistics`` show how much it saves."""
        return self.prompt_state.cache if self.prompt_state else None

    def save_prefix(self, path: str | Path, prompt: str | Sequence[int] | Messages) -> int:
        """Write the KV of a prompt to a file, for ``load_prefix`` of the same bundle. Returns its number of tokens.

        KV rows that the prefix cache has are used; the rest is computed. An existing snapshot is replaced atomically.

        Raises:
            PromptError: the prompt is empty or too long.
            OptionError: the model has no prefix cache, or a cache too small for this prompt.
            OutputError: the file exists and is no snapshot, or it cannot be written.
            EngineError: the engine failed, or another request is running.
        """
        state = require_prompt_state(self.prompt_state)
        check_target(path)
        tokens = self.encode(prompt)
        self.generate(tokens, PREFILL_ONLY)
        with self.lease.hold():
            snapshot = state.snapshot(tokens)
        write_snapshot(path, snapshot)
        return len(tokens)

    def load_prefix(self, path: str | Path) -> int:
        """Load KV that ``save_prefix`` wrote into the prefix cache. Returns the number of tokens.

        Prompts that begin with these tokens are then prefilled only from their end on. The entry can be evicted like
        every other entry of the cache: the least recently used goes first.

        Raises:
            SnapshotError: the file is missing, damaged, or of another bundle or version.
            OptionError: the model has no prefix cache, or a cache too small for this prompt.
            EngineError: another request is running.
        """
        state = require_prompt_state(self.prompt_state)
        snapshot = state.read(path)
        with self.lease.hold():
            state.keep(snapshot)
        return len(snapshot.tokens)

    def encode(self, prompt: str | Sequence[int] | Messages, **arguments: Any) -> list[int]:
        """Token ids of a prompt in any of its forms. ``arguments`` of the chat template are those of ``Chat``.

        Raises:
            PromptError: the prompt is empty, or is neither text, token ids nor messages.
        """
        if isinstance(prompt, Chat) or (_is_indexed(prompt) and len(prompt) and is_message(prompt[0])):
            ids = self.codec.encode_chat(as_chat(prompt, arguments))  # type: ignore[arg-type]
        elif arguments:
            raise PromptError(f"{next(iter(arguments))} is for chat messages, and the prompt has none")
        elif isinstance(prompt, str):
            ids = self.codec.encode(prompt) if prompt else []
        elif isinstance(prompt, bytes | Mapping) or not _is_indexed(prompt):
            raise PromptError(f"a prompt is text, token ids or messages, got {type(prompt).__name__}")
        else:
            ids = [self._check_token(token) for token in prompt]
        if not ids:
            raise PromptError("the prompt is empty: it must hold at least one token")
        if max(ids) >= (vocabulary := self.engine.geometry.vocab_size):
            text = self.codec.tokenizer.id_to_token(max(ids))
            raise PromptError(
                f"the prompt holds {text!r}, token {max(ids)} of the tokenizer, but the model knows {vocabulary} "
                "tokens: leave it out, or build from a checkpoint whose embedding has it"
            )
        return ids

    def _check_token(self, token: object) -> int:
        vocabulary = self.engine.geometry.vocab_size
        is_integer = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not is_integer or not 0 <= (index := int(token)) < vocabulary:  # type: ignore[call-overload]
            raise PromptError(f"a prompt of token ids must hold integers from 0 to {vocabulary - 1}, got {token!r}")
        return int(index)


def _is_indexed(prompt: object) -> bool:
    """Whether a prompt can be indexed from 0. An array without axes cannot, nor can a mapping."""
    return hasattr(prompt, "__getitem__") and not isinstance(prompt, Mapping) and getattr(prompt, "ndim", 1) > 0
