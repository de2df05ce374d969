"""Times llama.cpp on the same checkpoint as ``genai.py``: greedy autoregressive decoding of a file of prompts.

Run with the Python of the environment that ``setup.sh DIR llama_cpp`` makes. The checkpoint is written to a temporary
GGUF file first. Only what the demo is can be written: a Llama with tied embeddings, no biases and plain rope. No
tokenizer goes into the file: the prompts come as token ids, and eos is compared here with the checkpoint's.

The loop is llama.cpp's own low-level interface, with its defaults (a 16-bit KV cache among them). What is counted, and
the report, are those of ``genai.py``.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
from genai import Decoded, compare, make_parser, read_prompts
from safetensors.numpy import load_file

TYPES = {"F32": gguf.GGMLQuantizationType.F32, "Q8_0": gguf.GGMLQuantizationType.Q8_0}


class LlamaCpp:
    """llama.cpp through its Python binding's C functions, one context whose KV cache is cleared for every prompt."""

    def __init__(self, model: Path, *, type_name: str, eos: int, context_length: int, threads: int) -> None:
        self._lib = lib = import_binding()
        self.tool = f"llama.cpp {type_name}"
        self.version: str = lib.__version__ + " (llama-cpp-python)"
        self._eos = eos
        # An unkept callback would be collected while the library still calls it.
        self._silence = lib.llama_log_callback(lambda _level, _text, _data: None)
        lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context_length, threads, threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {context_length} positions for {model}")
        # A chain keeps its buffer of candidates; a lone sampler would allocate one for every token.
        self._sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self._sampler, lib.llama_sampler_init_greedy())

    def decode(self, prompt_ids: list[int], max_new_tokens: int) -> Decoded:
        lib, context, sampler, eos = self._lib, self._context, self._sampler, self._eos
        start = time.perf_counter()
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        prompt, one = (ctypes.c_int32 * len(prompt_ids))(*prompt_ids), (ctypes.c_int32 * 1)()
        prompt_batch = lib.llama_batch_get_one(prompt, len(prompt_ids))
        batch = lib.llama_batch_get_one(one, 1)
        ready = time.perf_counter()
        self._forward(prompt_batch)
        lib.llama_synchronize(context)
        prefilled = time.perf_counter()
        token_ids: list[int] = []
        while (token := lib.llama_sampler_sample(sampler, context, -1)) != eos:
            token_ids.append(token)
            if len(token_ids) == max_new_tokens:
                break
            one[0] = token
            self._forward(batch)
        done = time.perf_counter()
        stopped_at_eos = token == eos
        return Decoded(
            token_ids=token_ids,
            num_forwards=len(token_ids) if stopped_at_eos else len(token_ids) - 1,
            stopped_at_eos=stopped_at_eos,
            setup_seconds=ready - start,
            prefill_seconds=prefilled - ready,
            decode_seconds=done - prefilled,
        )

    def _forward(self, batch: Any) -> None:
        if status := self._lib.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode returned {status}, expected 0")


def import_binding() -> ModuleType:
    """The installed ``llama_cpp``, not this file, which has its name and stands in the first directory of the path."""
    here = Path(__file__).resolve().parent
    saved = sys.path
    try:
        sys.path = [entry for entry in saved if Path(entry).resolve() != here]
        return importlib.import_module("llama_cpp")
    finally:
        sys.path = saved


def write_gguf(checkpoint: Path, config: dict[str, Any], type_name: str, target: Path) -> None:
    """Writes the checkpoint as llama.cpp's converter would: norms in fp32, every matrix in the type asked for."""
    require_supported(config)
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads_of = {"q_proj": num_heads, "k_proj": num_kv_heads}
    for name, stored in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        num_rotated_heads = heads_of.get(module.rpartition(".")[2])
        weight = stored.astype(np.float32)
        if num_rotated_heads:
            weight = interleave_rope_halves(weight, num_rotated_heads)
        tensor_type = TYPES[type_name] if weight.ndim == 2 else TYPES["F32"]
        target_name = names.get_name(module)
        if target_name is None:
            raise SystemExit(f"{name}: no tensor of this name in a GGUF Llama")
        writer.add_tensor(f"{target_name}.weight", gguf.quantize(weight, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def require_supported(config: dict[str, Any]) -> None:
    """Anything else would be written wrong, not refused, and then timed."""
    expected = {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
    found = {name: config.get(name) for name in expected}
    found["rope_type"] = config.get("rope_parameters", {}).get("rope_type")
    expected["rope_type"] = "default"
    if found != expected:
        raise SystemExit(f"cannot write this checkpoint as GGUF: expected {expected}, got {found}")


def interleave_rope_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face the two halves of it."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def main() -> None:
    parser = make_parser("Time llama.cpp: greedy autoregressive decoding.")
    parser.add_argument("--type", choices=sorted(TYPES), default="F32", help="type of the weights (F32)")
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    longest = max(map(len, read_prompts(args)))
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / f"{args.type}.gguf"
        write_gguf(args.checkpoint, config, args.type, model)
        peer = LlamaCpp(
            model,
            type_name=args.type,
            eos=config["eos_token_id"],
            context_length=longest + args.max_new_tokens,
            threads=args.threads,
        )
        compare(peer, args)


if __name__ == "__main__":
    main()
