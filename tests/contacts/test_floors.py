"""Environments that pip fills with the oldest versions that ``pyproject.toml`` declares: they must do the work.

A floor that nobody runs is a guess. One environment holds every floor, with torch as ``constraints.txt`` pins it,
because older builds of it are not kept here. Each other Python has the runtime's floors, without torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cllm_export.bundle.manifest import Bundle
from tests.checkpoints import edit_json
from tests.conftest import Workshop
from tests.contacts.environments import (
    ROOT,
    add_torch,
    copy_source,
    declared_floors,
    install,
    interpreter,
    new_environment,
    run,
)
from tests.contacts.test_clean_install import GENERATE, PROMPT

FLOORS = declared_floors()
PINNED_FLOORS = ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "gguf")
"""Their floor is the pinned version, with which ``test_tensorrt_rtx.py`` and ``test_gguf.py`` work. No older one was
run. So is the floor of transformers that ``gguf`` asks for."""
NOT_RUN = ("torch", "onnxruntime-gpu", "tensorrt", "cuda-python", *PINNED_FLOORS)
"""torch is the pinned one; others need a GPU."""
RUNTIME_EXTRAS = ("cpu", "grammar", "plot", "evaluate")
EVERY_EXTRA = (*RUNTIME_EXTRAS, "export", "train", "sentencepiece")
CHECKPOINT = ROOT / "examples" / "text_to_sql" / "checkpoint"
PROMPTS = ROOT / "examples" / "text_to_sql" / "prompts.jsonl"
FEW = ("--max-new-tokens", 6, "--threads", 1)
SQL = 'start: " SELECT " /[a-z]+/'
PYTHONS = ("3.11", "3.12", "3.13")
"""Those that ``pyproject.toml`` names in its classifiers."""
FAMILIES = ("llama", "gemma2", "gemma3", "phi4-longrope", "smollm3")
"""What early versions of transformers 5 load otherwise: tied heads, windows, rope by layer, longrope, no rope."""


def filled(directory: Path, version: str, extras: tuple[str, ...]) -> Path:
    """The interpreter of an environment with these extras at their floors."""
    source, python = copy_source(directory), new_environment(interpreter(version), directory / "venv")
    floors = directory / "floors.txt"
    lines = [f"{name}=={floor}" for name, floor in FLOORS.items() if name not in NOT_RUN]
    floors.write_text("\n".join(lines), encoding="utf-8")
    if "export" in extras:
        add_torch(python)
    install(python, "--only-binary", ":all:", "--constraint", floors, f"{source}[{','.join(extras)}]")
    return python


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of every floor. Its Python is the oldest, which has a wheel of every floor."""
    return filled(tmp_path_factory.mktemp("floors"), PYTHONS[0], EVERY_EXTRA)


@pytest.fixture(scope="module", params=PYTHONS[1:])
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of the runtime's floors, on each other Python."""
    return filled(tmp_path_factory.mktemp("runtime"), request.param, RUNTIME_EXTRAS)


