"""Commands whose parameters come from dataclasses of options."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from cllm_export.checks import check_options, option
from cllm_export.cli.signature import flags_of_fields, with_options
from cllm_export.errors import OptionError


def parse_bytes(text: str, *, name: str) -> int:
    if not text.endswith("KB"):
        raise OptionError(f"{name} must end in KB, got {text!r}", fields=(name,))
    return 1000 * int(text[:-2])


def parse_pairs(texts: list[str]) -> dict[str, str]:
    return dict(text.split("=") for text in texts)


@dataclass(frozen=True, kw_only=True)
class Bake:
    kind: Literal["bread", "cake"] = option("bread", help="What to bake.", choices=("bread", "cake"))
    num_loaves: int | None = option(None, help="How many.", minimum=1)
    share: float = option(0.5, help="What share.", minimum=0, maximum=1)
    heat: float = option(1.0, help="How hot.", above=0)
    sizes: tuple[int, ...] = option((16,), help="Which sizes.", minimum=2, flag="--size")
    names: tuple[str, ...] = option((), help="Which names.")
    toppings: tuple[Literal["nuts", "salt"], ...] = option((), help="Which toppings.", choices=("nuts", "salt"))
    salted: bool = option(False, help="Add salt.")
    crusty: bool = option(True, help="Bake a crust.")
    by_hand: bool | None = option(None, help="Knead by hand.", flag="--by-hand/--by-machine")
    memory: int | None = option(None, help="How much memory.", minimum=1)
    pairs: dict[str, str] | None = option(None, help="Which pairs.", flag="--pair")
    secret: int = option(7, help="What nobody may ask.", hidden=True)
    plain: int = 8

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Icing:
    colour: str = option(help="Which colour.")
    heat: float | None = option(None, help="How hot the icing is.", above=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Oven:
    fuel: str = option(help="What burns.")


PARSE = {"memory": functools.partial(parse_bytes, name="memory"), "pairs": parse_pairs}
seen: list[Any] = []
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@with_options(Bake, parse=PARSE, metavars={"pairs": "A=B"})
@with_options(Icing, names={"heat": "icing_heat"}, flags={"page": "--recipe"})
def bake(
    recipe: Annotated[str, typer.Argument(help="The recipe.")],
    options: Bake,
    icing: Icing | None,
    force: Annotated[bool, typer.Option("--force", help="Bake again.")] = False,
) -> None:
    """Bake something."""
    seen.append((recipe, options, icing, force))


@app.command()
@with_options(Oven)
def light(oven: Oven) -> None:
    """Light an oven."""
    seen.append(oven)


def run(*arguments: object) -> Any:
    """What the command was called with; its error if it raised one; its exit code and output if it was not called."""
    seen.clear()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)
    if isinstance(result.exception, OptionError):
        raise result.exception
    return seen[0] if seen else (result.exit_code, result.output)


def baked(*arguments: object) -> Bake:
    return run("bake", "rye", *arguments)[1]


def test_defaults_are_those_of_the_class():
    assert run("bake", "rye") == ("rye", Bake(), None, False)


def test_every_kind_of_option_reaches_its_field():
    given = ["--kind", "cake", "--num-loaves", 3, "--share", 1, "--heat", 2.5, "--memory", "4KB", "--salted"]
    assert baked(*given) == Bake(kind="cake", num_loaves=3, share=1.0, heat=2.5, memory=4000, salted=True)


def test_a_tuple_is_an_option_that_may_be_repeated():
    assert baked("--size", 4, "--size", 8, "--names", "a") == Bake(sizes=(4, 8), names=("a",))


def test_a_tuple_may_be_of_choices():
    assert baked("--toppings", "nuts", "--toppings", "salt").toppings == ("nuts", "salt")
    with pytest.raises(OptionError, match="toppings must be one of nuts, salt, got 'mud'"):
        baked("--toppings", "mud")


def test_a_parser_may_take_every_repetition():
    assert baked("--pair", "a=b", "--pair", "c=d").pairs == {"a": "b", "c": "d"}


def test_a_flag_that_is_on_by_default_can_be_turned_off():
    assert not baked("--no-crusty").crusty


@pytest.mark.parametrize(("given", "value"), [((), None), (("--by-hand",), True), (("--by-machine",), False)])
def test_a_flag_may_be_left_open(given: tuple[str, ...], value: bool | None):
    assert baked(*given).by_hand is value


@pytest.mark.parametrize("flag", ["--secret", "--plain"])
def test_a_field_that_is_hidden_or_no_option_is_not_offered(flag: str):
    code, output = run("bake", "rye", flag, 1)
    assert code == 2 and "No such option" in output


def test_the_class_checks_ranges():
    """So that the message is the one of Python."""
    with pytest.raises(OptionError, match="num_loaves must be an integer of at least 1, got 0"):
        baked("--num-loaves", 0)


def test_a_parser_says_what_is_wrong():
    with pytest.raises(OptionError, match="memory must end in KB, got 'much'"):
        baked("--memory", "much")


def test_a_choice_is_checked_as_it_is_parsed():
    code, output = run("bake", "rye", "--kind", "pie")
    assert code == 2 and "--kind" in output and "bread" in output


def test_a_required_option_must_be_given():
    code, output = run("light")
    assert code == 2 and "Missing option" in output and "--fuel" in output
    assert run("light", "--fuel", "wood") == Oven(fuel="wood")


def test_an_optional_class_is_built_where_its_required_option_is_given():
    assert run("bake", "rye", "--colour", "red", "--icing-heat", 3)[2] == Icing(colour="red", heat=3.0)


def test_an_optional_class_needs_its_required_option():
    with pytest.raises(OptionError, match="icing_heat needs colour") as error:
        run("bake", "rye", "--icing-heat", 3)
    assert error.value.fields == ("icing_heat", "colour")


def test_an_error_names_the_parameter_of_its_field():
    """Two classes may have a field of one name."""
    with pytest.raises(OptionError, match="icing_heat must be a number above 0, got 0") as error:
        run("bake", "rye", "--colour", "red", "--icing-heat", 0)
    assert error.value.fields == ("icing_heat",)


def test_the_help_shows_what_the_class_says():
    _, output = run("bake", "--help")
    lines = {line.split()[1]: line for line in output.splitlines() if "--" in line}
    assert "What share." in lines["--share"] and "0<=x<=1" in lines["--share"] and "0.5" in lines["--share"]
    assert "x>=1" in lines["--num-loaves"]
    assert "x>0" in lines["--heat"]
    assert "A=B" in lines["--pair"]
    assert "nuts|salt" in lines["--toppings"]
    assert "default: 16" in lines["--size"]


def test_a_command_tells_which_fields_are_spelled_otherwise():
    assert flags_of_fields(bake) == {"heat": "--icing-heat", "page": "--recipe"}


def test_two_parameters_of_one_name_are_a_defect():
    def command(options: Bake, icing: Icing) -> None: ...

    with pytest.raises(TypeError, match="two parameters heat"):
        with_options(Bake)(with_options(Icing)(command))


def test_a_command_without_the_class_is_a_defect():
    with pytest.raises(TypeError, match="light has no parameter of Bake"):
        with_options(Bake)(light)


def test_a_name_that_is_no_option_is_a_defect():
    with pytest.raises(TypeError, match="Icing has no options taste"):
        with_options(Icing, exclude=("taste",))
