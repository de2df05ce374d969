"""Times ONNX Runtime GenAI on a model made by its own builder: greedy autoregressive decoding of a file of prompts.

Run with the Python of the environment that ``setup.sh`` makes. It is not part of the package and imports nothing of it.
``llama_cpp.py`` beside it takes the loop, the options and the report from here, so that both peers are timed alike.

What is counted, for every peer:

* new tokens: those before eos; the eos itself is not counted, though the forward that gave it is timed.
* prefill: one forward over the whole prompt. It also gives the first new token, which so costs the decode no forward.
  The project's own measures leave the prompt's last token to the decode, one forward more per prompt: to compare on
  that footing, take ``decode_tokens_per_second_last_prompt_token_in_decode``, computed by charging each prompt one more
  mean decode forward.
* not timed: tokenizing, detokenizing, loading, and making the generator and its KV cache (given as ``setup``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer

if TYPE_CHECKING:
    import onnxruntime_genai as og

WARM_UP_PROMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One prompt, decoded: its new tokens without eos, the decode forwards behind them, and where the time went."""

    token_ids: list[int]
    num_forwards: int
    stopped_at_eos: bool
    setup_seconds: float
    prefill_seconds: float
    decode_seconds: float


class Peer(Protocol):
    """A tool to compare with, loaded and ready."""

    tool: str
    version: str

    def decode(self, prompt_ids: list[int], max_new_tokens: int) -> Decoded:
        """Decodes one prompt greedily from an empty KV cache."""
        ...


