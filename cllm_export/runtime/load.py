"""Load a bundle: its engine on a device, its tokenizer and its prefix cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cllm_export.bundle.manifest import Bundle, open_bundle
from cllm_export.bundle.memory import PREFIX_CACHE_BYTES
from cllm_export.checks import names_options, option, require_at_least, require_one_of
from cllm_export.errors import OptionError, OutputError
from cllm_export.runtime.decoding.block_size.certificate import conditions_of, read_certified_sizes
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.block_size.latency_file import (
    read_compared_sizes,
    read_latency,
    write_compared_sizes,
)
from cllm_export.runtime.decoding.draft_model import DraftModel, check_pair
from cllm_export.runtime.decoding.prefix.prompt_state import PromptState
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.engines.machine import require_threads
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import pad_token

if TYPE_CHECKING:
    from cllm_export.tensorrt.library import LibraryName
    from cllm_export.tensorrt.plan_files import Plan

log = logging.getLogger(__name__)


@names_options
def load(
    path: str | Path,
    *,
    threads: int | None = None,
    num_slots: int | None = None,
    draft_model: str | Path | None = None,
    prefix_cache_bytes: int | None = None,
    provider: Provider = "cpu",
    cuda_graphs: bool = False,
    plan: str | None = None,
) -> Model:
    """Load a bundle for generation.

    Args:
        path: a directory that ``cllm-export build`` wrote.
        num_slots: B, the number of requests that a ``Service`` decodes at once. By default it is the bundle's batch
            size. A bundle with fixed shapes allows no other number.
        threads: CPU threads inside ONNX Runtime, at most as many as the process may use, which is the default.
        draft_model: another bundle with the same tokenizer, for requests with the ``model`` proposer. It is a smaller
            model or a CLLM.
        prefix_cache_bytes: host memory for the KV of earlier prompts and their new tokens. A prompt with the same
            beginning is prefilled only from the first token that differs. 0 keeps nothing. By default 256 MiB.
        provider: ``cpu`` and ``cuda`` are ONNX Runtime's; ``tensorrt`` runs the bundle's plan for this machine.
        cuda_graphs: only for ``cuda``: ONNX Runtime records the forward of each n and KV length, and replays it.
        plan: only for ``tensorrt`` and ``tensorrt-rtx``: the key of the bundle's plan. By default it is the newest that
            runs here. A draft model runs its own newest.

    Raises:
        OptionError: an option is out of range, or the draft model does not fit the model. The message says which and
            how.
        GpuError, PlanError: no GPU, or no plan that runs on it.
        BundleError: not a bundle, or damaged (sizes are checked; ``cllm-export verify`` checks checksums).
        EngineError: the engine does not take the graph.
        MissingExtraError: no engine is installed.
    """
    require_threads(threads)
    if prefix_cache_bytes is not None:
        require_at_least("prefix_cache_bytes", prefix_cache_bytes, 0)
    bundle = open_bundle(path)
    draft = open_bundle(draft_model) if draft_model else None
    if draft:
        check_pair(bundle, draft)
    engine = open_engine(bundle, provider, num_slots=num_slots, threads=threads, cuda_graphs=cuda_graphs, plan=plan)
    measured = _Measured(bundle, engine, provider, threads)
    return Model(
        bundle.manifest,
        engine,
        TextCodec.of_bundle(bundle),
        draft_model=_load_draft_model(draft, engine.num_slots, threads, provider, cuda_graphs) if draft else None,
        prompt_state=_make_prompt_state(bundle, engine, prefix_cache_bytes),
        forward_seconds=measured.times(),
        exact_sizes=measured.sizes(),
        keep_sizes=measured.keep_sizes,
    )


class _Measured:
    """What the files of a bundle know of its forwards on this engine. ``latency.json`` is of ONNX Runtime's CPU."""

    def __init__(self, bundle: Bundle, engine: Engine, provider: Provider, threads: int | None) -> None:
        self._bundle, self._engine, self._provider = bundle, engine, provider
        self._key: dict[str, Any] = {"num_slots": engine.num_slots, "threads": threads}

    def times(self) -> dict[int, float] | None:
        return read_latency(self._bundle, **self._key) if self._provider == "cpu" else None

    def sizes(self) -> ExactSizes:
        """The sizes that the certificate or ``latency.json`` compared under the conditions that hold here."""
        conditions = conditions_of(self._bundle, self._provider, self._engine.describe())
        certified = read_certified_sizes(self._bundle, conditions, num_slots=self._engine.num_slots)
        if self._provider != "cpu":
            return certified
        return certified.joined(read_compared_sizes(self._bundle, **self._key))

    def keep_sizes(self, sizes: ExactSizes) -> None:
        """Keep them for the next load. Where the directory is read-only, they are compared again each time."""
        if self._provider != "cpu":
            return
        try:
            write_compared_sizes(self._bundle, sizes, **self._key)
        except OutputError as error:
            log.info("the compared block sizes are not kept: %s", error)


