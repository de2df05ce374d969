"""Calibration on a real engine: statistics are what PyTorch's own layers see, and an interruption changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.scales import open_scales
from cllm_export.calibration.calibrate import CalibrateOptions, calibrate
from cllm_export.calibration.edited_engine import EditedEngine, read_graph
from cllm_export.calibration.linear_inputs import checkpoint_tensors, linear_inputs, linear_layers
from cllm_export.calibration.recording import read_recordings
from cllm_export.calibration.search.fake_quantization import FakeQuantization, fake_quantized
from cllm_export.calibration.search.fit import Budget, fit
from cllm_export.calibration.search.measured import HeldOutOptions, Losses, Quality
from cllm_export.calibration.search.sensitivity import StandIn
from cllm_export.errors import CalibrationError, OutputError
from cllm_export.evaluation.tasks.questions import read_questions
from cllm_export.exporter.quantize.options import QuantizeOptions
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from tests.conftest import THREADS

WORDS = ("select", "name", "from", "city", "where", "count", "order", "the")
CLEAN = CalibrateOptions(mix=0, num_rows=300, max_new_tokens=12, threads=THREADS)
NOTHING = Losses(tpf=0, quality=Quality(0, "same_text"), agreement=1, perplexity=0, same_text=1)
MIXED = CalibrateOptions(mix=0.5, num_rows=300, max_new_tokens=12, gram=True, threads=THREADS)

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""What a head that is tied to the table is called: the tensor that the checkpoint stores."""

STATISTICS_TOLERANCE = 1e-4
"""Relative to the largest range of the layer. Both compute in fp32 and differ in the order of sums, by some 1e-6;
another row, layer or channel is off by 0.1 or more."""

