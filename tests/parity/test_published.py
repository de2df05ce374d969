"""Published CLLM checkpoints: their configs are accepted as the hub spells them; shrunk copies decode losslessly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.contract import Geometry
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.runtime.load import load
from tests.checkpoints import BOS, EOS, PAD, Variant
from tests.conftest import THREADS, Workshop
from tests.parity.compare import (
    MARGIN_EPSILON,
    assert_own_greedy_tokens,
    assert_same_tokens,
    random_prompts,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
CONFIGS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIXTURES.glob("*.json"))
}
SHRUNK = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
"""What a shrunk copy takes from a tiny checkpoint, with its vocabulary; all else stays as published."""
TEMPLATES = {"llama": "llama2-chat.jinja", "qwen2": "qwen2.5-chat.jinja"}
MESSAGES = [
    {"role": "system", "content": "Answer in SQL."},
    {"role": "user", "content": "List the cities.  "},
    {"role": "assistant", "content": "SELECT city"},
    {"role": "user", "content": "And the names?\n"},
]


def shrunk(workshop: Workshop, name: str) -> Path:
    """A tiny checkpoint of the published config's family under that config, its dims apart."""
    published = CONFIGS[name]
    family = published["model_type"]
    heads = {"num_kv_heads": 4 if published["num_key_value_heads"] == published["num_attention_heads"] else 2}
    template = (FIXTURES / TEMPLATES[family]).read_text(encoding="utf-8")
    variant = Variant(family=family, tied=False, num_layers=1, chat_template=template, **heads)
    path = workshop.new_checkpoint(f"published-{name}", variant)
    tiny = json.loads((path / "config.json").read_text(encoding="utf-8"))
    changes = {key: tiny[key] for key in (*SHRUNK, "vocab_size")}
    changes |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (path / "config.json").write_text(json.dumps(published | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_gives_the_geometry_of_its_model(name: str):
    from transformers import AutoConfig

    from cllm_export.exporter.graph.trace import geometry_of

    published = CONFIGS[name]
    config = AutoConfig.for_model(**published)
    assert geometry_of(config, max_length=2048, max_block_size=64) == Geometry(
        num_layers=published["num_hidden_layers"],
        num_heads=published["num_attention_heads"],
        num_kv_heads=published["num_key_value_heads"],
        head_dim=128,
        hidden_size=published["hidden_size"],
        vocab_size=published["vocab_size"],
        cache_length=2048 + 63,
        max_block_size=64,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shrunk_copy_of_a_published_checkpoint_decodes_losslessly_with_its_chat_template(
    workshop: Workshop, name: str
):
    """Jacobi against autoregressive at one shape: equality; against PyTorch, but for margins under MARGIN_EPSILON."""
    from cllm_export.exporter.parity.reference import Reference

    checkpoint = shrunk(workshop, name)
    assert open_checkpoint(checkpoint).raw_config["rms_norm_eps"] == CONFIGS[name]["rms_norm_eps"]
    model = load(workshop.build(checkpoint, max_length=300).path, threads=THREADS)
    reference = Reference(checkpoint, max_length=300)
    chat = model.encode(MESSAGES)
    assert chat == reference.tokenizer.encode(MESSAGES)
    for prompt in (chat, *random_prompts(model.engine.geometry.vocab_size, [5, 60])):
        what = f"{name}, prompt of {len(prompt)}"
        expected = model.generate(prompt, max_new_tokens=20, method="autoregressive").token_ids
        assert_own_greedy_tokens(reference, prompt, expected, epsilon=MARGIN_EPSILON, what=what)
        for method in ("jacobi", "jacobi-block"):
            actual = model.generate(prompt, max_new_tokens=20, method=method).token_ids
            assert_same_tokens(actual, expected, f"{what}, {method}")
