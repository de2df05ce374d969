"""Options that state their own meaning and range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from cllm_export.checks import check_options, documented, option, option_specs
from cllm_export.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Options:
    count: int | None = option(None, help="How many.", minimum=1)
    share: float = option(0.5, help="What share.", minimum=0, maximum=1)
    weight: float = option(1.0, help="How heavy.", above=0)
    kind: str = option("a", help="Which kind.", choices=("a", "b"))
    sizes: tuple[int, ...] = option((), help="Which sizes.", minimum=2)
    offset: float = option(0.0, help="How far.")
    free: str = "anything"

    def __post_init__(self) -> None:
        check_options(self)


def test_options_in_range_are_taken():
    Options(count=1, share=1, weight=0.1, kind="b", sizes=(2, 3), free="x")


def test_a_default_of_none_may_be_none():
    assert Options().count is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count must be an integer of at least 1, got 0"),
        ("count", True, "count must be an integer of at least 1, got True"),
        ("count", 1.5, "count must be an integer of at least 1, got 1.5"),
        ("share", 1.1, "share must be a number from 0 to 1, got 1.1"),
        ("share", math.nan, "share must be a number from 0 to 1, got nan"),
        ("share", None, "share must be a number from 0 to 1, got None"),
        ("weight", 0, "weight must be a number above 0, got 0"),
        ("weight", math.inf, "weight must be a number above 0, got inf"),
        ("kind", "c", "kind must be one of a, b, got 'c'"),
        ("count", 10**30, f"count must be an integer of at most {2**63 - 1}, got {10**30}"),
        ("offset", math.nan, "offset must be a finite number, got nan"),
        ("sizes", (4, 1), "sizes must be an integer of at least 2, got 1"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(name, value, message):
    with pytest.raises(OptionError) as error:
        Options(**{name: value})
    assert str(error.value) == message
    assert error.value.fields == (name,)


def test_specs_come_in_the_order_of_fields():
    assert list(option_specs(Options)) == ["count", "share", "weight", "kind", "sizes", "offset"]
    assert option_specs(Options)["share"].maximum == 1


def test_a_documented_class_tells_its_options():
    """The text stands once, in the field."""

    @documented
    @dataclass(frozen=True, kw_only=True)
    class Told:
        """Options of a test."""

        count: int = option(1, help="How many.")

    assert Told.__doc__ == "Options of a test.\n\nOptions:\n    count: How many."