STAND_IN_TOLERANCE = 0.02
"""Of the change that quantising makes. Both round to the same numbers, and differ in the order of sums; a step more or
less here and there is a share of 1 / 127 of it."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [f"{WORDS[index % 8]} {WORDS[index * 3 % 7]} {index} and {WORDS[(index + 1) % 8]}" for index in range(40)]
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bundle(workshop):
    return workshop.bundle("small")


@pytest.fixture(scope="module")
def mixed(bundle, prompts, tmp_path_factory):
    return calibrate(bundle, prompts, tmp_path_factory.mktemp("mixed") / "scales", MIXED).scales


@pytest.mark.parametrize(
    ("weight", "tensors"),
    [
        ("model.layers.0.mlp.down_proj.weight.T", ("model.layers.0.mlp.down_proj.weight",)),
        ("lm_head.weight", ("lm_head.weight",)),
        ("a.qkv_proj.weight", ("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight")),
        ("a.qkv_proj.weight.T", ("a.qkv_proj.weight",)),
    ],
)
def test_a_weight_is_known_by_the_checkpoint_tensors_it_is_made_of(weight, tensors):
    assert checkpoint_tensors(weight) == tensors
    assert checkpoint_tensors("a.qkv_proj.weight", stored=True) == ("a.qkv_proj.weight",)


def test_every_linear_layer_of_the_checkpoint_is_observed(workshop, bundle, mixed):
    state = workshop.stock("small").state_dict()
    matrices = {name for name, value in state.items() if value.ndim == 2 and name not in TIED}
    assert matrices <= set(mixed.tensors)
    assert mixed.provenance.bundle_fingerprint == bundle.fingerprint
    mixed.require_checkpoint(bundle.manifest.checkpoint_fingerprint)
    mixed.require_tensors({name: state[name].shape[1] for name in matrices})


def test_statistics_of_clean_text_are_what_pytorch_sees(workshop, bundle, prompts, tmp_path, monkeypatch):
    import torch

    kept = tmp_path / "kept"
    monkeypatch.setattr("cllm_export.calibration.run_directory.shutil.rmtree", lambda path, **_: path.rename(kept))
    options = CalibrateOptions(mix=0, num_rows=100_000, max_new_tokens=12, threads=THREADS)
    scales = calibrate(bundle, prompts, tmp_path / "scales", options).scales
    model, seen = workshop.stock("small"), {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=f"{name}.weight": seen.setdefault(name, []).append(args[0][0].numpy())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    texts = [entry.text for path in sorted(kept.glob("*.jsonl")) for entry in read_recordings(path)]
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text[:-1]]))
    for handle in handles:
        handle.remove()
    assert scales.provenance.rows == {"clean": sum(len(text) - 1 for text in texts)}
    for name, parts in seen.items():
        rows, found = np.abs(np.concatenate(parts)), scales.of(TIED.get(name, name))
        allowed = STATISTICS_TOLERANCE * rows.max()
        assert found.num_rows == len(rows)
        np.testing.assert_allclose(found.amax, rows.max(axis=0), atol=allowed, err_msg=name)
        np.testing.assert_allclose(found.mean_abs, rows.mean(axis=0), atol=allowed, err_msg=name)


def test_every_row_of_a_gram_matrix_counts_alike(mixed):
    """A row is divided by its root mean square, so the squares of its channels sum to their number."""
    for entry in mixed.inputs:
        gram = mixed.gram(entry.name)
        assert np.array_equal(gram, gram.T)
        assert np.trace(gram, dtype=np.float64) == pytest.approx(entry.num_rows * len(gram), rel=1e-4)  # sums in fp32


def test_rows_come_in_the_mix_and_from_every_stage(mixed):
    rows = mixed.provenance.rows
    assert rows["clean"] == 150 and rows["guess"] + rows.get("partial", 0) + rows["fixed"] == 150
    assert mixed.provenance.num_rows == 300 == mixed.inputs[0].num_rows


@pytest.mark.parametrize("after", ["recordings", "statistics", "gram"])
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(bundle, prompts, mixed, tmp_path, monkeypatch, after):
    from cllm_export.calibration.run_directory import RunDirectory

    make = RunDirectory.make

    def make_and_die(self, path, write):
        make(self, path, write)
        if path.name.startswith(f"{after}-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "make", make_and_die)
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, prompts, tmp_path / "scales", MIXED)
    assert not (tmp_path / "scales").exists()
    monkeypatch.setattr(RunDirectory, "make", make)
    calibrate(bundle, prompts, tmp_path / "scales", MIXED)
    assert (tmp_path / "scales").read_bytes() == mixed.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["scales"]


def test_too_few_prompts_are_refused(bundle, prompts, tmp_path):
    options = CalibrateOptions(limit=5, max_new_tokens=4, threads=THREADS)
    with pytest.raises(CalibrationError, match="too few prompts: 5 of 5 could be decoded, at least 16"):
        calibrate(bundle, prompts, tmp_path / "scales", options)


def test_an_existing_scales_file_is_refused_before_any_work(bundle, prompts, mixed):
    with pytest.raises(OutputError, match="exists; replace it with force=True"):
        calibrate(bundle, prompts, mixed.path, MIXED)


def test_nan_activations_are_refused_by_layer_and_prompt(bundle, prompts, tmp_path, monkeypatch):
    values = EditedEngine.values
    monkeypatch.setattr(EditedEngine, "values", lambda self: {k: v * np.nan for k, v in values(self).items()})
    with pytest.raises(CalibrationError, match=r"is NaN in prompt \d+: the model overflows"):
        calibrate(bundle, prompts, tmp_path / "scales", CLEAN)


def test_constant_activations_are_refused_by_layer(bundle, prompts, tmp_path, monkeypatch):
    values = EditedEngine.values
    monkeypatch.setattr(EditedEngine, "values", lambda self: {k: v * 0 + 1 for k, v in values(self).items()})
    with pytest.raises(CalibrationError, match="these activations are constant"):
        calibrate(bundle, prompts, tmp_path / "scales", CLEAN)


def test_a_linked_bundle_has_the_layers_of_a_copied_one(workshop, bundle):
    linked = workshop.bundle("small", weights="link")
    copied_graph, linked_graph = read_graph(bundle), read_graph(linked)
    copied = linear_inputs(copied_graph, linear_layers(copied_graph))
    found = linear_inputs(linked_graph, linear_layers(linked_graph))
    assert [(each.tensors, each.width) for each in found] == [(each.tensors, each.width) for each in copied]
    engine = EditedEngine(linked, linked_graph, observed=[each.rows[0] for each in found], threads=THREADS)
    other = EditedEngine(bundle, copied_graph, observed=[each.rows[0] for each in copied], threads=THREADS)
    for each in (engine, other):
        each.forward(Batch([[5, 6, 7, 8]], [1], [0]))
    pairs = zip(engine.values().values(), other.values().values(), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())  # as STATISTICS_TOLERANCE


def test_an_edited_engine_gives_the_tokens_of_the_bundle(bundle):
    engine, edited = OrtEngine(bundle, threads=THREADS), EditedEngine(bundle, read_graph(bundle), threads=THREADS)
    for start in (0, 4):
        batch = Batch([[5, 6, 7, 8]], [1], [start])
        assert edited.forward(batch)[:2] == engine.forward(batch)[:2]


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8", "int4", "fp8"])
def test_rounding_every_layer_flips_more_than_any_layer_alone(bundle, prompts, mixed, scheme):
    questions = read_questions(prompts, limit=4)
    how = FakeQuantization(scheme=scheme, scales=mixed)
    options = HeldOutOptions(max_new_tokens=12, threads=THREADS)
    stand_in = StandIn(bundle, questions, how, options)
    ranked = stand_in.rank()
    assert {entry.layer.name for entry in ranked} == {layer.name for layer in stand_in.layers}
    rates = [entry.flips.all.rate for entry in ranked]
    assert rates == sorted(rates, reverse=True)
    kept = stand_in.losses([layer.name for layer in stand_in.layers])
    assert replace(kept, quality=NOTHING.quality) == NOTHING and kept.quality.loss == 0
    assert stand_in.losses([]).agreement < 1
    assert all("embed" not in layer.name and "lm_head" not in layer.name for layer in stand_in.layers)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_static_stand_ins_without_scales_are_refused(scheme):
    with pytest.raises(CalibrationError, match=f"{scheme} needs scales"):
        FakeQuantization(scheme=scheme)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8"])
def test_a_stand_in_of_every_layer_computes_what_a_bundle_does(workshop, bundle, mixed, scheme):
    """Of int8 a bundle smooths less, and of int4 its operator rounds the rows as well."""
    scales = mixed if scheme == "fp8" else None
    options = QuantizeOptions(scheme=scheme, scales=scales.path if scales else None)
    graph = read_graph(bundle)
    layers = [layer for layer in linear_layers(graph) if not layer.is_head]
    edited, weights = fake_quantized(bundle, graph, layers, FakeQuantization(scheme=scheme, scales=scales))
    stand_in = EditedEngine(bundle, edited, weights=weights, threads=THREADS)
    plain, built = (
        OrtEngine(each, num_slots=1, threads=THREADS) for each in (bundle, workshop.bundle("small", quantize=options))
    )
    fake, real, whole = (
        engine.forward(Batch([list(range(20))], [1], [0]), with_logits=True).logits[0]
        for engine in (stand_in, built, plain)
    )
    assert np.median(np.abs(fake - real)) < STAND_IN_TOLERANCE * np.median(np.abs(whole - real))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "small", "weights": "link"}, "give a bundle that was built with weights='copy', or leave rotate out"),
        ({"name": "starcoder2"}, "a LayerNormalization reads the residual stream: leave rotate out"),
    ],
    ids=["linked", "not rotatable"],
)
def test_a_bundle_that_cannot_be_rotated_has_no_rotated_stand_in(workshop, prompts, monkeypatch, options, words):
    """Nothing is decoded first."""
    monkeypatch.setattr(StandIn, "_decode", lambda *_: pytest.fail("it was decoded"))
    how = FakeQuantization(scheme="int8-dynamic", rotate=True)
    with pytest.raises(CalibrationError, match=words):
        StandIn(workshop.bundle(**options), read_questions(prompts, limit=1), how)


def test_a_fit_on_a_real_bundle_measures_that_bundle(bundle, prompts):
    how = FakeQuantization(scheme="int8-dynamic")
    stand_in = StandIn(bundle, read_questions(prompts, limit=3), how, HeldOutOptions(max_new_tokens=8, threads=THREADS))
    chosen = fit(stand_in, lambda keep: bundle, lambda built: NOTHING, Budget(max_tpf_loss=0.03))
    assert chosen.kept == () and chosen.bundle is bundle


def test_scales_say_how_they_were_made(bundle, mixed):
    made = open_scales(mixed.path).provenance
    assert (made.bundle_fingerprint, made.mix, made.seed, made.num_prompts) == (bundle.fingerprint, 0.5, 0, 40)
    assert made.loop == "sliding" and made.block_size == bundle.manifest.block_size
