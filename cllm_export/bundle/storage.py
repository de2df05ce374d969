"""A directory that is written whole or not at all: staged beside its target, then exchanged with it in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from cllm_export.errors import OutputError


@contextlib.contextmanager
def staged_output(target: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """A scratch directory beside ``target`` that takes its place when the block ends, and vanishes if it raises.

    Only a directory that holds a file named ``marker`` is ever replaced.

    Raises:
        OutputError: the target exists and ``force`` is not set, it holds no ``marker``, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    try:
        recover(target)
        check_output(target, force=force, marker=marker)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        staging, lock = _make_staging(target)
    except OSError as error:
        raise OutputError(f"cannot write beside {target}: {error.strerror}") from None
    try:
        yield staging
        check_output(target, force=force, marker=marker)  # something may have appeared there meanwhile
        _sync(staging)
        _take_place(staging, target)
    except OSError as error:
        raise output_error(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def check_output(target: Path, *, force: bool, marker: str) -> None:
    """Refuse, before any work, a target that must not be replaced.

    Raises:
        OutputError: it exists and ``force`` is not set, or it exists and holds no file named ``marker``.
    """
    parent = next((path for path in Path(os.path.abspath(target)).parents if path.exists()), Path(os.sep))
    if not parent.is_dir():
        raise OutputError(f"cannot write beside {target}: {parent} is not a directory")
    if not target.exists() and not target.is_symlink():
        return
    is_empty_dir = target.is_dir() and not any(target.iterdir())
    if not (target / marker).is_file() and not is_empty_dir:
        raise OutputError(
            f"{target} exists and holds no {marker}; it will not be replaced: choose another output", fields=("output",)
        )
    if not force and not is_empty_dir:
        raise OutputError(f"{target} exists; replace it with force=True or choose another output", fields=("output",))


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Put back the old bundle if a kill came between the two renames of the fall-back exchange."""
    if not target.name:  # the root directory
        return
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        previous.rename(target)


def _take_place(staging: Path, target: Path) -> None:
    """Put ``staging`` where ``target`` is, in one atomic step where the system has one."""
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
    """Swap two directories atomically with renameat2(2); False where the system or file system cannot."""
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

    It gets the name that other builds look for only once it is locked, so that none takes it for abandoned.
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
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove what killed builds of the same target left: nobody holds the lock of their staging directory."""
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
    """Make the names in a directory outlast a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(error: OSError, target: Path) -> OutputError:
    """What a failed write comes to: a full disk is named."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full while writing {target}; free space and run the command again")
    return OutputError(f"cannot write {target}: {error}")
