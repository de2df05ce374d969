"""fp8: 8-bit floats (E4M3). Each activation has one scale from a calibration."""

from __future__ import annotations

import onnx_ir as ir

from cllm_export.exporter.graph.rounding import Float8Rounding
from cllm_export.exporter.quantize.static_layers import Format, StaticScheme

FLOAT8_MAX = 448.0
"""The largest number of E4M3."""

FP8 = StaticScheme(
    name="fp8",
    min_agreement=0.5,
    format=Format(
        largest=FLOAT8_MAX,
        zero=ir.DataType.FLOAT8E4M3FN.numpy().type(0),
        rounding=Float8Rounding(largest=FLOAT8_MAX),
        smooth=False,
    ),
)
