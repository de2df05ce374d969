"""Times llama.cpp on the same checkpoint as ``genai.py``: greedy autoregressive decoding of a file of prompts.

Run with the Python of the environment that ``setup.sh DIR llama_cpp`` makes. The checkpoint is written to a temporary
GGUF file first (``llama_gguf.py`` says which can be). No tokenizer goes into it: the prompts come as token ids, and eos
is compared here with the checkpoint's.

The loop is llama.cpp's own low-level interface, with its defaults (a 16-bit KV cache among them). What is counted, and
the report, are those of ``genai.py``.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import time
from pathlib import Path

from genai import Decoded, compare, make_parser, read_prompts
from llama_context import LlamaContext
from llama_gguf import TYPES, write_gguf


class LlamaCpp:
    """llama.cpp through its Python binding's C functions, one context whose KV cache is cleared for every prompt."""

    def __init__(self, model: Path, *, type_name: str, eos: int, context_length: int, threads: int) -> None:
        self._llama = LlamaContext(model, context_length=context_length, threads=threads)
        self.tool = f"llama.cpp {type_name}"
        self.version = self._llama.version
        self._eos = eos
        lib = self._llama.lib
        # A chain keeps its buffer of candidates; a lone sampler would allocate one for every token.
        self._sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self._sampler, lib.llama_sampler_init_greedy())

    def decode(self, prompt_ids: list[int], max_new_tokens: int) -> Decoded:
        lib, context, sampler, eos = self._llama.lib, self._llama.context, self._sampler, self._eos
        start = time.perf_counter()
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        prompt, one = (ctypes.c_int32 * len(prompt_ids))(*prompt_ids), (ctypes.c_int32 * 1)()
        prompt_batch = lib.llama_batch_get_one(prompt, len(prompt_ids))
        batch = lib.llama_batch_get_one(one, 1)
        ready = time.perf_counter()
        self._llama.forward(prompt_batch)
        lib.llama_synchronize(context)
        prefilled = time.perf_counter()
        token_ids: list[int] = []
        while (token := lib.llama_sampler_sample(sampler, context, -1)) != eos:
            token_ids.append(token)
            if len(token_ids) == max_new_tokens:
                break
            one[0] = token
            self._llama.forward(batch)
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


def main() -> None:
    parser = make_parser("Time llama.cpp: greedy autoregressive decoding.")
    parser.add_argument("--type", choices=sorted(TYPES), default="F32", help="type of the weights (F32)")
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    longest = max(map(len, read_prompts(args)))
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / f"{args.type}.gguf"
        write_gguf(args.checkpoint, args.type, model)
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
