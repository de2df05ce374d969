"""Make a command's parameters from the dataclasses that they fill. Each option is defined once, in its class."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from cllm_export.checks import OptionSpec, option_specs
from cllm_export.cli.flags import names_replaced
from cllm_export.errors import OptionError

Command = TypeVar("Command", bound=Callable[..., Any])
Parse = Callable[..., Any]

FLAGS = "flags_of_fields"
"""Attribute of a command: the flags of fields whose flag differs from the field's name."""
NUMBERS = {int: "int", float: "float"}


def with_options(
    cls: type[Any],
    *,
    names: Mapping[str, str] | None = None,
    exclude: Collection[str] = (),
    parse: Mapping[str, Parse] | None = None,
    metavars: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Replace a command's parameter of this class by one parameter for each of the class's ``option`` fields.

    The parameter is found by its annotation, ``Class`` or ``Class | None``. The command gets an instance of the class
    in it. A parameter takes its type, default, help and range from its field. Its flag is the spec's ``flag``, else
    ``--name-with-dashes``. The class checks the range, so that Python and the command line show the same message. For
    ``Class | None``, an instance is built if its required options are given. Its other options need the required ones.

    Use it below ``@app.command()``, once for each class.

    Args:
        cls: a dataclass whose module imports nothing heavy.
        names: parameter names by field name, for fields that two classes have in common.
        exclude: fields that the command does not offer. They keep their defaults, like fields of hidden specs.
        parse: functions from what the user writes to a field's value, by field name. A function's first parameter is
            annotated ``str``, or ``list[str]`` for an option that may be repeated.
        metavars: text that the help shows instead of the type, by field name.
        flags: flags of other fields that errors may name, by field name.

    Raises:
        TypeError: the command has no parameter of the class, or two parameters get one name.
    """
    offered = _offered(cls, names or {}, exclude, parse or {}, metavars or {})

    def decorate(command: Command) -> Command:
        target = _parameter_of(command, cls)

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            own = {entry.name: given.pop(entry.name) for entry in offered}
            return command(**given, **{target.name: _instance(cls, own, offered, target)})

        parameters = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            replaced = [entry.parameter(target) for entry in offered] if parameter.name == target.name else [parameter]
            parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in replaced]
        _require_distinct(parameters, command)
        spelled = {entry.field.name: entry.flag for entry in offered if entry.field.name != entry.name}
        _describe(run, parameters, spelled | dict(flags or {}))
        return run  # type: ignore[return-value]

    return decorate


def flags_of_fields(command: Callable[..., Any] | None) -> dict[str, str]:
    """Flags of a command by field name, for fields that are not parameters of the same name."""
    return dict(getattr(command, FLAGS, {}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Offered:
    """A field that the command offers as a parameter."""

    name: str
    field: dataclasses.Field[Any]
    hint: Any
    spec: OptionSpec
    parse: Parse | None
    metavar: str | None

    @property
    def is_required(self) -> bool:
        return self.field.default is dataclasses.MISSING

    @property
    def default(self) -> Any:
        """The default on the command line. None stands for the field's own default, see ``value``."""
        default = None if self.is_required or self.parse else self.field.default
        return (list(default) or None) if isinstance(default, tuple) else default

    @property
    def flag(self) -> str:
        return self.spec.flag or _flag(self.name, _kind_of(self.hint, self.parse), self.default)

    def value(self, given: Any) -> Any:
        """Convert a value from the command line to the field's value."""
        if given is None:
            return None if self.is_required else self.field.default
        if self.parse:
            return self.parse(given)
        return tuple(given) if isinstance(given, list) else given

    def parameter(self, target: inspect.Parameter) -> inspect.Parameter:
        kind, is_optional = _kind_of(self.hint, self.parse), _allows_none(target.annotation)
        must_be_given = self.is_required and not is_optional
        default = None if is_optional else self.default
        info = typer.Option(
            self.flag,
            help=self.spec.help,
            metavar=self.metavar or _metavar(self.spec, kind),
            show_default=self._shown_default(is_optional=is_optional, must_be_given=must_be_given),
            rich_help_panel=self.spec.group,
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[kind if must_be_given or default is not None else kind | None, info],
            default=inspect.Parameter.empty if must_be_given else default,
        )

    def _shown_default(self, *, is_optional: bool, must_be_given: bool) -> bool | str:
        """What the help shows as the default: False for nothing, True for the default itself, or words."""
        if self.spec.otherwise:
            return self.spec.otherwise
        if self.default is None or must_be_given:
            return False
        return str(self.default) if is_optional else True


def _offered(
    cls: type[Any],
    names: Mapping[str, str],
    exclude: Collection[str],
    parse: Mapping[str, Parse],
    metavars: Mapping[str, str],
) -> list[_Offered]:
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, get_type_hints(cls)
    specs = option_specs(cls)
    if unknown := {*names, *exclude, *parse, *metavars} - set(specs):
        raise TypeError(f"{cls.__name__} has no options {', '.join(sorted(unknown))}")
    return [
        _Offered(
            name=names.get(name, name),
            field=fields[name],
            hint=hints[name],
            spec=spec,
            parse=parse.get(name),
            metavar=metavars.get(name),
        )
        for name, spec in specs.items()
        if name not in exclude and not spec.hidden
    ]


def _parameter_of(command: Callable[..., Any], cls: type[Any]) -> inspect.Parameter:
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.annotation is cls or cls in get_args(parameter.annotation):
            return parameter
    raise TypeError(f"{command.__name__} has no parameter of {cls.__name__}")


def _instance(cls: type[Any], given: dict[str, Any], offered: list[_Offered], target: inspect.Parameter) -> Any:
    """The instance of the class. None if the class is optional and its required options are missing.

    Raises:
        OptionError: an option is out of its range, or is given without one that it needs.
    """
    missing = [entry.name for entry in offered if entry.is_required and given[entry.name] is None]
    if not missing or not _allows_none(target.annotation):
        with names_replaced({entry.field.name: entry.name for entry in offered}):
            return cls(**{entry.field.name: entry.value(given[entry.name]) for entry in offered})
    if alone := [name for name, value in given.items() if value is not None]:
        raise OptionError(f"{alone[0]} needs {missing[0]}", fields=(alone[0], missing[0]))
    return None


def _describe(run: Any, parameters: list[inspect.Parameter], flags: Mapping[str, str]) -> None:
    """Set what Typer reads from a command, and the flags of its fields."""
    run.__signature__ = inspect.Signature(parameters, return_annotation=None)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    setattr(run, FLAGS, {**flags_of_fields(run), **flags})


def _require_distinct(parameters: list[inspect.Parameter], command: Callable[..., Any]) -> None:
    seen: set[str] = set()
    for parameter in parameters:
        if parameter.name in seen:
            raise TypeError(f"{command.__name__} has two parameters {parameter.name}: give one a name in `names`")
        seen.add(parameter.name)


def _allows_none(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)


def _kind_of(hint: Any, parse: Parse | None) -> Any:
    """The type given to Typer: without None, and a list if the field has a tuple or a sequence.

    Typer does not support lists of choices. It takes them as strings, and the class checks them.
    """
    if parse is not None:
        return next(iter(inspect.signature(parse, eval_str=True).parameters.values())).annotation
    if _allows_none(hint):
        [hint] = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) not in (tuple, Sequence):
        return hint
    item = get_args(hint)[0]
    return list[str] if get_origin(item) is Literal else list[item]  # type: ignore[valid-type]


def _flag(name: str, kind: Any, default: Any) -> str:
    dashed = name.replace("_", "-")
    return f"--{dashed}/--no-{dashed}" if kind is bool and default is not False else f"--{dashed}"


def _metavar(spec: OptionSpec, kind: Any) -> str | None:
    """The type with its range, such as ``<int 0<=x<=5>``. None if Typer's own text suffices."""
    if spec.choices and kind == list[str]:
        return f"<{'|'.join(spec.choices)}>"
    number = NUMBERS.get(get_args(kind)[0] if get_origin(kind) is list else kind)
    low = f"{spec.minimum}<=" if spec.minimum is not None else f"{spec.above}<" if spec.above is not None else ""
    high = f"<={spec.maximum}" if spec.maximum is not None else ""
    if number is None or not (low or high):
        return None
    if not high:
        bound, sign = (spec.minimum, ">=") if spec.minimum is not None else (spec.above, ">")
        return f"<{number} x{sign}{bound}>"
    return f"<{number} {low}x{high}>"
