"""Settings of a tuning run, from its options and the checkpoint."""

from __future__ import annotations

from cllm_export.exporter.checkpoint.read import Checkpoint, refuse_in_torch
from cllm_export.exporter.options import BuildOptions
from cllm_export.exporter.settle import Settings, settle
from cllm_export.training.options import TuneOptions


def settle_tuning(options: TuneOptions, checkpoint: Checkpoint) -> Settings:
    """Lengths and block size, from the options and the checkpoint.

    Raises:
        OptionError: the options do not fit the checkpoint.
        UnsupportedError: the checkpoint cannot be trained at this length, see ``refuse_in_torch``.
    """
    settings = settle(BuildOptions(max_length=options.max_length, trained_with=options.trained_with), checkpoint)
    refuse_in_torch(checkpoint, settings.max_length)
    return settings
