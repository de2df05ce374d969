"""Runs ``cllm-export tune``: prepares the data, tunes, reports. Each process of the run makes one call."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cllm_export.progress import SILENT, Voice
from cllm_export.runtime.engines.machine import require_threads
from cllm_export.training.intake import describe_data
from cllm_export.training.options import TuneOptions
from cllm_export.training.outcome import compare
from cllm_export.training.prepare import TrainingData, prepare
from cllm_export.training.processes import explain_lost_rank, join_processes, rank0_first
from cllm_export.training.tune import TuneReport, tune
from cllm_export.training.work import WorkDirectory


def run_tune(
    checkpoint: Path,
    prompts: Path,
    output: Path,
    options: TuneOptions,
    *,
    trajectories: Path | None,
    held_out: Path | None,
    num_held_out: int,
    limit: int | None,
    threads: int | None,
    resume: bool,
    force: bool,
    voice: Voice = SILENT,
) -> dict[str, Any] | None:
    """Tune, and return a description of the result; None in every process but the first.

    The run says what it keeps and drops before it begins, one line per call.

    Raises:
        CllmExportError: see ``prepare`` and ``tune``.
    """
    require_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    state = join_processes()
    if not state.is_main_process:
        voice = SILENT
    work = rank0_first(lambda: WorkDirectory(output, force=force, resume=resume))
    data = rank0_first(  # the first process collects missing answers; the others read them
        lambda: prepare(
            checkpoint,
            prompts,
            options,
            trajectories=trajectories,
            held_out=held_out,
            num_held_out=num_held_out,
            limit=limit,
            collected=work.collected_path,
            progress=voice.progress,
        )
    )
    for line in describe_data(data, options, num_processes=state.num_processes):
        voice.say(line)
    with explain_lost_rank():
        report = tune(
            checkpoint,
            output,
            data.samples,
            data.held_out,
            options,
            resume=resume,
            force=force,
            progress=voice.progress,
        )
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    return _describe(data, report)


def _describe(data: TrainingData, report: TuneReport) -> dict[str, Any]:
    outcome = compare(report.curve, stopped=report.stopped, num_prompts=len(data.held_out))
    return {
        "samples": len(data.samples),
        "held_out": len(data.held_out),
        "dropped": data.dropped,
        **asdict(report),
        "outcome": asdict(outcome),
    }
