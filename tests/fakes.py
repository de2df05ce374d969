"""Fakes for the unit tests: an engine that keeps the contract without tensors, and bundles that hold no model.

The fake engine has a real cache of rows. It writes the given tokens at the given places, including idle slots and dead
drafts, and reads whatever the cache holds. A loop with a wrong write index gets other tokens, not an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from hypothesis import settings
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cllm_export.bundle.contract import Batch, FixedShapes, Geometry, check_forward
from cllm_export.bundle.manifest import (
    CHAT_TEMPLATE_NAME,
    GREEDY_GRAPH,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    Bundle,
    GraphEntry,
    Manifest,
    describe_files,
    open_bundle,
    write_manifest,
)
from cllm_export.errors import EngineError
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.draft_model import DraftModel
from cllm_export.runtime.decoding.drafts.sources import Proposer
from cllm_export.runtime.decoding.jacobi import Autoregressive, BlockJacobi, SlidingJacobi
from cllm_export.runtime.decoding.prefix.prompt_state import PromptState
from cllm_export.runtime.decoding.statistics import ForwardRecord
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine, EngineBase, Forward, KvRows, prefill
from cllm_export.runtime.engines.kv_cache import check_row_shape, kv_length_bucket
from cllm_export.runtime.model import Model

PAD, EOS = 0, 1
"""The two special tokens of both fake tokenizers."""
GRAPH_FILE = "model.onnx"

properties = settings(deadline=None, derandomize=True, max_examples=150)
"""Settings of every hypothesis test: repeatable and without a deadline."""


PREFILL_CHUNK = 32
"""Tokens that one prefill forward of the fake engine takes."""


class Row(NamedTuple):
    """One KV row: the token written there, and a digest of what that token saw when it was written."""

    token: int
    context: int


UNWRITTEN = Row(-1, -1)


class LanguageModel(Protocol):
    """A model of two layers: ``context`` is what a row stores of the tokens it sees, ``predict`` the next token."""

    def context(self, tokens: Sequence[int]) -> int: ...

    def predict(self, rows: Sequence[Row]) -> int: ...


class HashModel:
    """Arbitrary but deterministic tokens, derived from the position and the last ``window`` rows.

    With window 0, only the position matters, so a draft is right at once. With None, every earlier row matters, so one
    wrong token makes all later tokens wrong.
    """

    def __init__(self, *, vocab_size: int, window: int | None = None, seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._window = window
        self._seed = seed

    def context(self, tokens: Sequence[int]) -> int:
        return hash((self._seed, len(tokens), *tokens[self._first(tokens) :]))

    def predict(self, rows: Sequence[Row]) -> int:
        contexts = [row.context for row in rows[self._first(rows) :]]
        return hash((self._seed, len(rows), *contexts)) % self._vocab_size

    def _first(self, items: Sequence[Any]) -> int:
        return 0 if self._window is None else max(0, len(items) - self._window)


class ScriptModel:
    """Gives ``script`` after a prompt while the last ``window`` tokens match the script, else a wrong token."""

    def __init__(self, *, prompt_length: int, script: Sequence[int], window: int | None = None) -> None:
        self._start = prompt_length
        self._script = list(script)
        self._window = window

    def context(self, tokens: Sequence[int]) -> int:
        return 0

    def predict(self, rows: Sequence[Row]) -> int:
        index = len(rows) - self._start
        if not 0 <= index < len(self._script):
            return self._script[-1]
        first = 0 if self._window is None else max(0, index - self._window)
        recited = [row.token for row in rows[self._start + first :]]
        right = self._script[index]
        return right if recited == self._script[first:index] else right ^ 1


def greedy(model: LanguageModel, prompt: Sequence[int], count: int, *, eos: Collection[int] = ()) -> list[int]:
    """The expected result: the model's own greedy tokens, without an engine, a cache or a loop of the project."""
    tokens = list(prompt)
    rows = [Row(token, model.context(tokens[: index + 1])) for index, token in enumerate(tokens)]
    while len(tokens) - len(prompt) < count and not (len(tokens) > len(prompt) and tokens[-1] in eos):
        tokens.append(model.predict(rows))
        rows.append(Row(tokens[-1], model.context(tokens)))
    return tokens[len(prompt) :]


ALL_EXACT = ExactSizes(equal=frozenset(range(1, 65)))


class Call(NamedTuple):
    """One recorded call of the fake engine."""

    kind: Literal["prefill", "forward", "rows"]
    input_ids: list[list[int]]
    num_committed: list[int]
    write_index: list[int]

    @staticmethod
    def of(kind: Literal["prefill", "forward", "rows"], batch: Batch) -> Call:
        """Record a call. Lists are copied, because a loop may reuse them."""
        blocks = [list(block) for block in batch.input_ids]
        return Call(kind, blocks, list(batch.num_committed), list(batch.write_index))


