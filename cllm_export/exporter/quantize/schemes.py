"""The table of schemes. A new scheme needs its own file, an entry here, and a name and spec in
``bundle/quantization.py``."""

from __future__ import annotations

from cllm_export.bundle.quantization import SchemeName
from cllm_export.exporter.quantize.fp8 import FP8
from cllm_export.exporter.quantize.int4 import INT4
from cllm_export.exporter.quantize.int8 import INT8
from cllm_export.exporter.quantize.int8_dynamic import INT8_DYNAMIC
from cllm_export.exporter.quantize.scheme import Scheme

SCHEMES: dict[SchemeName, Scheme] = {scheme.name: scheme for scheme in (INT8_DYNAMIC, INT8, INT4, FP8)}
