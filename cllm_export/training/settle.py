"""What a checkpoint makes of the options of a tuning run."""

from __future__ import annotations

from cllm_export.exporter.checkpoint.read import Checkpoint, refuse_in_torch
from cllm_export.exporter.options import BuildOptions
from cllm_export.exporter.settle import Settings, settle
from cllm_export.training.options import TuneOptions


def settle_tuning(options: TuneOptions, checkpoint: Checkpoint) -> Settings:
    """What the checkpoint makes of lengths and block size.

    Raises:
        OptionError: they do not fit it.
        UnsupportedError: it cannot be trained at this length, see ``refuse_in_torch``.
    """
    settings = settle(BuildOptions(max_length=options.max_length, trained_with=options.trained_with), checkpoint)
    refuse_in_torch(checkpoint, settings.max_length)
    return settings
