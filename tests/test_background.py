"""Files written while the training goes on."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

from models.errors import RunError
from tests.test_resume import after_step, assert_equal, run
from utils import checkpoint
from utils.background import BackgroundWriter


class Disk:
    """A writer, what it wrote and reported, and the failures that are still to come."""

    def __init__(self, *failures):
        self.failures, self.written, self.lines = list(failures), [], []
        self.writer = BackgroundWriter(self.lines.append)

    def put(self, path, text, before=lambda: None):
        def write():
            before()
            if self.failures:
                raise self.failures.pop(0)
            self.written.append(text)

        self.writer.put(Path(path), write, f"done: {text}")


def test_files_are_written_one_after_the_other():
    """The training goes on, but waits for an earlier write of the same file."""
    disk, free = Disk(), Event()
    disk.put("a", "a1", lambda: free.wait(10))
    disk.put("b", "b1")
    assert disk.writer.busy and disk.written == []
    Timer(0.1, free.set).start()
    disk.put("a", "a2")
    assert disk.written[0] == "a1"
    disk.writer.join()
    assert disk.written == ["a1", "b1", "a2"] and not disk.writer.busy
    assert disk.lines == ["done: a1", "done: b1", "done: a2"]
    disk.put("b", "b2")
    disk.writer.close()
    assert disk.written[3:] == ["b2"]


def test_a_write_takes_no_threads_of_openmp():
    """A second team of them makes all steps after the first save a quarter slower on a CPU."""
    disk, counts, before = Disk(), [], torch.get_num_threads()
    torch.set_num_threads(2)
    disk.put("a", "a1", lambda: counts.append(torch.get_num_threads()))
    disk.writer.join()
    assert counts == [1] and torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "failures, texts, written",
    [
        (1, ["a1", "b1"], ["b1", "a1"]),  # tried again at the end
        (1, ["a1", "a2"], ["a2"]),  # a newer one has taken its place
        (2, ["a1"], None),
    ],
)
def test_a_failed_write_is_reported_and_tried_again(failures, texts, written):
    disk = Disk(*[RunError("no room")] * failures)
    for text in texts:
        disk.put(text[0], text)
    with nullcontext() if written else pytest.raises(RunError, match="no room"):
        disk.writer.join()
    disk.writer.join()  # an error is raised once
    assert disk.written == (written or [])
    assert disk.lines[0] == "warning: no room; the training goes on"
    assert disk.lines[1:] == [f"done: {text}" for text in texts[1:]]


def test_a_bug_is_more_than_a_warning():
    disk = Disk(KeyError("a bug"))
    disk.put("a", "a1")
    for again in (lambda: disk.put("a", "a2"), disk.writer.join):
        with pytest.raises(KeyError, match="a bug"):
            again()
    assert disk.lines == disk.written == []


def test_a_file_holds_its_own_step_although_later_ones_are_made_meanwhile(workdir, monkeypatch):
    write, later = checkpoint.write_run, Event()

    def slow(path, content):
        early = content["state"]["step"] == 3
        assert not early or later.wait(60)
        write(path, content)
        if early:
            shutil.copy(path, "early_last.pt")

    assert run("whole") == 0
    monkeypatch.setattr(checkpoint, "write_run", slow)
    after_step(monkeypatch, 4, lambda _: later.set())
    assert run("run", "--save_every", "3") == 0
    assert_equal("whole", "run")
    assert run("new", "--resume", "early_last.pt") == 0
    assert_equal("whole", "new")
