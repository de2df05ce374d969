"""Names of fields in errors, shown as flags."""

from __future__ import annotations

import pytest

from cllm_export.cli.flags import Flag, with_flags
from cllm_export.errors import BundleError, OptionError, PromptError

FLAGS = {
    "block_size": Flag(on="--block-size"),
    "block_sizes": Flag(on="--block-size"),
    "seed": Flag(on="--seed"),
    "proposer": Flag(on="--proposer"),
    "by_layer": Flag(on="--by-layer", off="--whole", is_switch=True),
    "force": Flag(on="--force", is_switch=True),
}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("seed must be at least 0, got -1", "--seed must be at least 0, got -1"),
        ("leave block_size and seed out.", "leave --block-size and --seed out."),
        ("block_sizes must be 2 or more", "--block-size must be 2 or more"),
        ("the proposer of a seed, reseeded", "the proposer of a --seed, reseeded"),
        ("got 'seed' and 'block_size'", "got 'seed' and 'block_size'"),
        ("cannot read /data/seed/block_size.json", "cannot read /data/seed/block_size.json"),
        ("run again with --seed", "run again with --seed"),
        ("choose block_size=4, or proposer='pad'.", "choose --block-size 4, or --proposer pad."),
        ("use by_layer=True", "use --by-layer"),
        ("use by_layer=False", "use --whole"),
        ("leave force=True out", "leave --force out"),
    ],
)
def test_fields_of_the_error_become_flags(message: str, shown: str):
    assert with_flags(OptionError(message, fields=("seed",)), FLAGS) == shown


def test_other_errors_have_names_with_underscores_replaced():
    """A word without one may be plain English."""
    assert with_flags(PromptError("choose a block_size; no seed"), FLAGS) == "choose a --block-size; no seed"
    assert with_flags(PromptError("give another seed", fields=("seed",)), FLAGS) == "give another --seed"


def test_the_keys_of_a_damaged_file_stay():
    """They may be spelled like an option."""
    assert with_flags(BundleError("block_size is no number"), FLAGS) == "block_size is no number"
    assert with_flags(BundleError("give block_size", fields=("block_size",)), FLAGS) == "give --block-size"


def test_a_field_that_is_no_option_of_the_command_stays():
    assert with_flags(OptionError("num_slots is 0", fields=("num_slots",)), FLAGS) == "num_slots is 0"
