"""Run a script as on an x86 processor with fewer instruction sets: ONNX Runtime then chooses the kernels of that one.

python benchmarks/older_processor.py avx2 benchmarks/exact_sizes.py BUNDLE --threads 1

ONNX Runtime asks the processor itself, by the instruction ``cpuid``, and has no switch for it. So a copy of its library
gets an undefined instruction in place of each. A handler of the signal answers for ``cpuid``, without the bits of what
the older processor lacks. All else runs as it does. Needs gcc, objdump and Linux.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

LEVELS = {"sse": 0, "avx": 1, "avx2": 2, "avx2-vnni": 3, "avx512": 4}
"""What the processor has at most. ``avx512`` is without VNNI; ``avx2-vnni`` has the form of VNNI without AVX-512."""
CPUID, UNDEFINED = b"\x0f\xa2", b"\x0f\x0b"
HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>
static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  unsigned char *at = (unsigned char *)registers[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0x0b) { signal(SIGILL, SIG_DFL); return; }
  unsigned leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d;
  __cpuid_count(leaf, sub, a, b, c, d);
  if (leaf == 7 && sub == 0) {
    c &= ~(1u << 11);                                   /* avx512_vnni */
    d &= ~(1u << 22 | 1u << 24 | 1u << 25);             /* amx */
    if (LEVEL <= 3) {                                   /* avx512 */
      b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 28 | 1u << 30 | 1u << 31);
      c &= ~(1u << 1 | 1u << 6 | 1u << 12 | 1u << 14);
      d &= ~(1u << 8 | 1u << 23);
    }
    if (LEVEL <= 1) b &= ~(1u << 5);                    /* avx2 */
  }
  if (leaf == 7 && sub == 1) {
    a &= ~(1u << 5);                                    /* avx512_bf16 */
    if (LEVEL != 3) a &= ~(1u << 4);                    /* avx_vnni */
    d = 0;
  }
  if (leaf == 1) {
    if (LEVEL <= 1) c &= ~(1u << 12 | 1u << 29);        /* fma, f16c */
    if (LEVEL <= 0) c &= ~(1u << 27 | 1u << 28);        /* avx */
  }
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}
__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, 0);
}
"""


def main() -> None:
    level, *command = sys.argv[1:] or [""]
    if level not in LEVELS or not command:
        raise SystemExit(f"give one of {', '.join(LEVELS)}, then a script with its arguments")
    with tempfile.TemporaryDirectory() as scratch:
        copy_library(Path(scratch))
        source, handler = Path(scratch) / "handler.c", Path(scratch) / "handler.so"
        source.write_text(HANDLER, encoding="ascii")
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", f"-DLEVEL={LEVELS[level]}", str(source), "-o", str(handler)], check=True
        )
        paths = os.pathsep.join([scratch, str(Path.cwd())])
        environment = os.environ | {"LD_PRELOAD": str(handler), "PYTHONPATH": paths}
        raise SystemExit(subprocess.run([sys.executable, *command], env=environment, check=False).returncode)


def copy_library(directory: Path) -> None:
    """Copy the package ``onnxruntime`` into a directory, with an undefined instruction for each ``cpuid``."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("onnxruntime is not installed")
    package = Path(shutil.copytree(Path(spec.origin).parent, directory / "onnxruntime"))
    [library] = package.glob("capi/onnxruntime_pybind11_state*.so")
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, check=True).stdout
    loads = subprocess.run(["readelf", "-lW", str(library)], capture_output=True, check=True).stdout.decode()
    segments = [tuple(int(word, 16) for word in line.split()[1:5]) for line in loads.splitlines() if "LOAD" in line]
    content = bytearray(library.read_bytes())
    for found in re.finditer(rb"^ *([0-9a-f]+):\tcpuid", code, re.MULTILINE):
        address = int(found[1], 16)
        place = next(offset + address - start for offset, start, _, size in segments if start <= address < start + size)
        assert content[place : place + 2] == CPUID
        content[place : place + 2] = UNDEFINED
    library.write_bytes(content)


if __name__ == "__main__":
    main()
