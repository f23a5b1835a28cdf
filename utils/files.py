"""Files that are written whole or not at all."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class SaveError(OSError):
    """A file that could not be written; what was there before is whole."""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place, flushed, when the block ends well.

    It keeps the suffix, by which many libraries choose the format. A link stays one: what it leads
    to is replaced. A pipe or a device is written to at the end. Raises SaveError, with the old file
    untouched, where the disk is full or refuses.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder) / path.name)
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # a rename is safe from a power cut once the folder is on the disk
    except SaveError:  # of another file, which the block writes
        raise
    except BrokenPipeError:  # of another file: the reader of the standard output has gone
        raise
    except OSError as error:
        there = os.path.exists(path)
        kept = f"the one before is whole: {path}" if there else "nothing was there before"
        why = os.strerror(error.errno) if error.errno else str(error)
        failure = SaveError(f"{path} could not be written ({why}); {kept}")
        failure.errno = error.errno
        raise failure from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the block `path` is an empty file that no other process gets from here, nor after a
    kill is kept from. Raises BlockingIOError where another process has it.
    """
    with path.open("a") as file:
        try:
            # Of the process, not of the open file: a killed run's workers would go on holding that.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, os.strerror(error.errno)) from None
            # Some network file systems know no locks: there it is up to the user.
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            raise BlockingIOError(errno.EAGAIN, "somebody has just removed it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def same_file(a: str, b: str) -> bool:
    """Whether two names, of files or of addresses, mean one."""
    return a == b or os.path.realpath(a) == os.path.realpath(b)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
