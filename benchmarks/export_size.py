"""Measure seconds, memory and bytes of exports by model size, with random Llamas. Each build runs in its own process.

    python benchmarks/export_size.py DIRECTORY [--sizes 246m 1.1b 7b] [--ways copy:fp32 link:bf16 ...] [--json OUT]
    python benchmarks/export_size.py DIRECTORY --load            # a session's seconds and memory, linked and copied
    python benchmarks/export_size.py DIRECTORY --peer-python GENAI/bin/python OPTIMUM/bin/python

Each peer (ONNX Runtime GenAI's builder, Optimum) has its own environment, made by ``benchmarks/peers/setup.sh``.
Checkpoints are written shard by shard, in bf16 (246m in float32 for --load), one at a time. They are removed afterwards
unless --keep is given. Peaks are sampled every 10 ms. Anonymous memory is what a build needs; resident memory also
counts pages of files, which the system may drop. ``copy`` is a plain copy of the weight files, to show the disk's
speed. Processor seconds are reported beside wall-clock seconds, because machines are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from export_cost import memory_of
from safetensors.torch import save_file

SIZES: dict[str, dict[str, int]] = {
    "246m": {"hidden_size": 1024, "intermediate_size": 2816, "layers": 16, "heads": 16, "kv_heads": 4},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "layers": 22, "heads": 32, "kv_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
}
VOCABULARY = 32000
WAYS = ("copy:fp32", "copy:fp16", "copy:bf16", "link:bf16")
TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "text_to_sql" / "checkpoint" / "tokenizer.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

LOAD = """
import json, sys, time
from cllm_export.runtime.load import load
from cllm_export.runtime.decoding.block_size.time_forwards import run_forward
def memory():
    lines = open("/proc/self/status").read().splitlines()
    kept = [line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon"))]
    return {name.rstrip(":"): int(value) / 1e3 for name, value, _ in kept}
before, started = memory(), time.perf_counter()
model = load(sys.argv[1], threads=1)
seconds = time.perf_counter() - started
loaded = memory()
model.generate([5, 9, 7], max_new_tokens=8, block_size=16, ignore_eos=True)
times = {}
for n in (1, 16):
    laps = []
    for _ in range(15):
        started = time.perf_counter()
        run_forward(model.engine, n, 128)
        laps.append(time.perf_counter() - started)
    times[f"forward_ms_n{n}"] = 1e3 * sorted(laps)[7]
after = memory()
print(json.dumps({"load_seconds": seconds, "anonymous_mb": after["RssAnon"] - before["RssAnon"],
    "resident_mb_after_load": loaded["VmRSS"], "resident_mb": after["VmRSS"],
    "peak_resident_mb": after["VmHWM"], **times}))
"""

PEERS = {
    "onnxruntime-genai": "-m onnxruntime_genai.models.builder -m {checkpoint} -o {output} -p fp32 -e cpu "
    "-c {output}-cache",
    "optimum": "-m optimum.commands.optimum_cli export onnx --task text-generation-with-past -m {checkpoint} {output}",
}


def tensors_of(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Llama, in groups that form a shard."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = width // shape["heads"] * shape["kv_heads"]
    yield "model.embed_tokens.weight", (VOCABULARY, width)
    for layer in range(shape["layers"]):
        base = f"model.layers.{layer}."
        for name, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            yield f"{base}self_attn.{name}_proj.weight", (rows, width)
        for name, matrix in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield f"{base}mlp.{name}_proj.weight", matrix
        for name in ("input", "post_attention"):
            yield f"{base}{name}_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (VOCABULARY, width)


def make_checkpoint(output: Path, size: str, dtype: torch.dtype, *, shard_bytes: int = 500_000_000) -> None:
    """Write a checkpoint of random weights. Only one shard is in memory at a time."""
    from transformers import LlamaConfig

    shape = SIZES[size]
    output.mkdir(parents=True)
    LlamaConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    ).save_pretrained(output)
    shutil.copyfile(TOKENIZER, output / "tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 22, generator=generator) * 0.02).to(dtype)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, output / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for index, (name, dims) in enumerate(tensors_of(shape)):
        count = int(torch.Size(dims).numel())
        values = noise.roll(7919 * index).repeat(-(-count // noise.numel()))[:count].view(dims)
        shard[name] = torch.ones(dims, dtype=dtype) if len(dims) == 1 else values.clone()
        if sum(tensor.nbytes for tensor in shard.values()) > shard_bytes:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class FailedError(Exception):
    """A measured command failed."""


def measured(command: list[str], stdout: int | IO[bytes] = subprocess.DEVNULL) -> dict[str, Any]:
    """Run a command. Return its seconds, processor seconds and memory peaks."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would block a long output
    process = subprocess.Popen(command, stdout=stdout, stderr=errors)
    resident = anonymous = 0
    while process.poll() is None:
        status = memory_of(process.pid)
        resident, anonymous = max(resident, status.get("VmHWM", 0)), max(anonymous, status.get("RssAnon", 0))
        time.sleep(0.01)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        errors.seek(0)
        raise FailedError(f"{' '.join(command[:4])} failed: {errors.read().decode(errors='replace')[-2000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "peak_anonymous_mb": anonymous / 1e3,
        "peak_resident_mb": resident / 1e3,
    }


def measure_build(checkpoint: Path, way: str, work: Path) -> dict[str, Any]:
    mode, precision = way.split(":")
    bundle, report = work / "bundle", work / "report.json"
    options = ["--weights", mode, "--precision", precision, "--json"]
    build = [sys.executable, "-m", "cllm_export", "build", str(checkpoint), "--output", str(bundle), *options]
    with report.open("wb") as file:
        wall = measured(build, stdout=file)
    result = {"process": wall, **json.loads(report.read_text(encoding="utf-8"))}
    shutil.rmtree(bundle)
    return result


def measure_copy(checkpoint: Path, work: Path) -> dict[str, float]:
    """Measure the disk's speed: copy the weight files and synchronise."""
    target = work / "copy"
    started = time.perf_counter()
    size = 0
    target.mkdir()
    for path in checkpoint.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
        size += path.stat().st_size
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return {"seconds": round(seconds, 2), "mb_per_second": round(size / 1e6 / seconds)}


def measure_peers(python: Path, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Measure every peer that the environment has. A failed export is also a result."""
    results: dict[str, Any] = {}
    for name, line in PEERS.items():
        module = line.split()[1]
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            continue
        output = work / name
        filled = [argument.format(checkpoint=checkpoint, output=output) for argument in line.split()]
        try:
            results[name] = measured([str(python), *filled])
        except FailedError as error:
            results[name] = {"failed": str(error)}
        for left in (output, Path(f"{output}-cache")):
            shutil.rmtree(left, ignore_errors=True)
    return results


def measure_load(work: Path) -> dict[str, Any]:
    """Measure sessions over one float32 checkpoint, with linked and with copied weights."""
    checkpoint = work / "checkpoint-fp32"
    make_checkpoint(checkpoint, "246m", torch.float32)
    results = {}
    for mode in ("link", "copy"):
        bundle = work / f"bundle-{mode}"
        build = [sys.executable, "-m", "cllm_export", "build", str(checkpoint), "--output", str(bundle)]
        subprocess.run([*build, "--weights", mode], check=True, stdout=subprocess.DEVNULL)
    for mode in ("link", "copy", "link", "copy"):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(work / f"bundle-{mode}")], check=True, capture_output=True, text=True
        )
        results.setdefault(mode, []).append(json.loads(done.stdout))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["246m"])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "link:fp32"], default=list(WAYS))
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--peer-python", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    work = args.directory / "export-size"
    work.mkdir(parents=True)
    try:
        for size in [] if args.load else args.sizes:
            checkpoint = work / f"checkpoint-{size}"
            make_checkpoint(checkpoint, size, DTYPES["bf16"])
            entry = results[size] = {"disk": measure_copy(checkpoint, work)}
            print(size, "disk", json.dumps(entry["disk"]), flush=True)
            for way in args.ways:
                entry[way] = measure_build(checkpoint, way, work)
                print(size, way, json.dumps(entry[way]), flush=True)
            for python in args.peer_python:
                entry["peers"] = {**entry.get("peers", {}), **measure_peers(python, checkpoint, work)}
            if args.peer_python:
                print(size, "peers", json.dumps(entry["peers"]), flush=True)
            if not args.keep:
                shutil.rmtree(checkpoint)
        if args.load:
            results["load"] = measure_load(work)
            print(json.dumps(results["load"], indent=2))
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
