"""Consistency tuning: an ordinary checkpoint becomes a CLLM, or a better one.

The loop is ours, because its batches come from a pool that the loop's own predictions feed; processes, devices, mixed
precision and sharding are accelerate's. Everything that decides what happens next (pool, counters, optimisers, random
states) is saved together, so that a run that was interrupted and resumed gives the weights of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from cllm_export.bundle import FILLS, LOOPS, FillName, Loop, Progress, TrainedWith, require_one_of
from cllm_export.contract import require_at_least
from cllm_export.errors import OptionError, TuningError
from cllm_export.exporter.checkpoint import Checkpoint, open_checkpoint
from cllm_export.runtime.generate import Model
from cllm_export.training import MIXED_PRECISIONS, OBJECTIVES, OPTIMIZERS, MixedPrecision, Objective, OptimizerName
from cllm_export.training.attention import CPU_ATTENTION, register_cpu_attention
from cllm_export.training.held_out import HeldOutScore, measure
from cllm_export.training.lora import LoraOptions, add_lora, merge_lora
from cllm_export.training.losses import autoregressive_loss, consistency_loss
from cllm_export.training.optimizers import make_optimizers, set_learning_rate
from cllm_export.training.packed_model import PackedModel
from cllm_export.training.packing import Packed, pack
from cllm_export.training.pool import Pool, PoolOptions
from cllm_export.training.samples import Sample
from cllm_export.training.torch_engine import load_weights, model_around
from cllm_export.training.work import WorkDirectory

HELD_OUT_SLOTS = 16
COLLAPSE = 0.2
"""Share of repetitive held-out outputs, beyond the parent's, at which tuning is taken to have collapsed."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What ``cllm-export tune`` lets the user choose."""

    objective: Objective = "packed"
    """``packed``: many states of each sample in one forward; ``global``: one; ``local``: one, against the state after
    it; ``autoregressive``: none, which is ordinary fine-tuning."""
    block_sizes: tuple[int, ...] = (16,)
    """n of the training states. The first is what the checkpoint says it was trained with."""
    loop: Loop = "sliding"
    fill: FillName = "pad"
    num_windows: int = 6
    """States of a sample in a forward of the packed objective."""
    steps: int | None = None
    """Optimiser steps; resumed runs repeat exactly."""
    minutes: float | None = None
    """Minutes of training, held-out decoding excluded; instead of steps."""
    batch_size: int = 32
    """Samples of a forward, in each process."""
    gradient_accumulation: int = 1
    """Forwards of an optimiser step."""
    autoregressive_weight: float = 1.0
    """Weight of the autoregressive loss beside the consistency loss: too little of it, and models collapse."""
    label_smoothing: float = 0.0
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 2e-5
    matrix_learning_rate: float = 0.02
    """Of muon."""
    weight_decay: float = 0.01
    decay: float = 0.6
    """Share of the run over which the learning rate falls to zero."""
    max_gradient_norm: float = 1.0
    max_length: int | None = None
    """Tokens of prompt and answer; longer samples are left out."""
    mixed_precision: MixedPrecision = "no"
    lora: LoraOptions | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluate_every: float = 0.1
    """Share of the run after which the held-out set is decoded again and the state is saved."""
    patience: int | None = None
    """Stop after so many held-out decodes in a row without one per cent more tokens per forward."""

    def __post_init__(self) -> None:
        require_one_of("objective", self.objective, OBJECTIVES)
        require_one_of("loop", self.loop, LOOPS)
        require_one_of("fill", self.fill, FILLS)
        require_one_of("optimizer", self.optimizer, OPTIMIZERS)
        require_one_of("mixed_precision", self.mixed_precision, MIXED_PRECISIONS)
        for name in ("num_windows", "batch_size", "gradient_accumulation"):
            require_at_least(name, getattr(self, name), 1)
        if not self.block_sizes or min(self.block_sizes) < 2:
            raise OptionError(f"block_sizes must be 2 or more each, got {self.block_sizes}")
        if (self.steps is None) == (self.minutes is None):
            raise OptionError(f"give either steps or minutes, got {self.steps} and {self.minutes}")
        if (limit := self.steps if self.minutes is None else self.minutes) is not None and not limit > 0:
            raise OptionError(f"steps or minutes must be more than 0, got {limit}")
        for name in (
            "autoregressive_weight",
            "label_smoothing",
            "weight_decay",
            "learning_rate",
            "matrix_learning_rate",
        ):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.decay <= 1 or not 0 < self.evaluate_every <= 1:
            raise OptionError(
                f"decay and evaluate_every are shares of the run, got {self.decay}, {self.evaluate_every}"
            )

    @property
    def trained_with(self) -> TrainedWith:
        return TrainedWith(block_size=self.block_sizes[0], fill=self.fill, loop=self.loop)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a run did."""

    steps: int
    minutes: float
    """Of training, held-out decoding excluded."""
    samples_seen: int
    stopped: str
    """``done``, ``patience`` or ``collapse``."""
    curve: list[dict[str, float]]
    """Step, minutes, losses and held-out scores at each held-out decode."""


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

    State, logs and the last good checkpoint lie in ``OUTPUT.tuning`` meanwhile.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or unsupported.
        OutputError: the output exists, or cannot be written.
        OptionError: the options do not fit the model, or differ from those of the run to be resumed.
        TuningError: there is nothing to train on, or the loss is no longer finite.
    """
    checkpoint = open_checkpoint(checkpoint_path, max_length=options.max_length)
    work = WorkDirectory(Path(output), force=force)
    if not samples or not held_out:
        raise TuningError(f"tuning needs samples and a held-out set, got {len(samples)} and {len(held_out)}")
    run = _Run(checkpoint, work, samples, held_out, options, progress)
    return run.run(resume=resume)


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
        self._accelerator = Accelerator(mixed_precision=options.mixed_precision)
        set_seed(options.seed)
        self._decoder = load_weights(checkpoint)
        if options.gradient_checkpointing:
            self._decoder.gradient_checkpointing_enable()
        if self._accelerator.device.type == "cpu":
            register_cpu_attention()
            self._decoder.set_attn_implementation(CPU_ATTENTION)
        if options.lora:
            add_lora(self._decoder, options.lora)
        module = PackedModel(self._decoder).train()
        optimizers = make_optimizers(
            module,
            options.optimizer,
            learning_rate=options.learning_rate,
            matrix_learning_rate=options.matrix_learning_rate,
            weight_decay=options.weight_decay,
        )
        self._module, *self._optimizers = self._accelerator.prepare(module, *optimizers)
        self._pool = Pool(
            samples,
            _pool_options(options),
            pad_token_id=checkpoint.pad_token_id or 0,
            seed=options.seed,
            rank=self._accelerator.process_index,
            num_ranks=self._accelerator.num_processes,
        )
        self._step = 0
        self._seconds = 0.0
        self._curve: list[dict[str, float]] = []
        self._losses: list[dict[str, float]] = []
        self._next_evaluation = 0.0
        self._decodes: Model | None = None

    def run(self, *, resume: bool) -> TuneReport:
        fingerprint = {"options": self._options.to_dict(), "checkpoint": self._checkpoint.fingerprint()}
        if resume:
            self._restore(self._work.require_same(fingerprint))
        else:
            self._work.start(fingerprint, is_main=self._accelerator.is_main_process)
        stopped = ""
        while not stopped:
            if self._share >= self._next_evaluation or self._share >= 1.0:
                stopped = self._evaluate()
            else:
                self._train_step()
        return self._finish(stopped)

    @property
    def _share(self) -> float:
        """How much of the run is done."""
        if self._options.steps is not None:
            return self._step / self._options.steps
        assert self._options.minutes is not None
        return min(1.0, self._agreed(self._seconds) / (60 * self._options.minutes))

    def _agreed(self, value: float) -> float:
        """The largest of all processes' values: every process must come to the same decisions."""
        if self._accelerator.num_processes == 1:
            return value
        gathered: Tensor = self._accelerator.gather(torch.tensor([value], device=self._accelerator.device))
        return float(gathered.max())

    def _train_step(self) -> None:
        started = perf_counter()
        options = self._options
        raw = [optimizer.optimizer for optimizer in self._optimizers]
        set_learning_rate(raw, step=self._step, progress=self._share, decay=options.decay)
        losses: list[dict[str, float]] = []
        for micro in range(options.gradient_accumulation):
            last = micro + 1 == options.gradient_accumulation
            if last:
                losses.append(self._backward())
            else:
                with self._accelerator.no_sync(self._module):
                    losses.append(self._backward())
        if self._accelerator.sync_gradients:
            self._accelerator.clip_grad_norm_(self._module.parameters(), options.max_gradient_norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._step += 1
        self._seconds += perf_counter() - started
        self._losses.append({name: sum(entry[name] for entry in losses) / len(losses) for name in losses[0]})
        self._report_step()

    def _backward(self) -> dict[str, float]:
        entries = self._pool.draw(self._options.batch_size)
        samples = [self._pool.sample(entry) for entry in entries]
        packed = pack(samples, [entry.windows for entry in entries]).to(self._accelerator.device)
        logits = self._module(packed)
        clean = logits[: packed.num_clean]
        autoregressive = autoregressive_loss(clean, packed.targets, label_smoothing=self._options.label_smoothing)
        guesses = logits[packed.num_clean :]
        consistency = consistency_loss(guesses, logits.detach()[packed.teacher], packed.weight)
        weight = 1.0 if self._options.objective == "autoregressive" else self._options.autoregressive_weight
        loss = weight * autoregressive + consistency
        self._require_finite(loss, packed, logits, samples)
        self._accelerator.backward(loss / self._options.gradient_accumulation)
        self._pool.update(entries, _predictions(packed, guesses))
        return {"loss": loss.item(), "autoregressive": autoregressive.item(), "consistency": consistency.item()}

    def _require_finite(self, loss: Tensor, packed: Packed, logits: Tensor, samples: Sequence[Sample]) -> None:
        is_bad = not math.isfinite(loss.item())
        if not self._agreed(float(is_bad)):
            return
        bad_rows = ~torch.isfinite(logits[: packed.num_clean]).all(-1)
        owners = packed.clean_sample[bad_rows]
        name = samples[int(owners[0])].id if len(owners) else samples[0].id
        self._work.close()
        raise TuningError(
            f"the loss is {loss.item()} at step {self._step + 1}, first at sample {name!r} of the prompts; the last "
            f"good checkpoint is {self._work.checkpoint_path}: lower the learning rate, or look at that sample"
        )

    def _report_step(self) -> None:
        entry = self._losses[-1]
        self._work.log_scalars("train", entry, self._step, is_main=self._accelerator.is_main_process)
        total = self._options.steps or round(60 * (self._options.minutes or 0))
        done = self._step if self._options.steps else min(total, round(self._seconds))
        last = self._curve[-1]
        self._progress(
            f"loss {entry['loss']:.3f}, held out: {last['tokens_per_forward']:.2f} tokens per forward, "
            f"{last['exact_match']:.2f} exact",
            done,
            total,
        )

    def _evaluate(self) -> str:
        """Decode the held-out set, log it, save; why the run ends here, if it does."""
        score = self._score()
        recent = self._losses
        means = {name: sum(entry[name] for entry in recent) / len(recent) for name in recent[0]} if recent else {}
        self._losses = []
        entry = {"step": self._step, "minutes": round(self._seconds / 60, 3), **means, **score.to_dict()}
        self._curve.append(entry)
        is_main = self._accelerator.is_main_process
        self._work.log_scalars("held-out", score.to_dict(), self._step, is_main=is_main)
        self._work.log_curve(entry, is_main=is_main)
        stopped = self._why_stop()
        self._next_evaluation = min(1.0, self._share + self._options.evaluate_every)
        if stopped != "collapse":
            self._save()
        return stopped

    def _score(self) -> HeldOutScore:
        longest = max(len(sample.tokens) - sample.num_prompt for sample in self._held_out)
        if self._decodes is None:
            self._decodes = model_around(
                self._decoder,
                self._checkpoint,
                max_length=self._options.max_length,
                trained_with=self._options.trained_with,
                num_slots=HELD_OUT_SLOTS,
            )
        return measure(
            self._decodes, self._held_out, block_size=self._options.block_sizes[0], max_new_tokens=longest + 16
        )

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
        """State and checkpoint of this moment; what they replace goes only once they are whole."""
        counters = {
            "step": self._step,
            "seconds": self._seconds,
            "next_evaluation": self._next_evaluation,
            "curve": self._curve,
        }
        self._work.save_state(self._accelerator, self._pool.state(), counters)
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        state = self._accelerator.get_state_dict(self._module)
        if self._accelerator.is_main_process:
            weights = {name.removeprefix("decoder."): tensor for name, tensor in state.items()}
            if self._options.lora:
                weights = merge_lora(weights, self._options.lora)
            self._work.save_checkpoint(self._checkpoint, weights, self._options.trained_with)
        self._accelerator.wait_for_everyone()

    def _restore(self, counters: dict[str, Any]) -> None:
        self._pool.restore(self._work.load_state(self._accelerator))
        self._step, self._seconds = counters["step"], counters["seconds"]
        self._next_evaluation, self._curve = counters["next_evaluation"], counters["curve"]

    def _finish(self, stopped: str) -> TuneReport:
        report = TuneReport(
            steps=self._step,
            minutes=self._seconds / 60,
            samples_seen=self._step
            * self._options.batch_size
            * self._options.gradient_accumulation
            * self._accelerator.num_processes,
            stopped=stopped,
            curve=self._curve,
        )
        if self._accelerator.is_main_process:
            self._work.publish(asdict(report) | {"options": self._options.to_dict()})
        self._accelerator.wait_for_everyone()
        return report


def _pool_options(options: TuneOptions) -> PoolOptions:
    num_windows = {"packed": options.num_windows, "global": 1, "local": 1, "autoregressive": 0}[options.objective]
    return PoolOptions(
        num_windows=num_windows,
        block_sizes=options.block_sizes,
        loop=options.loop,
        fill=options.fill,
        visits=4 if num_windows else 1,
        keep_previous=options.objective == "local",
    )


def _predictions(packed: Packed, guesses: Tensor) -> list[list[list[int]]]:
    """The model's token after each guess, per sample and window."""
    tokens: list[int] = guesses.argmax(-1).tolist()
    return [[tokens[window.start : window.stop] for window in windows] for windows in packed.windows]
