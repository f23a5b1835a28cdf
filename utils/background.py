"""Files written by a thread, while the training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from models.errors import RunError


def host_copy(value):
    """A copy of tensors in dicts, lists and tuples, in the memory of the host.

    A copy from a GPU is asynchronous: `BackgroundWriter` waits for it before it writes.
    """
    if isinstance(value, Tensor):
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return copy.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        return {key: host_copy(each) for key, each in value.items()}
    return type(value)(map(host_copy, value)) if isinstance(value, list | tuple) else value


class BackgroundWriter:
    """Writes one file after the other in a thread.

    A file that cannot be written is reported by `report(line)`, and the training goes on. It is
    tried again by `join`, if no newer one has taken its place.
    """

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        # Without OpenMP's threads: a second team of them makes all later steps slower on a CPU.
        one = {"initializer": torch.set_num_threads, "initargs": (1,)}
        self.thread = ThreadPoolExecutor(max_workers=1, **one)
        self.writes: dict[Path, Future] = {}  # the last one of every file

    def put(self, path: Path, write: Callable[[], None], done: str = "") -> None:
        """Call `write()` in the thread, after all earlier ones, and then report `done`."""
        self.wait(path)
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        self.writes[path] = self.thread.submit(self._write, write, done, copied)

    def _write(self, write: Callable[[], None], done: str, copied) -> Callable[[], None] | None:
        """What is still to be done: nothing, or `write` again."""
        if copied:
            copied.synchronize()
        try:
            write()
        except RunError as error:
            self.report(f"warning: {error}; the training goes on")
            return write
        if done:
            self.report(done)
        return None

    def wait(self, path: Path) -> None:
        """Wait for the last write of a file."""
        if path in self.writes:
            self.writes[path].result()

    @property
    def busy(self) -> bool:
        return not all(write.done() for write in self.writes.values())

    def join(self) -> None:
        """Wait for all files. Raises RunError for one that cannot be written now either."""
        writes, self.writes = self.writes, {}
        errors = []
        for again in filter(None, [write.result() for write in writes.values()]):
            try:
                again()
            except RunError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Wait for what has begun."""
        self.thread.shutdown()
