"""Import one version of real bindings on a machine without a GPU, and print what they offer as JSON.

Run in a process of its own, since a process can load either module once: ``python -m tests.tensorrt.describe
tensorrt DIRECTORY``, ``... cuda DIRECTORY`` or ``... tensorrt-rtx``, which is that of the environment. Nothing of
TensorRT or CUDA is run: names, signatures, enums and which properties can be set are all that is read.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

STAND_INS = ("libnvinfer", "libnvonnxparser")
"""Libraries that the bindings ask for and that a machine without a GPU lacks."""
SYMBOLS = re.compile(r".*(_INTERNAL|PluginRegistry|OnnxParserVersion)|initLibNvInferPlugins")
"""What the bindings take from those libraries."""
CUDA_MODULES = {"runtime": "cuda", "driver": "cu", "nvrtc": "nvrtc"}
"""Modules of cuda.bindings, and what the names of their functions begin with."""
UNIONS = ("cudaGraphNodeParams",)
"""Structures of which the ones inside are described too; to make one of any kind could take what is not here."""
SECTION, ENTRY, SYMBOL = "<IIQQQQIIQQ", "<qQ", "<IBBHQQ"
SHT_DYNAMIC, SHT_DYNSYM, DT_NEEDED, STB_GLOBAL = 6, 11, 1, 1


def import_tensorrt(directory: Path) -> ModuleType:
    """The real bindings, with empty libraries in the place of TensorRT's own; every factory of them gives null."""
    module = directory / "tensorrt_bindings" / "tensorrt.so"
    needed, wanted = read_elf(module.read_bytes())
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "stand_in.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted if SYMBOLS.match(name)))
        for name in (name for name in needed if name.startswith(STAND_INS)):
            library = Path(scratch) / name
            subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, source], check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # stays mapped when the file is gone
        sys.path.insert(0, str(directory))
        return importlib.import_module("tensorrt_bindings")


def read_elf(data: bytes) -> tuple[list[str], list[str]]:
    """(names of the libraries that a 64-bit ELF module needs, names of the symbols that it takes from others)."""
    start, size, count = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from(SECTION, data, start + index * size) for index in range(count)]

    def text(section: tuple[int, ...], offset: int) -> str:
        place = sections[section[6]][4] + offset
        return data[place : data.index(b"\0", place)].decode()

    def entries(section: tuple[int, ...], form: str) -> Iterator[tuple[int, ...]]:
        return struct.iter_unpack(form, data[section[4] : section[4] + section[5]])

    needed, wanted = [], []
    for section in sections:
        if section[1] == SHT_DYNAMIC:
            needed += [text(section, value) for tag, value in entries(section, ENTRY) if tag == DT_NEEDED]
        elif section[1] == SHT_DYNSYM:
            symbols = entries(section, SYMBOL)
            wanted += [text(section, name) for name, info, _, place, _, _ in symbols if not place and info >> 4]
    return needed, wanted


def describe_tensorrt(module: ModuleType) -> dict[str, Any]:
    """Every class and enum of the bindings; nested ones are named with a dot."""
    enums: dict[str, dict[str, int]] = {}
    classes: dict[str, Any] = {}

    def visit(name: str, value: type) -> None:
        if hasattr(value, "__members__"):
            enums[name] = {member: int(each) for member, each in value.__members__.items()}
            return
        classes[name] = describe_class(value)
        for inner, each in vars(value).items():
            if inspect.isclass(each) and hasattr(each, "__members__"):
                visit(f"{name}.{inner}", each)

    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__.startswith("tensorrt"):
            visit(name, value)
    return {"version": module.__version__, "enums": enums, "classes": classes}


def describe_class(value: type) -> dict[str, Any]:
    methods, properties, constants = {}, {}, {}
    for name, member in vars(value).items():
        if isinstance(member, property):
            match = re.search(r"-> (.+)$", member.fget.__doc__ or "", re.MULTILINE) if member.fget else None
            properties[name] = {"type": match[1] if match else "", "writable": member.fset is not None}
        elif name == "__init__" or (callable(member) and not name.startswith("__")):
            methods[name] = signatures(member.__doc__ or "")
        elif hasattr(type(member), "__members__"):
            constants[name] = [type(member).__qualname__, int(member)]
    bases = [base.__name__ for base in value.__mro__[1:] if base.__module__.startswith("tensorrt")]
    return {"bases": bases, "methods": methods, "properties": properties, "constants": constants}


def signatures(docstring: str) -> list[dict[str, Any]]:
    """Every overload that a pybind11 docstring states; parameters but for ``self``."""
    found = []
    for line in docstring.splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((.*)\) -> (.+)$", line.strip())
        if match:
            given = [parameter(text) for text in split(match[1])]
            found.append({"parameters": [each for each in given if each["name"] != "self"], "returns": match[2]})
    return found


def parameter(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    kind, has_default, default = rest.partition(" = ")
    return {"name": name.strip(), "type": kind.strip(), "required": not has_default, "default": default.strip()}


def split(text: str) -> list[str]:
    """The parameters of a signature: parts between commas that stand in no bracket."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def describe_cuda(name: str, prefix: str) -> dict[str, Any]:
    """Every function, enum and structure of a module of ``cuda.bindings``; of a structure the names of its members."""
    import cuda.bindings

    module = importlib.import_module(f"cuda.bindings.{name}")
    functions, enums, structures = {}, {}, {}
    for each, value in vars(module).items():
        if inspect.isclass(value) and hasattr(value, "__members__"):
            enums[each] = {member: int(number) for member, number in value.__members__.items()}
        elif inspect.isclass(value):
            structures[each] = [member for member in dir(value) if not member.startswith("_")]
        elif each.startswith(prefix) and callable(value):
            functions[each] = [describe_argument(one) for one in inspect.signature(value).parameters.values()]
    return {
        "name": name,
        "version": cuda.bindings.__version__,
        "functions": functions,
        "enums": enums,
        "structures": structures,
        "nested": {each: describe_nested(vars(module)[each], structures) for each in UNIONS if each in structures},
        "constants": {each: int(value) for each, value in vars(module).items() if isinstance(value, int)},
    }


def describe_nested(structure: type, structures: Collection[str]) -> dict[str, str]:
    """Member -> structure that it is, of a structure's members that are structures of the same module."""
    made = structure()
    kinds = {member: type(getattr(made, member)).__name__ for member in dir(made) if not member.startswith("_")}
    return {member: kind for member, kind in kinds.items() if kind in structures}


def describe_argument(argument: inspect.Parameter) -> dict[str, Any]:
    kind = "" if argument.annotation is inspect.Parameter.empty else str(argument.annotation)
    return {"name": argument.name, "type": kind, "required": argument.default is inspect.Parameter.empty}


def main() -> None:
    what, directories = sys.argv[1], sys.argv[2:]
    if what == "tensorrt":
        described = describe_tensorrt(import_tensorrt(Path(directories[0])))
    elif what == "tensorrt-rtx":
        described = describe_tensorrt(importlib.import_module("tensorrt_rtx_bindings"))
    else:
        sys.path.insert(0, directories[0])
        described = {name: describe_cuda(name, prefix) for name, prefix in CUDA_MODULES.items()}
    json.dump(described, sys.stdout)


if __name__ == "__main__":
    main()