class FakeEngine(EngineBase):
    """An engine in pure Python that supports everything except loops on a device.

    ``calls`` records every call. ``rows`` is the cache [B][C].
    """

    can_copy_rows = True

    def __init__(
        self,
        model: LanguageModel,
        geometry: Geometry,
        *,
        num_slots: int = 1,
        fixed_shapes: FixedShapes | None = None,
    ) -> None:
        super().__init__(
            geometry,
            num_slots=fixed_shapes.batch_size if fixed_shapes else num_slots,
            prefill_chunk=fixed_shapes.block_size if fixed_shapes else PREFILL_CHUNK,
            fixed_shapes=fixed_shapes,
        )
        self._model = model
        self.calls: list[Call] = []
        self.is_closed = False
        self.num_rows_restored = 0
        self.rows = [[UNWRITTEN] * geometry.cache_length for _ in range(self.num_slots)]

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        if len(batch.input_ids[0]) > self.geometry.max_block_size:
            raise EngineError(f"a block of {len(batch.input_ids[0])} is above {self.geometry.max_block_size}")
        self._write(Call.of("forward", batch))
        next_ids = [
            [self._model.predict(rows[: start + row + 1]) for row in range(len(block))]
            for rows, block, start in zip(self.rows, batch.input_ids, batch.write_index, strict=True)
        ]
        accepted = [_count_right(*slot) for slot in zip(batch.input_ids, next_ids, batch.num_committed, strict=True)]
        if not with_logits:
            return Forward(next_ids, accepted)
        logits = np.stack(
            [
                [self._logits(rows[: start + row + 1], token) for row, token in enumerate(predicted)]
                for rows, predicted, start in zip(self.rows, next_ids, batch.write_index, strict=True)
            ]
        )
        return Forward(next_ids, accepted, logits)

    def require_lookahead(self) -> None:
        """The fake engine always supports lookahead."""

    def forward_rows(self, batch: Batch, row_offsets: NDArray[np.int64], row_mask: NDArray[np.bool_]) -> Forward:
        call = Call.of("rows", batch)
        self._check(call)
        self.calls.append(call)
        next_ids = [
            self._predict_rows(rows, block, start, row_offsets.tolist(), row_mask)
            for rows, block, start in zip(self.rows, call.input_ids, call.write_index, strict=True)
        ]
        right = zip(call.input_ids, next_ids, call.num_committed, strict=True)
        return Forward(next_ids, [_count_right(*slot) for slot in right])

    def _predict_rows(
        self, rows: list[Row], block: list[int], start: int, offsets: list[int], mask: NDArray[np.bool_]
    ) -> list[int]:
        """Write a block row by row. Each row depends on the cache below it and on the block's rows that it sees."""
        past, predicted = rows[:start], []
        seen_by = [sorted(np.flatnonzero(mask[row]).tolist(), key=offsets.__getitem__) for row in range(len(block))]
        for row, seen in enumerate(seen_by):
            tokens = [*(each.token for each in past), *(block[other] for other in seen)]
            context = self._model.context(tokens)
            if [offsets[other] for other in seen] != list(range(offsets[row] + 1)):  # no contiguous text
                context = hash((context, *(offsets[other] for other in seen)))
            rows[start + row] = Row(block[row], context)
        for seen in seen_by:
            predicted.append(self._model.predict([*past, *(rows[start + other] for other in seen)]))
        return predicted

    def _logits(self, rows: Sequence[Row], predicted: int) -> NDArray[np.float32]:
        """Random logits [V], seeded by what the model sees. The predicted token has the largest logit."""
        seed = abs(hash((predicted, *(row.context for row in rows))))
        logits = np.random.default_rng(seed).normal(size=self.geometry.vocab_size).astype(np.float32)
        logits[predicted] = logits.max() + np.float32(0.25)
        return logits

    def prefill(self, batch: Batch) -> None:
        self._write(Call.of("prefill", batch))

    def close(self) -> None:
        self.is_closed = True

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        """Token and context of each row, repeated in every tensor of the cache."""
        self._check_rows(slot, start, stop)
        g = self.geometry
        array = np.zeros((2 * g.num_layers, g.num_kv_heads, stop - start, g.head_dim), np.int64)
        for index, row in enumerate(self.rows[slot][start:stop]):
            assert row != UNWRITTEN, f"row {start + index} of slot {slot} was never written"
            array[:, :, index, :2] = row
        return array

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        self._check_rows(slot, start, stop)
        check_row_shape(rows, stop - start, geometry=self.geometry, dtype=np.dtype(np.int64))
        self.num_rows_restored += stop - start
        self.rows[slot][start:stop] = [Row(*map(int, row)) for row in rows[0, 0, :, :2]]

    def _write(self, call: Call) -> None:
        """Write the tokens of every slot, then the context of each token, as a decoder does layer by layer."""
        self._check(call)
        self.calls.append(call)
        for rows, block, start in zip(self.rows, call.input_ids, call.write_index, strict=True):
            tokens = [row.token for row in rows[:start]] + block
            for row, token in enumerate(block, start=start):
                rows[row] = Row(token, self._model.context(tokens[: row + 1]))

    def _check(self, call: Call) -> None:
        size = len(call.input_ids[0])
        lengths = {len(call.input_ids), len(call.num_committed), len(call.write_index)}
        if lengths != {self.num_slots} or {len(block) for block in call.input_ids} != {size} or not size:
            raise EngineError(f"the engine has {self.num_slots} slots and takes equal blocks, got {call}")
        if self.fixed_shapes and size != self.fixed_shapes.block_size:
            raise EngineError(f"this engine is pinned to blocks of {self.fixed_shapes.block_size}, got {size}")
        if not all(0 <= count <= size for count in call.num_committed):
            raise EngineError(f"num_committed must be 0 to {size}, got {call.num_committed}")
        if not all(0 <= token < self.geometry.vocab_size for block in call.input_ids for token in block):
            raise EngineError(f"tokens must be below {self.geometry.vocab_size}, got {call.input_ids}")
        kv_length = self.fixed_shapes.kv_length if self.fixed_shapes else self._kv_length(max(call.write_index) + size)
        check_forward(block_size=size, write_index=call.write_index, kv_length=kv_length, geometry=self.geometry)

    def _kv_length(self, needed: int) -> int:
        return kv_length_bucket(needed, self.geometry.cache_length)


