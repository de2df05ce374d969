"""The working directory of a tuning run, ``OUTPUT.tuning``: state to resume from, logs, the last good checkpoint.

    settings.json     what the run follows from; a resumed run must have the same
    state/            weights, optimisers, random states, pool of each process, counters: all of one moment
    checkpoint/       the last good checkpoint, complete, which becomes OUTPUT at the end
    curve.jsonl       one line for each held-out decode
    tensorboard/      the same, and the losses of each step

State and checkpoint are written beside their place and renamed into it: ``NAME.new`` is never trusted, ``NAME.old`` is
put back where a kill came between two renames.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.bundle.storage import check_output, locked_directory, staged_output, unfinished_files, whole_file
from cllm_export.errors import OptionError, OutputError, TuningError
from cllm_export.exporter.checkpoint.files import SINGLE_WEIGHTS
from cllm_export.exporter.checkpoint.read import Checkpoint
from cllm_export.training.event_log import EventLog
from cllm_export.training.processes import raise_on_all_ranks

REPORT_NAME = "tuning.json"
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Config, tokenizer and chat template: everything of a checkpoint but its weights and its model card."""
NOT_COPIED = (".index.json", REPORT_NAME)
STATE, CHECKPOINT, SETTINGS, COUNTERS, CURVE = "state", "checkpoint", "settings.json", "counters.json", "curve.jsonl"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WorkDirectory:
    """Where a run keeps what it must not lose. All processes of a run share it.

    Args:
        output: the checkpoint that the run is to write.
        force: replace an output that an earlier run wrote, and forget an interrupted one.
        resume: go on with an interrupted one.

    Raises:
        OutputError: the output exists and must not be replaced, or an interrupted run would be lost.
        TuningError: there is nothing to resume.
    """

    def __init__(self, output: Path, *, force: bool, resume: bool) -> None:
        check_output(output, force=force, marker=REPORT_NAME)
        self._output, self._force, self._resume = output, force, resume
        self.path = output.with_name(f"{output.name}.tuning")
        self._log: EventLog | None = None
        self._lock = ExitStack()
        has_state = any((self.path / name / COUNTERS).is_file() for name in (STATE, f"{STATE}.old"))
        if resume and not has_state:
            raise TuningError(
                f"there is no run to resume in {self.path}: it has saved no state; start without resume=True"
            )
        if has_state and not (resume or force):
            raise OutputError(
                f"{self.path} holds an interrupted run: go on with resume=True, or replace it with force=True"
            )
        self._require_own()

    @property
    def checkpoint_path(self) -> Path:
        """The last good checkpoint."""
        return self.path / CHECKPOINT

    @property
    def collected_path(self) -> Path:
        """Where answers are collected that a prompt file lacks: beside the run, so that starting over keeps them."""
        return self._output.with_name(f"{self._output.name}.trajectories")

    def open(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Begin the run, or go on with it; the counters of the moment it goes on from, none for a new one.

        Raises:
            OutputError: another run is at work there, or it cannot be written.
            TuningError: the state to be resumed is damaged.
            OptionError: its settings differ.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_directory()
            for name in (STATE, CHECKPOINT):
                self._recover(name)
                shutil.rmtree(self.path / f"{name}.new", ignore_errors=True)
            if self._resume:
                return self._require_same(settings)
            self._discard(STATE)  # first: it belongs to the settings that go now
            self._write_json(SETTINGS, settings)
            for path in self.path.iterdir():
                if path.name != SETTINGS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    def save_state(self, accelerator: Accelerator, pool: Mapping[str, Any], counters: Mapping[str, Any]) -> None:
        """Save everything of this moment; called by every process."""
        staging = self.path / f"{STATE}.new"
        is_main = accelerator.is_main_process
        with raise_on_all_ranks(), self._writing():
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
        with raise_on_all_ranks(), self._writing(staging):
            # PyTorch's own format: weights that are tied are one tensor in it, of which safetensors would warn
            accelerator.save_state(str(staging), safe_serialization=False)
            (staging / _pool_name(accelerator)).write_text(json.dumps(pool), encoding="utf-8")
        with raise_on_all_ranks(), self._writing(staging):
            if is_main:
                (staging / COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
                self._replace(STATE)

    def load_state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Load weights, optimisers and random states into the accelerator's; this process's pool."""
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

        ``trained_with`` None, of a run that trained no block, leaves the config as it is.
        """
        staging = self.path / f"{CHECKPOINT}.new"
        with self._writing(staging):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for path in sorted(source.path.iterdir()):
                if path.name.endswith(COPIED_SUFFIXES) and not path.name.endswith(NOT_COPIED):
                    shutil.copyfile(path, staging / path.name)
            config = json.dumps({**source.raw_config, **_cllm_section(trained_with)}, indent=2, sort_keys=True)
            (staging / "config.json").write_text(config + "\n", encoding="utf-8")
            tensors = {name: _like(source, name, weights) for name in source.tensors}
            save_file(tensors, staging / SINGLE_WEIGHTS, metadata={"format": "pt"})
            self._replace(CHECKPOINT)

    def publish(self, report: Mapping[str, Any]) -> None:
        """Make the last good checkpoint the output, with the run's report in it; what only a resume needs goes."""
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
        """One TensorBoard point each."""
        with self._writing():
            if self._log is None:
                self._log = EventLog(self.path / "tensorboard", first_step=step)
            self._log.add(group, values, step)

    def write_curve(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """All held-out decodes so far, so that none stands there twice after a resume."""
        with self._writing():
            text = "".join(json.dumps(entry) + "\n" for entry in curve)
            (self.path / CURVE).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Let go of logs and lock."""
        self._close_log()
        self._lock.close()

    def _close_log(self) -> None:
        if self._log:
            self._log.close()
            self._log = None

    def _require_own(self) -> None:
        """Refuse a directory of the user's that happens to have the name."""
        if not self.path.exists() and not self.path.is_symlink():
            return
        is_own = any((self.path / name).is_file() for name in (SETTINGS, REPORT_NAME))
        if not self.path.is_dir() or (not is_own and set(self.path.iterdir()) - set(unfinished_files(self.path))):
            raise OutputError(
                f"{self.path} is needed to work in, and is no run's: move it, or choose another output",
                fields=("output",),
            )

    def _lock_directory(self) -> None:
        busy = f"another run is at work in {self.path}: wait for it, or choose another output"
        self._lock.enter_context(locked_directory(self.path, busy=busy))

    def _require_same(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The counters of a run, which must have these settings."""
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

    def _discard(self, name: str) -> None:
        """Remove it so that a kill leaves nothing that looks whole."""
        place, staging = self.path / name, self.path / f"{name}.new"
        shutil.rmtree(staging, ignore_errors=True)
        if place.exists():
            place.rename(staging)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(self.path / f"{name}.old", ignore_errors=True)

    @contextmanager
    def _writing(self, staging: Path | None = None) -> Iterator[None]:
        """Turn what a full disk raises, which each library says in its own way, into one error; ``staging`` goes."""
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
    """A tensor as the source stores it; what training has no weight for, such as a stored table, as it is there."""
    if name not in weights:
        return source.read(name)
    return weights[name].detach().to("cpu", DTYPES[source.tensors[name].dtype]).contiguous().clone()