class GenAI:
    """ONNX Runtime GenAI, with the number of threads overlaid on the model's configuration and all else as built."""

    tool = "onnxruntime-genai"

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime_genai as og  # here, because llama_cpp.py imports this file and needs no GenAI

        self.version: str = og.__version__
        self._og = og
        config = og.Config(str(model))
        # An overlay lives in memory: the built genai_config.json stays as the builder wrote it.
        session_options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._model = og.Model(config)

    def decode(self, prompt_ids: list[int], max_new_tokens: int) -> Decoded:
        start = time.perf_counter()
        generator = self.make_generator(len(prompt_ids) + max_new_tokens)
        ready = time.perf_counter()
        generator.append_tokens(prompt_ids)
        prefilled = time.perf_counter()
        num_generated = 0
        # is_done() knows eos and the length limit: no token is read here. At eos there is one call more than tokens.
        while not generator.is_done():
            generator.generate_next_token()
            num_generated += 1
        done = time.perf_counter()
        # GenAI leaves the eos out of the sequence.
        token_ids = [int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]]
        return Decoded(
            token_ids=token_ids,
            num_forwards=num_generated - 1,
            stopped_at_eos=num_generated > len(token_ids),
            setup_seconds=ready - start,
            prefill_seconds=prefilled - ready,
            decode_seconds=done - prefilled,
        )

    def make_generator(self, max_length: int) -> og.Generator:
        """An empty sequence for so many tokens, its KV cache among them."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=max_length)
        return self._og.Generator(self._model, params)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that every peer has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face directory with the tokenizer.json")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines with a field `prompt`")
    parser.add_argument("--limit", type=positive, default=60, help="how many prompts, from the first (60)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length limit of a decode (128)")
    parser.add_argument("--threads", type=positive, default=1, help="threads inside one forward (1)")
    parser.add_argument("--repeats", type=positive, default=3, help="timed passes over the prompts (3)")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    return parser


def read_prompts(args: argparse.Namespace) -> list[list[int]]:
    """The first prompts as token ids, without bos: the same ones for every peer, whatever its own tokenizer."""
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.limit]
    if not lines:
        raise SystemExit(f"{args.prompts} holds no prompts")
    return [tokenizer.encode(json.loads(line)["prompt"], add_special_tokens=False).ids for line in lines]


def decode_all(peer: Peer, prompts: list[list[int]], args: argparse.Namespace) -> list[list[Decoded]]:
    """One list of decoded prompts per repeat, after a warm-up."""
    for prompt_ids in prompts[:WARM_UP_PROMPTS]:
        peer.decode(prompt_ids, args.max_new_tokens)
    repeats = [[peer.decode(ids, args.max_new_tokens) for ids in prompts] for _ in range(args.repeats)]
    tokens = [[decoded.token_ids for decoded in repeat] for repeat in repeats]
    if any(other != tokens[0] for other in tokens[1:]):
        raise SystemExit(f"{peer.tool} gave other tokens in a later repeat: greedy decoding should not")
    return repeats


def summarize(peer: Peer, repeats: list[list[Decoded]], args: argparse.Namespace) -> dict[str, Any]:
    """The report: every rate is the median over the repeats."""
    first = repeats[0]
    num_prompts, num_forwards = len(first), sum(decoded.num_forwards for decoded in first)
    new_tokens = sum(len(decoded.token_ids) for decoded in first)
    if num_forwards == 0:
        raise SystemExit("no decode forward to time: every prompt stopped at its first token; raise --max-new-tokens")

    def seconds(repeat: list[Decoded], *names: str) -> float:
        return float(sum(getattr(decoded, f"{name}_seconds") for decoded in repeat for name in names))

    def median(value: Callable[[list[Decoded]], float]) -> float:
        return statistics.median(value(repeat) for repeat in repeats)

    return {
        "tool": peer.tool,
        "version": peer.version,
        "threads": args.threads,
        "max_new_tokens": args.max_new_tokens,
        "prompts": num_prompts,
        "prompts_stopped_at_eos": sum(decoded.stopped_at_eos for decoded in first),
        "new_tokens": new_tokens,
        "decode_forwards": num_forwards,
        "decode_tokens_per_second": median(lambda repeat: new_tokens / seconds(repeat, "decode")),
        "decode_tokens_per_second_last_prompt_token_in_decode": median(
            lambda repeat: new_tokens / (seconds(repeat, "decode") * (1 + num_prompts / num_forwards))
        ),
        "tokens_per_second_with_prefill": median(lambda repeat: new_tokens / seconds(repeat, "prefill", "decode")),
        "decode_tokens_per_second_of_each_repeat": [new_tokens / seconds(repeat, "decode") for repeat in repeats],
        "milliseconds_per_decode_forward": median(lambda repeat: 1e3 * seconds(repeat, "decode") / num_forwards),
        "milliseconds_prefill_per_prompt": median(lambda repeat: 1e3 * seconds(repeat, "prefill") / num_prompts),
        "milliseconds_setup_per_prompt": median(lambda repeat: 1e3 * seconds(repeat, "setup") / num_prompts),
        "token_ids": [decoded.token_ids for decoded in first],
    }


def one_line(report: dict[str, Any]) -> str:
    return (
        f"{report['tool']} {report['version']}, {report['threads']} thread(s), {report['prompts']} prompts: "
        f"decode {report['decode_tokens_per_second']:,.0f} tokens/s, "
        f"{report['tokens_per_second_with_prefill']:,.0f} with prefill, "
        f"{report['new_tokens'] / report['prompts']:.1f} new tokens a prompt, "
        f"{report['prompts_stopped_at_eos']} stopped at eos"
    )


def compare(peer: Peer, args: argparse.Namespace) -> None:
    """Decodes, prints one line and writes the report."""
    report = summarize(peer, decode_all(peer, read_prompts(args), args), args)
    args.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(one_line(report))


def main() -> None:
    parser = make_parser("Time ONNX Runtime GenAI: greedy autoregressive decoding.")
    parser.add_argument("--model", type=Path, required=True, help="directory made by onnxruntime_genai.models.builder")
    args = parser.parse_args()
    compare(GenAI(args.model, args.threads), args)


if __name__ == "__main__":
    main()