def _count_right(block: Sequence[int], next_ids: Sequence[int], num_committed: int) -> int:
    if not num_committed:
        return 0
    right = num_committed
    while right < len(block) and block[right] == next_ids[right - 1]:
        right += 1
    return right


def make_geometry(*, vocab_size: int = 32, max_length: int = 64, max_block_size: int = 16) -> Geometry:
    """The geometry of a fake model. Only the numbers that bound a forward matter."""
    return Geometry(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=32,
        vocab_size=vocab_size,
        cache_length=max_length + max_block_size - 1,
        max_block_size=max_block_size,
    )


class RoundingEngine(FakeEngine):
    """Rounds otherwise where it is told to: logits, or a KV row, are off in their last bits.

    Args:
        logits_of: whether the logits of row ``index`` of a forward of n tokens are off, by n, index and slot.
        kv_of: whether its KV is off.
    """

    def __init__(
        self,
        *,
        logits_of: Callable[[int, int, int], bool] = lambda *_: False,
        kv_of: Callable[[int, int, int], bool] = lambda *_: False,
        num_slots: int = 1,
        max_length: int = 64,
        max_block_size: int = 16,
    ) -> None:
        geometry = make_geometry(vocab_size=64, max_length=max_length, max_block_size=max_block_size)
        super().__init__(HashModel(vocab_size=64), geometry, num_slots=num_slots)
        self._logits_of, self._kv_of = logits_of, kv_of
        self._off: set[tuple[int, int]] = set()

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        forward, size = super().forward(batch, with_logits=with_logits), len(batch.input_ids[0])
        for slot, start in enumerate(batch.write_index):
            for index in range(size):
                (self._off.add if self._kv_of(size, index, slot) else self._off.discard)((slot, start + index))
                if forward.logits is not None and self._logits_of(size, index, slot):
                    forward.logits[slot, index] += np.float32(1e-7)
        return forward

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        rows = super().read_rows(slot, start, stop)
        for index in range(start, stop):
            if (slot, index) in self._off:
                rows[-1, -1, index - start, -1] += 1
        return rows


def decode(
    decoder_type: type[SlidingJacobi] | type[BlockJacobi] | type[Autoregressive],
    engine: Engine,
    prompt: Sequence[int],
    *,
    block_size: int,
    proposer: Proposer,
    count: int,
) -> list[ForwardRecord]:
    """Prefill a prompt and run forwards until ``count`` tokens are known. Only the policy runs; no rule cuts it."""
    prefill(engine, prompt[:-1], PAD)
    decoder = decoder_type(last_token=prompt[-1], write_index=len(prompt) - 1, proposer=proposer)
    records: list[ForwardRecord] = []
    while sum(len(record.new) for record in records) < count:
        write_index = decoder.write_index
        tokens, num_committed = decoder.next_block(block_size)
        next_ids, num_accepted, _ = engine.forward(Batch([tokens], [num_committed], [write_index]))
        commit = decoder.commit(next_ids[0], num_accepted[0])
        records.append(ForwardRecord(write_index, tokens, next_ids[0], commit.num_accepted, commit.tokens))
    return records


