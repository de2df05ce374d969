"""``eos_token_id`` of ``generation_config.json`` and of ``config.json``: which one ends a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cllm_export.exporter.checkpoint.read import open_checkpoint
from tests.checkpoints import edit_json
from tests.conftest import Workshop


@pytest.fixture
def checkpoint(workshop: Workshop, tmp_path: Path) -> Path:
    return shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")


@pytest.mark.parametrize("stated", [3, [3, 4], [], "no file"])
@pytest.mark.parametrize("config", [2, [2, 7], None])
def test_the_tokens_that_end_a_text_are_those_of_transformers(checkpoint: Path, config: object, stated: object):
    import torch
    from transformers import AutoModelForCausalLM

    edit_json(checkpoint / "config.json", eos_token_id=config)
    if stated == "no file":
        (checkpoint / "generation_config.json").unlink()
    else:
        edit_json(checkpoint / "generation_config.json", eos_token_id=stated)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    settled, _ = model._prepare_generation_config(None)
    model._prepare_special_tokens(settled, False, torch.device("cpu"))
    ends = settled._eos_token_tensor
    assert list(open_checkpoint(checkpoint).eos_token_ids) == ([] if ends is None else ends.tolist())


def test_a_generation_config_that_names_none_does_not_make_a_text_endless(checkpoint: Path):
    edit_json(checkpoint / "config.json", eos_token_id=[2, 7])
    edit_json(checkpoint / "generation_config.json", drop=("eos_token_id",))
    assert open_checkpoint(checkpoint).eos_token_ids == (2, 7)
