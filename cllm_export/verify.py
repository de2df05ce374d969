"""Prove a bundle: its Jacobi loops give its own greedy tokens, and those are the checkpoint's.

What must be equal is required to be equal: Jacobi decoding against autoregressive decoding through the same engine
and shape. What floating point may flip, across shapes or against PyTorch, is compared token by token; a difference
counts as a tie only where the reference's own margin between its two best tokens is under a stated epsilon.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm_export.bundle import LOOKAHEAD_GRAPH, MANIFEST_NAME, PARITY_NAME, Bundle, Progress
from cllm_export.contract import BYTES, KV_DTYPE, Precision
from cllm_export.errors import BundleError, ChecksumError, EngineError, GraphError, OptionError, OutputError
from cllm_export.prompts import Prompt
from cllm_export.runtime.engine import prefill
from cllm_export.runtime.generate import METHODS, Generation, Method, load
from cllm_export.runtime.kv_cache import kv_extent
from cllm_export.runtime.ort_engine import OrtEngine, available_threads, describe_machine
from cllm_export.runtime.request import LOOKAHEAD
from cllm_export.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from cllm_export.exporter.reference import Reference

MARGIN_EPSILON: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.4}
"""Margin, in standard deviations of the logits, under which another token than the reference's counts as a tie.

The margin is the reference's best logit minus that of the engine's token. Through a decoder's depth fp32 carries an
error of about 1e-5 of the logits' spread, so 1e-3 is a hundred times the noise; fp16 weights and activations carry
2**-11 an operation, 0.01 or so in all; bf16 carries 2**-8, eight times as much.
"""

MAX_TIE_SHARE = 0.02
"""Share of positions that may be ties: near ties are rare, and many of them are an error in disguise."""

POISON: dict[Precision, float] = {"fp32": 1e4, "fp16": 100.0, "bf16": 100.0}
"""What dead rows are set to. In fp16 a score over a larger one overflows to infinity before the mask is applied, and
no row that a decoder ever wrote is that large."""

GREEDY, SAMPLED = "", "sampled "
"""What a check's name begins with."""

DEFAULT_NUM_PROMPTS = 16
HELD_BYTES = 10
"""Bytes a parameter takes in ``verify``: fp32 in the engine, fp32 in PyTorch, and what both work with."""

CORRUPTION_LIMIT = 1 << 30
"""Bytes above which a file is not copied to be corrupted; its checksum is compared all the same."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One property of a bundle and whether it holds; ``passed`` is None where it was not checked or is not required,
    and ``detail`` says why."""

    name: str
    passed: bool | None
    detail: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The report that ``verify`` writes as ``parity.json``."""

    bundle_fingerprint: str
    conditions: dict[str, Any]
    """What the checks ran with: prompts, new tokens, threads, engine, whether PyTorch was compared."""
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> str:
        checks = [vars(check) for check in self.checks]
        report = {
            "bundle_fingerprint": self.bundle_fingerprint,
            "passed": self.passed,
            "conditions": self.conditions,
            "checks": checks,
        }
        return json.dumps(report, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What ``cllm-export verify`` lets the user choose."""

    max_new_tokens: int = 128
    block_sizes: tuple[int, ...] = ()
    """Block sizes the losslessness checks run at; by default the bundle's own."""
    threads: int | None = None
    by_layer: bool | None = None
    """Compare with the checkpoint layer by layer instead of decoding; by default where the two do not fit in memory."""