def tokens_of(records: Sequence[ForwardRecord]) -> list[int]:
    """The new tokens of a run, in order."""
    return [token for record in records for token in record.new]


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE, like that of Qwen and Llama 3. An emoji is four tokens, and any ids can be decoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "select the name where the city"], trainer)
    return tokenizer


def llama_style_tokenizer():
    """As older Llama checkpoints have it: a normalizer that writes spaces, and special tokens that pass through it."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdx<>|im_end"]
    vocab = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    special = [AddedToken(text, normalized=True, special=True) for text in ("<unk>", "<s>", "</s>", "<|im_end|>")]
    tokenizer.add_special_tokens(special)
    return tokenizer


@functools.cache
def byte_fallback_tokenizer() -> Tokenizer:
    """Characters with byte fallback, like Llama 2, which CLLMs are made from. A newline is a byte."""
    pieces = ["<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdehinost"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>", byte_fallback=True))
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def fill_bundle(
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] | None = None,
    fixed_shapes: FixedShapes | None = None,
    **changes: Any,
) -> Manifest:
    """Write the files of a valid bundle without a model into a directory. ``changes`` are fields of its manifest."""
    tokenizer = tokenizer or byte_level_tokenizer()
    (directory / GRAPH_FILE).write_bytes(b"a graph")
    (directory / WEIGHTS_NAME).write_bytes(bytes(range(64)))
    tokenizer.save(str(directory / TOKENIZER_NAME))
    for name, text in (files or {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    settled: dict[str, Any] = {
        "family": "llama",
        "graphs": {GREEDY_GRAPH: GraphEntry(file=GRAPH_FILE, fixed_shapes=fixed_shapes)},
        "geometry": make_geometry(vocab_size=tokenizer.get_vocab_size()),
        "block_size": 4,
        "max_length": 64,
        "batch_size": 1,
        "precision": "fp32",
        "eos_token_ids": (EOS,),
        "pad_token_id": PAD,
        "trained_with": None,
        "special_tokens": {"eos_token": "</s>"},
        "checkpoint_fingerprint": "0" * 64,
        "tool_versions": {"cllm-export": "0.1.0"},
        "files": describe_files(directory),
    }
    manifest = Manifest(**settled | changes)
    write_manifest(directory, manifest)
    return manifest


def write_bundle(directory: Path, **options: Any) -> Bundle:
    """Make a directory a bundle and open it. See ``fill_bundle`` for the options."""
    directory.mkdir(parents=True, exist_ok=True)
    fill_bundle(directory, **options)
    return open_bundle(directory)


def write_chat_bundle(directory: Path, template: str, **options: Any) -> Bundle:
    """A bundle with this chat template."""
    return write_bundle(directory, files={CHAT_TEMPLATE_NAME: template}, **options)


def with_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with changed fields of its manifest."""
    return replace(bundle, manifest=replace(bundle.manifest, **changes))


def make_model(
    bundle: Bundle,
    language_model: LanguageModel,
    *,
    num_slots: int = 1,
    draft_model: DraftModel | None = None,
    prefix_cache_bytes: int = 0,
    forward_seconds: Mapping[int, float] | None = None,
    exact_sizes: ExactSizes = ALL_EXACT,
) -> Model:
    """A model that runs the fake engine instead of ONNX Runtime. By default it caches no prompts.

    Its block sizes count as compared with n = 1 already, so that an engine's calls are those of requests.
    """
    manifest = bundle.manifest
    engine = FakeEngine(
        language_model,
        manifest.geometry,
        num_slots=num_slots,
        fixed_shapes=manifest.graphs[GREEDY_GRAPH].fixed_shapes,
    )
    state = None
    if prefix_cache_bytes:
        state = PromptState(
            engine, max_bytes=prefix_cache_bytes, fingerprint=bundle.fingerprint, max_length=manifest.max_length
        )
    return Model(
        bundle.manifest,
        engine,
        TextCodec.of_bundle(bundle),
        draft_model=draft_model,
        prompt_state=state,
        forward_seconds=forward_seconds,
        exact_sizes=exact_sizes,
    )


def calls_of(model: Model) -> list[Call]:
    """The calls of a model's fake engine so far."""
    engine = model.engine
    assert isinstance(engine, FakeEngine)
    return engine.calls
