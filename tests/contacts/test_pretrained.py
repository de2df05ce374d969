"""A pre-trained LLM in every precision: fast bundles say what the model says, and TensorRT for RTX builds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.manifest import Bundle
from cllm_export.exporter.quantize.options import QuantizeOptions
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.general_text import general_passages
from cllm_export.runtime.load import load
from cllm_export.runtime.teacher_forced import Reading, agreement, general_texts, perplexity, read_texts
from tests.conftest import THREADS, Workshop
from tests.scales import observe_stock, save_scales
from tests.tensorrt.rtx.plans import BLOCK_SIZES, contents_of, require_sound

PROMPT = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
MAX_LENGTH = 512


def build(workshop: Workshop, checkpoint: Path, scheme: str | None = None, *, rotate: bool = False) -> Bundle:
    quantize = QuantizeOptions(scheme=scheme, head=True, rotate=rotate) if scheme else None
    return workshop.build(checkpoint, max_length=MAX_LENGTH, quantize=quantize)


def read(bundle: Bundle) -> Sequence[Reading]:
    """The package's general text, four kinds of it, read by the bundle."""
    texts = general_texts(TextCodec.of_bundle(bundle), general_passages(), max_length=MAX_LENGTH)
    return read_texts(OrtEngine(bundle, num_slots=1, threads=THREADS), texts, pad=0)


@pytest.fixture(scope="module")
def expected(workshop: Workshop, smollm2: Path) -> Sequence[Reading]:
    """What the model predicts in fp32."""
    return read(build(workshop, smollm2))


@pytest.mark.parametrize(
    ("scheme", "rotate", "least", "most"),
    [("int8-dynamic", False, 0.96, 1.01), ("int8-dynamic", True, 0.93, 1.025), ("int4", False, 0.96, 1.01)],
    ids=["int8-dynamic", "int8-dynamic, rotated", "int4"],
)
def test_a_fast_bundle_predicts_what_the_model_predicts(
    workshop: Workshop,
    smollm2: Path,
    expected: Sequence[Reading],
    scheme: str,
    rotate: bool,
    least: float,
    most: float,
):
    """``least`` is the share of equal predictions, and ``most`` the perplexity over the model's.

    They lie half a point and half a percent from what docs/measurements.md has, which is the noise of so many tokens.
    The file's own weights lie on a grid of 4 bits, which int4 keeps: what it loses are the activations.
    """
    bundle = build(workshop, smollm2, scheme, rotate=rotate)
    found = read(bundle)
    assert agreement(expected, found).share >= least
    assert perplexity(found) / perplexity(expected) <= most


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4"])
def test_a_fast_bundle_decodes_its_own_text_at_every_block_size(workshop: Workshop, smollm2: Path, scheme: str):
    model = load(build(workshop, smollm2, scheme).path, threads=THREADS, prefix_cache_bytes=0)
    alone = model.generate(PROMPT, method="autoregressive", block_size=1, max_new_tokens=24)
    assert "Paris" in alone.text
    for size in (4, 8, 16):
        assert model.generate(PROMPT, block_size=size, max_new_tokens=24).token_ids == alone.token_ids, size


@pytest.fixture(scope="module")
def scales(workshop: Workshop, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What int8 and fp8 need: statistics of every activation of the stock model."""
    import torch
    from transformers import AutoModelForCausalLM

    bundle = build(workshop, smollm2)
    stock = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    rows = observe_stock(stock, bundle.manifest.geometry.vocab_size)
    return save_scales(tmp_path_factory.mktemp("scales") / "scales.safetensors", bundle, rows)


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "int4"])
def test_tensorrt_for_rtx_builds_it(workshop: Workshop, smollm2: Path, scales: Path, tmp_path: Path, precision: Any):
    """One attention kernel a layer, and each weight once."""
    if precision == "bf16":
        options: dict[str, Any] = {"precision": "bf16"}
    else:
        own = {"engine": "tensorrt", "group_size": 32} if precision == "int4" else {"scales": scales}
        options = {"precision": "fp16", "quantize": QuantizeOptions(scheme=precision, **own)}
    bundle = workshop.build(smollm2, max_length=MAX_LENGTH, **options)
    contents = contents_of(bundle, tmp_path / precision)
    num_profiles = 1 + len(BLOCK_SIZES)
    require_sound(contents, bundle, attention=bundle.manifest.geometry.num_layers, num_profiles=num_profiles)
