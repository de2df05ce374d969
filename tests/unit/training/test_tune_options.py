"""Options of a tuning run: what is out of range is refused by name, NaN included."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import OptionError
from cllm_export.training.model.options import LoraOptions
from cllm_export.training.options import TuneOptions

SHARES = ("label_smoothing", "distance_weight", "decay", "evaluate_every")
RATES = ("autoregressive_weight", "weight_decay", "learning_rate", "matrix_learning_rate")
NUMBERS = sorted({*RATES, *SHARES, "max_gradient_norm"})


def make(**changes: Any) -> TuneOptions:
    return TuneOptions(**{"steps": 1} | changes)


def test_the_defaults_are_allowed_and_the_first_block_size_is_what_is_trained_with():
    options = make(block_sizes=(8, 16), loop="block", proposer="prompt", lora=LoraOptions(rank=2, alpha=4))
    assert options.trained_with == TrainedWith(block_size=8, proposer="prompt", loop="block")
    assert json.loads(json.dumps(options.to_dict()))["lora"] == {"rank": 2, "alpha": 4}


@pytest.mark.parametrize("value", [math.nan, -1, math.inf, -math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_negative_or_none_at_all(name: str, value: float):
    with pytest.raises(OptionError, match=name):
        make(**{name: value})


@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_one_at_most(name: str):
    make(**{name: 1.0})
    with pytest.raises(OptionError, match=f"{name} must be .* 1, got 1.01"):
        make(**{name: 1.01})


@pytest.mark.parametrize("name", ["max_gradient_norm", "evaluate_every"])
def test_what_must_be_more_than_nothing(name: str):
    with pytest.raises(OptionError, match=name):
        make(**{name: 0})


@pytest.mark.parametrize("name", ["num_windows", "batch_size", "gradient_accumulation", "steps", "patience"])
@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_a_count_is_one_at_least(name: str, value: float):
    with pytest.raises(OptionError, match=name):
        make(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1])
def test_minutes_are_a_time(value: float):
    make(steps=None, minutes=0.01)
    with pytest.raises(OptionError, match="minutes"):
        make(steps=None, minutes=value)


@pytest.mark.parametrize("limits", [{"steps": None}, {"steps": 1, "minutes": 1.0}])
def test_a_run_ends_after_steps_or_after_minutes(limits: dict[str, Any]):
    with pytest.raises(OptionError, match="either steps or minutes"):
        make(**limits)


@pytest.mark.parametrize("sizes", [(), (1,), (16, 0), (-4,)])
def test_a_block_has_something_to_guess(sizes: tuple[int, ...]):
    with pytest.raises(OptionError, match="block_sizes"):
        make(block_sizes=sizes)


@pytest.mark.parametrize("name", ["objective", "loop", "proposer", "optimizer", "mixed_precision"])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str):
    with pytest.raises(OptionError, match=f"{name} must be one of .*, got 'other'"):
        make(**{name: "other"})


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 2**32), ("max_length", 1), ("max_length", 0)])
def test_what_the_libraries_below_would_choke_on_is_refused_here(name: str, value: int):
    with pytest.raises(OptionError, match=name):
        make(**{name: value})


def test_muon_does_not_go_with_scaled_losses():
    make(optimizer="muon", mixed_precision="bf16")
    with pytest.raises(OptionError, match="optimizer='muon' does not go with mixed_precision='fp16'"):
        make(optimizer="muon", mixed_precision="fp16")
