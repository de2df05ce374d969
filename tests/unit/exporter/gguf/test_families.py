"""A checkpoint that llama.cpp's converter turned into GGUF comes back as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from cllm_export.exporter.checkpoint.families import FAMILIES
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.gguf.architectures import ARCHITECTURES
from cllm_export.exporter.gguf.convert import import_gguf
from cllm_export.exporter.gguf.header import read_gguf
from cllm_export.exporter.gguf.rope import rope_parameters
from cllm_export.exporter.gguf.tokenizer import END_TEXTS
from tests.checkpoints import LAYERED_ROPE, LINEAR_ROPE, LLAMA3_ROPE, LONGROPE, PARTIAL_ROPE, WINDOW, YARN_ROPE, Variant
from tests.conftest import Workshop
from tests.unit.exporter.gguf.made import CONTROL, write_gguf

torch = pytest.importorskip("torch")

GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}
CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {
    "llama": Variant(),
    "llama-untied-gqa": Variant(tied=False, num_kv_heads=1, head_dim=24),
    "llama-llama3": Variant(rope=LLAMA3_ROPE, head_dim=32),
    "llama-linear": Variant(rope=LINEAR_ROPE),
    "llama-yarn": Variant(rope=YARN_ROPE),
    "llama-biases": Variant(config={"attention_bias": True, "mlp_bias": True}),
    "mistral": Variant(family="mistral", tied=False, config={"sliding_window": None}),
    "qwen2": Variant(family="qwen2"),
    "qwen3": Variant(family="qwen3", head_dim=32),
    "qwen3-bias": Variant(family="qwen3", tied=False, config={"attention_bias": True}),
    "gemma2": Variant(family="gemma2", embedding_scale=0.06, config={**GEMMA, **CAPS}),
    "gemma3": Variant(family="gemma3_text", embedding_scale=0.06, rope=LAYERED_ROPE, config={**GEMMA, **LAYERS}),
    "phi3": Variant(family="phi3", tied=False, num_kv_heads=4, config={"sliding_window": WINDOW}),
    "phi3-longrope": Variant(family="phi3", rope=LONGROPE, config={"original_max_position_embeddings": 64}),
    "starcoder2": Variant(family="starcoder2", config={"use_bias": True, "sliding_window": None}),
    "stablelm": Variant(family="stablelm", tied=False, rope=PARTIAL_ROPE, config={"use_qkv_bias": True}),
    "stablelm-plain": Variant(family="stablelm", rope=PARTIAL_ROPE),
}

ADDED = {
    *("rope_parameters", "architectures", "dtype", "query_pre_attn_scalar", "layer_types", "transformers_version"),
    *("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "use_bias", "head_dim"),
}
"""Keys of a config that the tables of transformers leave out, and that are added."""


def make_checkpoint(workshop: Workshop, name: str) -> Path:
    """A checkpoint whose norms are multiples of 1 / 1024, so that fp32 holds them with 1 added and without."""
    path = workshop.new_checkpoint(f"gguf-{name}", VARIANTS[name])
    weights = load_file(path / "model.safetensors")
    rounded = {key: (value * 1024).round() / 1024 if "norm" in key else value for key, value in weights.items()}
    save_file(rounded, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_a_family_comes_back_as_the_same_model(workshop: Workshop, tmp_path: Path, name: str):
    """Weights bit for bit, and logits of a forward as well, which shows that the config says the same."""
    from transformers import AutoModelForCausalLM

    checkpoint = make_checkpoint(workshop, name)
    file = write_gguf(tmp_path / "model.gguf", checkpoint)
    made = import_gguf(file, tmp_path / "imported").path
    before, after = load_file(checkpoint / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    for key, values in before.items():
        assert (values == after[key]).all(), key
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (checkpoint, made)]
    assert torch.equal(*logits)
    assert open_checkpoint(made).eos_token_ids == (2,)


def test_the_architectures_are_those_of_the_families_for_which_transformers_has_tables():
    from transformers.integrations import GGUF_CONFIG_MAPPING

    mapped = {name for name in GGUF_CONFIG_MAPPING if name in FAMILIES or name == "gemma3"}
    assert set(ARCHITECTURES) == mapped - {"mistral"}


def test_a_name_of_mistral_gives_its_family(workshop: Workshop, tmp_path: Path):
    """As transformers decides, since llama.cpp has no architecture of that name."""
    file = write_gguf(tmp_path / "model.gguf", make_checkpoint(workshop, "mistral"), general__name="mistral")
    made = import_gguf(file, tmp_path / "imported")
    assert made.family == "mistral"
    assert json.loads((made.path / "config.json").read_text())["sliding_window"] is None, "the file states no window"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "starcoder2", "stablelm"])
def test_the_config_has_what_transformers_reads(workshop: Workshop, tmp_path: Path, name: str):
    """Of what its tables give. What they leave out is added, and the test of the logits judges that."""
    from transformers import AutoConfig

    file = write_gguf(tmp_path / "model.gguf", make_checkpoint(workshop, name), general__name="tiny")
    made = json.loads((import_gguf(file, tmp_path / "imported").path / "config.json").read_text())
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").to_dict()
    for key in made.keys() - ADDED:
        assert made[key] == theirs.get(key), key


def test_tied_embeddings_stay_tied(workshop: Workshop, tmp_path: Path):
    for name, tied in (("llama", True), ("llama-untied-gqa", False)):
        made = import_gguf(write_gguf(tmp_path / f"{name}.gguf", make_checkpoint(workshop, name)), tmp_path / name).path
        assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(made / "model.safetensors")) is not tied


def test_every_token_that_ends_a_text_is_in_the_configs(workshop: Workshop, tmp_path: Path):
    """End of turn and of message, too: a chat would not stop without them."""
    ends = {"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": 7}
    file = write_gguf(tmp_path / "model.gguf", make_checkpoint(workshop, "llama"), **ends)
    made = import_gguf(file, tmp_path / "imported").path
    for name in ("config.json", "generation_config.json"):
        assert json.loads((made / name).read_text())["eos_token_id"] == [2, 7]
    assert open_checkpoint(made).eos_token_ids == (2, 7)


@pytest.mark.parametrize("text", END_TEXTS)
def test_an_end_that_only_its_text_tells_is_in_the_configs(workshop: Workshop, tmp_path: Path, text: str):
    """As in llama.cpp, with an end of sequence beside it and without. Without, it is not the default of a family."""
    checkpoint = workshop.checkpoint("llama")
    metadata = read_gguf(write_gguf(tmp_path / "plain.gguf", checkpoint)).metadata
    tokens, types, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    fields = {
        "tokenizer__ggml__tokens": [*tokens[:-1], text],
        "tokenizer__ggml__token_type": [*types[:-1], CONTROL],
        "tokenizer__ggml__merges": merges[:1],
    }
    last = len(tokens) - 1
    for name, drop, expected in (("both", (), (2, last)), ("alone", ("tokenizer.ggml.eos_token_id",), (last,))):
        made = import_gguf(write_gguf(tmp_path / f"{name}.gguf", checkpoint, drop=drop, **fields), tmp_path / name).path
        assert open_checkpoint(made).eos_token_ids == expected


ROPE = "llama__rope__"
SCALINGS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "no type": ({f"{ROPE}scaling__factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "old field": ({f"{ROPE}scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "both fields": (
        {f"{ROPE}scale_linear": 2.0, f"{ROPE}scaling__factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "none": ({f"{ROPE}scaling__type": "none", f"{ROPE}scaling__factor": 2.0}, {"rope_type": "default"}),
    "none, old field": ({f"{ROPE}scaling__type": "none", f"{ROPE}scale_linear": 2.0}, {"rope_type": "default"}),
    "factor 0": ({f"{ROPE}scaling__type": "linear", f"{ROPE}scaling__factor": 0.0}, {"rope_type": "default"}),
    "yarn, factor 0": (
        {f"{ROPE}scaling__type": "yarn", f"{ROPE}scaling__factor": 0.0},
        {"rope_type": "yarn", "factor": 1.0},
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_is_scaled_with_the_defaults_of_llama_cpp(workshop: Workshop, tmp_path: Path, case: str):
    fields, expected = SCALINGS[case]
    file = read_gguf(write_gguf(tmp_path / "model.gguf", workshop.checkpoint("llama"), **fields))
    found = rope_parameters(file)
    assert {key: found[key] for key in expected} == expected
    assert expected["rope_type"] != "default" or found.keys() == {"rope_type", "rope_theta"}
