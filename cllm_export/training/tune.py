"""Consistency tuning: an ordinary checkpoint becomes a CLLM, or a better one.

This package has its own training loop, because the loop's predictions feed the pool that batches come from. Processes,
devices, mixed precision and sharding are left to accelerate. Pool, counters, optimisers and random states are saved
together. A run that was interrupted and resumed therefore gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cllm_export.errors import OptionError, TuningError
from cllm_export.exporter.checkpoint.read import Checkpoint, open_checkpoint
from cllm_export.progress import Progress, counted, resumable
from cllm_export.runtime.options import pad_token
from cllm_export.training.data.samples import Sample, digest_samples
from cllm_export.training.held_out import held_out_length, measure
from cllm_export.training.losses import autoregressive_loss, consistency_loss
from cllm_export.training.model.attention import CPU_ATTENTION, register_cpu_attention
from cllm_export.training.model.lora import add_lora, merge_lora
from cllm_export.training.model.packed_model import PackedModel
from cllm_export.training.model.packing import Packed, pack
from cllm_export.training.model.torch_engine import load_weights, model_around
from cllm_export.training.optimizers import make_optimizers, set_learning_rate
from cllm_export.training.options import TuneOptions
from cllm_export.training.pool import Pool, PoolOptions
from cllm_export.training.processes import (
    broadcast_from_rank0,
    join_processes,
    max_over_ranks,
    raise_on_all_ranks,
    rank0_first,
)
from cllm_export.training.settle import settle_tuning
from cllm_export.training.work import WorkDirectory

HELD_OUT_SLOTS = 16
MAX_LOSS = 80.0
"""Losses above this count as this, so that a perplexity is a finite number."""
COLLAPSE = 0.2
"""Tuning counts as collapsed if the share of repetitive held-out outputs exceeds the parent's by more than this."""


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a run did."""

    steps: int
    minutes: float
    """Minutes of training, held-out decoding excluded."""
    processor_minutes: float
    """The same in processor time of the first process. Compare this one where other jobs share the machine."""
    samples_seen: int
    stopped: str
    """``done``, ``patience`` or ``collapse``."""
    curve: list[dict[str, float]]
    """Step, minutes, losses and held-out scores at each held-out decode. After a collapse, the checkpoint is that of
    the entry before the last."""


def tune(
    checkpoint_path: str | Path,
    output: str | Path,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    options: TuneOptions,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> TuneReport:
    """Tune a checkpoint and write the result, with a ``cllm`` section in its config, to ``output``.

    During the run, ``OUTPUT.tuning`` holds the state, the logs and the last good checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or unsupported.
        OutputError: the output exists, or cannot be written.
        OptionError: the options do not fit the model, or differ from those of the resumed run.
        TuningError: there is nothing to train on, or the loss is no longer finite.
    """
    num_processes = join_processes().num_processes
    checkpoint = open_checkpoint(checkpoint_path, max_length=options.max_length)
    work = rank0_first(lambda: WorkDirectory(Path(output), force=force, resume=resume))
    if len(samples) < num_processes or not held_out:
        raise TuningError(
            f"tuning needs a held-out set and samples for each of {num_processes} processes, got {len(held_out)} and "
            f"{len(samples)}"
        )
    try:
        run = _Run(checkpoint, work, samples, held_out, options, progress)
        with resumable(run.describe_saved):
            return run.run()
    finally:
        work.close()
        AcceleratorState._reset_state()  # a later run in this process may choose another precision


class _Run:
    """One process of a tuning run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: WorkDirectory,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        options: TuneOptions,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._work, self._options = checkpoint, work, options
        self._held_out, self._progress = held_out, progress
        progress("loading the model", 0, 1)
        settings = settle_tuning(options, checkpoint)
        self._accelerator = _make_accelerator(options)
        self._is_main = self._accelerator.is_main_process
        self._settings = {
            "options": options.to_dict(),
            "checkpoint": checkpoint.fingerprint(),
            "set of samples": digest_samples(samples),
            "held-out set": digest_samples(held_out),
            "number of processes": self._accelerator.num_processes,
        }
        module = self._make_module()
        optimizers = make_optimizers(
            module,
            options.optimizer,
            learning_rate=options.learning_rate,
            matrix_learning_rate=options.matrix_learning_rate,
            weight_decay=options.weight_decay,
        )
        self._module, *self._optimizers = self._accelerator.prepare(module, *optimizers)
        self._decodes = model_around(
            module,
            checkpoint,
            max_length=held_out_length(
                held_out,
                most_tokens=options.held_out_tokens,
                longest=settings.max_length,
                block_size=options.block_sizes[0],
            ),
            trained_with=options.trained_with,
            num_slots=min(HELD_OUT_SLOTS, len(held_out)),
        )
        self._pool = Pool(
            samples,
            _pool_options(options),
            pad_token_id=pad_token(self._decodes.facts),
            seed=options.seed,
            rank=self._accelerator.process_index,
            num_ranks=self._accelerator.num_processes,
        )
        self._step = 0
        self._seconds = self._processor_seconds = 0.0
        self._curve: list[dict[str, float]] = []
        self._losses: list[dict[str, float]] = []
        self._last_sample = ""
        self._next_evaluation = 0.0
        self._stopped = ""
        self._saved_step = 0

    def run(self) -> TuneReport:
        with raise_on_all_ranks():
            counters = self._work.open(self._settings) if self._is_main else {}
        if counters := broadcast_from_rank0(counters):
            self._restore(counters)
        while not self._stopped:
            if self._share >= self._next_evaluation:
                self._evaluate()
            else:
                self._train_step()
        return self._finish()

    def describe_saved(self) -> str:
        """What an interruption leaves, and how to go on."""
        lost = self._step - self._saved_step
        if not self._saved_step:
            what = f"{counted(lost, 'step')} {'is' if lost == 1 else 'are'} lost" if lost else "no step was finished"
            return f"no state was saved yet, and {what}: run the same command again"
        return (
            f"{self._work.path} holds the state of step {self._saved_step}, and {counted(lost, 'later step')} "
            f"{'is' if lost == 1 else 'are'} lost: run "
            "the same command with resume=True"
        )

    def _make_module(self) -> PackedModel:
        options = self._options
        set_seed(options.seed)
        decoder = load_weights(self._checkpoint, max_length=options.max_length)
        if options.gradient_checkpointing:
            _enable_checkpointing(decoder)
        if self._accelerator.device.type == "cpu":
            register_cpu_attention()
            decoder.set_attn_implementation(CPU_ATTENTION)
        if options.lora:
            add_lora(decoder, options.lora)
        return PackedModel(decoder).train()

    @property
    def _share(self) -> float:
        """Share of the run that is done, equal in every process."""
        if self._options.steps is not None:
            return self._step / self._options.steps
        assert self._options.minutes is not None
        return min(1.0, max_over_ranks(self._seconds) / (60 * self._options.minutes))

    def _train_step(self) -> None:
        started, processor_started = perf_counter(), process_time()
        options = self._options
        raw = [optimizer.optimizer for optimizer in self._optimizers]
        set_learning_rate(raw, step=self._step, progress=self._share, decay=options.decay)
        losses: list[dict[str, float]] = []
        for left in reversed(range(options.gradient_accumulation)):
            with self._accelerator.no_sync(self._module) if left else nullcontext():
                losses.append(self._backward())
        self._clip_gradients()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._step += 1
        self._seconds += perf_counter() - started
        self._processor_seconds += process_time() - processor_started
        self._losses.append(_means(losses))
        self._report_step()

    def _backward(self) -> dict[str, float]:
        options = self._options
        entries = self._pool.draw(options.batch_size)
        samples = [self._pool.sample(entry) for entry in entries]
        self._last_sample = samples[-1].id
        windows, is_local = [entry.windows for entry in entries], options.objective == "local"
        packed = pack(samples, windows, local=is_local, distance_weight=options.distance_weight)
        packed = packed.to(self._accelerator.device)
        logits: Tensor = self._module(packed)
        clean, guesses = logits[: packed.num_clean], logits[packed.num_clean :]
        autoregressive = autoregressive_loss(clean, packed.targets, label_smoothing=options.label_smoothing)
        consistency = consistency_loss(guesses, logits.detach()[packed.teacher], packed.weight)
        weight = 1.0 if options.objective == "autoregressive" else options.autoregressive_weight
        loss = weight * autoregressive + consistency
        self._require_finite(loss, packed, logits, samples)
        self._accelerator.backward(loss / options.gradient_accumulation)
        self._pool.update(entries, _predictions(packed, guesses))
        return {"loss": loss.item(), "autoregressive": autoregressive.item(), "consistency": consistency.item()}

    def _require_finite(self, loss: Tensor, packed: Packed, logits: Tensor, samples: Sequence[Sample]) -> None:
        is_finite = math.isfinite(loss.item())
        if not max_over_ranks(float(not is_finite)):
            return
        with raise_on_all_ranks():
            if not is_finite:
                self._fail(f"the loss is {loss.item()}", _name_bad(packed, logits, samples))

    def _clip_gradients(self) -> None:
        """Clip, and fail if a gradient is not finite, so that it never reaches the weights.

        With fp16 such gradients are normal: the loss scaler skips the step.
        """
        parameters = self._module.parameters()
        total = self._accelerator.clip_grad_norm_(parameters, self._options.max_gradient_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        with raise_on_all_ranks():  # all processes have the same norm, over all their gradients
            if not math.isfinite(norm) and self._options.mixed_precision != "fp16":
                where = f"in a batch with sample {self._last_sample!r}, though the loss is finite"
                self._fail(f"the gradient's norm is {norm}", where)

    def _perplexity(self) -> float:
        """Perplexity of the answers of the first held-out samples. Fail if their logits are not finite.

        Held-out decoding sees only tokens, so it would not notice broken weights, and the run would save them.
        """
        samples = self._held_out[:HELD_OUT_SLOTS]
        packed = pack(samples, [() for _ in samples]).to(self._accelerator.device)
        with torch.no_grad():
            logits: Tensor = self._module(packed)
        is_sound = bool(torch.isfinite(logits).all())
        with raise_on_all_ranks():
            if not is_sound:
                self._fail("the model's output is not finite", f"{_name_bad(packed, logits, samples)} (held out)")
        return math.exp(min(MAX_LOSS, autoregressive_loss(logits, packed.targets).item()))

    def _fail(self, what: str, where: str) -> None:
        if not self._curve:
            raise TuningError(f"{what} before any training, {where}: the checkpoint or that sample is broken")
        raise TuningError(
            f"{what} at step {self._step + 1}, {where}; the last good checkpoint, of step {self._curve[-1]['step']}, "
            f"is {self._work.checkpoint_path}: lower the learning rate, or look at that sample"
        )

    def _report_step(self) -> None:
        entry = self._losses[-1]
        if self._is_main:
            self._work.log_scalars("train", entry, self._step)
        total = self._options.steps or round(60 * (self._options.minutes or 0))
        done = self._step if self._options.steps else min(total, round(self._seconds))
        last = self._curve[-1]
        self._progress(
            "training" if self._options.steps else "seconds of training",
            done,
            total,
            f"loss {entry['loss']:.3f}, held out: {last['tokens_per_forward']:.2f} tokens per forward, "
            f"{last['exact_match']:.2f} exact",
        )

    def _evaluate(self) -> None:
        """Decode the held-out set, log the scores, decide whether the run ends here, and save."""
        total = len(self._held_out)
        self._progress("held-out prompts", 0, total)
        perplexity = broadcast_from_rank0(self._perplexity())
        score = broadcast_from_rank0(
            measure(
                self._decodes,
                self._held_out,
                most_tokens=self._options.held_out_tokens,
                finished=lambda done: self._progress("held-out prompts", done, total),
            )
        ).to_dict()
        score["perplexity"] = round(perplexity, 4)
        means = _means(self._losses) if self._losses else {}
        self._losses = []
        self._curve.append({"step": self._step, "minutes": round(self._seconds / 60, 3), **means, **score})
        self._log_evaluation(score)
        self._stopped = broadcast_from_rank0(self._why_stop())
        self._next_evaluation = min(1.0, self._share + self._options.evaluate_every)
        if self._stopped != "collapse":
            self._save()

    def _log_evaluation(self, score: dict[str, float]) -> None:
        with raise_on_all_ranks():
            if self._is_main:
                self._work.log_scalars("held-out", score, self._step)
                self._work.write_curve(self._curve)

    def _why_stop(self) -> str:
        if self._curve[-1]["repetitive"] > self._curve[0]["repetitive"] + COLLAPSE:
            return "collapse"
        if self._share >= 1.0:
            return "done"
        patience = self._options.patience
        if patience is None or len(self._curve) <= patience:
            return ""
        rates = [entry["tokens_per_forward"] for entry in self._curve]
        return "patience" if max(rates[-patience:]) < 1.01 * max(rates[:-patience]) else ""

    def _save(self) -> None:
        """Save state and checkpoint. The old ones are removed only after the new ones are complete.

        No state is saved before the first step: there is none to lose. Asking sharded optimisers for it then would make
        them count one step too many from there on.
        """
        counters = {
            "step": self._step,
            "seconds": self._seconds,
            "processor_seconds": self._processor_seconds,
            "next_evaluation": self._next_evaluation,
            "stopped": self._stopped,
            "curve": self._curve,
        }
        if self._step:
            self._progress("saving", 0, 1)
            self._work.save_state(self._accelerator, self._pool.state(), counters)
            self._saved_step = self._step
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        state = self._accelerator.get_state_dict(self._module)
        with raise_on_all_ranks():
            if self._is_main:
                weights = {name.removeprefix("decoder."): tensor for name, tensor in state.items()}
                if self._options.lora:
                    weights = merge_lora(weights, self._options.lora)
                self._work.save_checkpoint(self._checkpoint, weights, self._options.claim)

    def _restore(self, counters: dict[str, Any]) -> None:
        with raise_on_all_ranks():
            self._pool.restore(self._work.load_state(self._accelerator))
        self._step, self._seconds = counters["step"], counters["seconds"]
        self._saved_step = self._step
        self._processor_seconds = counters["processor_seconds"]
        self._next_evaluation, self._curve = counters["next_evaluation"], counters["curve"]
        self._stopped = counters["stopped"]
        self._save_checkpoint()  # the run may have been killed between saving state and checkpoint

    def _finish(self) -> TuneReport:
        processes = self._accelerator.num_processes
        report = TuneReport(
            steps=self._step,
            minutes=self._seconds / 60,
            processor_minutes=self._processor_seconds / 60,
            samples_seen=self._step * self._options.batch_size * self._options.gradient_accumulation * processes,
            stopped=self._stopped,
            curve=self._curve,
        )
        with raise_on_all_ranks():
            if self._is_main:
                self._work.publish(asdict(report) | {"options": self._options.to_dict()})
        return report


def _make_accelerator(options: TuneOptions) -> Accelerator:
    device = join_processes().device.type
    if options.mixed_precision == "fp16" and device == "cpu":
        raise OptionError("mixed_precision fp16 needs a GPU: use bf16, or none")
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=options.mixed_precision)
    if options.optimizer == "muon" and accelerator.distributed_type == DistributedType.FSDP:
        raise OptionError("muon needs whole matrices, which sharding takes apart: use optimizer='adamw'")
    return accelerator


