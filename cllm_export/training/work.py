"""The working directory of a tuning run, ``OUTPUT.tuning``: state to resume from, logs, the last good checkpoint.

    settings.json     what determines the run; a resumed run must have equal settings
    state/            weights, optimisers, random states, pool of each process, counters, all of one step
    checkpoint/       the last good checkpoint, complete; it becomes OUTPUT at the end
    curve.jsonl       one line for each held-out decode
    tensorboard/      the held-out decodes, and the losses of each step

State and checkpoint are written to ``NAME.new``, which is then renamed to ``NAME``. A ``NAME.new`` is never trusted. If
the run is killed between two renames, ``NAME.old`` is put back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.bundle.storage import locked_directory, staged_output, whole_file
from cllm_export.errors import OptionError, OutputError, TuningError
from cllm_export.exporter.checkpoint.files import SINGLE_WEIGHTS
from cllm_export.exporter.checkpoint.read import MORE_CHAT_TEMPLATES, Checkpoint
from cllm_export.training.arguments import COUNTERS, REPORT_NAME, SETTINGS, STATE, check_tuning_output, work_path
from cllm_export.training.event_log import EventLog
from cllm_export.training.processes import raise_on_all_ranks

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Config, tokenizer and chat template: all files of a checkpoint except its weights and its model card."""
NOT_COPIED = (".index.json", REPORT_NAME)
CHECKPOINT, CURVE = "checkpoint", "curve.jsonl"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WorkDirectory:
    """The files of a run in progress. All processes of a run share it.

    Args:
        output: the checkpoint that the run will write.
        force: replace an output that an earlier run wrote, and discard an interrupted run.
        resume: continue an interrupted run.

    Raises:
        OutputError: the output exists and may not be replaced, or an interrupted run would be lost.
        TuningError: there is nothing to resume.
    """

    def __init__(self, output: Path, *, force: bool, resume: bool) -> None:
        check_tuning_output(output, force=force, resume=resume)
        self._output, self._force, self._resume = output, force, resume
        self.path = work_path(output)
        self._log: EventLog | None = None
        self._lock = ExitStack()

    @property
    def checkpoint_path(self) -> Path:
        """The last good checkpoint."""
        return self.path / CHECKPOINT

    @property
    def collected_path(self) -> Path:
        """Where missing answers are collected. It lies outside the run's directory, so starting over keeps them."""
        return self._output.with_name(f"{self._output.name}.trajectories")

    def open(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Begin or resume the run, and return the saved counters, empty for a new run.

        Raises:
            OutputError: another run uses the directory, or it cannot be written.
            TuningError: the saved settings or counters are damaged.
            OptionError: the settings differ from those of the run.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_directory()
            for name in (STATE, CHECKPOINT):
                self._recover(name)
                shutil.rmtree(self.path / f"{name}.new", ignore_errors=True)
            if self._resume:
                return self._require_same(settings)
            self._discard(STATE)  # first, because it belongs to the old settings
            self._write_json(SETTINGS, settings)
            for path in self.path.iterdir():
                if path.name != SETTINGS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    def save_state(self, accelerator: Accelerator, pool: Mapping[str, Any], counters: Mapping[str, Any]) -> None:
        """Save the state of this step. Every process must call it."""
        staging = self.path / f"{STATE}.new"
        is_main = accelerator.is_main_process
        with raise_on_all_ranks(), self._writing():
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
        with raise_on_all_ranks(), self._writing(staging):
            # PyTorch's own format stores tied weights as one tensor; safetensors would warn of them
            accelerator.save_state(str(staging), safe_serialization=False)
            (staging / _pool_name(accelerator)).write_text(json.dumps(pool), encoding="utf-8")
        with raise_on_all_ranks(), self._writing(staging):
            if is_main:
                (staging / COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
                self._replace(STATE)

    def load_state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Load weights, optimisers and random states into the accelerator, and return the pool of this process.

        Raises:
            TuningError: the state is damaged.
        """
        place = self.path / STATE
        try:
            pool: dict[str, Any] = json.loads((place / _pool_name(accelerator)).read_text(encoding="utf-8"))
            accelerator.load_state(str(place))
        except Exception as error:  # pickle, PyTorch and accelerate raise many types for a damaged file
            raise TuningError(
                f"the state in {place} is damaged: {type(error).__name__}: {error}; start over with force=True"
            ) from None
        return pool

    def save_checkpoint(
        self, source: Checkpoint, weights: Mapping[str, Tensor], trained_with: TrainedWith | None
    ) -> None:
        """Write a complete checkpoint: the source's files, these weights in the source's dtypes, a ``cllm`` section.

        ``trained_with`` is None if the run trained no block; the config then stays as it is.
        """
        staging = self.path / f"{CHECKPOINT}.new"
        with self._writing(staging):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for path in sorted(source.path.iterdir()):
                if path.name.endswith(COPIED_SUFFIXES) and not path.name.endswith(NOT_COPIED):
                    shutil.copyfile(path, staging / path.name)
            if (templates := source.path / MORE_CHAT_TEMPLATES).is_dir():
                shutil.copytree(templates, staging / MORE_CHAT_TEMPLATES)
            config = json.dumps({**source.raw_config, **_cllm_section(trained_with)}, indent=2, sort_keys=True)
            (staging / "config.json").write_text(config + "\n", encoding="utf-8")
            tensors = {name: _like(source, name, weights) for name in source.tensors}
            save_file(tensors, staging / SINGLE_WEIGHTS, metadata={"format": "pt"})
            self._replace(CHECKPOINT)

    def publish(self, report: Mapping[str, Any]) -> None:
        """Write the last good checkpoint and the run's report to the output; remove what only a resume needs."""
        self._close_log()
        with self._writing():
            self._write_json(REPORT_NAME, report)
            with staged_output(self._output, force=self._force, marker=REPORT_NAME) as staging:
                shutil.copytree(self.checkpoint_path, staging, dirs_exist_ok=True)
                shutil.copyfile(self.path / REPORT_NAME, staging / REPORT_NAME)
            self._discard(STATE)
            self._discard(CHECKPOINT)
            (self.path / SETTINGS).unlink()

    def log_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write one TensorBoard point for each value."""
        with self._writing():
            if self._log is None:
                self._log = EventLog(self.path / "tensorboard", first_step=step)
            self._log.add(group, values, step)

    def write_curve(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """Write all held-out decodes so far; rewriting the file avoids duplicates after a resume."""
        with self._writing():
            text = "".join(json.dumps(entry) + "\n" for entry in curve)
            (self.path / CURVE).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the log and release the lock."""
        self._close_log()
        self._lock.close()

    def _close_log(self) -> None:
        if self._log:
            self._log.close()
            self._log = None

    def _lock_directory(self) -> None:
        busy = f"another run is at work in {self.path}: wait for it, or choose another output"
        self._lock.enter_context(locked_directory(self.path, busy=busy))
        self._lock.callback(self._remove_if_empty)

    def _remove_if_empty(self) -> None:
        """Leave no empty directory of a run that was stopped before it wrote anything."""
        with suppress(OSError):
            self.path.rmdir()

    def _require_same(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The counters of the saved run, after a check that its settings equal these."""
        try:
            before = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            counters: dict[str, Any] = json.loads((self.path / STATE / COUNTERS).read_text(encoding="utf-8"))
            was_options = dict(before["options"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TuningError(f"the run in {self.path} cannot be read: {error}; start over with force=True") from None
        given = json.loads(json.dumps(settings))
        options = given["options"]
        differing = [name for name, value in options.items() if was_options.get(name) != value]
        if differing:
            was = ", ".join(f"{name} {was_options.get(name)}, not {options[name]}" for name in differing)
            raise OptionError(f"the run in {self.path} had other settings: {was}; resume it with the same")
        others = [name for name, value in given.items() if name != "options" and before.get(name) != value]
        if others:
            raise OptionError(f"the run in {self.path} had another {' and another '.join(others)}: resume it with that")
        return counters

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with whole_file(self.path / name) as unfinished:
            unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _replace(self, name: str) -> None:
        """Replace ``name`` by ``name.new``. If killed in between, ``_recover`` puts ``name.old`` back."""
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

    def _discard(self, name: str) -> None:
        """Remove ``name`` so that a kill in between leaves no directory that looks complete."""
        place, staging = self.path / name, self.path / f"{name}.new"
        shutil.rmtree(staging, ignore_errors=True)
        if place.exists():
            place.rename(staging)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(self.path / f"{name}.old", ignore_errors=True)

    @contextmanager
    def _writing(self, staging: Path | None = None) -> Iterator[None]:
        """Turn each library's error for a failed write, such as on a full disk, into ``OutputError``.

        ``staging`` is then removed.
        """
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if staging:
                shutil.rmtree(staging, ignore_errors=True)
            raise OutputError(
                f"cannot write to {self.path}: {_reason(error)}; what was saved before is whole: make room, and go on "
                "with resume=True"
            ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0]
    return f"a file came out too short, as on a full disk ({text})" if "inline_container" in text else text


def _pool_name(accelerator: Accelerator) -> str:
    return f"pool_{accelerator.process_index}.json"


def _cllm_section(trained_with: TrainedWith | None) -> dict[str, dict[str, object]]:
    if trained_with is None:
        return {}
    return {"cllm": {"n": trained_with.block_size, "proposer": trained_with.proposer, "loop": trained_with.loop}}


def _like(source: Checkpoint, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """The trained tensor in the source's dtype, or the source's own where training has none, as for a stored table."""
    if name not in weights:
        return source.read(name)
    return weights[name].detach().to("cpu", DTYPES[source.tensors[name].dtype]).contiguous().clone()
