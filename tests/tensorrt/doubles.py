"""Doubles of ``tensorrt`` and ``cuda.bindings``, made from what the real bindings offer, as ``describe`` read it.

An unknown name, an unknown or repeated keyword, a missing or surplus argument, a value of the wrong kind or enum, and
a write to a property that cannot be set all raise ``Nonconforming``, which no ``except Exception`` swallows. What a
call *does* comes from a behaviour: an object with methods named ``Class_method`` or after a function. Checked is the
form of every call against that version, not its meaning.
"""

from __future__ import annotations

import enum
import functools
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cllm_export.tensorrt.library import TENSORRT_RTX
from tests.tensorrt.install import BUILD

BUFFERS = (bytes, bytearray, memoryview)
ROOT = Path(__file__).parent.parent.parent


class Nonconforming(BaseException):
    """Code under test used the bindings as no such version can be used."""


class EnumDouble:
    """A member of a pybind11 enum: neither an int nor equal to one, but ``int()`` takes it."""

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"


def make_enum(name: str, members: Mapping[str, int]) -> type[EnumDouble]:
    """The class of a pybind11 enum, which can be neither subscripted nor iterated over."""
    made: Any = type(name, (EnumDouble,), {})
    made.__members__ = {member: made(member, value) for member, value in members.items()}
    for member, each in made.__members__.items():
        setattr(made, member, each)
    return made


@functools.cache
def describe(what: str, version: str) -> dict[str, Any]:
    """What the bindings of a version offer; the test is skipped where they are not installed or do not import."""
    directory = BUILD / what / version
    if not directory.is_dir():
        pytest.skip(f"the bindings of {what} {version} are not installed: run `make bindings`")
    return _described(what, version, directory, (str(directory),))


