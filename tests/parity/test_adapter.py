"""Adapters: merged while streaming, they give the weights that PEFT merges, and what is not merged is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from cllm_export.bundle.manifest import WEIGHTS_NAME, Bundle  # noqa: E402 - after the skips
from cllm_export.exporter.checkpoint.adapter import HARMLESS, READ, REFUSED  # noqa: E402
from cllm_export.exporter.checkpoint.adapter_targets import targeted  # noqa: E402
from tests.checkpoints import edit_json, edit_weights  # noqa: E402
from tests.conftest import Workshop  # noqa: E402
from tests.e2e.conftest import assert_refused, cli, output  # noqa: E402, F401 - fixtures

TOLERANCE = 2e-6
"""Of a weight, against PEFT's: both add the same product of rank 3 to 5 in fp32 to values up to 1.5, where half a unit
in the last place is 6e-8; a product in pieces of rows may sum its three to five terms in another order."""


def save_adapter(directory: Path, base: Path, **options: Any) -> Any:
    """Save an adapter with matrices that do something; what PEFT merges of it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(base_model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model.merge_and_unload().state_dict()


def stored(bundle: Bundle) -> dict[str, Any]:
    """Every written weight by name, as an array."""
    data = bundle.file(WEIGHTS_NAME).read_bytes()
    graph, arrays = onnx.load(bundle.graph_path(), load_external_data=False).graph, {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type == onnx.TensorProto.FLOAT and entries["location"] == WEIGHTS_NAME:
            place = slice(int(entries["offset"]), int(entries["offset"]) + int(entries["length"]))
            arrays[tensor.name] = np.frombuffer(data[place], np.float32).reshape(tensor.dims)
    return arrays


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}},
        {"target_modules": "all-linear", "r": 5},
    ],
    ids=["plain", "rslora", "patterns", "all linear"],
)
def test_the_merged_weights_are_pefts(workshop: Workshop, tmp_path: Path, options: dict[str, Any]):
    base = workshop.checkpoint("llama")
    merged = save_adapter(tmp_path / "adapter", base, **options)
    arrays = stored(workshop.build(tmp_path / "adapter"))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        qkv = torch.cat([merged[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]).T.numpy()
        np.testing.assert_allclose(arrays[f"{prefix}self_attn.qkv_proj.weight"], qkv, rtol=0, atol=TOLERANCE)
        for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
            ours = arrays[f"{prefix}{name}.weight.T"]
            np.testing.assert_allclose(ours, merged[f"{prefix}{name}.weight"].T.numpy(), rtol=0, atol=TOLERANCE)


def test_only_what_the_adapter_leaves_alone_is_linked(workshop: Workshop, tmp_path: Path):
    merged = save_adapter(tmp_path / "adapter", workshop.checkpoint("llama"))
    bundle = workshop.build(tmp_path / "adapter", weights="link")
    arrays = stored(bundle)
    changed = {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in ADAPTED}
    assert changed == set(arrays) - {"rotary.cos", "rotary.sin"}
    assert not changed & set(bundle.manifest.linked_weights)
    for name in changed:
        np.testing.assert_allclose(arrays[name], merged[name].numpy(), rtol=0, atol=TOLERANCE)


ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def test_verify_compares_with_the_adapter_merged_by_peft(
    workshop: Workshop,
    tmp_path: Path,
    cli: Any,  # noqa: F811
):
    save_adapter(tmp_path / "adapter", workshop.checkpoint("llama"))
    bundle = workshop.build(tmp_path / "adapter")
    options = ("--max-new-tokens", 6, "--threads", 1)
    outcome = cli("verify", bundle.path, "--checkpoint", tmp_path / "adapter", *options)
    assert outcome.code == 0, outcome
    other = cli("verify", bundle.path, "--checkpoint", workshop.checkpoint("llama"), *options)
    assert_refused(other, "was not built from")


def test_a_base_may_be_given_and_is_asked_for_where_the_stated_one_is_not_here(
    workshop: Workshop,
    tmp_path: Path,
    cli: Any,  # noqa: F811
    output: Path,  # noqa: F811
):
    adapter = tmp_path / "adapter"
    save_adapter(adapter, workshop.checkpoint("llama"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/llama")
    assert_refused(cli("build", adapter, "--output", output), "'someone/llama'", "--base CHECKPOINT")
    assert cli("build", adapter, "--output", output, "--base", workshop.checkpoint("llama")).code == 0
    again = ("--output", output, "--force", "--base", adapter)
    assert_refused(cli("build", workshop.checkpoint("llama"), *again), "--base", "is for adapters")
    wrong = cli("build", adapter, "--output", output, "--force", "--base", workshop.checkpoint("small"))
    assert_refused(wrong, "model.layers.1.", "no weight for")


def renamed(old: str, new: str) -> Callable[[Path], object]:
    """A tensor of the adapter under another name."""

    def damage(adapter: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = adapter / "adapter_model.safetensors"
        save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)

    return damage


def stated(**changes: Any) -> Callable[[Path], object]:
    return lambda adapter: edit_json(adapter / "adapter_config.json", **changes)


def without(part: str) -> Callable[[Path], object]:
    """Both matrices on some modules are missing, as after a save that was cut short."""

    def damage(adapter: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = adapter / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)

    return damage


REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another kind": (stated(peft_type="IA3"), ("'IA3'", "only LORA")),
    "DoRA": (stated(use_dora=True), ("DoRA",)),
    "biases": (stated(bias="all"), ("biases", "'all'")),
    "modules trained whole": (stated(modules_to_save=["lm_head"]), ("modules_to_save",)),
    "a start that changes the base": (stated(init_lora_weights="pissa"), ("'pissa'", "changes its base")),
    "an unknown target": (renamed("q_proj", "x_proj"), ("x_proj", "no weight for")),
    "an embedding": (
        renamed("q_proj.lora_A.weight", "q_proj.lora_embedding_A"),
        ("lora_embedding_A", "no LoRA matrix"),
    ),
    "half a pair": (renamed("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.k_proj.lora_A"), ("only one",)),
    "a module without matrices": (
        without("layers.1.mlp.down_proj"),
        ("layers.1.mlp.down_proj", "1 such", "incomplete"),
    ),
    "a projection without matrices": (without("v_proj"), ("layers.0.self_attn.v_proj", "2 such", "incomplete")),
    "a target without matrices": (
        stated(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"]),
        ("adapts lm_head", "incomplete"),
    ),
    "an expression whose modules lack matrices": (
        stated(target_modules=r".*\.(q|k|v)_proj|.*down_proj"),
        ("k_proj", "2 such", "incomplete"),
    ),
    "matrices of what is no target": (
        stated(target_modules=["q_proj", "down_proj"]),
        ("matrices for model.layers.0.self_attn.v_proj", "2 such", "peft would ignore"),
    ),
    "matrices of an excluded module": (
        stated(exclude_modules=["v_proj", "q_proj"]),
        ("matrices for model.layers.0.self_attn.q_proj", "4 such", "exclude_modules"),
    ),
    "matrices of another layer": (
        stated(layers_to_transform=[1]),
        ("matrices for model.layers.0.mlp.down_proj", "3 such", "layers_to_transform"),
    ),
    "matrices of what an expression does not fit": (
        stated(target_modules=r".*layers\.1\..*|.*\.(q|v)_proj", exclude_modules=r".*(k|o|gate|up)_proj"),
        ("matrices for model.layers.0.mlp.down_proj", "1 such"),
    ),
    "no targets": (stated(target_modules=None), ("target_modules None", "merge it with peft")),
    "an expression without end": (stated(target_modules="(.*)*_proj"), ("target_modules '(.*)*_proj'", "forever")),
    "no expression": (stated(target_modules="(q_proj"), ("target_modules '(q_proj'", "no expression")),
    "KaSA": (stated(kasa_config={"beta": 1.0}), ("KaSA",)),
    "what no one knows": (stated(frobnicate=True), ("frobnicate", "merge it with peft")),
    "another rank": (stated(r=8), ("do not fit", "rank 8")),
    "a rank of 0": (stated(r=0), ("the r 0",)),
    "a pattern that is an expression": (stated(rank_pattern={"(a+)+": 4}), ("rank_pattern", "'(a+)+'")),
    "no weights": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), ("adapter_model.safetensors",)),
    "a config cut short": (
        lambda adapter: (adapter / "adapter_config.json").write_text("{"),
        ("adapter_config.json", "not valid JSON"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_merged_is_refused_by_name(
    workshop: Workshop,
    tmp_path: Path,
    cli: Any,  # noqa: F811
    output: Path,  # noqa: F811
    case: tuple[Callable[[Path], object], tuple[str, ...]],
):
    save_adapter(tmp_path / "adapter", workshop.checkpoint("llama"))
    case[0](tmp_path / "adapter")
    assert_refused(cli("build", tmp_path / "adapter", "--output", output), *case[1])


def test_a_head_that_is_tied_is_refused(
    workshop: Workshop,
    tmp_path: Path,
    cli: Any,  # noqa: F811
    output: Path,  # noqa: F811
):
    """PEFT would change the embedding too; and a head that is stored as well would take nothing of it."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(workshop.checkpoint("small"), tmp_path / "base")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(base, **{"lm_head.weight": table.clone()})
    save_adapter(tmp_path / "adapter", base)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    pair = {"A": torch.ones(4, table.shape[1]), "B": torch.ones(table.shape[0], 4)}
    head = {f"base_model.model.lm_head.lora_{side}.weight": matrix for side, matrix in pair.items()}
    save_file({**load_file(path), **head}, path)
    assert_refused(cli("build", tmp_path / "adapter", "--output", output), "lm_head", "ties to the embedding")


TARGETS: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["q_proj", "self_attn.v_proj", "proj"]},
    "a whole name": {"target_modules": ["model.layers.0.mlp.up_proj", "o_proj"], "layers_to_transform": [1]},
    "an expression": {"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "all linear but one": {"target_modules": "ALL-LINEAR", "exclude_modules": ["o_proj"]},
    "all but": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1\..*k_proj"},
    "a layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers of another name": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "x"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("family", ["llama", "phi4-longrope", "starcoder2"])
@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_the_modules_that_a_config_names_are_those_that_peft_finds(
    workshop: Workshop, family: str, options: dict[str, Any]
):
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workshop.checkpoint(family)))
    modules = {name for name, module in model.named_modules() if getattr(module, "weight", torch.ones(1)).ndim == 2}
    config = _maybe_include_all_linear_layers(peft.LoraConfig(**options), model)
    theirs = {module for module in modules if check_target_module_exists(config, module)}
    assert targeted(options, modules) == theirs


def test_every_setting_of_peft_is_read_refused_or_harmless():
    """A setting that a later PEFT adds must be judged before it can change what is merged."""
    assert {field.name for field in fields(peft.LoraConfig)} == {*READ, *REFUSED, *HARMLESS}


def test_a_matrix_with_a_nan_is_named(
    workshop: Workshop,
    tmp_path: Path,
    cli: Any,  # noqa: F811
    output: Path,  # noqa: F811
):
    from safetensors.torch import load_file, save_file

    save_adapter(tmp_path / "adapter", workshop.checkpoint("llama"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    assert_refused(cli("build", tmp_path / "adapter", "--output", output), "NaN", "down_proj")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
