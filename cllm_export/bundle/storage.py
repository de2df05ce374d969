"""Write files and directories whole or not at all: stage them beside the target, then move them in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm_export.errors import OutputError


@contextlib.contextmanager
def staged_output(target: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """A scratch directory beside ``target``. It replaces ``target`` when the block ends, and is removed if it raises.

    Only a directory that holds a file named ``marker`` is ever replaced.

    Raises:
        OutputError: the target exists and ``force`` is not set, the target holds no ``marker``, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    try:
        recover(target)
        check_output(target, force=force, marker=marker)
    except OSError as error:
        raise OutputError(f"cannot write beside {target}: {error.strerror}; choose another output") from None
    with scratch_directory(target) as staging:
        try:
            yield staging
            check_output(target, force=force, marker=marker)  # the target may have appeared in the meantime
            _sync(staging)
            _take_place(staging, target)
        except OSError as error:
            raise output_error(error, target) from error


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside ``target``, for the time of the block. What a killed process left goes with it.

    Raises:
        OutputError: nothing can be written there.
    """
    target = Path(os.path.realpath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        scratch, lock = _make_staging(target)
    except OSError as error:
        raise OutputError(f"cannot write beside {target}: {error.strerror}; choose another output") from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def check_output(target: Path, *, force: bool, marker: str) -> None:
    """Refuse a target that must not be replaced, before any work is done.

    Raises:
        OutputError: the target exists, and ``force`` is not set or it holds no file named ``marker``.
    """
    check_parent(target)
    if not target.exists() and not target.is_symlink():
        return
    is_empty_dir = target.is_dir() and not any(target.iterdir())
    if not (target / marker).is_file() and not is_empty_dir:
        raise OutputError(
            f"{target} exists and holds no {marker}; it will not be replaced: choose another output", fields=("output",)
        )
    if not force and not is_empty_dir:
        raise OutputError(f"{target} exists; replace it with force=True or choose another output", fields=("output",))


def check_parent(target: Path) -> None:
    """Refuse a target whose directory cannot be made or written to.

    Raises:
        OutputError: as said.
    """
    parent = next((path for path in Path(os.path.abspath(target)).parents if path.exists()), Path(os.sep))
    if not parent.is_dir():
        raise OutputError(f"cannot write beside {target}: {parent} is not a directory; choose another output")
    if reason := why_unwritable(parent):
        raise OutputError(f"cannot write beside {target}: {parent} cannot be written to ({reason}); {ELSEWHERE}")


ELSEWHERE = "choose another output, or make that directory writable"


def why_unwritable(directory: Path) -> str | None:
    """Why no file can be made in a directory; None if one can.

    A file without a name is made, because permissions alone do not tell: ``/proc`` and some mounts refuse.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file beside ``path`` for the block to write. It replaces ``path`` at the end; an error removes it.

    Links are followed. If ``path`` is no regular file (a pipe, ``/dev/stdout``), the block gets ``path`` itself.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    if _is_stream(path):
        yield path
        return
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".cllm-export-{secrets.token_hex(4)}.unfinished")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
        sync_directory(target.parent)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with whole_file(path) as scratch:
            scratch.write_bytes(data)
    except OSError as error:
        raise output_error(error, path) from None


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_file(path: Path, *, force: bool, name: str = "output") -> None:
    """Check, before any work for a file starts, that the file can be written.

    Args:
        name: the option that gives the path.

    Raises:
        OutputError: the file exists and ``force`` is not set, the path is a directory, or its directory does not exist
            or is not writable.
    """
    directory = Path(os.path.realpath(path)).parent
    if _is_stream(path) and not path.is_dir():
        return
    if path.is_dir() or not directory.is_dir():
        raise OutputError(
            f"cannot write {path}: {name} must be a file in a directory that exists and can be written", fields=(name,)
        )
    if reason := why_unwritable(directory):
        raise OutputError(
            f"cannot write {path}: {directory} cannot be written to ({reason}); choose another {name}", fields=(name,)
        )
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists; replace it with force=True or choose another {name}", fields=(name,))


STREAMS = ("/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd", "/proc/self/fd")
"""Names of what the process has open. They count as streams even where a regular file is open."""


def _is_stream(path: Path) -> bool:
    """Whether the path must not be replaced by a file: a pipe, a device, a directory or an open file's name."""
    absolute = Path(os.path.abspath(path))
    if any(absolute.is_relative_to(name) for name in STREAMS):
        return True
    return path.exists() and not path.is_file()


def unfinished_files(directory: Path) -> list[Path]:
    """Scratch files that killed writers left in a directory."""
    return sorted(path for path in directory.glob(".*.unfinished") if path.is_file())


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Restore the old bundle if a kill came between the two renames of the fallback exchange."""
    if not target.name:  # the root directory
        return
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        previous.rename(target)


def _take_place(staging: Path, target: Path) -> None:
    """Replace ``target`` with ``staging``, in one atomic step if the system supports it."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        previous = _previous(target)
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
        staging.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    sync_directory(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically with renameat2(2). False if the system or file system does not support it."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    status = renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange)
    if status != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return int(status) == 0


def _make_staging(target: Path) -> tuple[Path, int]:
    """A new directory beside the target, and the descriptor that holds its lock.

    The directory gets the name that other builds look for only after it is locked, so that none takes it for abandoned.
    """
    token = secrets.token_hex(4)
    unlocked = target.with_name(f".{target.name}.new-{token}")
    unlocked.mkdir()
    try:
        descriptor = os.open(unlocked, os.O_RDONLY)
        _try_lock(descriptor)
        return unlocked.rename(target.with_name(f".{target.name}.staging-{token}")), descriptor
    except FileNotFoundError:  # another build cleaned up between two of these lines
        return _make_staging(target)


def _try_lock(descriptor: int) -> bool:
    """Lock an open descriptor until it is closed or the process ends. False if another process holds the lock."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)


@contextlib.contextmanager
def locked_directory(directory: Path, *, busy: str) -> Iterator[None]:
    """Lock a directory for one process, and create it if it is missing. The lock ends with its process.

    Raises:
        OutputError: another process holds the lock (the message is ``busy``), or the directory cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise output_error(error, directory) from None
    try:
        if not _try_lock(descriptor):
            raise OutputError(busy, fields=("output",))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block of this directory, and keep the others out.

    For a file that is read, changed and written again. The lock ends with its process, and leaves no file.

    Raises:
        OutputError: the directory cannot be locked.
    """
    from filelock import lock_descriptor

    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise output_error(error, directory) from None
    try:
        try:
            lock_descriptor(descriptor)
        except OSError as error:
            raise output_error(error, directory) from None
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed builds of the same target left: staging directories whose lock no process holds."""
    if target.exists():
        shutil.rmtree(_previous(target), ignore_errors=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        if not left.name.removeprefix(f".{target.name}.").startswith(("staging-", "new-")):
            continue
        if left.is_symlink() or not left.is_dir():
            left.unlink(missing_ok=True)
            continue
        descriptor = os.open(left, os.O_RDONLY)
        try:
            if _try_lock(descriptor):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(error: OSError, target: Path) -> OutputError:
    """The error for a failed write. It says so if the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full while writing {target}; free space and run the command again")
    return OutputError(f"cannot write {target}: {error}")
