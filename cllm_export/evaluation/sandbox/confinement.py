"""Script of the child process: gives up every right that a pure computation does not need, then runs a program.

It reads its settings and the program from standard input, which is then closed. It can import only the standard
library, and nothing of this package: see ``sandbox.py``. The constants are from the Linux headers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION_FLAG, LANDLOCK_PATH_BENEATH = 1, 1
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
WRITES_BY_VERSION = {1: 0x1FFF & ~0b1101, 2: 0x3FFF & ~0b1101, 3: 0x7FFF & ~0b1101}
"""Landlock version -> all its file rights except execute, read file and read directory."""
CAPABILITY_VERSION = 0x20080522
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refused with EPERM
X32_BIT = 0x40000000
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> its number in a seccomp filter. Each tuple below holds one call number per machine, in this order. It is
None where the machine has no such call."""
FORBIDDEN_CALLS: dict[str, tuple[tuple[int | None, int | None], ...]] = {
    "processes: clone, fork, vfork, clone3": ((56, 220), (57, None), (58, None), (435, 435)),
    "signals: kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal": (
        ((62, 129), (200, 130), (234, 131), (129, 138), (297, 240), (424, 424))
    ),
    "other processes: ptrace, process_vm_readv and writev, kcmp, pidfd_getfd, process_mrelease, prlimit64": (
        ((101, 117), (310, 270), (311, 271), (312, 272), (438, 438), (448, 448), (302, 261))
    ),
    "sockets: socket to getsockopt": (
        *((number, None) for number in range(41, 56)),
        *((None, n) for n in range(198, 213)),
    ),
    "more sockets: accept4, recvmmsg, sendmmsg": ((288, 242), (299, 243), (307, 269)),
    "shared memory, semaphores, queues": (
        *((number, None) for number in (*range(29, 32), *range(64, 72))),
        *((None, number) for number in range(186, 198)),
    ),
    "modes: chmod, fchmod, fchmodat, fchmodat2": ((90, None), (91, 52), (268, 53), (452, 452)),
    "owners: chown, fchown, lchown, fchownat": ((92, None), (93, 55), (94, None), (260, 54)),
    "times: utime, utimes, futimesat, utimensat": ((132, None), (235, None), (261, None), (280, 88)),
    "attributes: set and remove, setxattrat, removexattrat": (
        ((188, 5), (189, 6), (190, 7), (197, 14), (198, 15), (199, 16), (463, 463), (466, 466))
    ),
    "mounts: mount, umount2, pivot_root, chroot, open_tree to fspick, mount_setattr": (
        *((165, 40), (166, 39), (155, 41), (161, 51), (442, 442)),
        *((number, number) for number in (428, 429, 430, 431, 432, 433)),
    ),
    "namespaces: unshare, setns": ((272, 97), (308, 268)),
    "io_uring, which does all this by another way": ((425, 425), (426, 426), (427, 427)),
    "kernel: bpf, perf_event_open, userfaultfd, modules, kexec, reboot, swap, acct, quotactl, keys": (
        *((321, 280), (298, 241), (323, 282), (175, 105), (313, 273), (176, 106), (246, 104), (320, None), (169, 142)),
        *((167, 224), (168, 225), (163, 89), (179, 60), (248, 217), (249, 218), (250, 219)),
    ),
    "clock and names: settimeofday, clock_settime, clock_adjtime, sethostname, setdomainname": (
        ((164, 170), (227, 112), (305, 266), (170, 161), (171, 162))
    ),
    "scheduling: priority, parameters, policy, affinity, attributes, ioprio_set, migrate and move pages": (
        *((141, 140), (142, 118), (144, 119), (203, 122), (314, 274), (251, 30), (256, 238), (279, 239)),
    ),
    "files by handle, fanotify: name_to_handle_at, open_by_handle_at, fanotify_init": (
        ((303, 264), (304, 265), (300, 262))
    ),
}
"""Names of the refused system calls -> their numbers."""


def limit(seconds: int, memory_bytes: int) -> None:
    """Limit processor time, address space, file size and open files. Write no core dump; die with the parent."""
    for kind, wanted in (
        (resource.RLIMIT_CPU, seconds + 1),  # the parent must time out first: it tells a timeout from a failure
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (bound, bound))
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def forbid_writing() -> None:
    """Landlock: forbid writing, creating, moving and removing files, except for writing to /dev/null."""
    version = LIBC.syscall(SYS_LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION_FLAG)
    _require(version >= 1, "no Landlock")
    handled = WRITES_BY_VERSION[min(version, 3)]
    rules = ctypes.create_string_buffer(struct.pack("=Q", handled), 8)
    ruleset = LIBC.syscall(SYS_LANDLOCK_CREATE, rules, 8, 0)
    _require(ruleset >= 0, "Landlock makes no ruleset")
    null = os.open("/dev/null", os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", handled & (WRITE_FILE | TRUNCATE), null), 12)
    _require(LIBC.syscall(SYS_LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, rule, 0) == 0, "Landlock takes no rule")
    _require(LIBC.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0) == 0, "Landlock does not restrict")
    os.close(null)
    os.close(ruleset)


def drop_capabilities() -> None:
    """Give up all capabilities, which are the special rights of the superuser."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION, 0), 8)
    nothing = ctypes.create_string_buffer(24)
    _require(LIBC.capset(header, nothing) == 0, "capabilities stay")


def forbid_calls() -> None:
    """Seccomp: refuse the system calls that reach out of the process."""
    machine = platform.machine()
    _require(machine in MACHINES, f"no list of system calls for {machine}")
    column = list(MACHINES).index(machine)
    numbers = sorted({number for kind in FORBIDDEN_CALLS.values() for calls in kind if (number := calls[column])})
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_IF_EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (JUMP_IF_AT_LEAST, len(numbers) + 1, 0, X32_BIT),
        *((JUMP_IF_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


def main() -> None:
    """Read the program, confine this process and report that, run the program, and report if it reached its end."""
    settings = [sys.stdin.buffer.readline().decode().strip() for _ in range(5)]
    out, word, seconds, memory_bytes, length = int(settings[0]), settings[1].encode(), *map(int, settings[2:])
    text = sys.stdin.buffer.read().decode("utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        limit(seconds, memory_bytes)
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        forbid_writing()
        drop_capabilities()
        forbid_calls()
    except OSError as error:
        os.write(out, str(error).encode())
        os._exit(1)
    os.write(out, b"ready\n")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for source, name in ((text[:length], "<program>"), (text[length:], "<check>")):
        exec(compile(source, name, "exec"), namespace)  # noqa: S102 - the process is confined for this
    os.write(out, word)
    os._exit(0)


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _require(LIBC.prctl(option, *padded) == 0, f"prctl {option} fails")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OSError(ctypes.get_errno(), message)


if __name__ == "__main__":
    main()
