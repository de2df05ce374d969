"""The options of a verification, and the report that it writes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

from cllm_export.bundle.manifest import GREEDY_GRAPH, PARITY_NAME, Bundle
from cllm_export.bundle.storage import write_text
from cllm_export.checks import check_options, documented, option
from cllm_export.errors import OptionError, OutputError
from cllm_export.runtime.decoding.shared_options import max_new_tokens_option, num_slots_option, threads_option
from cllm_export.runtime.engines.machine import require_memory
from cllm_export.runtime.load import Provider, plan_option, provider_option

GREEDY, SAMPLED = "", "sampled "
"""Prefixes of check names."""

DEFAULT_NUM_PROMPTS = 16

HELD_BYTES = 10
"""Bytes per parameter in ``verify``: fp32 in the engine or in PyTorch, never in both, pages of the weight
files, and working memory."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One property of a bundle and whether it holds.

    ``passed`` is None if the property was not checked or is not required; ``detail`` says why.
    """

    name: str
    passed: bool | None
    detail: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The report that ``verify`` writes as ``parity.json``."""

    bundle_fingerprint: str
    conditions: dict[str, Any]
    """What the report certifies: provider, device, precision, threads, versions of libraries. And the settings of the
    checks: prompts, new tokens, and whether PyTorch was compared."""
    checks: tuple[Check, ...]
    exact_sizes: dict[str, Any] | None = None
    """Block sizes by whether they are ``equal`` to n = 1 or ``different``, and ``num_slots``, the numbers of slots that
    they were compared with. None if nothing was compared."""

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> str:
        checks = [vars(check) for check in self.checks]
        report = {
            "bundle_fingerprint": self.bundle_fingerprint,
            "passed": self.passed,
            "conditions": self.conditions,
            "exact_sizes": self.exact_sizes,
            "checks": checks,
        }
        return json.dumps(report, indent=2) + "\n"


@documented
@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of ``cllm-export verify``."""

    max_new_tokens: int = max_new_tokens_option()
    block_sizes: tuple[int, ...] = option(
        (),
        help="Block size n, in tokens; repeat the option for several.",
        minimum=1,
        flag="--block-size",
        group="Decoding",
    )
    """Block sizes of the losslessness checks. The default is the bundle's own n."""
    threads: int | None = threads_option()
    provider: Provider = provider_option()
    """What runs the bundle. The certificate is for this provider alone."""
    plan: str | None = plan_option()
    """The certificate is for this plan alone."""
    num_slots: int | None = num_slots_option(
        help="Number of slots to compare block sizes with, as the service will have.",
        otherwise="the bundle's batch size, at least 2",
    )
    """Block sizes are compared with one slot and with this many. A plan has the slots that it was built with."""
    by_layer: bool | None = option(
        None,
        help="Compare with the checkpoint layer by layer, or by decoding.",
        otherwise="whichever fits in memory",
        flag="--by-layer/--whole",
        group="Machine",
    )
    """Compare with the checkpoint layer by layer instead of decoding. Default if both do not fit in memory."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.by_layer and self.provider != "cpu":
            raise OptionError(
                f"layers are compared on the CPU alone, got provider={self.provider!r}: leave provider or by_layer out",
                fields=("provider", "by_layer"),
            )
        if self.num_slots is not None and not self.slots_may_vary:
            raise OptionError(
                f"a plan has the slots that it was built with, got num_slots={self.num_slots} and "
                f"provider={self.provider!r}: leave num_slots out",
                fields=("num_slots", "provider"),
            )

    @property
    def slots_may_vary(self) -> bool:
        """Whether the provider runs any number of slots."""
        return self.provider in ("cpu", "cuda")


def check_writable(bundle: Bundle) -> None:
    """Check, before any work, that the report can be written.

    Raises:
        OutputError: the bundle's directory is not writable.
    """
    try:
        with tempfile.TemporaryFile(dir=bundle.path) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise OutputError(f"cannot write {PARITY_NAME} into {bundle.path}: {error.strerror}") from None


def check_slots(bundle: Bundle, options: VerifyOptions) -> None:
    """Check, before any work, that an engine can have as many slots as the options ask for.

    Raises:
        OptionError: the bundle is pinned to another number, or so many do not fit into memory.
    """
    slots, manifest = options.num_slots, bundle.manifest
    if slots is None:
        return
    fixed = manifest.graphs[GREEDY_GRAPH].fixed_shapes
    if fixed and slots != fixed.batch_size:
        raise OptionError(
            f"{bundle.path} is pinned to {fixed.batch_size} slots, got num_slots={slots}: leave num_slots out",
            fields=("num_slots",),
        )
    if options.provider == "cpu":
        require_memory(slots, manifest.geometry.cache_bytes(manifest.precision))


def write_parity(bundle: Bundle, parity: Parity) -> None:
    """Write ``parity.json``, whole or not at all.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    write_text(bundle.path / PARITY_NAME, parity.to_json())


def files_text(bundle: Bundle) -> str:
    linked = len(bundle.manifest.linked_files)
    return f"{len(bundle.manifest.files)} files match the manifest" + (f", {linked} linked ones too" if linked else "")


def reported(check: Check) -> Check:
    return replace(check, passed=None, detail=f"{check.detail}; reported, for a quantised bundle need not agree")