@pytest.fixture(scope="module")
def made(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bundle, as the oldest versions build it."""
    target = tmp_path_factory.mktemp("made") / "bundle"
    cllm(everything, "build", CHECKPOINT, "--output", target)
    return target


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Bundle:
    return workshop.bundle("demo")


def cllm(python: Path, *arguments: object) -> str:
    """The output of a command, which must succeed."""
    outcome = run(python, "-m", "cllm_export", *arguments, cwd=python.parents[1])
    assert outcome.returncode == 0, (arguments, outcome.stdout[-1500:], outcome.stderr[-3000:])
    return outcome.stdout


def decodes_with_grammars(python: Path, bundle: Path) -> None:
    grammar = python.parents[1] / "sql.lark"
    grammar.write_text(SQL, encoding="utf-8")
    for constraint in (("--grammar", grammar), ("--regex", " SELECT [a-z]+")):
        [row] = map(json.loads, cllm(python, *GENERATE, *constraint, bundle, PROMPT).splitlines())
        assert row["text"].startswith(" SELECT ")


@pytest.mark.parametrize("name", PINNED_FLOORS)
def test_a_floor_that_is_not_run_here_is_the_pinned_version(name: str):
    assert f"{name}=={FLOORS[name]}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_every_floor_is_what_was_installed(everything: Path):
    tell = "import sys, importlib.metadata as found; print(*(found.version(name) for name in sys.argv[1:]))"
    extras_of_others = {"pytest", "pytest-xdist", "hypothesis", "mypy", "ruff", "psutil"}
    names = [name for name in FLOORS if name not in (*NOT_RUN, *extras_of_others)]
    told = run(everything, "-c", tell, *names, cwd=everything.parents[1])
    assert told.returncode == 0, told.stderr
    for name, version in zip(names, told.stdout.split(), strict=True):
        assert (version + ".0.0").startswith(FLOORS[name] + "."), name


def test_a_bundle_that_the_oldest_versions_build_decodes_the_same_text(
    everything: Path, made: Path, workshop: Workshop
):
    [row] = map(json.loads, cllm(everything, *GENERATE, made, PROMPT).splitlines())
    result = workshop.model("demo").generate(PROMPT, max_new_tokens=24, block_size=8)
    assert row["token_ids"] == list(result.token_ids)


def test_verify_compares_with_the_checkpoint(everything: Path, made: Path):
    assert "verified" in cllm(everything, "verify", made, "--checkpoint", CHECKPOINT, *FEW)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_early_versions_load_otherwise_are_verified(
    everything: Path, workshop: Workshop, tmp_path: Path, name: str
):
    checkpoint = workshop.checkpoint(name)
    cllm(everything, "build", checkpoint, "--output", tmp_path / "bundle", "--max-length", 128)
    assert "verified" in cllm(everything, "verify", tmp_path / "bundle", "--checkpoint", checkpoint, *FEW)


def test_grammars_work(everything: Path, made: Path):
    decodes_with_grammars(everything, made)


def test_a_tuned_child_is_trained_scored_and_collected_from(everything: Path, made: Path, tmp_path: Path):
    data = ("--prompts", PROMPTS, "--limit", 8)
    size = ("--steps", 2, "--batch-size", 2, "--num-windows", 1, "--num-held-out", 2, "--max-length", 256)
    cllm(everything, "tune", CHECKPOINT, *data, "--output", tmp_path / "tuned", *size, "--threads", 1)
    cllm(everything, "tune", CHECKPOINT, *data, "--output", tmp_path / "adapted", *size, "--lora-rank", 2)
    cllm(everything, "collect", tmp_path / "tuned", "--prompts", PROMPTS, "--limit", 2, "--output", tmp_path / "states")
    cllm(everything, "evaluate", made, "--task", "prompts", "--data", PROMPTS, "--limit", 2)


def test_an_adapter_is_merged_and_verified_by_peft(everything: Path, tmp_path: Path):
    save = (
        "import sys, peft, transformers\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "config = peft.LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj'], init_lora_weights=False)\n"
        "peft.get_peft_model(base, config).save_pretrained(sys.argv[2])\n"
    )
    saved = run(everything, "-c", save, CHECKPOINT, tmp_path / "adapter", cwd=tmp_path)
    assert saved.returncode == 0, saved.stderr
    cllm(everything, "build", tmp_path / "adapter", "--output", tmp_path / "bundle")
    verified = cllm(everything, "verify", tmp_path / "bundle", "--checkpoint", tmp_path / "adapter", *FEW)
    assert "verified" in verified


def test_a_tokenizer_model_alone_is_converted(everything: Path, workshop: Workshop, tmp_path: Path):
    checkpoint = shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    train = (
        "import sys, sentencepiece\n"
        "sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(['the cat sat on the mat'] * 3), "
        "model_prefix=sys.argv[1], vocab_size=280, model_type='bpe', byte_fallback=True, minloglevel=2, "
        "normalization_rule_name='identity', remove_extra_whitespaces=False, hard_vocab_limit=False)\n"
    )
    trained = run(everything, "-c", train, checkpoint / "tokenizer", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    cllm(everything, "build", checkpoint, "--output", tmp_path / "bundle", "--max-length", 64)
    assert cllm(everything, "generate", tmp_path / "bundle", "the cat", *FEW)


def test_the_runtime_decodes_what_the_development_environment_decodes(
    runtime: Path, bundle: Bundle, workshop: Workshop
):
    [row] = map(json.loads, cllm(runtime, *GENERATE, bundle.path, PROMPT).splitlines())
    result = workshop.model("demo").generate(PROMPT, max_new_tokens=24, block_size=8)
    assert row["token_ids"] == list(result.token_ids)


def test_extras_of_the_runtime_work(runtime: Path, workshop: Workshop, bundle: Bundle, tmp_path: Path):
    decodes_with_grammars(runtime, bundle.path)
    copy = workshop.copy(bundle, tmp_path / "bundle").path
    cllm(runtime, "verify", copy, *FEW)
    cllm(runtime, "evaluate", copy, "--task", "prompts", "--data", PROMPTS, "--limit", 2)
    cllm(runtime, "bench", copy, "--repeats", 1, *FEW, "--plots", tmp_path / "plots")
    assert list((tmp_path / "plots").iterdir())


def test_the_pythons_that_are_run_are_those_that_are_declared():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for version in PYTHONS:
        assert f'"Programming Language :: Python :: {version}"' in declared
    assert declared.count("Programming Language :: Python :: 3.") == len(PYTHONS)
