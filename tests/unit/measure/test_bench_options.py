"""What a bench may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import OptionError
from cllm_export.measure.options import BenchOptions


def test_the_baseline_stands_beside_methods_that_are_asked_for():
    assert BenchOptions(methods=("jacobi",)).timed() == ("jacobi", "autoregressive")
    assert BenchOptions(methods=("autoregressive", "jacobi")).timed() == ("autoregressive", "jacobi")
    assert BenchOptions().timed("jacobi-block") == ("jacobi-block",)


def test_lookahead_has_what_was_given_of_its_shape():
    options = BenchOptions(methods=("lookahead",), window=3, guesses=2)
    assert options.lookahead == {"window": 3, "guesses": 2}
    assert BenchOptions().lookahead == {}


@pytest.mark.parametrize(
    ("given", "field", "phrase"),
    [
        ({"block_sizes": (4, 0)}, "block_sizes", "at least 1, got 0"),
        ({"block_sizes": (4, 8, 4)}, "block_sizes", "a value twice: 4, 8, 4"),
        ({"methods": ("jacobi", "fast")}, "methods", "must be one of"),
        ({"methods": ("jacobi", "jacobi")}, "methods", "a value twice"),
        ({"window": 3}, "window", "is for lookahead"),
        ({"methods": ("jacobi",), "guesses": 3}, "guesses", "is for lookahead"),
        ({"methods": ("lookahead", "autoregressive"), "block_sizes": (4,)}, "block_sizes", "is for the Jacobi loops"),
        ({"methods": ("autoregressive",), "proposer": "pad"}, "proposer", "is for loops that draft"),
        ({"proposer": "zeros"}, "proposer", "got 'zeros'"),
        ({"draft_model": Path("x"), "methods": ("jacobi",)}, "draft_model", "needs methods speculative"),
        ({"draft_model": Path("x"), "proposer": "lookup"}, "draft_model", "needs methods speculative"),
        ({"repeats": 0}, "repeats", "at least 1"),
        ({"threads": 0}, "threads", "at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens", "at least 1"),
    ],
)
def test_options_that_nothing_would_use_or_that_are_out_of_range_are_refused(
    given: dict[str, Any], field: str, phrase: str
):
    with pytest.raises(OptionError, match=phrase) as refused:
        BenchOptions(**given)
    assert field in refused.value.fields


@pytest.mark.parametrize(
    "given",
    [
        {"draft_model": Path("x")},
        {"draft_model": Path("x"), "methods": ("speculative",)},
        {"draft_model": Path("x"), "methods": ("jacobi",), "proposer": "model+lookup"},
        {"methods": ("autoregressive", "speculative"), "proposer": "pool"},
    ],
)
def test_a_draft_model_is_taken_where_something_asks_it(given: dict[str, Any]):
    assert BenchOptions(**given)