@functools.cache
def describe_rtx() -> dict[str, Any]:
    """What the bindings of TensorRT for RTX in this environment offer; without them the test is skipped."""
    try:
        version = importlib.metadata.version(TENSORRT_RTX.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{TENSORRT_RTX.package} is not installed: run `make setup`")
    directory = BUILD / TENSORRT_RTX.name / version
    directory.mkdir(parents=True, exist_ok=True)
    return _described(TENSORRT_RTX.name, version, directory, ())


def _described(what: str, version: str, directory: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The description that is kept in a directory, made anew where the script is newer."""
    kept, script = directory / "described.json", Path(__file__).with_name("describe.py")
    if not kept.exists() or kept.stat().st_mtime < script.stat().st_mtime:
        command = [sys.executable, "-m", "tests.tensorrt.describe", what, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the bindings of {what} {version} do not import here: {done.stderr.strip().splitlines()[-1]}")
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
            file.write(done.stdout)
        Path(file.name).replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


class TensorRtDouble:
    """``import tensorrt``, as of one version. ``calls`` lists what was called, as (Class.method, arguments by name)."""

    def __init__(self, api: Mapping[str, Any], behaviour: object | None = None) -> None:
        self._api = api
        self.behaviour = behaviour
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.__version__ = api["version"]
        self._enums: dict[str, Any] = {}
        for name, members in api["enums"].items():
            plain = name.split(".")[-1]  # a class that inherits an enum of another has the very same one
            self._enums[name] = self._enums.setdefault(plain, make_enum(plain, members))
        self._classes: dict[str, type] = {}
        for name in api["classes"]:
            self._make_class(name)

    def __getattr__(self, name: str) -> Any:
        for known in (self._classes, self._enums):
            if name in known:
                return known[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise Nonconforming(f"tensorrt {self.__version__} has no {name}")

    def make(self, name: str, /, **values: Any) -> Any:
        """An object of a class that has no constructor; ``values`` are what its properties give."""
        double = object.__new__(self._classes[name])
        vars(double)["_values"] = values
        return double

    def called(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of a method, or of every write to a property (``set Class.property``)."""
        return [arguments for called, arguments in self.calls if called == name]

    def _make_class(self, name: str) -> type:
        if name not in self._classes:
            described = self._api["classes"][name]
            nearest = described["bases"][:1]
            bases = tuple(self._make_class(base) for base in nearest if base in self._api["classes"]) or (ObjectDouble,)
            members: dict[str, Any] = {"_module": self, "_described": described, "_name": name}
            for constant, (kind, value) in described["constants"].items():
                members[constant] = next(each for each in self._enums[kind].__members__.values() if each.value == value)
            for inner, each in self._enums.items():
                if inner.startswith(f"{name}."):
                    members[inner.split(".")[1]] = each
            self._classes[name] = type(name, bases, members)
        return self._classes[name]

    def call(self, owner: str, method: str, overloads: Sequence[Mapping[str, Any]], given: Any) -> tuple[Any, str]:
        """(arguments by name, return type) of the overload that takes a call."""
        arguments, returns = bind(f"{owner}.{method}", overloads, *given, fits=self.fits)
        self.calls.append((f"{owner}.{method}", arguments))
        return arguments, returns

    def fits(self, value: Any, kind: str) -> bool:
        """Whether pybind11 would take a value for a parameter of this type."""
        name = kind.rsplit(".", maxsplit=1)[-1].rsplit("::", maxsplit=1)[-1]
        if name in self._enums:
            return type(value) is self._enums[name]
        if name.startswith("Dims"):
            return isinstance(value, (tuple, list, self._classes["Dims"])) and all(
                isinstance(each, int) for each in value
            )
        if name in self._classes:
            return isinstance(value, self._classes[name])
        return fits_plain(value, name)

    def default(self, returns: str) -> Any:
        """What a call gives that no behaviour answers."""
        name = returns.rsplit(".", maxsplit=1)[-1].rsplit("::", maxsplit=1)[-1]
        if name in self._classes:
            return self.make(name)
        return {"bool": True, "int": 0, "str": "", "float": 0.0}.get(name)


def fits_plain(value: Any, kind: str) -> bool:
    """As ``fits``, of what is neither class nor enum; a type that is not known here takes anything."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if kind in ("int", "SupportsInt"):
        return is_number or isinstance(value, EnumDouble)
    if kind in ("Buffer", "buffer"):
        return isinstance(value, BUFFERS) or hasattr(value, "nbytes")
    known: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "tuple": (tuple,), "list": (list,)}
    return isinstance(value, known[kind]) if kind in known else True


def bind(
    label: str,
    overloads: Sequence[Mapping[str, Any]],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    fits: Callable[[Any, str], bool],
) -> tuple[dict[str, Any], str]:
    """(arguments by name, return type) of the first overload that takes them."""
    reasons = []
    for overload in overloads:
        parameters = overload["parameters"]
        names = [parameter["name"] for parameter in parameters]
        bound = dict(zip(names, positional, strict=False)) | dict(keywords)
        wrong = sorted(set(keywords) - set(names[len(positional) :]))
        missing = [each["name"] for each in parameters if each["required"] and each["name"] not in bound]
        kinds = {parameter["name"]: parameter for parameter in parameters}
        if len(positional) > len(names):
            reasons.append(f"takes {len(names)} arguments, got {len(positional)}")
        elif wrong:
            reasons.append(f"unknown or repeated keyword {wrong[0]!r}, takes {names}")
        elif missing:
            reasons.append(f"misses {missing[0]!r}")
        elif unfit := [name for name, value in bound.items() if not _takes(kinds[name], value, fits)]:
            reasons.append(f"{unfit[0]} is a {kinds[unfit[0]]['type']}, got {bound[unfit[0]]!r}")
        else:
            return bound, overload["returns"]
    raise Nonconforming(f"{label}: " + ("; or ".join(reasons) or "no signature is known"))


def _takes(parameter: Mapping[str, Any], value: Any, fits: Callable[[Any, str], bool]) -> bool:
    if value is None:
        return parameter.get("default") == "None"
    return fits(value, parameter["type"])


class ObjectDouble:
    """An object of the bindings. A Python class that derives from one may have members of its own."""

    _module: TensorRtDouble
    _described: Mapping[str, Any]
    _name: str

    def __new__(cls, *positional: Any, **keywords: Any) -> Any:
        double = object.__new__(cls)
        vars(double)["_values"] = {}
        return double

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        module, name = self._module, self._name
        overloads = self._described["methods"].get("__init__", [])
        arguments, _ = module.call(name, "__init__", overloads, (positional, keywords))
        if construct := getattr(module.behaviour, f"{name}_new", None):
            construct(self, **arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        owner, methods, properties = self._find(name)
        if name in properties:
            return self._read(owner, name, properties[name]["type"])
        return functools.partial(self._call, owner, name, methods[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self) is not self._module._classes.get(self._name):  # a subclass of ours
            vars(self)[name] = value
            return
        owner, _, properties = self._find(name)
        label = f"{owner}.{name}"
        if name not in properties or not properties[name]["writable"]:
            raise Nonconforming(f"{label} cannot be set in TensorRT {self._module.__version__}")
        if not self._module.fits(value, properties[name]["type"]):
            raise Nonconforming(f"{label} is a {properties[name]['type']}, got {value!r}")
        self._module.calls.append((f"set {label}", {"value": value}))
        self._values[name] = value

    def _find(self, name: str) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
        for owner in (self._name, *self._described["bases"]):
            described = self._module._api["classes"].get(owner)
            if described and (name in described["methods"] or name in described["properties"]):
                return owner, described["methods"], described["properties"]
        raise Nonconforming(f"{self._name} has no {name} in TensorRT {self._module.__version__}")

    def _read(self, owner: str, name: str, kind: str) -> Any:
        if name in self._values:
            return self._values[name]
        read = getattr(self._module.behaviour, f"{owner}_{name}", None)
        return read(self) if read else self._module.default(kind)

    def _call(self, owner: str, name: str, overloads: Any, *positional: Any, **keywords: Any) -> Any:
        arguments, returns = self._module.call(owner, name, overloads, (positional, keywords))
        run = getattr(self._module.behaviour, f"{owner}_{name}", None)
        return run(self, **arguments) if run else self._module.default(returns)


class StructureDouble:
    """A structure of the bindings that code under test fills in; one inside another is made with it."""

    def __init__(self, cuda: CudaDouble, name: str) -> None:
        vars(self).update(_cuda=cuda, _name=name)
        for member, inner in cuda.nested(name).items():
            vars(self)[member] = StructureDouble(cuda, inner)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._cuda.members(self._name) or name in self._cuda.nested(self._name):
            raise Nonconforming(f"{self._name}.{name} cannot be set in cuda.bindings {self._cuda.version}")
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        raise Nonconforming(f"{self._name}.{name} was never given, or there is no such member")


SUCCESS = {
    "runtime": ("cudaError_t", "cudaSuccess"),
    "driver": ("CUresult", "CUDA_SUCCESS"),
    "nvrtc": ("nvrtcResult", "NVRTC_SUCCESS"),
}
"""Module of cuda.bindings -> the enum of its error codes, and the member that is none."""


class CudaDouble:
    """``from cuda.bindings import runtime`` (or ``driver``, or ``nvrtc``), as of one version.

    The behaviour's functions give what comes after the error code: nothing, a value or several, or an error's name.
    """

    def __init__(self, api: Mapping[str, Any], behaviour: object) -> None:
        self._api = api
        self.behaviour = behaviour
        self.version = api["version"]
        self._enums = {name: enum.IntEnum(name, members) for name, members in api["enums"].items()}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name in self._enums:
            return self._enums[name]
        if name in self._api["functions"]:
            return functools.partial(self._call, name)
        if name in self._api["constants"]:
            return self._api["constants"][name]
        if name in self._api["structures"]:
            return functools.partial(StructureDouble, self, name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise Nonconforming(f"cuda.bindings.{self._api['name']} {self.version} has no {name}")

    def members(self, structure: str) -> list[str]:
        return list(self._api["structures"][structure])

    def nested(self, structure: str) -> dict[str, str]:
        """Member -> structure, of those that hold others, as far as they are described."""
        return dict(self._api.get("nested", {}).get(structure, {}))

    def structure(self, name: str, /, **values: Any) -> SimpleNamespace:
        """A structure of the bindings with these members, all of which it must have."""
        if unknown := set(values) - set(self._api["structures"][name]):
            raise Nonconforming(f"{name} has no {sorted(unknown)[0]}")
        return SimpleNamespace(**values)

    def _call(self, name: str, *positional: Any, **keywords: Any) -> tuple[Any, ...]:
        overload = {"parameters": self._api["functions"][name], "returns": ""}
        arguments, _ = bind(name, [overload], positional, keywords, fits=self._fits)
        self.calls.append((name, arguments))
        given = getattr(self.behaviour, name)(self, **arguments)
        kind, success = SUCCESS[self._api["name"]]
        errors = self._enums[kind]
        if isinstance(given, errors):
            return (given,)
        values = given if isinstance(given, tuple) else () if given is None else (given,)
        return (errors[success], *values)

    def _fits(self, value: Any, kind: str) -> bool:
        return type(value) is self._enums[kind] if kind in self._enums else True