def _make_prompt_state(bundle: Bundle, engine: Engine, max_bytes: int | None) -> PromptState | None:
    if not engine.can_copy_rows:
        if max_bytes:
            raise OptionError(f"{type(engine).__name__} keeps no prompts: leave prefix_cache_bytes out, or give 0")
        return None
    if max_bytes == 0:
        return None
    return PromptState(
        engine,
        max_bytes=PREFIX_CACHE_BYTES if max_bytes is None else max_bytes,
        fingerprint=bundle.fingerprint,
        max_length=bundle.manifest.max_length,
    )


def _load_draft_model(
    bundle: Bundle, num_slots: int, threads: int | None, provider: Provider, cuda_graphs: bool
) -> DraftModel:
    pinned = bundle.manifest.graphs["greedy"].fixed_shapes
    if pinned and pinned.batch_size < num_slots:
        raise OptionError(
            f"draft model {bundle.path} is pinned to {pinned.batch_size} slots and the model has {num_slots}: "
            f"build it with batch_size={num_slots}, or without fixed_shapes"
        )
    return DraftModel(
        open_engine(
            bundle,
            provider,
            num_slots=None if pinned else num_slots,
            threads=threads,
            cuda_graphs=cuda_graphs,
        ),
        max_length=bundle.manifest.max_length,
        pad_token_id=pad_token(bundle.manifest),
        trained_with=bundle.manifest.trained_with,
    )


Provider = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)


def provider_option() -> Any:
    """What runs a bundle, as an option of a command."""
    return option(
        "cpu",
        choices=PROVIDERS,
        help="What runs the bundle: ONNX Runtime on cpu or cuda, or the bundle's plan by tensorrt or tensorrt-rtx.",
        group="Machine",
    )


def plan_option() -> Any:
    """Which of a bundle's plans runs, as an option of a command."""
    return option(
        None,
        help="Key of the plan to run, as `inspect` shows it, with --provider tensorrt or tensorrt-rtx.",
        otherwise="the newest that runs here",
        group="Machine",
    )


def require_plan(bundle: Bundle, provider: Provider, plan: str | None) -> Plan | None:
    """The plan that an option names; None without the option. Needs no GPU.

    Raises:
        OptionError: this provider runs no plan, or the bundle has none of this key.
        PlanError: the plan is damaged.
    """
    if plan is None:
        return None
    if provider in ("cpu", "cuda"):
        raise OptionError(
            f"plan is for provider tensorrt and tensorrt-rtx, got {plan!r} and provider {provider}: leave plan out",
            fields=("plan", "provider"),
        )
    from cllm_export.tensorrt.plan_files import named_plan

    return named_plan(bundle, plan)


def open_engine(
    bundle: Bundle,
    provider: Provider,
    *,
    num_slots: int | None = None,
    threads: int | None = None,
    cuda_graphs: bool = False,
    plan: str | None = None,
) -> Engine:
    """A bundle's engine on a device. By default it has as many slots as the bundle or the plan was built for.

    Raises:
        OptionError: there is no such provider or plan, the plan has another number of slots, or ``cuda_graphs`` or
            ``plan`` is set for a provider that takes none.
        GpuError, PlanError, EngineError, MissingExtraError: see the engine.
    """
    require_one_of("provider", provider, PROVIDERS)
    if cuda_graphs and provider != "cuda":
        raise OptionError(
            f"cuda_graphs is for the provider cuda, got {provider}: leave it out (plans record graphs without)"
        )
    named = require_plan(bundle, provider, plan)
    match provider:
        case "cpu" | "cuda":
            return OrtEngine(bundle, device=provider, num_slots=num_slots, threads=threads, cuda_graphs=cuda_graphs)
        case library:
            return _open_plan_engine(bundle, library, num_slots, named)


def _open_plan_engine(bundle: Bundle, library: LibraryName, num_slots: int | None, plan: Plan | None) -> Engine:
    from cllm_export.tensorrt.engine import TrtEngine
    from cllm_export.tensorrt.library import LIBRARIES, open_gpu

    engine = TrtEngine(bundle, plan=plan, gpu=open_gpu(LIBRARIES[library]))
    if num_slots not in (None, engine.num_slots):
        slots = engine.num_slots
        engine.close()
        raise OptionError(
            f"the plan was built for {slots} slots, got num_slots={num_slots}: build one with that batch_size, or name "
            "another with plan"
        )
    return engine
