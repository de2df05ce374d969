"""Prove a bundle: its Jacobi loops give its own greedy tokens, and these are the checkpoint's tokens.

Jacobi decoding must equal autoregressive decoding through the same engine and shape. Across shapes or against PyTorch,
floating point may flip a token, so tokens are compared one by one. A difference counts as a tie only if the reference's
margin between its best token and the engine's token is below a stated epsilon.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from cllm_export.bundle.contract import BYTES, KV_DTYPE
from cllm_export.bundle.manifest import Bundle, open_bundle
from cllm_export.checks import names_options
from cllm_export.errors import ChecksumError, EngineError, GraphError, OptionError
from cllm_export.exporter.checkpoint.source import require_source
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.block_size.certificate import conditions_of
from cllm_export.runtime.engines.machine import (
    available_memory,
    available_threads,
    describe_processor,
    onnxruntime_version,
)
from cllm_export.runtime.engines.resident_memory import trim_heap
from cllm_export.verification.engine_checks import (
    EngineRun,
    check_cache_is_in_place,
    check_dead_rows_are_hidden,
    check_rows_are_isolated,
)
from cllm_export.verification.exact import Exactness, exactness_of
from cllm_export.verification.files import check_corruption_is_caught
from cllm_export.verification.report import (
    DEFAULT_NUM_PROMPTS,
    HELD_BYTES,
    Check,
    Parity,
    VerifyOptions,
    check_slots,
    check_writable,
    files_text,
    reported,
    write_parity,
)
from cllm_export.verification.tokens import TokenSession, open_reference

ENGINE_CHECKS = (check_rows_are_isolated, check_dead_rows_are_hidden, check_cache_is_in_place)


@names_options
def verify(
    bundle: Bundle | str | Path,
    *,
    prompts: Sequence[Prompt] = (),
    checkpoint: Path | None = None,
    base: Path | None = None,
    options: VerifyOptions | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Run every check and write ``parity.json`` into the bundle, which may be given by its path.

    Without prompts, seeded random tokens are used. Without a checkpoint, a token that differs across shapes cannot be
    shown to be a tie, and the check fails. A quantised bundle must decode losslessly like any other. Its distance from
    the checkpoint is reported but fails no check. ``checkpoint`` may be an adapter, with its ``base``. A bundle of only
    the first layers is compared with the checkpoint's first layers. If bundle and checkpoint do not fit in memory, they
    are compared layer by layer, and the report says that nothing was decoded.

    The report certifies the provider of the options, on this machine. It says which block sizes are bit-equal to n = 1
    there, and ``load`` uses what it says where the same holds.

    Raises:
        ChecksumError: a file of the bundle is corrupted.
        CheckpointError: the checkpoint cannot be read, or is not the one the bundle was built from.
        OptionError: an option needs another one.
    """
    options = options or VerifyOptions()
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    check_writable(bundle)
    check_slots(bundle, options)
    instead = _why_by_layer(bundle, options)
    if checkpoint is None:
        _require_no_checkpoint(base, instead)
    conditions = {
        "by_layer": instead,
        "prompts": len(prompts) or f"{DEFAULT_NUM_PROMPTS} of random tokens",
        "max_new_tokens": options.max_new_tokens,
        "compared_with_checkpoint": checkpoint is not None,
        **conditions_of(bundle, options.provider, {"device": None}),
    }
    try:
        bundle.check_files(progress)
    except ChecksumError as error:
        _write(bundle, conditions, [Check(name="checksums", passed=False, detail=str(error))], None)
        raise
    progress = progress or (lambda *_: None)
    checks, exact = [Check(name="checksums", passed=True, detail=files_text(bundle))], None
    if instead and checkpoint:
        conditions |= describe_processor(options.threads or available_threads()) | onnxruntime_version()
        checks.append(Check(name="decoding", passed=None, detail=f"not tried: {instead}"))
        checks.append(check_layers(bundle, checkpoint, base=base, threads=options.threads, progress=progress))
    else:
        progress("opening the bundle", 0, 1)
        found, facts, exact = _decode(bundle, prompts, checkpoint, base, options, progress)
        conditions |= facts
        checks += found
    progress("checks of the files", 0, 1)
    checks.append(check_corruption_is_caught(bundle))
    return _write(bundle, conditions, checks, exact.to_dict() if exact else None)


