"""The scales file: what is written is read again, and anything else is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cllm_export.bundle.scales import InputStatistics, Provenance, open_scales, write_scales
from cllm_export.errors import OutputError, ScalesError

Q, K, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight", "mlp.down_proj.weight"
MADE = Provenance(
    checkpoint_fingerprint="c" * 64,
    bundle_fingerprint="b" * 64,
    prompts_sha256="d" * 64,
    num_prompts=3,
    loop="sliding",
    proposer="pad",
    block_size=16,
    seed=0,
    mix=0.5,
    rows={"clean": 10, "guess": 4, "partial": 3, "fixed": 3},
    tool_versions={"cllm-export": "0"},
)


def statistics(*tensors, width=4, seed=0):
    amax = np.random.default_rng(seed).uniform(1, 2, width).astype(np.float32)
    return InputStatistics(tensors=tensors, num_rows=20, amax=amax, high=amax * 0.9, mean_abs=amax * 0.1)


INPUTS = (statistics(Q, K), statistics(DOWN, width=6, seed=1))
GRAMS = {entry.name: np.outer(entry.amax, entry.amax) for entry in INPUTS}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "scales.safetensors"
    write_scales(path, MADE, INPUTS, {name: (lambda gram=gram: gram) for name, gram in GRAMS.items()})
    return path


def test_scales_are_read_as_they_were_written(path):
    scales = open_scales(path)
    assert scales.provenance == MADE
    assert scales.tensors == (Q, K, DOWN)
    for tensor, entry in ((Q, INPUTS[0]), (K, INPUTS[0]), (DOWN, INPUTS[1])):
        found = scales.of(tensor)
        assert np.array_equal(found.amax, entry.amax) and np.array_equal(found.high, entry.high)
        assert np.array_equal(found.mean_abs, entry.mean_abs) and found.num_rows == 20
        assert np.array_equal(scales.gram(tensor), GRAMS[entry.name])


def test_equal_scales_are_equal_bytes(path, tmp_path):
    write_scales(tmp_path / "again", MADE, INPUTS, {name: (lambda gram=gram: gram) for name, gram in GRAMS.items()})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_provenance_that_holds_zeros_only_is_left_as_it_is(tmp_path):
    made = replace(MADE, checkpoint_fingerprint="0" * 64, prompts_sha256="0" * 64)
    write_scales(tmp_path / "zeros", made, INPUTS)
    assert open_scales(tmp_path / "zeros").provenance == made


def test_the_safetensors_library_reads_the_file(path):
    from safetensors.numpy import load_file

    tensors = load_file(path)
    assert np.array_equal(tensors[f"amax/{DOWN}"], INPUTS[1].amax)
    assert np.array_equal(tensors[f"gram/{Q}"], GRAMS[Q])


def test_scales_without_gram_matrices_say_how_to_get_them(tmp_path):
    write_scales(tmp_path / "small", MADE, INPUTS)
    with pytest.raises(ScalesError, match=r"no Gram matrix of mlp\.down_proj\.weight; calibrate again with gram=True"):
        open_scales(tmp_path / "small").gram(DOWN)


def test_a_layer_that_was_not_observed_is_refused_by_name(path):
    with pytest.raises(ScalesError, match=r"no statistics of lm_head\.weight"):
        open_scales(path).require_tensors({Q: 4, "lm_head.weight": 4})


def test_a_layer_of_another_width_is_refused_by_name(path):
    open_scales(path).require_tensors({Q: 4, DOWN: 6})
    with pytest.raises(ScalesError, match=r"has 6 channels for mlp\.down_proj\.weight, which has 8"):
        open_scales(path).require_tensors({DOWN: 8})


def test_scales_of_another_checkpoint_are_refused(path):
    open_scales(path).require_checkpoint("c" * 64)
    with pytest.raises(ScalesError, match="calibrated with another checkpoint"):
        open_scales(path).require_checkpoint("e" * 64)


def test_every_flipped_byte_is_noticed(path):
    data = path.read_bytes()
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ScalesError):
            open_scales(path)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_file_that_was_cut_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ScalesError, match="is no scales file, or is damaged"):
        open_scales(path)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ScalesError, match=r"cannot be read: No such file .*; give a file that"):
        open_scales(tmp_path / "none")


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"amax/x": np.ones(3, np.float32)}, tmp_path / "other")
    with pytest.raises(ScalesError, match="its header does not say how it was made; give a file that"):
        open_scales(tmp_path / "other")


def test_a_newer_version_is_refused_with_what_to_do(path, monkeypatch):
    monkeypatch.setattr("cllm_export.bundle.scales.SCALES_VERSION", 0)
    with pytest.raises(ScalesError, match="has version 2, this cllm-export reads 0: upgrade cllm-export"):
        open_scales(path)


def test_nan_is_never_written_and_leaves_no_file(tmp_path):
    entry = statistics(Q)
    entry.amax[2] = np.nan
    with pytest.raises(ScalesError, match=f"amax/{Q} is not finite"):
        write_scales(tmp_path / "nan", MADE, [entry])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_replaced_only_by_force(path):
    with pytest.raises(OutputError, match="exists; replace it with force=True"):
        write_scales(path, MADE, INPUTS)
    write_scales(path, MADE, INPUTS[:1], force=True)
    assert open_scales(path).tensors == (Q, K)


@pytest.mark.parametrize("change", [{"mix": 1.5}, {"rows": {"clean": -1}}, {"num_prompts": 0}])
def test_a_provenance_out_of_range_is_refused(change):
    with pytest.raises(ValueError, match=r"mix or rows|num_prompts"):
        replace(MADE, **change)
