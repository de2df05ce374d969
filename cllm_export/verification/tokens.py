"""Compare tokens: Jacobi decoding with autoregressive decoding, with other shapes, and with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm_export.bundle.contract import Batch, Precision
from cllm_export.bundle.manifest import LOOKAHEAD_GRAPH, Bundle
from cllm_export.errors import EngineError, OptionError
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt, random_prompts
from cllm_export.runtime.decode_all import decode_all, first_difference
from cllm_export.runtime.decoding.request import LOOKAHEAD, METHODS, Method
from cllm_export.runtime.decoding.sampling import Sampler, Sampling
from cllm_export.runtime.engines.base import prefill
from cllm_export.runtime.load import load
from cllm_export.runtime.request_run import Generation
from cllm_export.verification.encoding import compare_tokenizers
from cllm_export.verification.grammars import check_grammars
from cllm_export.verification.report import DEFAULT_NUM_PROMPTS, GREEDY, SAMPLED, Check, VerifyOptions, reported

if TYPE_CHECKING:
    from cllm_export.exporter.parity.reference import Reference


MARGIN_EPSILON: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.4}
"""A token that differs from the reference's is a tie below this margin, in standard deviations of the logits.

The margin is the reference's best logit minus the logit of the engine's token. Over all layers, fp32 accumulates an
error of about 1e-5 of the logits' spread, so 1e-3 is a hundred times the noise. fp16 weights and activations have an
error of 2**-11 per operation, about 0.01 in total. bf16 has 2**-8, eight times as much.
"""

MAX_TIE_SHARE = 0.02
"""Largest allowed share of ties among positions. Near ties are rare; many of them indicate an error."""


class TokenSession:
    """The checks that decode prompts. They share one model, one reference and the sequences decoded so far.

    Engine and checkpoint are never in memory together: the engine decodes everything first and is closed.

    Args:
        reference: opens the checkpoint's model once the engine is closed; None without a checkpoint.
    """

    def __init__(
        self,
        bundle: Bundle,
        prompts: Sequence[Prompt],
        reference: Callable[[], Reference] | None,
        options: VerifyOptions,
        progress: Progress,
    ) -> None:
        manifest = bundle.manifest
        self._bundle = bundle
        self._model = load(
            bundle.path,
            threads=options.threads,
            provider=options.provider,
            plan=options.plan,
            prefix_cache_bytes=0,
        )
        self._open_reference = reference
        self._reference: Reference | None = None
        self._progress = progress
        self._max_new_tokens = options.max_new_tokens
        self._prompts = (
            self._encode(prompts)
            if prompts
            else random_prompts(
                DEFAULT_NUM_PROMPTS, vocab_size=manifest.geometry.vocab_size, max_length=manifest.max_length
            )
        )
        self._contents = {key: prompt.content for key, prompt in zip(self._prompts, prompts, strict=False)}
        self._ignore_eos = not prompts  # random prompts reach eos at once, which would test nothing
        self._decoded: dict[tuple[Method, int | None, str], list[Generation] | EngineError] = {}
        own = manifest.block_size
        pinned = self._model.engine.fixed_shapes is not None
        self._block_sizes = options.block_sizes or (own,)
        if pinned and set(self._block_sizes) != {own}:
            given = ", ".join(map(str, self._block_sizes))
            raise OptionError(f"this bundle is pinned to blocks of {own}, got {given}: leave block_sizes out")

    def close(self) -> None:
        """Free the engine."""
        self._model.close()

    def describe_engine(self) -> dict[str, Any]:
        """What the checks run on; see ``Engine.describe``."""
        return self._model.engine.describe()

    def token_checks(self) -> list[Check]:
        """Every check, in the order of the report. Closes the engine."""
        first = self._block_sizes[0]
        lossless = self._lossless_checks(first)
        pinned = self._model.engine.fixed_shapes is not None
        sampled = None if pinned else self._across_shapes_check(first, SAMPLED)
        has_lookahead = LOOKAHEAD_GRAPH in self._bundle.manifest.graphs
        grammars = check_grammars(self._model, self._block_sizes, self._progress)
        self._decode_ahead(first, with_lookahead=has_lookahead)
        self.close()
        if self._open_reference:
            self._progress("opening the checkpoint", 0, 1)
            self._reference = self._open_reference()
        across = self._across_shapes_check(first, GREEDY) if sampled else None
        detail = "the bundle is pinned to one shape"
        return [
            *lossless,
            across or Check(name=f"{GREEDY}across shapes", passed=None, detail=detail),
            sampled or Check(name=f"{SAMPLED}across shapes", passed=None, detail=detail),
            *([_failing_with_the_engine(f"{LOOKAHEAD} == autoregressive", self._lookahead)] if has_lookahead else []),
            grammars,
            _failing_with_the_engine("against the PyTorch checkpoint", self._against_checkpoint, first),
            self._tokenization(),
        ]

    def _lossless_checks(self, first: int) -> list[Check]:
        checks = []
        for block_size in self._block_sizes:
            for method in METHODS[:2]:
                name = f"{method} == autoregressive, n = {block_size}"
                checks.append(_failing_with_the_engine(name, self._lossless, method, block_size))
        name = f"{SAMPLED}jacobi == autoregressive, n = {first}"
        return [*checks, _failing_with_the_engine(name, self._lossless, METHODS[0], first, SAMPLED)]

    def _across_shapes_check(self, block_size: int, kind: str) -> Check:
        return _failing_with_the_engine(f"{kind}across shapes", self._across_shapes, block_size, kind)

    def _decode_ahead(self, block_size: int, *, with_lookahead: bool) -> None:
        """Decode what is compared after the engine is closed. A check reports an engine that fails here."""
        wanted: list[tuple[Method, int | None]] = [("autoregressive", block_size), ("autoregressive", 1)]
        if self._model.engine.fixed_shapes:
            wanted = wanted[:1]
        if with_lookahead:
            wanted.append((LOOKAHEAD, None))
        for method, size in wanted:
            with suppress(EngineError):
                self._decode(method, size)

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
            detail=detail + ("; no draft was accepted, which proves little: give prompts" if vacuous else ""),
            data={"prompts": len(actual), "equal": equal, "new_tokens": tokens, "differences": differences},
        )

    def _across_shapes(self, block_size: int, kind: str = GREEDY) -> Check:
        name = f"{kind}across shapes, n = 1 against {block_size}"
        if block_size == 1:
            return Check(name=name, passed=None, detail="only one shape was asked for")
        return self._equal_but_for_ties(name, "autoregressive", block_size, kind)

    def _lookahead(self) -> Check:
        """Check lookahead decoding. Its forwards have other shapes, so ties are allowed as across shapes."""
        return self._equal_but_for_ties(f"{LOOKAHEAD} == autoregressive", LOOKAHEAD, None)

    def _equal_but_for_ties(self, name: str, method: Method, block_size: int | None, kind: str = GREEDY) -> Check:
        one, many = self._decode("autoregressive", 1, kind), self._decode(method, block_size, kind)
        ties = Ties(MARGIN_EPSILON[self._bundle.manifest.precision])
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
        """How far the drawn token's score is below the best score, in standard deviations of the logits.

        None if the position is past the end, or the engine returns no logits.
        """
        if position >= len(generation.token_ids):
            return None
        engine, text = self._model.engine, [*prompt, *generation.token_ids[:position]]
        prefill(engine, text[:-1], 0)
        forward = engine.forward(Batch([text[-1:]], [1], [len(text) - 1]), with_logits=True)
        if forward.logits is None:
            return None
        logits = forward.logits[0]
        sampler = Sampler(_sampling(generation.seed), prompt=text, vocab_size=logits.shape[1])
        scores = sampler.scores(text[-1:], len(text) - 1, logits)[0]
        return float((scores.max() - scores[generation.token_ids[position]]) / logits.std())

    def _against_checkpoint(self, block_size: int) -> Check:
        name = "against the PyTorch checkpoint"
        if self._reference is None:
            return Check(name=name, passed=None, detail="no checkpoint given")
        ties = Ties(MARGIN_EPSILON[self._bundle.manifest.precision])
        generations = self._decode("autoregressive", block_size)
        pairs = zip(self._prompts.items(), generations, strict=True)
        for done, ((prompt_id, prompt), generation) in enumerate(pairs):
            self._progress("prompts of the checkpoint", done, len(self._prompts))
            ties.count_prompt(len(generation.token_ids))
            predictions = self._reference.predict(prompt, generation.token_ids)
            for position, prediction in enumerate(predictions):
                if prediction.token != generation.token_ids[position]:
                    ties.add(prompt_id, position, prediction.margin / prediction.scale)
        return self._judged(ties.check(name))

    def _judged(self, check: Check) -> Check:
        """Make the check of a quantised bundle a report that cannot fail: its reference is the unquantised model.

        This also holds across shapes. A difference in the last bit of fp32 may round an activation to the next integer.
        The tokens that tie then are those of the quantised model.
        """
        return reported(check) if self._bundle.manifest.quantization else check

    def _tokenization(self) -> Check:
        name = "prompts encode as in the checkpoint"
        if self._reference is None or not self._contents:
            return Check(name=name, passed=None, detail="needs a checkpoint and prompts")
        return compare_tokenizers(name, self._contents, self._prompts, self._reference.tokenizer)

    def _margin(self, prompt: list[int], tokens: Sequence[int], position: int) -> float | None:
        """How far this token is below the reference's best, in standard deviations of the logits. None if unknown."""
        if self._reference is None or position >= len(tokens):
            return None
        prediction = self._reference.predict(prompt, tokens[: position + 1])[position]
        return prediction.margin / prediction.scale

    def _decode(self, method: Method, block_size: int | None, kind: str = GREEDY) -> list[Generation]:
        """Decode every prompt with one loop. The result is cached for further checks. Lookahead has no n."""
        key = (method, block_size, kind)
        if known := self._decoded.get(key):
            if isinstance(known, EngineError):
                raise known
            return known
        stage = f"{kind}{method}" + ("" if block_size is None else f", n = {block_size}")
        try:
            decoded = decode_all(
                self._model,
                self._prompts.values(),
                at_most=self._max_new_tokens,
                first_seed=1,
                progress=lambda done: self._progress(stage, done, len(self._prompts)),
                method=method,
                block_size=block_size,
                ignore_eos=self._ignore_eos,
                temperature=_sampling(1).temperature if kind == SAMPLED else None,
            )
            generations = [each.generation for each in decoded]
        except EngineError as error:
            self._decoded[key] = error
            raise
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
    """Sampling settings of the checks: the plain softmax, so that margins need not consider filters."""
    return Sampling(temperature=1.0, seed=seed)


def _failing_with_the_engine(name: str, run: Callable[..., Check], *arguments: object) -> Check:
    """Run a check. If a broken graph stops the engine, return a failed check."""
    try:
        return run(*arguments)
    except EngineError as error:
        return Check(name=name, passed=False, detail=str(error))


class Ties:
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
            margin = "unknown (give a checkpoint)" if first["margin"] is None else f"{first['margin']:.2g}"
            detail += f"; first difference: prompt {first['prompt']}, token {first['position']}, margin {margin}"
            detail += f"; {share:.1%} of positions differ"
        data = {
            "prompts": self._num_prompts,
            "differences": self._differences,
            "margin_epsilon": self._epsilon,
            "max_tie_share": MAX_TIE_SHARE,
        }
        return Check(name=name, passed=not wrong and share <= MAX_TIE_SHARE, detail=detail, data=data)


def open_reference(bundle: Bundle, checkpoint: Path, base: Path | None) -> Reference:
    """The checkpoint's model in PyTorch.

    Raises:
        CheckpointError: transformers does not load it.
    """
    from cllm_export.exporter.parity.reference import Reference

    manifest = bundle.manifest
    return Reference(checkpoint, max_length=manifest.max_length, base=base, num_layers=manifest.geometry.num_layers)
