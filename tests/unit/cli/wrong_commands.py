"""Wrong commands, made from the command line's own parameters, and a process that runs them all.

A new option gets its wrong commands from its type, its range and its choices. Each command has one fault.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

import cllm_export.cli.entry  # it has all commands
from cllm_export.cli import main
from cllm_export.cli.app import app

HEAVY = frozenset(
    {
        *("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "cuda"),
        *("accelerate", "peft", "pyarrow", "matplotlib", "pandas"),
    }
)
"""Packages that take seconds to import."""

INPUTS = {
    **dict.fromkeys(("bundle", "bundles", "against", "draft_model", "source", "parent"), "bundle"),
    **dict.fromkeys(("checkpoint", "base"), "checkpoint"),
    **dict.fromkeys(("prompts", "held_out", "data"), "prompts.jsonl"),
    **{"json_schema": "schema.json", "grammar": "grammar.lark", "scales": "scales.safetensors"},
    **{
        "file": "model.gguf",
        "text": "prompts.jsonl",
        "load_prefix": "prefix.safetensors",
        "trajectories": "trajectories",
        "example": "example",
    },
}
"""Parameter that names something to read -> a right value. Its type says whether a directory or a file is expected."""
OUTPUTS = frozenset({"output", "as_json", "save_prefix", "plots"})
"""Parameters that name something to write."""
DIRECTORY_OUTPUTS = frozenset({"build", "import", "quantize", "collect", "tune", "demo"})
"""Commands whose ``output`` is a directory. That of others is a file."""
BOUNDED_BY_MODEL = frozenset({"block_size", "block_sizes", "num_layers", "max_length", "kv_lengths"})
"""Numbers that the model bounds."""
WRONG_TEXTS = {
    **{
        "block_size": "several",
        "max_memory": "much",
        "workspace": "much",
        "device_memory": "much",
        "targets": "sm1",
        "plan": "no_such_key",
        "proposer": "guesswork",
    },
    **{"sha256": "12ab", "logit_bias": "five", "max_tpf_loss": "much", "max_quality_loss": "much", "keep": "the_attic"},
    **dict.fromkeys(("min_agreement", "max_perplexity_rise", "min_same_text"), "much"),
}
"""Option that takes text -> a text that it refuses."""
FREE_TEXTS = frozenset({"prompt", "stop", "regex", "device", "system"})
"""Parameters that take any text, or text that needs an engine to be judged."""
NEEDS: dict[str, dict[str, str | None]] = {
    **{"draft_model": {"methods": "speculative", "method": "speculative"}, "parent": {"task": "prompts"}},
    **{"scales": {"precision": "int8"}, "keep": {"precision": "int8-dynamic"}, "group_size": {"precision": "int4"}},
    **{"prompts": {"prompt": None}, "limit": {"prompt": None, "prompts": "prompts.jsonl"}, "logprobs": {"as_json": ""}},
    "targets": {"target": "tensorrt-rtx"},
    **{"lora_alpha": {"lora_rank": "4"}, "trained_loop": {"trained_block_size": "4"}},
    **{"trained_proposer": {"trained_block_size": "4"}, "base": {"checkpoint": "adapter"}},
    **{name: {"methods": "lookahead", "method": "lookahead"} for name in ("window", "ngram", "guesses")},
    **{name: {"temperature": "1"} for name in ("top_k", "top_p", "min_p", "seed")},
}
"""Parameter -> values of others without which it is wrong for another reason. None leaves a parameter out."""
GIVEN = {"precision": "int8-dynamic", "steps": "1", "task": "prompts", "prompt": "hello", "output": "new/out"}
"""Right values of parameters that name nothing to read."""
WANTED = {"tune": ("steps",), "evaluate": ("task",), "generate": ("prompt",), "demo": ("output", "example")}
"""Parameters that a right command has besides the required ones."""


class Case(NamedTuple):
    """A wrong command, and what its message names."""

    arguments: tuple[str, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.arguments)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    heavy: str | None
    """The heavy package that it began to import."""
    left: list[str]
    """What it changed in its directory."""


def commands() -> dict[str, Any]:
    assert cllm_export.cli.entry.main
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


class Parameter(NamedTuple):
    """A parameter of a command, with the type that its signature says."""

    command: str
    name: str
    flag: str | None
    """None for an argument."""
    kind: Any
    choices: tuple[str, ...]
    low: float | None
    low_is_inside: bool
    high: float | None
    is_required: bool

    @property
    def title(self) -> str:
        """What a message calls it."""
        return self.flag or self.name

    def given(self, value: str) -> str:
        if self.kind is bool:
            return str(self.flag)
        return f"{self.flag}={value}" if self.flag else value


def parameters(command: str) -> list[Parameter]:
    given = commands()[command]
    signature = inspect.signature(given.callback, eval_str=True)
    found = [(entry, signature.parameters[entry.name]) for entry in given.params if entry.name in signature.parameters]
    return [_parameter(command, entry, declared) for entry, declared in found]


def _parameter(command: str, entry: Any, declared: inspect.Parameter) -> Parameter:
    kind = _item(declared.annotation)
    metavar = entry.metavar or ""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    bounds = re.search(r"<(?:int|float) (?:([-\d.e]+)(<=?))?x(?:(>=?|<=)([-\d.e]+))?>", metavar)
    low, low_is_inside, high = entry.min, True, entry.max
    if bounds:
        if bounds[1]:
            low, low_is_inside = float(bounds[1]), bounds[2] == "<="
        if bounds[3] == "<=":
            high = float(bounds[4])
        elif bounds[3]:
            low, low_is_inside = float(bounds[4]), bounds[3] == ">="
    elif "|" in metavar and "N|auto" not in metavar:
        choices = tuple(metavar.strip("<>").split("|"))
    is_option = entry.param_type_name == "option"
    return Parameter(
        command=command,
        name=entry.name,
        flag=entry.opts[0] if is_option else None,
        kind=str if choices else kind,
        choices=choices,
        low=low,
        low_is_inside=low_is_inside,
        high=high,
        is_required=entry.required,
    )


def _item(hint: Any) -> Any:
    """The type of one value, without Annotated, None and list."""
    if get_origin(hint) is Annotated:
        return _item(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return _item(next(each for each in get_args(hint) if each is not NoneType))
    return _item(get_args(hint)[0]) if get_origin(hint) in (list, tuple) else hint


def command_line(command: str, own: Mapping[str, str | None]) -> tuple[str, ...]:
    """A command that has these values. All others are right. None leaves a parameter out."""
    words = [command]
    for entry in parameters(command):
        value = own.get(entry.name)
        if entry.name not in own and (entry.is_required or entry.name in WANTED.get(command, ())):
            value = _right_value(entry)
        if value is not None:
            words.append(entry.given(value))
    return tuple(words)


def _right_value(entry: Parameter) -> str:
    if entry.name == "output" and entry.command not in DIRECTORY_OUTPUTS:
        return "new.json"
    return GIVEN.get(entry.name) or INPUTS[entry.name]


def missing() -> Iterator[Case]:
    """Each required argument and option, left out."""
    for command in commands():
        for entry in parameters(command):
            if entry.is_required:
                yield Case(command_line(command, {entry.name: None}), (entry.title,))


def wrong_values(kind: str) -> Iterator[Case]:
    """Each argument and option with each wrong value of a kind: numbers, words, inputs or outputs."""
    make = {"numbers": _numbers, "words": _words, "inputs": _inputs, "outputs": _outputs}[kind]
    for command in commands():
        for entry in parameters(command):
            for value in make(entry):
                names = (value, entry.flag) if entry.flag else (value,)
                yield Case(command_line(command, NEEDS.get(entry.name, {}) | {entry.name: value}), names)


def _numbers(entry: Parameter) -> Iterator[str]:
    if entry.kind not in (int, float):
        return
    yield from ("many", "1.5") if entry.kind is int else ("much", "nan", "inf")
    if entry.kind is int:
        yield str(10**30)
    is_exact = (entry.command, entry.name) == ("generate", "max_new_tokens")  # elsewhere it is a limit
    if is_exact or (entry.name in BOUNDED_BY_MODEL and entry.command != "plan-memory"):
        yield str(10**9)
    if entry.low is not None:
        below = entry.low if not entry.low_is_inside else entry.low - 1
        yield f"{below:g}" if entry.kind is float else str(int(below))
    elif entry.kind is int:
        yield "-1"
    if entry.high is not None:
        yield str(entry.high + 1.0) if entry.kind is float else str(int(entry.high) + 1)


def _words(entry: Parameter) -> Iterator[str]:
    if entry.choices:
        yield "nonsense"
    elif entry.kind is str and entry.name not in INPUTS and entry.name not in FREE_TEXTS:
        yield WRONG_TEXTS[entry.name]  # a new option has to say here what it refuses


def _is_path(entry: Parameter) -> bool:
    return entry.kind is Path or entry.name in ("json_schema", "grammar")


def _inputs(entry: Parameter) -> Iterator[str]:
    if not _is_path(entry) or entry.name in OUTPUTS:
        return
    yield from ("absent", "taken.txt/below", "dangling")
    yield from ("taken", "taken.bin") if "." in INPUTS[entry.name] else ("empty", "taken.bin", "damaged")


def _outputs(entry: Parameter) -> Iterator[str]:
    if not _is_path(entry) or entry.name not in OUTPUTS:
        return
    is_directory = entry.name == "plots" or (entry.name == "output" and entry.command in DIRECTORY_OUTPUTS)
    yield from ("taken.txt/below", "/proc/new")
    yield "taken.txt" if is_directory else "taken"
    if is_directory and entry.name == "output":
        yield from ("taken", "dangling")


PAIRS = {
    "bench": ("bundle --limit=1", "bundle --proposer=pad --method=autoregressive", "bundle bundle"),
    "build": (
        *("checkpoint --output=new/out --group-size=32", "checkpoint --output=new/out --keep=model.norm.weight"),
        *("checkpoint --output=new/out --precision=int8", "checkpoint --output=new/out --compute=fp16"),
        *("model.gguf --output=new/out --base=checkpoint", "model.gguf --output=new/out --weights=link"),
        *("model.gguf --output=new/out --max-length=65", "model.gguf --output=new/out --num-layers=3"),
        *("checkpoint --output=new/out --base=checkpoint", "checkpoint --output=new/out --trained-loop=block"),
        *("checkpoint --output=new/out --rotate", "checkpoint --output=new/out --precision=int4 --rotate"),
    ),
    "collect": ("bundle --prompts=prompts.jsonl --output=new/out --device=cuda",),
    "evaluate": (
        *("--data=prompts.jsonl bundle", "bundle --data=prompts.jsonl --probe --task=prompts"),
        *("bundle --data=prompts.jsonl --probe --block-size=4", "bundle --data=prompts.jsonl --probe --parent=bundle"),
        "bundle --data=prompts.jsonl --task=prompts --allow-code-execution",
    ),
    "generate": (
        *("bundle hello --prompts=prompts.jsonl", "bundle hello --limit=1", "bundle hello --json --stats"),
        *("bundle hello --json --show-blocks", "bundle hello --logprobs=1", "bundle hello --draft-model=bundle"),
        *("bundle hello --window=4", "bundle hello --proposer=pad --method=autoregressive"),
        *("bundle hello --grammar={}", "bundle hello --json-schema={}"),
        *("bundle hello --cuda-graphs", "bundle --prompts=prompts.jsonl --save-prefix=new.safetensors"),
    ),
    "quantize": (
        "checkpoint --against=bundle --prompts=prompts.jsonl --output=new/out --precision=int8-dynamic --group-size=32",
        "checkpoint --against=bundle --prompts=prompts.jsonl --output=new/out --precision=int4 --rotate",
        "checkpoint --against=bundle --prompts=prompts.jsonl --output=new/out --precision=int4 --group-size=64",
    ),
    "tune": (
        "checkpoint --prompts=prompts.jsonl --output=new/out",
        "checkpoint --prompts=prompts.jsonl --output=new/out --steps=1 --minutes=1",
        "checkpoint --prompts=prompts.jsonl --output=new/out --steps=1 --lora-alpha=1",
        "checkpoint --prompts=prompts.jsonl --output=new/out --steps=1 --resume",
        "checkpoint --prompts=prompts.jsonl --output=new/out --steps=1 --optimizer=muon --mixed-precision=fp16",
    ),
    "verify": (
        "bundle --limit=1",
        "--by-layer bundle",
        "bundle --base=checkpoint",
        "bundle --num-slots=2 --provider=tensorrt",
    ),
}
"""Options that need each other, or exclude each other. The message names the last."""


def pairs() -> Iterator[Case]:
    """Each command with options that do not go together."""
    for command, lines in PAIRS.items():
        for line in lines:
            words = line.split()
            last = words[-1].partition("=")[0]
            yield Case((command, *words), (last,) if last.startswith("--") and last != "--output" else ())


def cases(kind: str) -> list[Case]:
    made = {"missing": missing, "pairs": pairs}.get(kind, lambda: wrong_values(kind))()
    return list(dict.fromkeys(made))


class _Imported(BaseException):
    """A command began to import a heavy package."""


class _Guard:
    """Stops the import of a heavy package."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".", maxsplit=1)[0] in HEAVY:
            raise _Imported(name)


def _run(arguments: Sequence[str]) -> Outcome:
    before = _snapshot()
    out, err, code, heavy = io.StringIO(), io.StringIO(), 0, None
    sys.argv = ["cllm-export", *arguments]
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"hello"), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
        except _Imported as error:
            heavy = str(error)
    after = _snapshot()
    left = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue(), heavy=heavy, left=left)


def _snapshot() -> dict[str, tuple[float, float]]:
    found = {str(path): path.lstat() for path in Path().rglob("*")}
    return {name: (math.inf if Path(name).is_dir() else entry.st_size, entry.st_mtime) for name, entry in found.items()}


def run_all() -> None:
    """Run the commands that standard input lists, and print their outcomes."""
    typer.main.get_command = functools.cache(typer.main.get_command)  # it takes longer than most commands
    sys.meta_path.insert(0, _Guard())  # type: ignore[arg-type]
    commands = json.load(sys.stdin)
    outcomes = [asdict(_run(arguments)) for arguments in commands]
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    run_all()
