"""The options of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cllm_export.bundle.contract import PRECISIONS, Precision
from cllm_export.bundle.linked_weights import WEIGHTS_MODES, WeightsMode
from cllm_export.bundle.manifest import LOOPS, PROPOSERS, Loop, ProposerName, TrainedWith
from cllm_export.bundle.quantization import ENGINE_TITLES
from cllm_export.checks import OptionGroup, check_options, documented, option
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.read import DEFAULT_MAX_LENGTH_CAP, require_layers
from cllm_export.exporter.quantize.options import QuantizeOptions

MIN_MAX_LENGTH = 2


@documented
@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of ``cllm-export build``.

    Raises:
        OptionError: an option is out of its range.
    """

    GROUP: ClassVar[OptionGroup] = "Graph"

    block_size: int | None = option(
        None, help="Block size n, in tokens.", otherwise="what the model was trained with, else 16", minimum=1
    )
    max_length: int | None = option(
        None,
        help="Largest number of tokens of a prompt and its new tokens.",
        otherwise="the model's, at most 2048",
        minimum=1,
    )
    batch_size: int = option(1, help="Number of slots: prompts that are decoded at once.", minimum=1)
    precision: Precision = option(
        "fp32", help="The dtype of what is computed and of the KV cache.", choices=PRECISIONS, hidden=True
    )
    """The dtype of the computation and of the KV cache."""
    quantize: QuantizeOptions | None = None
    """How to quantise linear layers; by default they are not quantised."""
    weights: WeightsMode = option(
        "copy",
        help="Copy the weights into the bundle, or link to the checkpoint, which must then stay there.",
        choices=WEIGHTS_MODES,
        group="Output",
    )
    """``copy`` makes a bundle that does not need the checkpoint. ``link`` leaves tensors that already have the engine's
    dtype in the checkpoint. The bundle then needs the checkpoint to stay where it is."""
    max_memory: int | None = option(
        None, help="Largest amount of memory that the build may use, such as 1GB.", minimum=1, group="Machine"
    )
    """Limit on the anonymous memory of the build, in bytes."""
    base: Path | None = option(
        None,
        help="The checkpoint that a LoRA adapter is for.",
        otherwise="the one that the adapter names",
        group="Input",
    )
    num_layers: int | None = option(
        None, help="Export only this many layers, from the first, for debugging.", minimum=1, group="Input"
    )
    fixed_shapes: bool = option(
        False, help="Fix the batch size, block size and KV length in the graph, for compilers that need fixed shapes."
    )
    lookahead: bool = option(False, help="Add the graph that lookahead decoding needs.")
    """Add the lookahead graph, which fixed shapes exclude. Where the model cannot have one, only the greedy graph is
    built; the report says why."""
    trained_with: TrainedWith | None = None
    """Overrides the ``cllm`` section of the checkpoint's config."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.lookahead and self.fixed_shapes:
            raise OptionError(
                "lookahead and fixed_shapes exclude each other: the block of the one grows and shrinks by what was "
                "accepted, and the other pins it; leave one of them out",
                fields=("lookahead", "fixed_shapes"),
            )
        if self.quantize:
            self._require_compute(self.quantize)

    def _require_compute(self, quantize: QuantizeOptions) -> None:
        """Refuse a dtype that the quantised graph cannot compute in."""
        form = quantize.form
        if self.precision in form.compute:
            return
        engines = " and ".join(ENGINE_TITLES[engine] for engine in form.engines)
        other = next((form for form in quantize.spec.forms if self.precision in form.compute), None)
        raise OptionError(
            f"{quantize.scheme} for {engines} computes in {' or '.join(form.compute)}, got {self.precision}: "
            "leave precision out" + (f", or give engine='{other.engines[0]}'" if other else ""),
            fields=("precision",),
        )


@dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """``TrainedWith`` as options of the command line."""

    GROUP: ClassVar[OptionGroup] = "Training"

    block_size: int = option(
        help="Block size that the model was tuned with, if its config does not say.",
        minimum=1,
        flag="--trained-block-size",
    )
    proposer: ProposerName = option(
        "pad",
        help="Proposer that the model was tuned with, if its config does not say.",
        choices=PROPOSERS,
        flag="--trained-proposer",
    )
    loop: Loop = option(
        "sliding",
        help="Loop that the model was tuned with, if its config does not say.",
        choices=LOOPS,
        flag="--trained-loop",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def trained_with(self) -> TrainedWith:
        return TrainedWith(block_size=self.block_size, proposer=self.proposer, loop=self.loop)


def require_lengths(options: BuildOptions, *, max_length: int, limit: int, trained_block: int | None = None) -> None:
    """Refuse a length that the model does not have, or a block size that exceeds the length.

    Args:
        max_length: the length that the bundle is built for.
        limit: the model's own number of positions.
        trained_block: the block size if none is given.

    Raises:
        OptionError: as said.
    """
    if max_length < MIN_MAX_LENGTH:
        raise OptionError(f"max_length must be at least {MIN_MAX_LENGTH}, a prompt token and a new one")
    if max_length > limit:
        raise OptionError(f"max_length={max_length} is beyond the model's own {limit} positions")
    block_size = options.block_size or trained_block
    if block_size is not None and block_size > max_length:
        given = f"block_size={block_size}"
        origin = given if options.block_size else f"the block size it was trained with, {block_size},"
        raise OptionError(f"{origin} is above the max length {max_length}; choose a smaller block_size")


def refuse_link(path: Path, options: BuildOptions) -> None:
    """Refuse to link the weights of a GGUF file, which is imported for the time of the build alone.

    Raises:
        OptionError: they are to be linked.
    """
    if options.weights == "link":
        raise OptionError(
            f"weights='link' needs a checkpoint that stays, and {path} is a GGUF file: import it first with "
            f"cllm-export import {path} --output my-checkpoint, and build that",
            fields=("weights",),
        )


def check_lengths(options: BuildOptions, config: Mapping[str, Any], path: Path) -> None:
    """Compare the lengths of a build with a checkpoint's ``config.json``, as far as it states them.

    Raises:
        OptionError: the model has fewer positions or layers.
    """
    limit, layers = config.get("max_position_embeddings"), config.get("num_hidden_layers")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    is_dynamic = isinstance(rope, dict) and "dynamic" in (rope.get("rope_type"), rope.get("type"))
    if isinstance(limit, int) and not is_dynamic:  # that type is refused beyond its length for a reason of its own
        length = options.max_length or min(limit, DEFAULT_MAX_LENGTH_CAP)
        require_lengths(options, max_length=length, limit=limit)
    if isinstance(layers, int) and options.num_layers is not None:
        require_layers(options.num_layers, layers, path)