def verify(
    bundle: Bundle,
    *,
    prompts: Sequence[Prompt] = (),
    checkpoint: Path | None = None,
    base: Path | None = None,
    options: VerifyOptions | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Run every check and write ``parity.json`` into the bundle.

    Without prompts, sequences of random tokens (seeded) stand for them. Without a checkpoint, a token that differs
    across shapes cannot be shown to be a tie, and fails. A quantised bundle has to decode losslessly like any other;
    how far it is from its checkpoint is reported and fails nothing. ``checkpoint`` may be an adapter, with its
    ``base``; a bundle of the first layers alone is compared with the first layers. Where bundle and checkpoint do not
    fit in memory whole, the report compares them layer by layer and says that nothing was decoded.

    Raises:
        ChecksumError: a file of the bundle is corrupted.
        CheckpointError: the checkpoint cannot be read, or is not the one the bundle was built from.
    """
    options = options or VerifyOptions()
    check_writable(bundle)
    instead = _why_by_layer(bundle, options.by_layer)
    if instead and checkpoint is None:
        raise OptionError(f"nothing would be decoded ({instead}): give --checkpoint to compare with")
    conditions = {
        "by_layer": instead,
        "prompts": len(prompts) or f"{DEFAULT_NUM_PROMPTS} of random tokens",
        "max_new_tokens": options.max_new_tokens,
        "compared_with_checkpoint": checkpoint is not None,
        "quantization": bundle.manifest.quantization.scheme if bundle.manifest.quantization else None,
        **describe_machine(options.threads),
    }
    try:
        bundle.check_files(progress)
    except ChecksumError as error:
        corrupted = Check(name="checksums", passed=False, detail=str(error))
        write_parity(bundle, Parity(bundle_fingerprint=bundle.fingerprint, conditions=conditions, checks=(corrupted,)))
        raise
    progress = progress or (lambda *_: None)
    checks = [Check(name="checksums", passed=True, detail=_files_text(bundle))]
    if instead and checkpoint:
        checks.append(Check(name="decoding", passed=None, detail=f"not tried: {instead}"))
        checks.append(check_layers(bundle, checkpoint, base=base, threads=options.threads, progress=progress))
    else:
        reference = _open_reference(bundle, checkpoint, base) if checkpoint else None
        checks += _Session(bundle, prompts, reference, options, progress).token_checks()
        checks += [
            check_rows_are_isolated(bundle, options.threads),
            check_dead_rows_are_hidden(bundle, options.threads),
            check_cache_is_in_place(bundle, options.threads),
        ]
    checks.append(check_corruption_is_caught(bundle))
    parity = Parity(bundle_fingerprint=bundle.fingerprint, conditions=conditions, checks=tuple(checks))
    write_parity(bundle, parity)
    return parity


def check_layers(
    bundle: Bundle,
    checkpoint: Path,
    *,
    base: Path | None = None,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> Check:
    """Compare every layer with the checkpoint's own, one in memory at a time; see ``exporter/layer_parity.py``.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not the one the bundle was built from.
        OptionError: it is an adapter, whose layers nobody merges one by one.
    """
    from cllm_export.exporter.adapter import open_source
    from cllm_export.exporter.layer_parity import NUM_TOKENS, compare_layers, describe
    from cllm_export.exporter.layer_reference import LayerReference

    name, manifest = "layer by layer against the PyTorch checkpoint", bundle.manifest
    require_source(bundle, checkpoint, base)
    opened, adapter = open_source(checkpoint, base, max_length=manifest.max_length)
    if adapter:
        raise OptionError(f"{checkpoint} is an adapter, which is not compared layer by layer: use --whole")
    reference = LayerReference(
        opened, manifest.precision, max_length=manifest.max_length, num_layers=manifest.geometry.num_layers
    )
    generator = random.Random(0)  # noqa: S311 - test data, not a secret
    tokens = [generator.randrange(manifest.geometry.vocab_size) for _ in range(NUM_TOKENS)]
    try:
        errors = compare_layers(bundle, reference, tokens, threads=threads or available_threads(), progress=progress)
    except (EngineError, GraphError) as error:
        return Check(name=name, passed=False, detail=str(error))
    detail, parts = describe(errors)
    check = Check(name=name, passed=all(entry.passed for entry in errors), detail=detail, data={"parts": parts})
    return _reported(check) if manifest.quantization else check


def _why_by_layer(bundle: Bundle, wanted: bool | None) -> str | None:
    """Why the bundle is compared layer by layer, or None where it is decoded."""
    if wanted is not None:
        return "asked for layer by layer" if wanted else None
    manifest = bundle.manifest
    if manifest.precision == "bf16":
        return "no engine here multiplies bf16 matrices"
    stored = 1 if manifest.quantization else BYTES[KV_DTYPE[manifest.precision]]
    parameters = bundle.weight_bytes // stored
    needed, free = HELD_BYTES * parameters, available_memory()
    if free is None or needed <= free:
        return None
    return f"bundle and checkpoint would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check_writable(bundle: Bundle) -> None:
    """Find out before any work that the report could not be written.

    Raises:
        OutputError: the bundle's directory takes no file.
    """
    try:
        with tempfile.TemporaryFile(dir=bundle.path) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise OutputError(f"cannot write {PARITY_NAME} into {bundle.path}: {error.strerror}") from None


def write_parity(bundle: Bundle, parity: Parity) -> None:
    """Write ``parity.json``, whole or not at all.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    target = bundle.path / PARITY_NAME
    scratch = target.with_name(f".{PARITY_NAME}.{os.getpid()}")
    try:
        scratch.write_text(parity.to_json(), encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"cannot write {target}: {error.strerror}") from None


def _files_text(bundle: Bundle) -> str:
    linked = len(bundle.manifest.linked_files)
    return f"{len(bundle.manifest.files)} files match the manifest" + (f", {linked} linked ones too" if linked else "")


class _Session:
    """The checks that decode prompts: they share one model, one reference and the sequences decoded so far."""

    def __init__(
        self,
        bundle: Bundle,
        prompts: Sequence[Prompt],
        reference: Reference | None,
        options: VerifyOptions,
        progress: Progress,
    ) -> None:
        self._bundle = bundle
        self._model = load(bundle.path, threads=options.threads, prefix_cache_bytes=0)
        self._reference = reference
        self._progress = progress
        self._max_new_tokens = options.max_new_tokens
        self._prompts = self._encode(prompts) if prompts else random_prompts(bundle, DEFAULT_NUM_PROMPTS)
        self._contents = {key: prompt.content for key, prompt in zip(self._prompts, prompts, strict=False)}
        self._ignore_eos = not prompts  # random tokens end at once, and would try nothing
        self._decoded: dict[tuple[Method, int | None, str], list[Generation]] = {}
        own = bundle.manifest.block_size
        pinned = self._model.engine.fixed_shapes is not None
        self._block_sizes = options.block_sizes or (own,)
        if pinned and set(self._block_sizes) != {own}:
            given = ", ".join(map(str, self._block_sizes))
            raise OptionError(f"this bundle is pinned to blocks of {own}, got {given}: leave --block-size out")

    def token_checks(self) -> list[Check]:
        checks = []
        for block_size in self._block_sizes:
            for method in METHODS[:2]:
                name = f"{method} == autoregressive, n = {block_size}"
                checks.append(_failing_with_the_engine(name, self._lossless, method, block_size))
        first = self._block_sizes[0]
        name = f"{SAMPLED}jacobi == autoregressive, n = {first}"
        checks.append(_failing_with_the_engine(name, self._lossless, METHODS[0], first, SAMPLED))
        for kind in (GREEDY, SAMPLED):
            if self._model.engine.fixed_shapes:
                detail = "the bundle is pinned to one shape"
                checks.append(Check(name=f"{kind}across shapes", passed=None, detail=detail))
            else:
                checks.append(_failing_with_the_engine(f"{kind}across shapes", self._across_shapes, first, kind))
        if LOOKAHEAD_GRAPH in self._bundle.manifest.graphs:
            checks.append(_failing_with_the_engine(f"{LOOKAHEAD} == autoregressive", self._lookahead))
        checks.append(_failing_with_the_engine("against the PyTorch checkpoint", self._against_checkpoint, first))
        checks.append(self._tokenization())
        return checks

    def _lossless(self, method: Method, block_size: int, kind: str = GREEDY) -> Check:
        expected, actual = self._decode("autoregressive", block_size, kind), self._decode(method, block_size, kind)
        differences = [
            {"prompt": prompt_id, "position": first_difference(a.token_ids, e.token_ids)}
            for prompt_id, a, e in zip(self._prompts, actual, expected, strict=True)
            if a.token_ids != e.token_ids
        ]
        forwards = sum(generation.statistics.forwards for generation in actual)
        tokens = sum(generation.statistics.new_tokens for generation in actual)
        equal = len(actual) - len(differences)
        vacuous = tokens == forwards and block_size > 1
        detail = f"{equal} of {len(actual)} prompts equal, {tokens} tokens, {tokens / forwards:.2f} per forward"
        return Check(
            name=f"{kind}{method} == autoregressive, n = {block_size}",
            passed=False if differences else None if vacuous else True,
            detail=detail + ("; no draft was accepted, which proves little: give --prompts" if vacuous else ""),
            data={"prompts": len(actual), "equal": equal, "new_tokens": tokens, "differences": differences},
        )

    def _across_shapes(self, block_size: int, kind: str = GREEDY) -> Check:
        name = f"{kind}across shapes, n = 1 against {block_size}"
        if block_size == 1:
            return Check(name=name, passed=None, detail="only one shape was asked for")
        return self._equal_but_for_ties(name, "autoregressive", block_size, kind)

    def _lookahead(self) -> Check:
        """Its forwards have shapes of their own, so it is held to what other shapes are held to."""
        return self._equal_but_for_ties(f"{LOOKAHEAD} == autoregressive", LOOKAHEAD, None)

    def _equal_but_for_ties(self, name: str, method: Method, block_size: int | None, kind: str = GREEDY) -> Check:
        one, many = self._decode("autoregressive", 1, kind), self._decode(method, block_size, kind)
        ties = _Ties(MARGIN_EPSILON[self._bundle.manifest.precision])
        for (prompt_id, prompt), a, b in zip(self._prompts.items(), one, many, strict=True):
            position = first_difference(a.token_ids, b.token_ids)
            ties.count_prompt(len(a.token_ids))
            if position is not None:
                margins = [self._margin_of(kind, prompt, found, position) for found in (a, b)]
                ties.add(prompt_id, position, None if None in margins else max(m for m in margins if m is not None))
        return self._judged(ties.check(name))

    def _margin_of(self, kind: str, prompt: list[int], generation: Generation, position: int) -> float | None:
        if kind == GREEDY:
            return self._margin(prompt, generation.token_ids, position)
        return self._sampled_margin(prompt, generation, position)

    def _sampled_margin(self, prompt: list[int], generation: Generation, position: int) -> float | None:
        """How far the score of the token drawn there is below the best one's, in standard deviations of the logits."""
        if position >= len(generation.token_ids):
            return None
        engine, text = self._model.engine, [*prompt, *generation.token_ids[:position]]
        prefill(engine, text[:-1], 0)
        forward = engine.forward([text[-1:]], [1], [len(text) - 1], with_logits=True)
        if forward.logits is None:
            return None
        logits = forward.logits[0]
        sampler = Sampler(_sampling(generation.seed), prompt=text, vocab_size=logits.shape[1])
        scores = sampler.scores(text[-1:], len(text) - 1, logits)[0]
        return float((scores.max() - scores[generation.token_ids[position]]) / logits.std())

    def _against_checkpoint(self, block_size: int) -> Check:
        name = "against the PyTorch checkpoint"
        if self._reference is None:
            return Check(name=name, passed=None, detail="no --checkpoint given")
        ties = _Ties(MARGIN_EPSILON[self._bundle.manifest.precision])
        generations = self._decode("autoregressive", block_size)
        for (prompt_id, prompt), generation in zip(self._prompts.items(), generations, strict=True):
            ties.count_prompt(len(generation.token_ids))
            predictions = self._reference.predict(prompt, generation.token_ids)
            for position, prediction in enumerate(predictions):
                if prediction.token != generation.token_ids[position]:
                    ties.add(prompt_id, position, prediction.margin / prediction.scale)
        return self._judged(ties.check(name))

    def _judged(self, check: Check) -> Check:
        """The reference is the unquantised model: of a quantised bundle, what it says is a distance and no verdict.

        Across shapes too: where fp32 differs in the last bit, an activation may be rounded to the next integer, and the
        tokens that tie then are those of the quantised model.
        """
        return _reported(check) if self._bundle.manifest.quantization else check

    def _tokenization(self) -> Check:
        name = "prompts encode as in the checkpoint"
        if self._reference is None or not self._contents:
            return Check(name=name, passed=None, detail="needs --checkpoint and --prompts")
        different = [
            key for key, content in self._contents.items() if self._reference.encode(content) != self._prompts[key]
        ]
        equal = len(self._contents) - len(different)
        detail = f"{equal} of {len(self._contents)} prompts give transformers' own token ids"
        return Check(name=name, passed=not different, detail=detail, data={"different": different})

    def _margin(self, prompt: list[int], tokens: Sequence[int], position: int) -> float | None:
        """How far below the reference's best token this one is, in standard deviations; None if that is unknown."""
        if self._reference is None or position >= len(tokens):
            return None
        prediction = self._reference.predict(prompt, tokens[: position + 1])[position]
        return prediction.margin / prediction.scale

    def _decode(self, method: Method, block_size: int | None, kind: str = GREEDY) -> list[Generation]:
        """Every prompt through one loop; each is run once, however many checks look at it. Lookahead has no n."""
        key = (method, block_size, kind)
        if key in self._decoded:
            return self._decoded[key]
        generations = []
        for done, prompt in enumerate(self._prompts.values(), start=1):
            limit = min(self._max_new_tokens, self._bundle.manifest.max_length - len(prompt))
            generations.append(
                self._model.generate(
                    prompt,
                    max_new_tokens=limit,
                    method=method,
                    block_size=block_size,
                    ignore_eos=self._ignore_eos,
                    temperature=_sampling(done).temperature if kind == SAMPLED else None,
                    seed=done,
                )
            )
            shape = "" if block_size is None else f", n = {block_size}"
            self._progress(f"{kind}{method}{shape}", done, len(self._prompts))
        self._decoded[key] = generations
        return generations

    def _encode(self, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
        encoded = {}
        for index, prompt in enumerate(prompts, start=1):
            key = prompt.id if prompt.id not in encoded else f"{prompt.id} (line {index})"
            ids = self._model.encode(prompt.content)
            if len(ids) >= self._bundle.manifest.max_length:
                raise OptionError(f"prompt {key} has {len(ids)} tokens, too long for this bundle; leave it out")
            encoded[key] = ids
        return encoded


def _sampling(seed: int) -> Sampling:
    """How prompts are sampled: from the plain softmax, whose margins need no account of filters."""
    return Sampling(temperature=1.0, seed=seed)


def _failing_with_the_engine(name: str, run: Callable[..., Check], *arguments: object) -> Check:
    """The check, or a failed one where a broken graph stops the engine."""
    try:
        return run(*arguments)
    except EngineError as error:
        return Check(name=name, passed=False, detail=str(error))


def _reported(check: Check) -> Check:
    return replace(check, passed=None, detail=f"{check.detail}; reported, for a quantised bundle need not agree")


class _Ties:
    """Positions where two engines differ, and whether they are ties."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self._num_prompts = self._num_positions = 0
        self._differences: list[dict[str, Any]] = []

    def count_prompt(self, num_positions: int) -> None:
        self._num_positions += num_positions
        self._num_prompts += 1

    def add(self, prompt: str, position: int, margin: float | None) -> None:
        self._differences.append({"prompt": prompt, "position": position, "margin": margin})

    def check(self, name: str) -> Check:
        wrong = [entry for entry in self._differences if entry["margin"] is None or entry["margin"] > self._epsilon]
        prompts = {entry["prompt"] for entry in self._differences}
        share = len(self._differences) / max(1, self._num_positions)
        detail = f"{self._num_prompts - len(prompts)} of {self._num_prompts} prompts equal"
        if self._differences:
            first = (wrong or self._differences)[0]
            margin = "unknown (give --checkpoint)" if first["margin"] is None else f"{first['margin']:.2g}"
            detail += f"; first difference: prompt {first['prompt']}, token {first['position']}, margin {margin}"
            detail += f"; {share:.1%} of positions differ"
        data = {
            "prompts": self._num_prompts,
            "differences": self._differences,
            "margin_epsilon": self._epsilon,
            "max_tie_share": MAX_TIE_SHARE,
        }
        return Check(name=name, passed=not wrong and share <= MAX_TIE_SHARE, detail=detail, data=data)


def random_prompts(bundle: Bundle, count: int, *, seed: int = 0) -> dict[str, list[int]]:
    """Sequences of random tokens by name, of lengths that reach over chunks of the prompt."""
    generator = random.Random(seed)  # noqa: S311 - test data, not a secret
    manifest = bundle.manifest
    longest = max(1, min(160, manifest.max_length // 2))
    lengths = [generator.randint(1, longest) for _ in range(count)]
    return {
        f"random-{index}": [generator.randrange(manifest.geometry.vocab_size) for _ in range(length)]
        for index, length in enumerate(lengths)
    }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first position where two sequences differ, or None where they are equal."""
    if tuple(a) == tuple(b):
        return None
    pairs = zip(a, b, strict=False)
    return next((index for index, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def check_rows_are_isolated(bundle: Bundle, threads: int | None, *, trials: int = 8) -> Check:
    """Change later rows and other slots at random: the prediction and the KV rows of earlier rows stay bit-equal."""
    probe = _Probe(bundle, threads)
    block = probe.random_block()
    before = probe.run(block)
    leaks = []
    for trial in range(trials):
        kept = 1 + trial % max(1, probe.block_size - 1) if trial else 1
        changed = block[:kept] + probe.random_block()[kept:]
        if not probe.same(before, probe.run(changed, disturb=True), rows=kept):
            leaks.append(kept)
    slots = probe.engine.num_slots
    detail = (
        f"{trials} trials, {slots} {'slots' if slots > 1 else 'slot, so no other to change'}, n = {probe.block_size}"
    )
    return Check(
        name="rows see each other only through attention",
        passed=not leaks if probe.block_size > 1 or slots > 1 else None,
        detail=detail if not leaks else f"rows before {leaks[0]} changed with later rows or other slots",
        data={"trials": trials, "slots": slots, "leaks": leaks},
    )


def check_dead_rows_are_hidden(bundle: Bundle, threads: int | None) -> Check:
    """Poison every row above the write index with large finite values: no output and no valid row changes."""
    probe = _Probe(bundle, threads)
    block = probe.random_block()
    clean = probe.run(block)
    poison = POISON[bundle.manifest.precision]
    same = probe.same(clean, probe.run(block, poison=poison), rows=probe.block_size)
    visible = probe.num_dead_rows
    detail = f"{visible} rows in sight above the block set to {poison:g}" if same else "a dead row changed an output"
    return Check(
        name="dead cache rows change nothing", passed=(same if visible else None) if same else False, detail=detail
    )


def check_cache_is_in_place(bundle: Bundle, threads: int | None) -> Check:
    """The engine writes the block's rows into the very buffers it reads, and says nothing of a copy."""
    probe = _Probe(bundle, threads, log_severity=2)
    with _captured_stderr() as log:
        before = {name: array.copy() for name, array in probe.engine.cache.items()}
        probe.run(probe.random_block())
    rows = slice(probe.write_index, probe.write_index + probe.block_size)
    written = all(np.any(array[:, :, rows] != before[name][:, :, rows]) for name, array in probe.engine.cache.items())
    above = slice(probe.write_index + probe.block_size, None)
    kept = all(
        np.array_equal(array[:, :, above], before[name][:, :, above]) for name, array in probe.engine.cache.items()
    )
    warned = "in-place" in log()
    problems = [
        text
        for text, failed in (
            ("the block's rows were not written", not written),
            ("rows beyond the block were written", not kept),
            ("ONNX Runtime reports a copy of the cache", warned),
        )
        if failed
    ]
    return Check(
        name="KV cache is updated in place",
        passed=not problems,
        detail="; ".join(problems) or f"{len(before)} buffers, past and present on one address",
    )


def check_corruption_is_caught(bundle: Bundle) -> Check:
    """Flip one byte of a copy of each file: the checksum of exactly that file must fail."""
    missed, skipped = [], []
    for name, entry in bundle.manifest.files.items():
        if entry.size > CORRUPTION_LIMIT or not entry.size:
            skipped.append(name)
            continue
        try:
            named = _corruption_is_named(bundle, name)
        except OSError as error:
            raise OutputError(f"cannot copy {name} to corrupt it: {error.strerror} ({error.filename})") from None
        if not named:
            missed.append(name)
    detail = f"one flipped byte in each of {len(bundle.manifest.files) - len(skipped)} files was named"
    if skipped:
        detail += f"; not tried on {', '.join(skipped)} (size)"
    return Check(
        name="corruption is caught by checksum",
        passed=not missed,
        detail=detail if not missed else f"a flipped byte in {missed[0]} went unnoticed",
    )


class _Probe:
    """An engine with two slots or more, brought to the same state before every forward."""

    def __init__(self, bundle: Bundle, threads: int | None, *, log_severity: int = 3) -> None:
        pinned = bundle.manifest.graphs["greedy"].fixed_shapes
        slots = None if pinned else max(2, bundle.manifest.batch_size)
        self.engine = OrtEngine(bundle, num_slots=slots, threads=threads, log_severity=log_severity)
        self.block_size = bundle.manifest.block_size
        self._vocabulary = bundle.manifest.geometry.vocab_size
        self._random = random.Random(1)  # noqa: S311 - test data, not a secret
        self._prompt = self._tokens(self._prompt_length(bundle.manifest.max_length))
        self.write_index = len(self._prompt)
        self.num_dead_rows = self._extent(self.write_index) - self.write_index - self.block_size
        """Rows above the block that attention reads and the mask must hide."""

    def random_block(self) -> list[int]:
        return self._tokens(self.block_size)

    def _prompt_length(self, max_length: int) -> int:
        """A length around 24 behind which some dead rows are in sight, if there is one."""
        longest = max(1, min(24, max_length - 1))
        lengths = range(longest, 0, -1)
        return next((size for size in lengths if self._extent(size) >= size + self.block_size + 4), longest)

    def _extent(self, write_index: int) -> int:
        fixed, cache_length = self.engine.fixed_shapes, self.engine.geometry.cache_length
        return fixed.kv_extent if fixed else kv_extent(write_index + self.block_size, cache_length)

    def run(
        self, block: list[int], *, disturb: bool = False, poison: float | None = None
    ) -> tuple[list[int], list[Any]]:
        """Predictions [n] of slot 0 and its KV rows [K, n, D] of every layer, after one forward of the block."""
        for array in self.engine.cache.values():
            array.fill(0)
        prefill(self.engine, self._prompt, 0)
        if poison is not None:
            for array in self.engine.cache.values():
                array[:, :, self.write_index :] = poison
        others = self.engine.num_slots - 1
        blocks = [block] + [self.random_block() if disturb else [0] * self.block_size for _ in range(others)]
        active = [1] + [int(disturb)] * others
        forward = self.engine.forward(blocks, active, [self.write_index] + [0] * others)
        rows = slice(self.write_index, self.write_index + self.block_size)
        return forward.next_ids[0], [array[0, :, rows].copy() for array in self.engine.cache.values()]

    @staticmethod
    def same(a: tuple[list[int], list[Any]], b: tuple[list[int], list[Any]], *, rows: int) -> bool:
        """Whether the first rows agree bit for bit."""
        caches = zip(a[1], b[1], strict=True)
        return a[0][:rows] == b[0][:rows] and all(x[:, :rows].tobytes() == y[:, :rows].tobytes() for x, y in caches)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]


def require_source(bundle: Bundle, checkpoint: Path, base: Path | None = None) -> None:
    """Check that a bundle was built from this checkpoint.

    Raises:
        CheckpointError: it cannot be opened.
        BundleError: the bundle was built from another one.
    """
    from cllm_export.exporter.adapter import open_source

    opened, _ = open_source(checkpoint, base, max_length=bundle.manifest.max_length)
    if opened.fingerprint() != bundle.manifest.checkpoint_fingerprint:
        raise BundleError(
            f"{bundle.path} was not built from {checkpoint}: their fingerprints differ; "
            "give the checkpoint it was built from, or rebuild it"
        )


def _open_reference(bundle: Bundle, checkpoint: Path, base: Path | None) -> Reference:
    from cllm_export.exporter.reference import Reference

    require_source(bundle, checkpoint, base)
    manifest = bundle.manifest
    return Reference(checkpoint, max_length=manifest.max_length, base=base, num_layers=manifest.geometry.num_layers)


def _corruption_is_named(bundle: Bundle, name: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="cllm-export-verify-") as scratch:
        copy = Path(scratch)
        for other in (MANIFEST_NAME, *bundle.manifest.files):
            place: Callable[..., object] = shutil.copyfile if other == name else os.symlink
            place(bundle.path.resolve() / other, copy / other)
        with (copy / name).open("r+b") as file:
            file.seek(bundle.manifest.files[name].size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        try:
            own = replace(bundle.manifest, linked_files={}, linked_weights={})  # linked files are not ours to corrupt
            Bundle(path=copy, manifest=own, fingerprint=bundle.fingerprint).check_files()
        except ChecksumError as error:
            return name in str(error)
        return False


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """What native code writes to the process's standard error meanwhile, such as ONNX Runtime's own log."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        text = ""
        try:
            yield lambda: text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text = file.read().decode(errors="replace")
