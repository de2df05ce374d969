"""A GGUF file of a package index: its checksum, its weights beside transformers, its tokens beside llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.conftest import THREADS, Workshop
from tests.contacts.environments import ROOT, install, new_environment, run

TEXTS = (
    *("The capital of France is", "  123 456", "x = 1\n    y = 22\n\n\n  z", "a  1   22    333", "don't I'll WE'RE"),
    *("日本語 12", "é à ü", "\t\t1", "1,234.56", " \n \n12", "🙂 ok", "<|im_start|>user\nhi<|im_end|>\n"),
)
SERVE = """
import json, sys, urllib.request, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.cpuparams.n_threads, options.port = sys.argv[1], 512, 1, 0
server, found = xllamacpp.Server(options), []
for text in json.loads(open(sys.argv[2], encoding="utf-8").read()):
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    asked = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    found.append(json.load(urllib.request.urlopen(asked))["tokens"])
print("TOKENS " + json.dumps(found))
"""
"""Tokens of llama.cpp, by the server of its binding."""


def test_the_weights_are_those_of_transformers(smollm2_file: Path, smollm2: Path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32)
    theirs, ours = model.state_dict(), load_file(smollm2 / "model.safetensors")
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())


def test_the_tokens_are_those_of_llama_cpp(smollm2_file: Path, smollm2: Path, tmp_path: Path):
    from tokenizers import Tokenizer

    python = new_environment(Path(sys.executable), tmp_path / "venv")
    install(python, "--only-binary", ":all:", "xllamacpp")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(TEXTS), encoding="utf-8")
    told = run(python, "-c", SERVE, smollm2_file, texts, cwd=tmp_path)
    [line] = [line for line in told.stdout.splitlines() if line.startswith("TOKENS ")]
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    for text, expected in zip(TEXTS, json.loads(line.removeprefix("TOKENS ")), strict=True):
        assert tokenizer.encode(text).ids == expected, text


def test_the_model_is_built_and_answers(workshop: Workshop, smollm2: Path):
    """A chat ends with the end of its turn."""
    from cllm_export.runtime.load import load

    model = load(workshop.build(smollm2, max_length=256).path, threads=THREADS)
    result = model.generate([{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    assert "Paris" in result.text
    assert result.finish_reason == "eos"


def test_the_versions_that_import_are_the_pinned_ones():
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "gguf==0.19.0\n" in pinned
    assert '"gguf>=0.19.0"' in declared
    assert "transformers==5.23." in pinned
    assert '"transformers>=5.23"' in declared
