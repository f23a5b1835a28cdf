"""Atomic writes and locks."""

import errno
import fcntl
import os
import subprocess
import sys
from subprocess import PIPE
from unittest.mock import Mock

import pytest

from models.errors import RunError
from tests.helpers import ROOT
from utils import files
from utils.files import atomic_write, exclusive_lock


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    with atomic_write(tmp_path / "link.csv") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".csv"
        temporary.write_text("new")
        assert (tmp_path / "real.csv").read_text() == "old"
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "real.csv"]


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize(
    "error, raised, message",
    [
        (OSError(28, "?"), RunError, "a.txt could not be written (No space left on device)"),
        (KeyError("a bug"), KeyError, ""),
    ],
)
def test_a_failed_write_leaves_the_old_file(error, raised, message, old, tmp_path):
    if old:
        (tmp_path / "a.txt").write_text(old)
    with pytest.raises(raised) as caught, atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert [path.read_text() for path in tmp_path.iterdir()] == ([old] if old else [])
    text = str(caught.value)
    assert message in text and ("the old file is intact" in text) == bool(old and message)


def test_a_lock_belongs_to_one_process_and_ends_with_it(tmp_path):
    code = (
        "import os, sys; from utils.files import exclusive_lock\n"
        "with exclusive_lock(sys.argv[1]):\n"
        "    if os.fork(): print(flush=True)\n"
        "    sys.stdin.read()  # in a worker as well, which outlives a killed run\n"
    )
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError), exclusive_lock(lock):
            pass
        assert lock.exists()
        other.kill()
        other.wait()
        with exclusive_lock(lock):
            assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_last_owner_removes_meanwhile(tmp_path, monkeypatch):
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *a: ((tmp_path / "lock").unlink(), real(*a)))
    with pytest.raises(BlockingIOError), exclusive_lock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(error, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(error, "no locks")))
    for _ in range(2):
        with exclusive_lock(tmp_path / "lock"):
            assert (tmp_path / "lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "lock").symlink_to("elsewhere")  # which filelock does not follow
    with pytest.raises(OSError, match="symbolic links"), exclusive_lock(tmp_path / "lock"):
        pass


def test_windows_flushes_files_opened_to_be_written_and_no_folders(tmp_path, monkeypatch):
    flushed = []

    def fsync(handle):  # of Windows
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise PermissionError(errno.EACCES, "a folder")
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not opened to be written")
        flushed.append(os.read(handle, 10))

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert flushed == [b"new"] and (tmp_path / "a.txt").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(tmp_path / "pipe") as path, path.open("w") as file:
        file.write("text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