def _write(
    bundle: Bundle, conditions: dict[str, Any], checks: Sequence[Check], exact_sizes: dict[str, Any] | None
) -> Parity:
    parity = Parity(
        bundle_fingerprint=bundle.fingerprint, conditions=conditions, checks=tuple(checks), exact_sizes=exact_sizes
    )
    write_parity(bundle, parity)
    return parity


def _decode(
    bundle: Bundle,
    prompts: Sequence[Prompt],
    checkpoint: Path | None,
    base: Path | None,
    options: VerifyOptions,
    progress: Progress,
) -> tuple[list[Check], dict[str, Any], Exactness]:
    """The checks that need an engine, what it depends on, and which sizes are exact on it.

    The checkpoint's model leaves memory before the last checks open engines of their own.
    """
    facts, checks = _compare_tokens(bundle, prompts, checkpoint, base, options, progress)
    trim_heap()
    progress("checks of the engine", 0, 1)
    run = EngineRun(options.provider, options.threads, facts.get("plan"))
    checks += [check(bundle, run) for check in ENGINE_CHECKS]
    exact = exactness_of(bundle, run, options)
    return [*checks, exact.check], facts, exact


def _compare_tokens(
    bundle: Bundle,
    prompts: Sequence[Prompt],
    checkpoint: Path | None,
    base: Path | None,
    options: VerifyOptions,
    progress: Progress,
) -> tuple[dict[str, Any], list[Check]]:
    """What the engine depends on, and the checks of its tokens."""
    if checkpoint:
        require_source(bundle, checkpoint, base)
    reference = partial(open_reference, bundle, checkpoint, base) if checkpoint else None
    with closing(TokenSession(bundle, prompts, reference, options, progress)) as session:
        return session.describe_engine(), session.token_checks()


def check_layers(
    bundle: Bundle,
    checkpoint: Path,
    *,
    base: Path | None = None,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> Check:
    """Compare every layer with the checkpoint's, one in memory at a time. See ``exporter/parity/layer_parity.py``.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not the one the bundle was built from.
        OptionError: the checkpoint is an adapter, whose layers cannot be merged one by one.
    """
    from cllm_export.exporter.checkpoint.adapter import open_source
    from cllm_export.exporter.parity.layer_parity import NUM_TOKENS, compare_layers, describe
    from cllm_export.exporter.parity.layer_reference import LayerReference

    name, manifest = "layer by layer against the PyTorch checkpoint", bundle.manifest
    require_source(bundle, checkpoint, base)
    opened, adapter = open_source(checkpoint, base, max_length=manifest.max_length)
    if adapter:
        raise OptionError(f"{checkpoint} is an adapter, which is not compared layer by layer: use by_layer=False")
    reference = LayerReference(
        opened, manifest.precision, max_length=manifest.max_length, num_layers=manifest.geometry.num_layers
    )
    generator = random.Random(0)  # noqa: S311 - test data, not a secret
    tokens = [generator.randrange(manifest.geometry.vocab_size) for _ in range(NUM_TOKENS)]
    try:
        errors = compare_layers(bundle, reference, tokens, threads=threads or available_threads(), progress=progress)
    except (EngineError, GraphError) as error:
        return Check(name=name, passed=False, detail=str(error))
    detail, parts = describe(errors)
    check = Check(name=name, passed=all(entry.passed for entry in errors), detail=detail, data={"parts": parts})
    return reported(check) if manifest.quantization else check


def _require_no_checkpoint(base: Path | None, instead: str | None) -> None:
    """Refuse what needs a checkpoint: a base, or a comparison by layer for this reason."""
    if base is not None:
        raise OptionError("base needs checkpoint, which must be an adapter", fields=("base", "checkpoint"))
    if instead:
        raise OptionError(
            f"nothing would be decoded ({instead}): give checkpoint, to compare with", fields=("checkpoint",)
        )


def _why_by_layer(bundle: Bundle, options: VerifyOptions) -> str | None:
    """Why the bundle is compared layer by layer, or None if it is decoded. A GPU decodes it whole."""
    if options.by_layer is not None:
        return "asked for layer by layer" if options.by_layer else None
    if options.provider != "cpu":
        return None
    manifest = bundle.manifest
    if manifest.precision == "bf16":
        return "no engine here multiplies bf16 matrices"
    stored = 1 if manifest.quantization else BYTES[KV_DTYPE[manifest.precision]]
    parameters = bundle.weight_bytes // stored
    needed, free = HELD_BYTES * parameters, available_memory()
    if free is None or needed <= free:
        return None
    return f"bundle and checkpoint would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
