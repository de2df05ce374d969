"""Make a Llama checkpoint with random weights, to measure export and latency.

python benchmarks/random_llama.py OUTPUT [--size 246m] [--vocabulary 32000] [--tokenizer TOKENIZER_JSON]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "2-layers": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "246m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}


def make_checkpoint(output: Path, size: str, dtype: torch.dtype, tokenizer: Path, vocabulary: int) -> int:
    """Write the checkpoint and return its number of parameters. Any tokenizer will do, since weights are random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"num_key_value_heads": 4, **SIZES[size]},
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        # If embeddings were as small as the other weights, the layers' outputs would drown out the token. 4-bit
        # rounding would then change so many greedy tokens that `build` considers the bundle broken.
        std = 1.0 if "embed" in name else 0.02
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(output)
    shutil.copyfile(tokenizer, output / "tokenizer.json")
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", choices=SIZES, default="246m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--vocabulary", type=int, default=32000)
    default = Path(__file__).resolve().parent.parent / "examples" / "text_to_sql" / "checkpoint" / "tokenizer.json"
    parser.add_argument("--tokenizer", type=Path, default=default)
    args = parser.parse_args()
    count = make_checkpoint(args.output, args.size, getattr(torch, args.dtype), args.tokenizer, args.vocabulary)
    print(f"{args.output}: {count / 1e6:.0f} M parameters, {args.dtype}")


if __name__ == "__main__":
    main()
