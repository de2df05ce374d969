"""RoPE tables: at every position those of transformers itself, bit for bit, whatever the rope type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from cllm_export.exporter.graph.rotary import rotary_tables, settle_rope
from tests.checkpoints import DYNAMIC_ROPE, LAYERED_ROPE, LINEAR_ROPE, LLAMA3_ROPE, LONGROPE, PARTIAL_ROPE, YARN_ROPE

ORIGINAL, LIMIT = LONGROPE["original_max_position_embeddings"], 256


def config_of(family: str, rope: Mapping[str, Any], **options: Any) -> Any:
    if family == "phi3":  # whose config has a length of its own beside that of its rope
        options["original_max_position_embeddings"] = ORIGINAL
    return AutoConfig.for_model(
        family,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=LIMIT,
        pad_token_id=0,
        rope_parameters=dict(rope),
        **options,
    )


@pytest.mark.parametrize("max_length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, LIMIT])
@pytest.mark.parametrize(
    ("rotary_type", "family", "rope"),
    [
        (LlamaRotaryEmbedding, "llama", LINEAR_ROPE),
        (LlamaRotaryEmbedding, "llama", LLAMA3_ROPE),
        (LlamaRotaryEmbedding, "llama", YARN_ROPE),
        (LlamaRotaryEmbedding, "llama", DYNAMIC_ROPE),
        (Phi3RotaryEmbedding, "phi3", PARTIAL_ROPE),
        (Phi3RotaryEmbedding, "phi3", LONGROPE),
    ],
)
def test_tables_are_those_that_transformers_has_for_a_text_of_the_max_length(
    rotary_type: Any, family: str, rope: Mapping[str, Any], max_length: int
):
    config = config_of(family, rope)
    cos, sin = rotary_tables(rotary_type, config, max_length=max_length, length=max_length + 63)[None]
    expected = rotary_type(config)(torch.zeros(1), torch.arange(max_length)[None])
    for table, whole in zip((cos, sin), expected, strict=True):
        assert table.shape[0] == max_length + 63
        assert torch.equal(torch.cat((table, table), 1)[:max_length], whole[0])


def test_layers_of_two_types_have_a_table_each():
    config = config_of(
        "gemma3_text", LAYERED_ROPE, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    tables = rotary_tables(Gemma3RotaryEmbedding, config, max_length=100, length=120)
    assert set(tables) == {"sliding_attention", "full_attention"}
    for layer_type, (cos, _) in tables.items():
        expected, _ = Gemma3RotaryEmbedding(config)(torch.zeros(1), torch.arange(120)[None], layer_type)
        assert torch.equal(torch.cat((cos, cos), 1), expected[0])
    assert not torch.equal(tables["sliding_attention"][0], tables["full_attention"][0])


def test_short_and_long_factors_give_other_tables():
    config = config_of("phi3", LONGROPE)
    short, long = (
        rotary_tables(Phi3RotaryEmbedding, config, max_length=ORIGINAL + more, length=LIMIT)[None] for more in (0, 1)
    )
    assert not torch.equal(short[0], long[0])


@pytest.mark.parametrize(("max_length", "is_long"), [(ORIGINAL, False), (ORIGINAL + 1, True)])
def test_the_max_length_chooses_the_factors_of_longrope_once_for_every_length(max_length: int, is_long: bool):
    """transformers chooses by the length of each text, so that a cache filled before would be of other factors."""
    rotary = Phi3RotaryEmbedding(config_of("phi3", LONGROPE))
    settle_rope(rotary, max_length)
    factors = torch.tensor(LONGROPE["long_factor" if is_long else "short_factor"])
    expected = 1 / (factors * 10000.0 ** (torch.arange(0, 8, 2) / 8))
    for length in (3, ORIGINAL, ORIGINAL + 1, LIMIT):
        rotary(torch.zeros(1), torch.arange(length)[None])
        torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-6, atol=0)
