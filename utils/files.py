"""Safe files: written completely or not at all, and locked by one process at a time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from models.errors import RunError

WINDOWS = os.name == "nt"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends well.

    It keeps the suffix, by which libraries choose the format. If `path` is a symbolic link, its
    target is replaced. Raises RunError, with the old file intact, if the disk is full or refuses.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device is not replaced
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # the rename survives a power cut only once the folder is on the disk
    except OSError as error:
        if error.filename and Path(error.filename) not in (temporary, path, path.parent):
            raise  # of another file, inside the block
        reason = os.strerror(error.errno) if error.errno else str(error)
        old = "the old file is intact" if path.exists() else "no file is left behind"
        raise RunError(f"{path} could not be written ({reason}); {old}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: str | Path, seconds: float = 0) -> Iterator[None]:
    """Hold the lock file `path` during the block. Raises BlockingIOError if another process does,
    and still does after some `seconds`.

    A kill releases the lock, even if data workers live on: filelock closes its file in every fork.
    A file system without locks lets every process pass.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        with suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            if seconds:
                print(f"note: waiting until another process releases {path}", file=sys.stderr)
            lock.acquire(timeout=seconds)
    except Timeout as error:
        raise BlockingIOError(f"{path} is locked") from error
    except OSError as error:
        if error.filename:  # the file cannot be opened; else it cannot be locked
            raise
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes it at the release
            Path(path).unlink(missing_ok=True)
        lock.release()


def flush(path: str | Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk."""
    if WINDOWS and Path(path).is_dir():
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes what it writes
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
