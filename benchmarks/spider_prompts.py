"""Convert Spider's train.json or dev.json to a prompt file for `tune` and `evaluate --task prompts`:

    python benchmarks/spider_prompts.py spider/train.json --output spider-train.jsonl

By default, `tables.json` is read from the directory of the data. dev.json is for measuring only: never train on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cllm_export.evaluation.tasks.spider_prompt import read_spider, spider_prompt_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tables", type=Path, help="tables.json, if not beside the data")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    lines = list(spider_prompt_lines(read_spider(arguments.data, tables=arguments.tables, limit=arguments.limit)))
    arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"wrote {len(lines)} prompts to {arguments.output}")


if __name__ == "__main__":
    main()
