"""Golden traces: the inputs and outputs of every forward of a few requests, to test loops in other languages.

A loop in C++ that gets the outputs of a trace must produce the trace's inputs and tokens, forward by forward. It needs
neither a model nor an engine. ``docs/loop.md`` gives the rules of the loop and the format of a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from cllm_export.bundle.contract import CONTRACT_VERSION, Batch
from cllm_export.bundle.manifest import Bundle, ProposerName
from cllm_export.errors import OptionError
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.engines.base import Engine, EngineBase, Forward
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions, pad_token, resolve

TRACE_VERSION = 1
DEFAULT_METHODS: tuple[Method, ...] = ("jacobi", "jacobi-block", "autoregressive")
PROPOSERS: tuple[ProposerName, ...] = ("pad", "repeat")
"""Proposers that a trace may use. The other proposers need rules beyond those of the loop."""


class RecordingEngine(EngineBase):
    """An engine that runs another engine and records its inputs and outputs. ``forwards`` grows with every call."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(
            engine.geometry,
            num_slots=engine.num_slots,
            prefill_chunk=engine.prefill_chunk,
            fixed_shapes=engine.fixed_shapes,
        )
        self._engine = engine
        self.forwards: list[dict[str, Any]] = []

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        inputs = _inputs("decode", batch)
        forward = self._engine.forward(batch, with_logits=with_logits)
        self.run_seconds = self._engine.run_seconds
        self.forwards.append(inputs | {"next_ids": forward.next_ids[0], "num_accepted": forward.num_accepted[0]})
        return forward

    def prefill(self, batch: Batch) -> None:
        self.forwards.append(_inputs("prefill", batch))
        self._engine.prefill(batch)
        self.run_seconds = self._engine.run_seconds

    def close(self) -> None:
        """Close the engine that this one runs."""
        self._engine.close()


def _inputs(kind: str, batch: Batch) -> dict[str, Any]:
    """The inputs of slot 0, copied because a loop may reuse its lists."""
    return {
        "kind": kind,
        "input_ids": list(batch.input_ids[0]),
        "num_committed": batch.num_committed[0],
        "write_index": batch.write_index[0],
    }


def record_traces(
    bundle: Bundle,
    model: Model,
    prompts: Iterable[Prompt],
    *,
    methods: Sequence[Method] = DEFAULT_METHODS,
    block_size: int | None = None,
    proposer: ProposerName = "pad",
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Decode every prompt with every method and record every forward, JSON-ready. ``model`` is loaded from ``bundle``.

    Raises:
        OptionError: the proposer needs rules beyond those of the loop, or an option is out of range.
        PromptError: a prompt is malformed or too long.
    """
    if proposer not in PROPOSERS:
        raise OptionError(f"proposer must be one of {', '.join(PROPOSERS)} in a trace, got {proposer!r}")
    recorder = RecordingEngine(model.engine)
    recorded = Model(model.facts, recorder, model.codec)
    traces = []
    for prompt in prompts:
        for method in methods:
            recorder.forwards = []
            options = GenerateOptions(
                method=method,
                block_size=block_size,
                deterministic=block_size is None,
                proposer=None if method == "autoregressive" else proposer,
                max_new_tokens=max_new_tokens,
            )
            request = resolve(options, recorded.limits, recorded.encode(prompt.content))
            fills = proposer if request.block_size != 1 else None
            generation = recorded.generate(request.prompt, options, block_size=request.block_size, proposer=fills)
            traces.append(
                {
                    "prompt": prompt.id,
                    "method": method,
                    "prompt_ids": list(request.prompt),
                    "block_size": request.block_size,
                    "proposer": proposer,
                    "max_new_tokens": request.max_new_tokens,
                    "forwards": recorder.forwards,
                    "token_ids": list(generation.token_ids),
                    "finish_reason": generation.finish_reason,
                }
            )
    return {
        "trace_version": TRACE_VERSION,
        "contract_version": CONTRACT_VERSION,
        "bundle_fingerprint": bundle.fingerprint,
        "geometry": asdict(model.engine.geometry),
        "prefill_chunk": model.engine.prefill_chunk,
        "max_length": model.facts.max_length,
        "eos_token_ids": list(model.facts.eos_token_ids),
        "pad_token_id": pad_token(model.facts),
        "traces": traces,
    }
