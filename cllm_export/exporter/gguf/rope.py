"""The rotary positions of a model in a GGUF file, as ``rope_parameters`` of transformers."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_export.errors import UnsupportedError
from cllm_export.exporter.gguf.header import GgufFile
from cllm_export.exporter.gguf.values import read_tensor

FACTORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that say how rope is scaled, and that are no weights."""
PARTIAL = ("phi3", "stablelm")
_DEFAULT_BASE = 10_000.0
_HIGH_FACTORS, _LENGTHS = (4.0, 2.0, 8.0, 16.0, 32.0), tuple(2**power for power in (13, *range(4, 21)))
"""Candidates of llama3's high factor and original length; the usual ones come first."""


def rope_parameters(file: GgufFile) -> dict[str, Any]:
    """The ``rope_parameters`` of the config. For Gemma 3 they are by layer type.

    Raises:
        UnsupportedError: the file scales rope in a way that the family cannot express.
    """
    base = {"rope_theta": file.get("rope.freq_base", _DEFAULT_BASE)} | _partial(file)
    scaled = _scaled(file, base)
    if file.architecture != "gemma3":
        return scaled
    near = {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", _DEFAULT_BASE)}
    return {"full_attention": scaled, "sliding_attention": near}


def _partial(file: GgufFile) -> dict[str, float]:
    """The share of a head that is rotated."""
    head = file.get("attention.key_length", file.get("embedding_length") // file.get("attention.head_count"))
    rotated = file.get("rope.dimension_count", head)
    if rotated % 2 or (rotated > head and file.architecture in PARTIAL):
        raise _unknown(file, f"rotates {rotated} of {head} values of a head, and values are rotated in pairs")
    if file.architecture in PARTIAL:
        return {"partial_rotary_factor": rotated / head}
    if rotated != head and not (file.architecture == "llama" and file.get("attention.key_length") is None):
        raise UnsupportedError(
            f"{file.path} rotates {rotated} of {head} values of a head, and {file.architecture} rotates all; build the "
            "Hugging Face checkpoint of the model"
        )
    return {}


def _scaled(file: GgufFile, base: dict[str, Any]) -> dict[str, Any]:
    """The scaling, with llama.cpp's defaults: a missing type is linear, and a factor of 0 is none."""
    if LONG_FACTORS in file.tensors or SHORT_FACTORS in file.tensors:
        return _longrope(file, base)
    kind = file.get("rope.scaling.type", "linear")
    factor = file.get("rope.scaling.factor", file.get("rope.scale_linear", 0.0)) or 1.0
    if FACTORS in file.tensors:
        if kind != "none" and factor != 1.0:
            raise _unknown(file, f"scales rope twice, by {factor} and by a tensor {FACTORS!r}")
        return _llama3(file, base)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return base | _yarn(file, factor)
    raise _unknown(file, f"has rope scaling of type {kind!r}")


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    """YaRN. llama.cpp scales attention as transformers does, if the file does not say otherwise."""
    for name in ("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor", "attn_factor"):
        if file.get(f"rope.scaling.{name}") not in (None, 1.0 if name != "yarn_log_multiplier" else 0.0):
            raise _unknown(file, f"has yarn with {name}={file.get(f'rope.scaling.{name}')}")
    original = file.get("rope.scaling.original_context_length", file.get("context_length"))
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    fast, slow = file.get("rope.scaling.yarn_beta_fast"), file.get("rope.scaling.yarn_beta_slow")
    return found | {name: value for name, value in (("beta_fast", fast), ("beta_slow", slow)) if value is not None}


def _longrope(file: GgufFile, base: dict[str, Any]) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length")
    if original is None or {LONG_FACTORS, SHORT_FACTORS} - set(file.tensors) or file.architecture != "phi3":
        raise _unknown(file, "scales rope by length, and does not say all that this needs")
    if original <= 1:
        raise _unknown(file, f"scales rope by length from an original context of {original} tokens")
    factors = {
        "long_factor": read_tensor(file, file.tensors[LONG_FACTORS]).tolist(),
        "short_factor": read_tensor(file, file.tensors[SHORT_FACTORS]).tolist(),
    }
    found = base | {"rope_type": "longrope", "original_max_position_embeddings": original} | factors
    scale = file.get("context_length") / original
    own = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    stated = file.get("rope.scaling.attn_factor", own)
    return found if math.isclose(stated, own, rel_tol=1e-6) else found | {"attention_factor": stated}


def _llama3(file: GgufFile, base: dict[str, Any]) -> dict[str, Any]:
    """The parameters of llama3 whose factors are those in the file, since the file has the factors alone."""
    factors = read_tensor(file, file.tensors[FACTORS]).astype(np.float64).reshape(-1)
    if np.all(factors == 1.0):
        return base | {"rope_type": "default"}
    lengths = dict.fromkeys((*_LENGTHS, file.get("rope.scaling.original_context_length", 2**13)))
    for high, length in product(_HIGH_FACTORS, lengths):
        found = {"factor": float(factors.max()), "high_freq_factor": high, "original_max_position_embeddings": length}
        if np.allclose(llama3_factors(base["rope_theta"], 2 * len(factors), **found), factors, rtol=1e-5, atol=0):
            return base | {"rope_type": "llama3", "low_freq_factor": 1.0} | found
    raise _unknown(file, f"has a tensor {FACTORS!r} that no llama3 scaling gives")


def llama3_factors(
    base: float, size: int, *, factor: float, high_freq_factor: float, original_max_position_embeddings: int
) -> npt.NDArray[np.float64]:
    """What llama3 divides each frequency by, with a low factor of 1. Shape (size / 2,)."""
    lengths = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    smooth = (original_max_position_embeddings / lengths - 1.0) / (high_freq_factor - 1.0)
    between: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    is_long, is_short = smooth < 0, smooth > 1
    return np.where(is_long, factor, np.where(is_short, 1.0, between))


def _unknown(file: GgufFile, what: str) -> UnsupportedError:
    return UnsupportedError(f"{file.path} {what}, which cannot be imported; build the Hugging Face checkpoint instead")
