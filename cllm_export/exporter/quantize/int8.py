"""int8: 8-bit integers. Each activation has one scale from a calibration; channel outliers move into the weight."""

from __future__ import annotations

import numpy as np

from cllm_export.exporter.graph.rounding import INT8_MAX, ChannelRounding
from cllm_export.exporter.quantize.static_layers import Format, StaticScheme

INT8 = StaticScheme(
    name="int8",
    min_agreement=0.5,
    format=Format(largest=INT8_MAX, zero=np.int8(0), rounding=ChannelRounding(), smooth=True),
)
