"""Measure what quantising each layer alone costs: flips on block states, and tokens per forward."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cllm_export.bundle.manifest import Bundle
from cllm_export.calibration.edited_engine import EditedEngine, read_graph, require_unquantised
from cllm_export.calibration.linear_inputs import LinearLayer, linear_layers
from cllm_export.calibration.search.fake_quantization import FakeQuantization, fake_quantized
from cllm_export.calibration.search.flips import Flips, count_flips, predict
from cllm_export.calibration.search.forced_texts import ForcedTexts
from cllm_export.calibration.search.measured import (
    HeldOutOptions,
    Losses,
    Measured,
    losses_between,
    measure_decode,
    tpf_loss,
)
from cllm_export.evaluation.tasks.questions import Question
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.general_text import general_passages
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import pad_token


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The cost of quantising only one layer."""

    layer: LinearLayer
    flips: Flips
    tpf_loss: float
    """Lost share of the tokens per forward. For one layer it is mostly noise; the sum over layers is not."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "layer": self.layer.name,
            "tensors": list(self.layer.tensors),
            "values": self.layer.shape[0] * self.layer.shape[1],
            "tpf_loss": round(self.tpf_loss, 6),
            "flips": self.flips.to_dict(),
        }


class StandIn:
    """An unquantised bundle on held-out prompts, and the losses if layers are rounded in its graph.

    Raises:
        CalibrationError: the bundle is quantised, not fp32, or cannot be rotated.
    """

    def __init__(
        self,
        bundle: Bundle,
        questions: Sequence[Question],
        how: FakeQuantization,
        options: HeldOutOptions | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._bundle, self._questions, self._how = bundle, questions, how
        self._options = options or HeldOutOptions()
        self._progress = progress or (lambda *_: None)
        self._pad = pad_token(bundle.manifest)
        require_unquantised(bundle)
        self._graph = read_graph(bundle)
        self._codec = TextCodec.of_bundle(bundle)
        self.layers = [layer for layer in linear_layers(self._graph) if not layer.is_head]
        """The layers that can be quantised: every linear layer except the head."""
        fake_quantized(bundle, self._graph, (), how)  # it refuses what cannot be done, before anything is decoded
        model = load(bundle.path, threads=self._options.threads, prefix_cache_bytes=0)
        self._settings = self._options.settings(model)
        self.before: Measured = self._decode(model)
        self._texts = ForcedTexts(
            self._codec,
            general_passages(self._options.text),
            self.before.recordings,
            max_length=bundle.manifest.max_length,
        )
        self._readings = self._texts.read(model.engine, self._pad, self._progress)
        self._predictions = predict(model.engine, self.before.recordings, self._pad)

    def rank(self) -> list[LayerSensitivity]:
        """Quantise each layer on its own. The layer with the most flips comes first."""
        found = []
        for index, layer in enumerate(self.layers):
            found.append(self._measure(layer))
            self._progress("layers", index + 1, len(self.layers))
        return sorted(found, key=lambda entry: (-entry.flips.all.rate, entry.layer.name))

    def losses(self, keep: Collection[str]) -> Losses:
        """The losses if all layers except those with these names are quantised."""
        return self.losses_of(self._model(layer for layer in self.layers if layer.name not in keep))

    def losses_of(self, model: Model) -> Losses:
        """The losses of a model against the unquantised bundle, on the same prompts with the same settings."""
        readings = self._texts.read(model.engine, self._pad, self._progress)
        return losses_between(self.before, self._decode(model), self._readings, readings)

    def _measure(self, layer: LinearLayer) -> LayerSensitivity:
        model = self._model([layer])
        after = predict(model.engine, self.before.recordings, self._pad)
        flips = count_flips(self.before.recordings, self._predictions, after)
        return LayerSensitivity(layer=layer, flips=flips, tpf_loss=tpf_loss(self.before, self._decode(model)))

    def _decode(self, model: Model) -> Measured:
        return measure_decode(model, self._questions, self._settings, self._progress, "decoding")

    def _model(self, layers: Iterable[LinearLayer]) -> Model:
        graph, weights = fake_quantized(self._bundle, self._graph, layers, self._how)
        engine = EditedEngine(self._bundle, graph, weights=weights, threads=self._options.threads)
        return Model(self._bundle.manifest, engine, self._codec)
