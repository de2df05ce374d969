"""Compare the token ids of prompts with what the tokenizer files of the checkpoint give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cllm_export.runtime.decode_all import first_difference
from cllm_export.runtime.decoding.text import Messages
from cllm_export.verification.report import Check

if TYPE_CHECKING:
    from cllm_export.exporter.parity.tokenization import ReferenceTokenizer


def compare_tokenizers(
    name: str,
    contents: Mapping[str, str | Messages],
    encoded: Mapping[str, list[int]],
    reference: ReferenceTokenizer,
) -> Check:
    """Check that a bundle encodes as the files of its checkpoint say.

    ``AutoTokenizer`` may build another tokenizer from the same ``tokenizer.json``. That fails no bundle, for the file
    is what the bundle and training here read, but the report says so.
    """
    different: list[dict[str, Any]] = []
    rebuilt: list[dict[str, Any]] = []
    for key, content in contents.items():
        if (expected := reference.encode(content)) != encoded[key]:
            different.append({"prompt": key, "bundle": encoded[key], "checkpoint": expected})
        elif other := reference.rebuilt(content):
            rebuilt.append({"prompt": key, "bundle": encoded[key], "by": other[0], "rebuilt": other[1]})
    detail = f"{len(contents) - len(different)} of {len(contents)} prompts give the token ids of {reference.side}"
    if different:
        first = different[0]
        at = first_difference(first["bundle"], first["checkpoint"]) or 0
        detail += (
            f"; prompt {first['prompt']} differs from token {at} on: the bundle gives {_around(first['bundle'], at)}, "
            f"{reference.side} {_around(first['checkpoint'], at)}, which is right: build the bundle again"
        )
    elif rebuilt:
        first = rebuilt[0]
        at = first_difference(first["bundle"], first["rebuilt"]) or 0
        detail += (
            f"; {first['by']} builds another tokenizer from that file: from token {at} of prompt {first['prompt']} on "
            f"the bundle and the file give {_around(first['bundle'], at)}, AutoTokenizer "
            f"{_around(first['rebuilt'], at)}. The bundle is right if the model was trained with the file, as tune and "
            "transformers 4 do. If it was trained with that AutoTokenizer, save its backend_tokenizer as tokenizer.json"
        )
    return Check(name=name, passed=not different, detail=detail, data={"different": different, "rebuilt": rebuilt})


def _around(ids: Sequence[int], position: int) -> str:
    """A few ids from a position on."""
    few = ", ".join(map(str, ids[position : position + 4]))
    return f"[{few}, ...]" if len(ids) > position + 4 else f"[{few}]"
