"""``cllm-export calibrate``: decode prompts with a bundle and write statistics of its linear layers to a scales file.

The calibration first records all decodes and then observes them, because a row's stage of convergence is known only
after its request has ended. Both phases process the prompt file in shards and keep finished shards on disk. An
interrupted calibration can therefore resume, and ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cllm_export import __version__
from cllm_export.bundle.manifest import Bundle, ProposerName
from cllm_export.bundle.scales import FloatArray, InputStatistics, Provenance, Scales, open_scales, write_scales
from cllm_export.bundle.storage import sha256_of
from cllm_export.calibration.accumulate import GramAccumulator, num_above
from cllm_export.calibration.edited_engine import EditedEngine, read_graph, require_unquantised
from cllm_export.calibration.linear_inputs import LinearInput, linear_inputs, linear_layers
from cllm_export.calibration.observe import Offsets, Statistics, add_all, observe
from cllm_export.calibration.outliers import outliers
from cllm_export.calibration.record import RecordOptions, record
from cllm_export.calibration.recording import Recording, read_recordings, write_recordings
from cllm_export.calibration.run_directory import RunDirectory, RunSettings, run_directory
from cllm_export.calibration.selection import RowCounts, Selection, count_rows, select_rows
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import CalibrationError, DamagedRunError, OutputError
from cllm_export.progress import Progress, resumable
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.decoding.shared_options import (
    block_size_option,
    limit_option,
    max_new_tokens_option,
    proposer_option,
    threads_option,
)
from cllm_export.runtime.engines.machine import available_threads, describe_machine
from cllm_export.runtime.load import load
from cllm_export.runtime.options import pad_token

if TYPE_CHECKING:
    from onnx import ModelProto

MIN_PROMPTS = 16
"""Fewer prompts are no representative sample."""
SHARD_SIZE = 16
"""Prompts per shard: at most this many must be decoded again after an interruption."""
GRAM_BYTES = 1 << 30
"""Memory for the Gram matrices of one pass. They are as large as the model's matrices, so many passes may be needed."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Options of ``cllm-export calibrate``."""

    GROUP: ClassVar[OptionGroup] = "Quantisation"

    mix: float = option(
        0.5,
        help="Share of the observed rows that come from block states; the rest is clean text.",
        minimum=0,
        maximum=1,
    )
    """Share of the observed rows that come from block states. The other rows come from clean text."""
    num_rows: int = option(16384, help="Largest number of rows to observe.", minimum=1, flag="--rows")
    gram: bool = option(False, help="Write Gram matrices too, which GPTQ needs; the file becomes large.")
    """Whether to write Gram matrices too."""
    block_size: int | None = block_size_option()
    """The default is the bundle's own n."""
    proposer: ProposerName | None = proposer_option()
    """The default is the proposer that the model was trained with."""
    seed: int = option(0, help="Seed of the random choice of rows, and of random drafts.", minimum=0)
    max_new_tokens: int = max_new_tokens_option()
    limit: int | None = limit_option()
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The result of a calibration."""

    scales: Scales
    outliers: list[dict[str, Any]]
    num_skipped: int
    """Number of prompts that are empty, too long, or cannot be tokenised."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        made = self.scales.provenance
        return {
            "scales": str(self.scales.path),
            "prompts": made.num_prompts,
            "skipped": self.num_skipped,
            "rows": made.rows,
            "inputs": len(self.scales.inputs),
            "layers": len(self.scales.tensors),
            "gram": bool(self.scales.grams),
            "outliers": self.outliers,
        }


