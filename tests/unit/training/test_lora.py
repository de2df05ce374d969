"""LoRA: only adapters train, and what is saved is what peft itself would merge."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from cllm_export.errors import OptionError  # noqa: E402 - after the skips
from cllm_export.training.model.lora import PROJECTIONS, add_lora, merge_lora  # noqa: E402
from cllm_export.training.model.options import LoraOptions  # noqa: E402
from tests.checkpoints import TRAINABLE  # noqa: E402
from tests.conftest import Workshop  # noqa: E402

OPTIONS = LoraOptions(rank=3, alpha=7.0)


def load(workshop: Workshop, name: str) -> Any:
    from cllm_export.exporter.checkpoint.read import open_checkpoint
    from cllm_export.training.model.torch_engine import load_weights

    return load_weights(open_checkpoint(workshop.checkpoint(name)))


def adapted(workshop: Workshop, name: str) -> Any:
    """A decoder with adapters that do something: freshly made ones are zero."""
    decoder = load(workshop, name)
    add_lora(decoder, OPTIONS)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return decoder


@pytest.mark.parametrize("name", ["llama", "phi4-longrope", "stablelm"])
def test_only_adapters_train_and_every_projection_has_one(workshop: Workshop, name: str):
    decoder = adapted(workshop, name)
    projections = [part for part in load(workshop, name).model.layers.modules() if isinstance(part, torch.nn.Linear)]
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * len(projections)


def test_a_fresh_adapter_changes_nothing(workshop: Workshop):
    decoder, tokens = load(workshop, "qwen2"), torch.arange(5, 25)[None]
    with torch.no_grad():
        before = decoder(tokens, use_cache=False).logits
        add_lora(decoder, OPTIONS)
        assert torch.equal(decoder(tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("name", TRAINABLE)
def test_merged_weights_are_those_that_peft_merges(workshop: Workshop, name: str):
    """One product of rank 3 added to each weight, in another order of the same sums: 1e-6 of values about 1."""
    from peft import LoraConfig, get_peft_model

    decoder = adapted(workshop, name)
    config = LoraConfig(r=3, lora_alpha=7.0, target_modules=list(PROJECTIONS))
    theirs = get_peft_model(load(workshop, name), config)
    theirs.base_model.model.load_state_dict(decoder.state_dict())
    expected = theirs.merge_and_unload().state_dict()
    merged = merge_lora(decoder.state_dict(), OPTIONS)
    assert merged.keys() == expected.keys() == load(workshop, name).state_dict().keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5, msg=key)
    key = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(merged[key], load(workshop, name).state_dict()[key]), "the adapters do something"


def test_merging_keeps_the_dtype_of_the_weight(workshop: Workshop):
    weights = {name: tensor.bfloat16() for name, tensor in adapted(workshop, "llama").state_dict().items()}
    assert {tensor.dtype for tensor in merge_lora(weights, OPTIONS).values()} == {torch.bfloat16}


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, -1.0), (2, math.nan), (2, math.inf)])
def test_sizes_that_make_no_sense_are_refused(rank, alpha):
    with pytest.raises(OptionError, match=r"(rank|alpha) must be"):
        LoraOptions(rank=rank, alpha=alpha)
