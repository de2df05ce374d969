"""Which block sizes give the rows of n = 1 bit for bit, by bundle and threads.

python benchmarks/exact_sizes.py BUNDLE... [--threads 1 --threads 2]

``benchmarks/older_processor.py`` runs it as on a processor with fewer instruction sets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cllm_export.bundle.manifest import open_bundle
from cllm_export.runtime.decoding.block_size.exact_sizes import compare_sizes
from cllm_export.runtime.engines.onnxruntime import OrtEngine

SIZES = (2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, action="append")
    args = parser.parse_args()
    for path in args.bundles:
        for threads in args.threads or [1]:
            engine = OrtEngine(open_bundle(path), num_slots=1, threads=threads)
            sizes = [size for size in SIZES if size <= engine.max_block_size]
            found = compare_sizes(engine, sizes).to_dict()
            print(f"{path.name}, threads {threads}: equal {found['equal']}, different {found['different']}", flush=True)
            engine.close()


if __name__ == "__main__":
    main()