def calibrate(
    bundle: Bundle,
    prompts_path: Path,
    output: Path,
    options: CalibrateOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Calibrate an unquantised bundle. An interrupted run with the same settings is resumed.

    Raises:
        CalibrationError: there are too few prompts, NaN or constant activations; the bundle is already quantised; or
            the interrupted run is of another bundle or has other options.
        PromptError: the prompt file is missing or malformed.
        OutputError: the output exists and ``force`` is not set, or it cannot be written.
        EngineError: the engine failed.
        MissingExtraError: a required package is not installed.
    """
    options = options or CalibrateOptions()
    if output.exists() and not force:
        raise OutputError(f"{output} exists; replace it with force=True or choose another output", fields=("output",))
    prompts = read_prompts(prompts_path, limit=options.limit)
    require_unquantised(bundle)
    graph = read_graph(bundle)
    inputs = linear_inputs(graph, linear_layers(graph))
    settings = _settle(bundle, sha256_of(prompts_path), len(prompts), options)
    with run_directory(output, settings) as directory, resumable(directory.describe):
        run = _Run(bundle, graph, inputs, settings, directory, options.threads, progress or (lambda *_: None))
        num_recorded = run.record(prompts)
        statistics, provenance = run.observe(num_recorded)
        grams = run.gram_matrices() if options.gram else {}
        write_scales(output, provenance, statistics, grams, force=force)
    return Calibration(
        scales=open_scales(output), outliers=outliers(statistics), num_skipped=len(prompts) - num_recorded
    )


def _settle(bundle: Bundle, prompts_sha256: str, num_prompts: int, options: CalibrateOptions) -> RunSettings:
    manifest = bundle.manifest
    trained, pinned = manifest.trained_with, manifest.graphs["greedy"].fixed_shapes
    threads = options.threads or available_threads()
    return RunSettings(
        bundle_fingerprint=bundle.fingerprint,
        prompts_sha256=prompts_sha256,
        num_prompts=num_prompts,
        loop=trained.loop if trained else "sliding",
        proposer=options.proposer or (trained.proposer if trained else "pad"),
        block_size=options.block_size or (pinned.block_size if pinned else manifest.block_size),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        mix=options.mix,
        num_rows=options.num_rows,
        gram=options.gram,
        threads=threads,
        onnxruntime=str(describe_machine(threads)["onnxruntime"]),
    )


class _Run:
    """One calibration in progress. It processes the prompt file shard by shard."""

    def __init__(
        self,
        bundle: Bundle,
        graph: ModelProto,
        inputs: Sequence[LinearInput],
        settings: RunSettings,
        directory: RunDirectory,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._bundle, self._graph, self._inputs = bundle, graph, inputs
        self._settings, self._directory, self._threads = settings, directory, threads
        self._progress = progress
        self._num_shards = -(-settings.num_prompts // SHARD_SIZE)
        self._pad = pad_token(bundle.manifest)
        self._counts: list[list[RowCounts]] = []
        """Row counts of every recording, shard by shard."""
        self._selection: Selection | None = None
        self._opened: EditedEngine | None = None

    def record(self, prompts: Sequence[Prompt]) -> int:
        """Decode every prompt. Return the number of prompts that could be decoded."""
        model = None
        for shard in range(self._num_shards):
            path, first = self._directory.recordings(shard), shard * SHARD_SIZE
            if not path.exists():
                model = model or load(self._bundle.path, threads=self._threads, prefix_cache_bytes=0)
                chosen = prompts[first : first + SHARD_SIZE]
                recordings = record(
                    model,
                    chosen,
                    self._record_options(),
                    first=first,
                    progress=lambda done, first=first: self._progress("decoding", first + done, len(prompts)),  # type: ignore[misc]
                )
                self._directory.make(path, lambda target, found=recordings: write_recordings(target, found))  # type: ignore[misc]
            self._progress("decoding", min(first + SHARD_SIZE, len(prompts)), len(prompts))
        self._counts = [[count_rows(entry) for entry in self._recordings(shard)] for shard in range(self._num_shards)]
        num_recorded = sum(map(len, self._counts))
        if num_recorded < MIN_PROMPTS:
            raise CalibrationError(
                f"too few prompts: {num_recorded} of {len(prompts)} could be decoded, at least {MIN_PROMPTS} are needed"
            )
        self._selection = select_rows(
            (counts for shard in self._counts for counts in shard),
            num_rows=self._settings.num_rows,
            mix=self._settings.mix,
            seed=self._settings.seed,
        )
        return num_recorded

    def observe(self, num_recorded: int) -> tuple[list[InputStatistics], Provenance]:
        """The statistics of every input, and how they were made."""
        assert self._selection is not None
        num_largest = num_above(self._selection.num_rows) + 1
        total = Statistics.empty(self._inputs, num_largest)
        for shard in range(self._num_shards):
            path = self._directory.statistics(shard)
            if not path.exists():
                found = Statistics.empty(self._inputs, num_largest)
                add_all(self._see(shard), self._inputs, found)
                self._directory.make(path, found.write)
            total.merge(Statistics.read(path, self._inputs, num_largest))
            self._progress("observing", shard + 1, self._num_shards)
        for entry in self._inputs:
            if total.inputs[entry.name].is_constant:
                raise CalibrationError(
                    f"the layers {', '.join(entry.tensors)} see the same row whatever the prompt: these activations "
                    "are constant and give no scale; check the bundle with cllm-export verify, or give other prompts"
                )
        return [_statistics(entry, total) for entry in self._inputs], self._provenance(num_recorded, total)

    def gram_matrices(self) -> dict[str, Callable[[], FloatArray]]:
        """Functions that read the Gram matrix of each input from disk. Limited memory may take several passes."""
        left = [index for index in range(len(self._inputs)) if not self._directory.gram(index).exists()]
        while left:
            group = _that_fit(left, self._inputs)
            self._gram_pass(group)
            left = left[len(group) :]
            self._progress("gram matrices", len(self._inputs) - len(left), len(self._inputs))
        paths = {entry.name: self._directory.gram(index) for index, entry in enumerate(self._inputs)}
        return {name: lambda path=path: np.load(path, mmap_mode="r") for name, path in paths.items()}  # type: ignore[misc]

    def _gram_pass(self, group: Sequence[int]) -> None:
        grams = {index: GramAccumulator(self._inputs[index].width) for index in group}
        for shard in range(self._num_shards):
            for seen in self._see(shard):
                for index, gram in grams.items():
                    gram.add(seen.values[self._inputs[index].rows[0]])
        for index, gram in grams.items():
            self._directory.make(self._directory.gram(index), lambda path, found=gram: _save(path, found.result()))  # type: ignore[misc]

    def _see(self, shard: int) -> Iterator[Any]:
        assert self._selection is not None
        before = [counts for earlier in self._counts[:shard] for counts in earlier]
        offsets = Offsets(states=sum(each.states for each in before), clean=sum(each.clean for each in before))
        return observe(
            self._engine(),
            self._recordings(shard),
            self._selection,
            offsets,
            chunk=self._settings.block_size,
            pad=self._pad,
        )

    def _engine(self) -> EditedEngine:
        if self._opened is None:
            observed = [entry.rows[0] for entry in self._inputs]
            self._opened = EditedEngine(self._bundle, self._graph, observed=observed, threads=self._threads)
        return self._opened

    def _recordings(self, shard: int) -> Iterator[Recording]:
        path = self._directory.recordings(shard)
        try:
            yield from read_recordings(path)
        except (ValueError, TypeError) as error:
            raise DamagedRunError(f"{path} is damaged: {error}; remove it and run the command again") from None

    def _record_options(self) -> RecordOptions:
        settings = self._settings
        return RecordOptions(
            loop=settings.loop,
            proposer=settings.proposer,
            block_size=settings.block_size,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        )

    def _provenance(self, num_recorded: int, total: Statistics) -> Provenance:
        settings = self._settings
        return Provenance(
            checkpoint_fingerprint=self._bundle.manifest.checkpoint_fingerprint,
            bundle_fingerprint=self._bundle.fingerprint,
            prompts_sha256=settings.prompts_sha256,
            num_prompts=num_recorded,
            loop=settings.loop,
            proposer=settings.proposer,
            block_size=settings.block_size,
            seed=settings.seed,
            mix=settings.mix,
            rows=dict(sorted(total.kinds.items())),
            tool_versions={"cllm-export": __version__, "onnxruntime": settings.onnxruntime},
        )


def _statistics(entry: LinearInput, total: Statistics) -> InputStatistics:
    found = total.inputs[entry.name]
    return InputStatistics(
        tensors=entry.tensors, num_rows=found.num_rows, amax=found.amax, high=found.high, mean_abs=found.mean_abs
    )


def _that_fit(left: Sequence[int], inputs: Sequence[LinearInput]) -> list[int]:
    """The next inputs whose Gram matrices fit in ``GRAM_BYTES`` together, at least one."""
    chosen, size = [left[0]], 4 * inputs[left[0]].width ** 2
    for index in left[1:]:
        size += 4 * inputs[index].width ** 2
        if size > GRAM_BYTES:
            break
        chosen.append(index)
    return chosen


def _save(path: Path, array: FloatArray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
