"""The decoding loop in C++ of ``examples/cpp/`` replays golden traces, and finds a number in one that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm_export.measure.traces import record_traces
from cllm_export.prompts import Prompt
from tests.fakes import HashModel, make_model, write_bundle

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
GOLDEN = sorted((ROOT / "tests" / "fixtures" / "traces").glob("*.json"))
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fsanitize=address,undefined")
METHODS = ("jacobi", "jacobi-block", "autoregressive")
INPUTS = ("input_ids", "num_committed", "write_index")

Replay = Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        assert os.environ.get("CI") != "true", "there is no C++ compiler, and CI needs one"
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("cpp") / "replay"
    command = [compiler, *FLAGS, "-o", str(program), str(EXAMPLE / "replay.cpp")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return program


@pytest.fixture
def replay(program: Path, tmp_path: Path) -> Replay:
    """Replay the traces of a file's content."""

    def run(file: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "traces.json"
        path.write_text(json.dumps(file, indent=1), encoding="utf-8")
        return subprocess.run([program, path], capture_output=True, text=True, check=False, timeout=60)

    return run


def read_golden(name: str) -> dict[str, Any]:
    [path] = (path for path in GOLDEN if path.stem == name)
    file: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return file


@pytest.fixture
def golden() -> dict[str, Any]:
    """Traces of the demo's model, which accept any number of tokens; free to change."""
    return read_golden("demo-repeat")


def trace_of(file: dict[str, Any], method: str) -> dict[str, Any]:
    """The trace of the second prompt, which is read in several chunks and ends with an end-of-sequence token."""
    return [trace for trace in file["traces"] if trace["method"] == method][-1]


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_the_golden_traces_replay(program: Path, path: Path):
    done = subprocess.run([program, path], capture_output=True, text=True, check=False, timeout=60)
    traces = read_golden(path.stem)["traces"]
    num_forwards = sum(len(trace["forwards"]) for trace in traces)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(traces)} traces and {num_forwards} forwards are equal\n"


def test_the_golden_traces_reach_every_branch_of_the_loop():
    """Both proposers, all methods, both ends; blocks that are accepted whole, in part and with one token."""
    traces = [trace for path in GOLDEN for trace in read_golden(path.stem)["traces"]]
    assert {trace["proposer"] for trace in traces} == {"pad", "repeat"}
    assert {trace["finish_reason"] for trace in traces} == {"eos", "length"}
    for method in ("jacobi", "jacobi-block"):
        forwards = [forward for trace in traces if trace["method"] == method for forward in trace["forwards"]]
        accepted = {forward["num_accepted"] for forward in forwards if forward["kind"] == "decode"}
        assert {1, 2, 4, 8} <= accepted, method


@pytest.mark.parametrize("proposer", ["pad", "repeat"])
def test_traces_of_every_method_end_and_block_size_replay(replay: Replay, tmp_path: Path, proposer: Any):
    """Models that are seldom, sometimes and always right, n of 1 to 6, prompts of one chunk and of many."""
    bundle = write_bundle(tmp_path / "bundle", eos_token_ids=tuple(range(1, 40)))
    vocabulary = bundle.manifest.geometry.vocab_size
    prompts = [Prompt(id="short", content="a"), Prompt(id='a "long" one', content="the cat sat on the mat " * 2)]
    reasons = set()
    for seed in range(6):
        model = make_model(bundle, HashModel(vocab_size=vocabulary, window=(0, 2, None)[seed % 3], seed=seed))
        file = record_traces(bundle, model, prompts, proposer=proposer, block_size=1 + seed, max_new_tokens=12)
        done = replay(file)
        assert (done.returncode, done.stderr) == (0, "")
        reasons |= {trace["finish_reason"] for trace in file["traces"]}
    assert reasons == {"length", "eos"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("prefill", name) for name in INPUTS),
        *(("decode", name) for name in (*INPUTS, "next_ids", "num_accepted")),
    ],
)
def test_one_wrong_number_of_a_forward_is_found(
    replay: Replay, golden: dict[str, Any], method: str, kind: str, name: str
):
    """Forward, kind and both values are in the message, so that whoever writes a loop sees where it went wrong."""
    forwards = [forward for forward in trace_of(golden, method)["forwards"] if forward["kind"] == kind]
    changed = forwards[1]
    if isinstance(changed[name], list):
        changed[name][0] += 1
    else:
        changed[name] += 1
    done = replay(golden)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"prompt 2, {method}, " in done.stderr
    assert "the trace has" in done.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["token_ids", "prompt_ids"])
def test_one_wrong_token_of_a_request_is_found(replay: Replay, golden: dict[str, Any], method: str, place: str):
    trace_of(golden, method)[place][-1] += 1
    assert replay(golden).returncode == 1


def test_what_a_trace_says_of_the_request_is_followed(replay: Replay):
    """Another limit, pad token, cache, chunk, reason, a forward less or more: each changes what the loop does."""

    def shorter(file: dict[str, Any]) -> None:
        trace_of(file, "jacobi")["forwards"].pop()

    def longer(file: dict[str, Any]) -> None:
        forwards = trace_of(file, "jacobi")["forwards"]
        forwards.append(forwards[-1])

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "the loop runs more forwards than the trace": shorter,
        "forwards: the trace has": longer,
        "token_ids: the trace has": lambda file: trace_of(file, "jacobi").update(max_new_tokens=23),
        "finish_reason: the trace has": lambda file: trace_of(file, "jacobi").update(finish_reason="length"),
        "input_ids: the trace has": lambda file: file.update(pad_token_id=1),
        "forward 1, input_ids: the trace has": lambda file: file.update(prefill_chunk=15),
        "KV rows, and the cache has 20": lambda file: file["geometry"].update(cache_length=20),
    }
    for said, change in changes.items():
        file = read_golden("demo-pad")
        change(file)
        done = replay(file)
        assert done.returncode == 1, said
        assert said in done.stderr


@pytest.mark.parametrize(
    "text", ["", "{", '{"traces": [', '{"trace_version": 2}', "nonsense", '{"trace_version": 1} x']
)
def test_a_file_that_is_no_trace_is_refused(program: Path, tmp_path: Path, text: str):
    path = tmp_path / "traces.json"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([program, path], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
