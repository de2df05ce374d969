"""Checks that every package uses: for options, for names read from files, and for parsed JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Literal, ParamSpec, TypeVar

from cllm_export.errors import BundleError, OptionError

T = TypeVar("T")
P = ParamSpec("P")

OptionGroup = Literal[
    "Input",
    "Output",
    "Decoding",
    "Lookahead",
    "Sampling",
    "Grammar",
    "Graph",
    "Quantisation",
    "Budget",
    "Objective",
    "Training",
    "LoRA",
    "Plan",
    "Machine",
]
"""Groups of options in the command line's help, in its order."""

LARGEST_INTEGER = 2**63 - 1
"""Engines and files hold integers in 64 bits. No option may be larger."""


def require_one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise OptionError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {value!r}", fields=(name,))


def no_such_option(name: str, names: Collection[str]) -> OptionError:
    """The error for an option that does not exist. It names all there are, and the one that was probably meant."""
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f": did you mean {nearest[0]}?" if nearest else ""
    return OptionError(f"no such option: {name}; there are {', '.join(names)}{hint}", fields=(name,))


def names_options(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function raise OptionError for a keyword that it does not have, where Python raises TypeError."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in names:
                raise no_such_option(name, names)
        return function(*args, **kwargs)

    return checked


def require_plain_name(name: str) -> None:
    """Raise BundleError unless ``name`` is a plain file name: a path read from a file must not leave its directory."""
    if not name or name in (".", "..") or name != os.path.basename(name) or "\\" in name or "\0" in name:
        raise BundleError(f"file name {name!r} is not a plain name inside the bundle; do not use this bundle")


def from_fields(cls: type[T], raw: dict[str, Any]) -> T:
    """Make a dataclass from parsed JSON. A missing key raises TypeError, an unknown key ValueError."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"unknown key {unknown[0]!r} in {cls.__name__}")
    return cls(**raw)


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Raise OptionError unless ``value`` is an int of at least ``minimum``, and of at most 64 bits."""
    _require_64_bits(name, value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {value!r}", fields=(name,))


def _require_64_bits(name: str, value: object) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise OptionError(f"{name} must be an integer of at most {LARGEST_INTEGER}, got {value}", fields=(name,))


def parse_share(text: str, *, name: str) -> float:
    """``3%`` or ``0.03`` as a share; ``name`` is the option's.

    Raises:
        OptionError: the text is not a share.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise OptionError(f"{name} must be a share such as 3% or 0.03, got {text!r}", fields=(name,)) from None
    check_share(name, share, repr(text))
    return share


def check_share(name: str, share: float, given: str) -> None:
    """Refuse what is no share. What must not be lost may be 100%; what may be lost may not.

    Raises:
        OptionError: as said; the message has ``given``.
    """
    is_least = name.startswith("min_")
    if not (0 <= share < 1 or (is_least and share == 1)):
        raise OptionError(
            f"{name} must be from 0% to {'' if is_least else 'below '}100%, such as 3%, got {given}", fields=(name,)
        )


@dataclass(frozen=True, kw_only=True)
class OptionSpec:
    """Meaning and range of an option. It is stored as the metadata ``option`` of a dataclass field."""

    help: str
    """One sentence for the command line's help and for readers of the class."""
    minimum: float | None = None
    above: float | None = None
    """An exclusive minimum."""
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    flag: str | None = None
    """The flag on the command line, if it is not ``--name-with-dashes``."""
    check: Callable[[Any], None] | None = None
    """Raises OptionError for a value that the range does not rule out."""
    hidden: bool = False
    """If True, the command line does not offer the option under its own name."""
    otherwise: str | None = None
    """What a default of None or of an empty tuple stands for. The help shows it as the default."""
    group: OptionGroup | None = None
    """Where the help shows the option. By default it is the ``GROUP`` of the class that declares the option."""

    @property
    def sentences(self) -> str:
        """The meaning and, in words, the default."""
        return f"{self.help} By default {self.otherwise}." if self.otherwise else self.help


def option(default: Any = dataclasses.MISSING, *, help: str, **limits: Any) -> Any:  # noqa: A002
    """A field of an options class: default, meaning and range in one place; ``check_options`` checks the range.

    Args:
        default: as in ``dataclasses.field``. An option may be None if its default is None.
        help: the meaning of the option, in one sentence.
        limits: the other fields of ``OptionSpec``.
    """
    return dataclasses.field(default=default, metadata={"option": OptionSpec(help=help, **limits)})


def option_specs(cls: Any) -> dict[str, OptionSpec]:
    """The options of a class (or of an instance of it), in declaration order. Each has its group, if there is any."""
    kind = cls if isinstance(cls, type) else type(cls)
    return {
        field.name: _grouped(field.metadata["option"], field.name, kind)
        for field in fields(cls)
        if "option" in field.metadata
    }


def _grouped(spec: OptionSpec, name: str, kind: type) -> OptionSpec:
    if spec.group:
        return spec
    declaring = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    return dataclasses.replace(spec, group=declaring.__dict__.get("GROUP"))


def documented(cls: type[T]) -> type[T]:
    """Add the meaning of each option to the docstring of a public options class, and let it name unknown ones."""
    cls.__init__ = names_options(cls.__init__)  # type: ignore[method-assign]
    lines = [f"    {name}: {spec.sentences}" for name, spec in option_specs(cls).items()]
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nOptions:\n" + "\n".join(lines)
    return cls


def check_options(options: Any) -> None:
    """Check every option of an instance against its spec. ``__post_init__`` calls it. A tuple is checked item by item.

    Raises:
        OptionError: an option is out of its range; the message names the field and the value.
    """
    for field in fields(options):
        spec = field.metadata.get("option")
        value = getattr(options, field.name)
        if spec is None or (value is None and field.default is None):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            check_option(field.name, item, spec, is_integer="float" not in str(field.type))


def check_option(name: str, value: object, spec: OptionSpec, *, is_integer: bool = True) -> None:
    """Check one value against its spec.

    Raises:
        OptionError: it is out of its range; the message has ``name`` and the value.
    """
    if spec.choices:
        require_one_of(name, value, spec.choices)
    if is_integer:
        _require_64_bits(name, value)
    if (spec.minimum, spec.above, spec.maximum) != (None, None, None):
        _check_range(name, value, spec, is_integer=is_integer)
    elif isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{name} must be a finite number, got {value}", fields=(name,))
    if spec.check:
        spec.check(value)


def _check_range(name: str, value: object, spec: OptionSpec, *, is_integer: bool) -> None:
    if is_integer and spec.minimum is not None and spec.maximum is None:
        require_at_least(name, value, int(spec.minimum))  # type: ignore[arg-type]
        return
    kinds = (int,) if is_integer else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    is_number = is_number and (isinstance(value, int) or math.isfinite(value))  # type: ignore[arg-type]
    if not is_number or not _is_within(value, spec):  # type: ignore[arg-type]
        raise OptionError(f"{name} must be {_range_text(spec, is_integer=is_integer)}, got {value!r}", fields=(name,))


def _is_within(value: float, spec: OptionSpec) -> bool:
    return (
        (spec.minimum is None or value >= spec.minimum)
        and (spec.above is None or value > spec.above)
        and (spec.maximum is None or value <= spec.maximum)
    )


def _range_text(spec: OptionSpec, *, is_integer: bool) -> str:
    what = "an integer" if is_integer else "a number"
    if spec.minimum is not None and spec.maximum is not None:
        return f"{what} from {spec.minimum} to {spec.maximum}"
    bounds = [f"at least {spec.minimum}"] if spec.minimum is not None else []
    bounds += [f"above {spec.above}"] if spec.above is not None else []
    bounds += [f"at most {spec.maximum}"] if spec.maximum is not None else []
    return f"{what} {' and '.join(bounds)}".replace("number at", "number of at").replace("integer at", "integer of at")
