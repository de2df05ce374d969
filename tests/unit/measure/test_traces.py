"""Golden traces, replayed by a loop that knows ``docs/loop.md`` and nothing of this package's loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import OptionError
from cllm_export.measure.traces import DEFAULT_METHODS, record_traces
from cllm_export.prompts import Prompt
from tests.fakes import HashModel, make_model, write_bundle

TRACES = Path(__file__).parents[2] / "fixtures" / "traces"
GOLDEN = TRACES / "llama.json"


def replay(file: dict[str, Any], trace: dict[str, Any]) -> tuple[list[int], str]:
    """Tokens and reason of a request, from the recorded outputs; every input must be the recorded one."""
    forwards = iter(trace["forwards"])
    prompt, n, method = trace["prompt_ids"], trace["block_size"], trace["method"]

    def run(kind: str, block: list[int], committed: int, w: int) -> dict[str, Any]:
        forward = next(forwards)
        inputs = [forward["kind"], forward["input_ids"], forward["num_committed"], forward["write_index"]]
        assert inputs == [kind, block, committed, w]
        return forward

    def filled(known: list[int]) -> list[int]:
        token = file["pad_token_id"] if trace["proposer"] == "pad" else known[-1]
        return known + [token] * (n - len(known))

    w, tokens, k = 0, [], 0
    for start in range(0, len(prompt) - 1, file["prefill_chunk"]):
        chunk = prompt[:-1][start : start + file["prefill_chunk"]]
        run("prefill", chunk, len(chunk), w)
        w += len(chunk)
    block = filled(prompt[-1:])
    while True:
        forward = run("decode", block, 1, w)
        out, a = forward["next_ids"], forward["num_accepted"]
        if method == "autoregressive":
            new, w, block = out[:1], w + 1, filled(out[:1])
        elif method == "jacobi":
            new, w, block = out[:a], w + a, filled(out[a - 1 :])
        elif a == n:
            new, w, block, k = out[k:a], w + n, filled(out[n - 1 :]), 0
        else:
            new, block, k = out[k:a], block[:1] + out[: n - 1], a
        for token in new[: trace["max_new_tokens"] - len(tokens)]:
            tokens.append(token)
            if token in file["eos_token_ids"]:
                assert next(forwards, None) is None
                return tokens, "eos"
        if len(tokens) == trace["max_new_tokens"]:
            assert next(forwards, None) is None
            return tokens, "length"


@pytest.mark.parametrize("name", ["llama", "demo-pad", "demo-repeat"])
def test_the_committed_traces_are_what_the_written_rules_give(name: str):
    file = json.loads((TRACES / f"{name}.json").read_text(encoding="utf-8"))
    assert {trace["method"] for trace in file["traces"]} == set(DEFAULT_METHODS)
    assert {trace["finish_reason"] for trace in file["traces"]} >= {"length"}
    assert any(forward.get("num_accepted", 0) > 1 for trace in file["traces"] for forward in trace["forwards"])
    assert any(forward["kind"] == "prefill" for trace in file["traces"] for forward in trace["forwards"])
    for trace in file["traces"]:
        assert replay(file, trace) == (trace["token_ids"], trace["finish_reason"])


def test_the_committed_traces_have_the_same_tokens_whatever_the_loop():
    by_prompt: dict[str, set[tuple[int, ...]]] = {}
    for trace in json.loads(GOLDEN.read_text(encoding="utf-8"))["traces"]:
        by_prompt.setdefault(trace["prompt"], set()).add(tuple(trace["token_ids"]))
    assert all(len(tokens) == 1 for tokens in by_prompt.values())


@pytest.mark.parametrize("proposer", ["pad", "repeat"])
@pytest.mark.parametrize("window", [0, 2, None])
@pytest.mark.parametrize("seed", range(4))
def test_a_recorded_trace_is_what_the_written_rules_give(tmp_path: Path, proposer: Any, window: int | None, seed: int):
    bundle = write_bundle(tmp_path / "bundle")
    vocabulary = bundle.manifest.geometry.vocab_size
    model = make_model(bundle, HashModel(vocab_size=vocabulary, window=window, seed=seed))
    prompts = [Prompt(id="short", content="a"), Prompt(id="long", content="the cat sat on the mat " * 2)]
    file = record_traces(bundle, model, prompts, proposer=proposer, block_size=1 + 3 * (seed % 3), max_new_tokens=9)
    assert len(file["traces"]) == len(prompts) * len(DEFAULT_METHODS)
    assert json.loads(json.dumps(file)) == file
    for trace in file["traces"]:
        assert replay(file, trace) == (trace["token_ids"], trace["finish_reason"])


def test_a_trace_that_was_tampered_with_does_not_replay():
    file = json.loads(GOLDEN.read_text(encoding="utf-8"))
    trace = next(trace for trace in file["traces"] if trace["method"] == "jacobi")
    first = next(forward for forward in trace["forwards"] if forward["kind"] == "decode")
    first["next_ids"][0] ^= 1
    with pytest.raises(AssertionError):
        assert replay(file, trace) == (trace["token_ids"], trace["finish_reason"])


def test_a_proposer_with_rules_of_its_own_is_refused(tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    model = make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size))
    with pytest.raises(OptionError, match="proposer must be one of pad, repeat in a trace"):
        record_traces(bundle, model, [], proposer="lookup")
