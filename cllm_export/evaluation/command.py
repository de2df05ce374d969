"""Runs ``cllm-export evaluate``: from the parsed options to the report."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from cllm_export.checks import option_specs
from cllm_export.errors import OptionError, about
from cllm_export.evaluation.evaluate import EvaluateOptions, evaluate, read_task
from cllm_export.evaluation.probe import ProbeOptions, probe
from cllm_export.evaluation.tasks.task import TASKS, TaskName
from cllm_export.progress import Progress
from cllm_export.prompts import read_prompts

OF_PROBE = tuple(option_specs(ProbeOptions))


def run_evaluation(
    source: Path,
    data: Path,
    task: TaskName | None,
    parent: Path | None,
    options: EvaluateOptions,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate. Bad arguments are refused before any work.

    Raises:
        CllmExportError: see ``evaluate``.
    """
    if task is None:
        raise OptionError(
            f"say what the data is with task ({', '.join(TASKS)}), or ask for probe", fields=("task", "probe")
        )
    with about("data"):
        read = read_task(task, data, options)
    return evaluate(source, read, data=data, parent=parent, options=options, progress=progress)


def run_probe(
    source: Path,
    data: Path,
    task: TaskName | None,
    parent: Path | None,
    options: EvaluateOptions,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probe. Bad arguments are refused before any work.

    Raises:
        OptionError: an option was given that a probe does not use.
        CllmExportError: see ``probe``.
    """
    given = {field.name: getattr(options, field.name) for field in fields(options)} | {"task": task, "parent": parent}
    if unused := [name for name, value in given.items() if value and name not in OF_PROBE]:
        raise OptionError(
            f"{unused[0]} is not for probe, which tries every form: leave it out", fields=(unused[0], "probe")
        )
    probe_options = ProbeOptions(**{name: given[name] for name in OF_PROBE if given[name] is not None})
    with about("data"):
        prompts = read_prompts(data, limit=options.limit)
    return probe(source, prompts, options=probe_options, progress=progress)