def _enable_checkpointing(decoder: PreTrainedModel) -> None:
    """Turn on gradient checkpointing, whose method has another name in other versions of transformers.

    ``use_reentrant`` is off because adapters behind frozen inputs need that.
    """
    enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _pool_options(options: TuneOptions) -> PoolOptions:
    num_windows = {"packed": options.num_windows, "global": 1, "local": 1, "autoregressive": 0}[options.objective]
    return PoolOptions(
        num_windows=num_windows,
        block_sizes=options.block_sizes,
        loop=options.loop,
        proposer=options.proposer,
        visits=options.visits,
        keep_previous=options.objective == "local",
    )


def _predictions(packed: Packed, guesses: Tensor) -> list[list[list[int]]]:
    """The model's token after each guess, per sample and window."""
    tokens: list[int] = guesses.argmax(-1).tolist()
    return [[tokens[window.start : window.stop] for window in windows] for windows in packed.windows]


def _means(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(entry[name] for entry in losses) / len(losses) for name in losses[0]}


def _name_bad(packed: Packed, logits: Tensor, samples: Sequence[Sample]) -> str:
    """Which samples of a batch have an output that is not finite."""
    owners = sorted(set(packed.owners[~torch.isfinite(logits).all(-1)].tolist()))
    if len(owners) == len(samples) > 1:
        return f"at every sample of the batch, such as {samples[owners[0]].id!r}: the weights are broken"
    return f"first at sample {samples[owners[0] if owners else 0].id!r}"
