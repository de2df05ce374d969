"""The working directory of a tuning run, ``OUTPUT.tuning``: state to resume from, logs, the last good checkpoint.

    settings.json     options and checkpoint of the run; a resumed run must have the same
    state/            weights, optimisers, random states, pool of each process, counters: all of one moment
    checkpoint/       the last good checkpoint, complete, which becomes OUTPUT at the end
    curve.jsonl       one line for each held-out decode
    tensorboard/      the same, and the losses of each step

State and checkpoint are written beside their place and renamed into it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cllm_export.bundle import TrainedWith, staged_output
from cllm_export.errors import OptionError, OutputError, TuningError
from cllm_export.exporter.checkpoint import SINGLE_WEIGHTS, WEIGHTS_INDEX, Checkpoint

REPORT_NAME = "tuning.json"
COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
"""Config, tokenizer and chat template: everything of a checkpoint but its weights and its model card."""
STATE, CHECKPOINT, SETTINGS, COUNTERS = "state", "checkpoint", "settings.json", "counters.json"


class WorkDirectory:
    """Where a run keeps what it must not lose.

    Args:
        output: the checkpoint that the run is to write.
        force: replace an output that an earlier run wrote, and forget an interrupted one.

    Raises:
        OutputError: the output exists and must not be replaced.
    """

    def __init__(self, output: Path, *, force: bool) -> None:
        self._output, self._force = output, force
        self.path = output.with_name(f"{output.name}.tuning")
        self._writer: SummaryWriter | None = None
        if output.exists() and not (force and (output / REPORT_NAME).is_file()):
            raise OutputError(
                f"{output} exists; choose another --output"
                + (", or replace it with --force" if (output / REPORT_NAME).is_file() else "")
            )

    @property
    def checkpoint_path(self) -> Path:
        """The last good checkpoint."""
        return self.path / CHECKPOINT

    @property
    def collected_path(self) -> Path:
        """Where answers are collected that a prompt file lacks: beside the run, so that starting over keeps them."""
        return self._output.with_name(f"{self._output.name}.trajectories")

    def start(self, settings: Mapping[str, Any], *, is_main: bool) -> None:
        """Begin a run.

        Raises:
            OutputError: an interrupted run lies there, or it cannot be written.
        """
        if not is_main:
            return
        with self._writing():
            if (self.path / SETTINGS).exists() and not self._force:
                raise OutputError(
                    f"{self.path} holds an interrupted run: go on with --resume, or forget it with --force"
                )
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            (self.path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def require_same(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The counters of the run to be resumed.

        Raises:
            TuningError: there is no such run.
            OptionError: its settings differ.
        """
        self._recover(STATE)
        try:
            before = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            counters: dict[str, Any] = json.loads((self.path / STATE / COUNTERS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TuningError(f"there is no run to resume in {self.path}: {error}; start without --resume") from None
        given = json.loads(json.dumps(settings))
        if given["checkpoint"] != before["checkpoint"]:
            raise OptionError(f"the run in {self.path} was of another checkpoint: resume it with that one")
        differing = [name for name, value in given["options"].items() if before["options"].get(name) != value]
        if differing:
            was = ", ".join(f"{name} {before['options'].get(name)}" for name in differing)
            raise OptionError(f"the run in {self.path} had other settings: {was}; resume it with the same")
        return counters

    def save_state(self, accelerator: Accelerator, pool: Mapping[str, Any], counters: Mapping[str, Any]) -> None:
        """Save everything of this moment; called by every process."""
        staging = self.path / f"{STATE}.new"
        with self._writing():
            if accelerator.is_main_process:
                shutil.rmtree(staging, ignore_errors=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(staging))
            (staging / _pool_name(accelerator)).write_text(json.dumps(pool), encoding="utf-8")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (staging / COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
                self._replace(STATE)
            accelerator.wait_for_everyone()

    def load_state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Load weights, optimisers and random states into the accelerator's; this process's pool."""
        place = self.path / STATE
        try:
            pool: dict[str, Any] = json.loads((place / _pool_name(accelerator)).read_text(encoding="utf-8"))
        except OSError:
            raise TuningError(
                f"{place} has no pool of process {accelerator.process_index}: resume with as many processes as before"
            ) from None
        accelerator.load_state(str(place))
        return pool

    def save_checkpoint(self, source: Checkpoint, weights: Mapping[str, Tensor], trained_with: TrainedWith) -> None:
        """Write a complete checkpoint: the source's files, these weights in the source's dtypes, a ``cllm`` section."""
        staging = self.path / f"{CHECKPOINT}.new"
        with self._writing():
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for path in sorted(source.path.iterdir()):
                if path.suffix in COPIED_SUFFIXES and path.name not in {WEIGHTS_INDEX, REPORT_NAME}:
                    shutil.copyfile(path, staging / path.name)
            cllm = {"n": trained_with.block_size, "fill": trained_with.fill, "loop": trained_with.loop}
            config = json.dumps({**source.raw_config, "cllm": cllm}, indent=2, sort_keys=True) + "\n"
            (staging / "config.json").write_text(config, encoding="utf-8")
            tensors = {name: _like(source, name, weights[name]) for name in source.tensors}
            save_file(tensors, staging / SINGLE_WEIGHTS, metadata={"format": "pt"})
            self._replace(CHECKPOINT)

    def publish(self, report: Mapping[str, Any]) -> None:
        """Make the last good checkpoint the output, with the run's report in it; what only a resume needs goes."""
        self.close()
        with self._writing():
            text = json.dumps(report, indent=2) + "\n"
            (self.path / REPORT_NAME).write_text(text, encoding="utf-8")
            with staged_output(self._output, force=self._force, marker=REPORT_NAME) as staging:
                shutil.copytree(self.checkpoint_path, staging, dirs_exist_ok=True)
                (staging / REPORT_NAME).write_text(text, encoding="utf-8")
            shutil.rmtree(self.path / STATE)
            shutil.rmtree(self.checkpoint_path)
            (self.path / SETTINGS).unlink()

    def log_scalars(self, group: str, values: Mapping[str, float], step: int, *, is_main: bool) -> None:
        """One TensorBoard point each."""
        if not is_main:
            return
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def log_curve(self, entry: Mapping[str, Any], *, is_main: bool) -> None:
        if is_main:
            with self._writing(), (self.path / "curve.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Flush the logs."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def _replace(self, name: str) -> None:
        """Put ``name.new`` where ``name`` is; a kill in between leaves ``name.old``, which ``_recover`` puts back."""
        place, staging, old = self.path / name, self.path / f"{name}.new", self.path / f"{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        staging.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def _recover(self, name: str) -> None:
        place, old = self.path / name, self.path / f"{name}.old"
        if old.exists() and not place.exists():
            old.rename(place)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {error.strerror or error}; what was saved before is whole: "
                "make room and go on with --resume"
            ) from None


def _pool_name(accelerator: Accelerator) -> str:
    return f"pool_{accelerator.process_index}.json"


def _like(source: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[source.tensors[name].dtype]
    return tensor.detach().to("cpu", dtype).contiguous().clone()
