"""Files that are written whole, whatever lies under their name."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from subprocess import PIPE

import pytest

from tests.helpers import ROOT
from utils.files import SaveError, locked, written_whole


def write(path, text):
    with written_whole(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "real.csv"]


def test_a_pipe_is_written_to(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_text()))
    reader.start()
    write(pipe, "new")
    reader.join(timeout=30)
    assert seen == ["new"] and pipe.is_fifo()


def test_a_lock_is_of_one_process_and_ends_with_it(tmp_path):
    code = "import os, sys; from pathlib import Path; from utils.files import locked\n" \
           "with locked(Path(sys.argv[1])):\n" \
           "    if os.fork(): print(flush=True)\n" \
           "    sys.stdin.read()  # in a worker, too, which outlives a killed run\n"  # fmt: skip
    command, env = [sys.executable, "-c", code, str(tmp_path / "lock")], os.environ.copy()
    env["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, env=env) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path / "lock"):
            assert (tmp_path / "lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_leaves_it_to_the_user(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    with locked(tmp_path / "lock"):
        pass


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with (
        pytest.raises(SaveError, match=r"could not be written \(No space left.*is whole"),
        written_whole(tmp_path / "a.txt") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
