"""``cllm-export evaluate``: decodes and scores a model on a task, and its parent with equal settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cllm_export.bundle.manifest import ProposerName
from cllm_export.checks import check_options, option
from cllm_export.errors import OptionError, PromptError
from cllm_export.evaluation.decoding import Decoded, Settings, decode_prompts, default_settings
from cllm_export.evaluation.measures import measure
from cllm_export.evaluation.sources import kind_of, open_source
from cllm_export.evaluation.tasks.gsm8k_task import Gsm8kTask
from cllm_export.evaluation.tasks.humaneval_task import HumanevalTask
from cllm_export.evaluation.tasks.prompt_task import PromptTask
from cllm_export.evaluation.tasks.scores import Scores
from cllm_export.evaluation.tasks.task import Task, TaskName, user_message
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.request import JacobiMethod
from cllm_export.runtime.decoding.shared_options import (
    block_size_option,
    limit_option,
    max_new_tokens_option,
    method_option,
    proposer_option,
    threads_option,
)
from cllm_export.runtime.general_text import Passage, general_passages, text_option
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import pad_token
from cllm_export.runtime.teacher_forced import ForcedText, Reading, agreement, general_texts, perplexity, read_texts

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of ``cllm-export evaluate``. None stands for the default of the model or of the task."""

    method: JacobiMethod | None = method_option()
    block_size: int | None = block_size_option(whose="the model's own")
    proposer: ProposerName | None = proposer_option()
    max_new_tokens: int | None = max_new_tokens_option(None, otherwise="the task's")
    limit: int | None = limit_option()
    threads: int | None = threads_option()
    text: Path | None = text_option()
    allow_code_execution: bool = option(
        False, help="Run the code that the model writes, in a sandbox. Only humaneval needs it.", group="Input"
    )

    def __post_init__(self) -> None:
        check_options(self)


def read_task(name: TaskName, data: Path, options: EvaluateOptions) -> Task:
    """Read a task's data file.

    Raises:
        DataError, PromptError: the file is missing, damaged or belongs to another task.
        OptionError: an option does not fit the task.
        MissingExtraError: the task needs a package that is not installed.
    """
    if options.allow_code_execution and name != "humaneval":
        raise OptionError(f"allow_code_execution is for task='humaneval'; leave it out with task='{name}'")
    if name == "humaneval":
        return HumanevalTask.read(data, limit=options.limit, allow_code_execution=options.allow_code_execution)
    if name == "gsm8k":
        return Gsm8kTask.read(data, limit=options.limit)
    if name == "prompts":
        return PromptTask.read(data, limit=options.limit)
    from cllm_export.evaluation.tasks.spider_task import SpiderTask

    return SpiderTask.read(data, limit=options.limit)


def evaluate(
    source: Path,
    task: Task,
    *,
    data: Path,
    parent: Path | None = None,
    options: EvaluateOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode and score a task, and return the report, JSON-ready.

    ``models`` holds ``model`` and, if given, ``parent``, which is decoded with the settings of ``model``. Each has
    ``scores`` (shares by measure, overall and by group), ``decoding`` (see ``Measures``), ``general_perplexity``,
    ``skipped`` (prompts by reason) and ``answers`` (the text and the judgement of each prompt). ``compared`` says how
    far the two agree: ``same_text``, the equal answers, and ``general_agreement``, the tokens of general text for which
    both predict the same token, which is None if their tokenizers differ. It is None without a parent.

    Raises:
        CllmExportError: a model cannot be opened or cannot decode with the settings, or no prompt can be decoded.
    """
    options = options or EvaluateOptions()
    for path in (source, parent):
        if path is not None:
            kind_of(path)
    model = open_source(source, threads=options.threads)
    settings = settle(default_settings(model, max_new_tokens=options.max_new_tokens or task.max_new_tokens), options)
    passages = general_passages(options.text)
    ours = _read_general(model, passages, progress)
    models = {"model": _evaluate_one(source, model, task, settings, progress, "model")}
    models["model"]["general_perplexity"] = perplexity(ours.readings)
    compared = None
    if parent:
        del model
        other = open_source(parent, threads=options.threads)
        theirs = _read_general(other, passages, progress)
        models["parent"] = _evaluate_one(parent, other, task, settings, progress, "parent")
        models["parent"]["general_perplexity"] = perplexity(theirs.readings)
        compared = _compare(models, ours, theirs)
    return {
        "report_version": REPORT_VERSION,
        "task": task.name,
        "data": data.name,
        "limit": options.limit,
        "settings": {
            "method": settings.method,
            "block_size": settings.block_size,
            "proposer": settings.proposer,
            "max_new_tokens": settings.max_new_tokens,
        },
        "models": models,
        "compared": compared,
    }


def settle(defaults: Settings, options: EvaluateOptions) -> Settings:
    """A model's defaults, replaced by the options that the user chose."""
    chosen = {name: getattr(options, name) for name in ("method", "block_size", "proposer", "max_new_tokens")}
    return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})


def speaks_chat(model: Model) -> bool:
    """Whether a model has a chat template that accepts a user message."""
    try:
        return bool(model.encode(user_message("hello")))
    except PromptError:
        return False


class _General(NamedTuple):
    """General text as a model reads it."""

    texts: list[ForcedText]
    readings: list[Reading]


def _read_general(model: Model, passages: Sequence[Passage], progress: Progress | None) -> _General:
    texts = general_texts(model.codec, passages, max_length=model.facts.max_length)
    report = progress or (lambda *_: None)
    readings = read_texts(
        model.engine, texts, pad_token(model.facts), lambda done: report("general text", done, len(texts))
    )
    return _General(texts, readings)


def _compare(models: Mapping[str, Mapping[str, Any]], ours: _General, theirs: _General) -> dict[str, Any]:
    """How far the model and its parent agree, JSON-ready."""
    first, second = ({each["id"]: each["text"] for each in entry["answers"]} for entry in models.values())
    both = first.keys() & second.keys()
    equal = sum(first[name] == second[name] for name in both)
    agreed = agreement(theirs.readings, ours.readings).to_dict() if ours.texts == theirs.texts else None
    return {"same_text": {"equal": equal, "of": len(both)}, "general_agreement": agreed}


def _evaluate_one(
    path: Path, model: Model, task: Task, settings: Settings, progress: Progress | None, stage: str
) -> dict[str, Any]:
    chat = speaks_chat(model)
    prompts = task.prompts(chat=chat)
    decoded = decode_prompts(
        model, prompts, replace(settings, stop=tuple(task.stop(chat=chat))), progress=progress, stage=stage
    )
    scores = _score(task, decoded, progress)
    return {
        "path": path.name,
        "kind": kind_of(path),
        "chat": chat,
        "prompts": len(prompts),
        "decoded": len(decoded.answers),
        "skipped": decoded.skipped,
        "scores": scores.to_dict(),
        "decoding": measure(decoded.answers, settings).to_dict(),
        "answers": _answers(decoded, scores, lambda index: prompts[index].id),
    }


def _score(task: Task, decoded: Decoded, progress: Progress | None) -> Scores:
    if progress:
        progress("scores", 0, len(decoded.answers))
    indices = [answer.index for answer in decoded.answers]
    return task.score(indices, [answer.generation.text for answer in decoded.answers])


def _answers(decoded: Decoded, scores: Scores, name: Callable[[int], str]) -> list[dict[str, Any]]:
    return [
        {"id": name(answer.index), "text": answer.generation.text, "exact": answer.exact, **judgement}
        for answer, judgement in zip(decoded.answers, scores.judgements, strict=True)
    ]
