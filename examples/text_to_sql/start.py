"""Write the checkpoint that training starts from: a byte-level BPE tokenizer and a Llama with random weights.

    python examples/text_to_sql/start.py --data DIR/train.jsonl --output DIR/start

Weights are stored in bf16, so that 5.7 M parameters stay under 12 MB; the engine runs them in fp32,
23 MB that do not fit the cache of most CPU cores: as in a large model, reading weights is what a forward costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
VOCAB_SIZE = 1024


def train_tokenizer(path: Path, limit: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits one by one, so that numbers are copied digit by digit. Adds no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for _, line in zip(range(limit), file, strict=False)]
    tokenizer.train_from_iterator((line["prompt"] + line["answer"] for line in lines), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106 - a token of a vocabulary
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Random weights; the projections that write into the residual stream start smaller, as in GPT-2."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=672,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_model(options.seed).to(torch.bfloat16).save_pretrained(options.output)
    train_tokenizer(options.data).save_pretrained(options.output)


if __name__ == "__main__":
    main()
