"""A Llama checkpoint as a GGUF file, in the type asked for: what llama.cpp reads.

    LLAMA_ENV/bin/python benchmarks/peers/llama_gguf.py CHECKPOINT OUTPUT.gguf --type Q8_0

Norms are in fp32 and every matrix is in the type asked for, embedding and head included. llama.cpp's own tool keeps the
head of a Q4_0 file at 6 bits: this file is the smaller and faster one. Only a Llama without biases and with plain
rope can be written, its head tied to the embedding or not. No tokenizer goes into the file: prompts come as token ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def write_gguf(checkpoint: Path, type_name: str, target: Path) -> None:
    """Writes the checkpoint: norms in fp32, every matrix in the type asked for."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(checkpoint / "model.safetensors")
    require_supported(config, has_head="lm_head.weight" in tensors)
    writer = gguf.GGUFWriter(str(target), "llama")
    describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads_of = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, stored in tensors.items():
        module = name.removesuffix(".weight")
        num_rotated_heads = heads_of.get(module.rpartition(".")[2])
        weight = interleave_rope_halves(stored, num_rotated_heads) if num_rotated_heads else stored
        tensor_type = TYPES[type_name] if weight.ndim == 2 else TYPES["F32"]
        target_name = names.get_name(module)
        if target_name is None:
            raise SystemExit(f"{name}: no tensor of this name in a GGUF Llama")
        writer.add_tensor(f"{target_name}.weight", gguf.quantize(weight, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp must know of the model besides its tensors."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file in fp32. Its own library's numpy has no bf16."""
    content = np.memmap(path, np.uint8, "r")
    start = 8 + int(content[:8].view("<u8")[0])
    tensors = {}
    for name, entry in json.loads(content[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        data = np.array(content[start + first : start + last])
        match entry["dtype"]:
            case "BF16":  # the upper half of fp32
                values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
            case "F32" | "F16" as dtype:
                values = data.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
            case other:
                raise SystemExit(f"{path}: {name} is {other}, expected F32, F16 or BF16")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def require_supported(config: dict[str, Any], *, has_head: bool) -> None:
    """Anything else would be written wrong, not refused, and then timed."""
    expected = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    found = {name: config.get(name) for name in expected}
    found["rope_type"] = config.get("rope_parameters", {}).get("rope_type")
    expected["rope_type"] = "default"
    # A file without a head of its own is read as one whose head is the embedding.
    found["tie_word_embeddings"] = config.get("tie_word_embeddings")
    expected["tie_word_embeddings"] = not has_head
    if found != expected:
        raise SystemExit(f"cannot write this checkpoint as GGUF: expected {expected}, got {found}")


def interleave_rope_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face the two halves of it."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=sorted(TYPES), default="F32", help="type of the matrices (F32)")
    args = parser.parse_args()
    write_gguf(args.checkpoint, args.type, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.0f} MB, {args.type}")


if __name__ == "__main__":
    main()
