"""Draw how one answer converges: a row for each forward, a column for each token, as an SVG file.

    python benchmarks/block_picture.py BUNDLE (--prompt TEXT | --prompts FILE --number 41) --output PICTURE.svg

The prompt is decoded with sliding Jacobi at a fixed n (``--block-size``), and autoregressively. If the two give
different tokens, nothing is drawn. Every cell comes from the records of the forwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from cllm_export import Model, load
from cllm_export.errors import CllmExportError, OptionError
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.statistics import ForwardRecord, stationary_positions

FONT_SIZE, LETTER = 13, 7.83
"""Font size and letter width, in pixels. A letter of a monospaced font is 0.602 of its size wide."""
ROW, CELL, GAP, PADDING = 38, 26, 4, 5
LEFT, TOP, MARGIN, GAIN = 96, 116, 20, 44
WIDTH = 960
"""Smallest width of the picture, which the legend needs."""

KNOWN, GUESSED, OWN, WAITS, WRONG, FILL = "known", "guessed", "own", "waits", "wrong", "fill"
LEGEND = (
    (GUESSED, "right guess, accepted"),
    (OWN, "the model's next token"),
    (WAITS, "right guess, not accepted yet"),
    (WRONG, "wrong"),
    (FILL, "no guess yet"),
)

STYLE = """
  text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; font-size: 13px; }
  .label, .legend { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif; }
  .cell { text-anchor: middle; }
  .gain { text-anchor: end; font-weight: 600; }
  .title { font-size: 15px; font-weight: 600; }
  .panel { fill: #ffffff; stroke: #d0d7de; }
  .label, .known { fill: #59636e; }
  .strong { fill: #1f2328; }
  rect.guessed { fill: #0072b2; } text.guessed { fill: #ffffff; }
  rect.own { fill: #ffffff; stroke: #0072b2; stroke-width: 2.5; } text.own { fill: #005685; font-weight: 700; }
  rect.waits { fill: #d6ecfa; stroke: #0072b2; stroke-dasharray: 3 2; } text.waits { fill: #1f2328; }
  rect.wrong { fill: #fbe3c4; } text.wrong { fill: #7a3e00; text-decoration: line-through; }
  rect.fill { fill: none; stroke: #d0d7de; } text.fill { fill: #818b98; }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #0d1117; stroke: #3d444d; }
    .label, .known { fill: #9198a1; }
    .strong { fill: #f0f6fc; }
    rect.guessed { fill: #1f8fd6; } text.guessed { fill: #ffffff; }
    rect.own { fill: #0d1117; stroke: #56b4e9; } text.own { fill: #8fd0f5; }
    rect.waits { fill: #12324a; stroke: #56b4e9; } text.waits { fill: #f0f6fc; }
    rect.wrong { fill: #4d3008; } text.wrong { fill: #f5b65c; }
    rect.fill { stroke: #3d444d; } text.fill { fill: #656c76; }
  }
"""


class Cell(NamedTuple):
    """One token of one row."""

    column: int
    text: str
    kind: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt")
    source.add_argument("--prompts", type=Path, help="JSON Lines; --number says which line")
    parser.add_argument("--number", type=int, default=1, help="the line of --prompts, from 1")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        prompt = args.prompt or _prompt_of(args.prompts, args.number)
        picture = draw(load(args.bundle), prompt, block_size=args.block_size)
    except CllmExportError as error:
        parser.error(str(error))
    args.output.write_text(picture, encoding="utf-8")


def _prompt_of(path: Path, number: int) -> str:
    prompts = read_prompts(path)
    if not 1 <= number <= len(prompts):
        raise OptionError(f"--number {number} is not a line of {path}, which has {len(prompts)}")
    content = prompts[number - 1].content
    if not isinstance(content, str):
        raise OptionError(f"line {number} of {path} holds messages; name a line with a `prompt`")
    return content


def draw(model: Model, prompt: str, *, block_size: int) -> str:
    """The picture of this prompt's answer.

    Raises:
        CllmExportError: the prompt or the block size is refused, or the two loops differ.
    """
    generation = model.generate(prompt, method="jacobi", block_size=block_size)
    reference = model.generate(prompt, method="autoregressive", block_size=block_size)
    if generation.token_ids != reference.token_ids:
        raise CllmExportError("Jacobi and autoregressive decoding differ for this prompt; run `cllm-export verify`")
    tokens = [_text(model, token) for token in generation.token_ids]
    rows = [list(cells) for cells in _rows(model, generation.forwards, tokens)]
    gains = [len(record.new) for record in generation.forwards]
    title = f"{len(tokens)} tokens in {len(gains)} forwards"
    note = f"autoregressive decoding takes {len(reference.forwards)} forwards for the same tokens; block size n = "
    return _svg(rows, gains, title=title, note=f"{note}{block_size}")


def _rows(model: Model, records: Sequence[ForwardRecord], tokens: Sequence[str]) -> Iterator[Iterator[Cell]]:
    """The cells of each forward, by column. Columns count new tokens from 0."""
    for index, record in enumerate(records):
        following = records[index + 1] if index + 1 < len(records) else None
        yield _row(model, record, following, tokens, records[0].write_index + 1)


def _row(
    model: Model, record: ForwardRecord, following: ForwardRecord | None, tokens: Sequence[str], first: int
) -> Iterator[Cell]:
    start = record.write_index + 1 - first
    waiting = {position - first for position in stationary_positions(record, following)} if following else set()
    for column in range(start):
        yield Cell(column, tokens[column], KNOWN)
    for column in range(start, min(len(tokens), start + max(len(record.block) - 1, len(record.new)))):
        row = column - start + 1
        if row < len(record.new):
            yield Cell(column, tokens[column], GUESSED)
        elif row == len(record.new):
            yield Cell(column, tokens[column], GUESSED if row < record.num_accepted else OWN)
        elif record.block[row] == model.facts.pad_token_id:
            yield Cell(column, "·", FILL)
        else:
            yield Cell(column, _text(model, record.block[row]), WAITS if column in waiting else WRONG)


def _text(model: Model, token: int) -> str:
    text = model.codec.tokenizer.decode([token], skip_special_tokens=False).replace("\n", "\\n")
    return text.strip() or "␣"


def _svg(rows: Sequence[Sequence[Cell]], gains: Sequence[int], *, title: str, note: str) -> str:
    lefts, right = _columns(rows)
    width, height = max(WIDTH, right + GAIN + MARGIN), TOP + ROW * len(rows) + MARGIN - (ROW - CELL) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="panel" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="8"/>',
        f'<text class="label title strong" x="{MARGIN}" y="34">{escape(title)}</text>',
        f'<text class="label" x="{MARGIN}" y="56">{escape(note)}</text>',
        *_legend(),
    ]
    for index, (cells, gain) in enumerate(zip(rows, gains, strict=True)):
        top = TOP + ROW * index
        parts.append(f'<text class="label" x="{MARGIN}" y="{top + 18}">forward {index + 1}</text>')
        for cell in cells:
            parts += _box(lefts[cell.column][0], top, lefts[cell.column][1], cell.text, cell.kind)
        parts.append(f'<text class="label gain strong" x="{width - MARGIN:.0f}" y="{top + 18}">+{gain}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _columns(rows: Sequence[Sequence[Cell]]) -> tuple[list[tuple[float, float]], float]:
    """Left edge and width of each column, and the right edge of the last. A column is as wide as its longest text."""
    count = 1 + max(cell.column for cells in rows for cell in cells)
    letters = [1] * count
    for cell in (cell for cells in rows for cell in cells):
        letters[cell.column] = max(letters[cell.column], len(cell.text))
    columns, left = [], float(LEFT)
    for letter_count in letters:
        columns.append((left, letter_count * LETTER + 2 * PADDING))
        left += columns[-1][1] + GAP
    return columns, left


def _legend() -> Iterator[str]:
    left = float(MARGIN)
    for kind, meaning in LEGEND:
        yield from _box(left, 74, 30, "·" if kind == FILL else "ab", kind)
        yield f'<text class="legend label" x="{left + 38:.0f}" y="92">{escape(meaning)}</text>'
        left += 38 + len(meaning) * 6.7 + 22


def _box(left: float, top: float, width: float, text: str, kind: str) -> Iterator[str]:
    if kind != KNOWN:
        inset = 1.25 if kind == OWN else 0.5
        yield (
            f'<rect class="{kind}" x="{left + inset:.2f}" y="{top + inset:.2f}" width="{width - 2 * inset:.2f}" '
            f'height="{CELL - 2 * inset:.2f}" rx="4"/>'
        )
    yield f'<text class="cell {kind}" x="{left + width / 2:.2f}" y="{top + 17.5}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
