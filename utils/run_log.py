"""What a run tells: lines and bars on the main process's console, curves in TensorBoard."""

import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.shell import complain, mute, printable

QUIET_SECONDS = 15  # without a terminal, one line of progress every so often


class RunLog:
    """Silent everywhere but on the main process. Bars appear on a terminal only."""

    def __init__(self, main: bool):
        self.main = main
        self.folder: Path | None = None
        self.writer: SummaryWriter | None = None
        self.last_line = 0.0

    def open_curves(self, folder: Path, first_step: int = 0) -> None:
        """Draw into `folder` from now on; points of an earlier run from `first_step` are hidden.

        So this comes last, when nothing of the command can be refused any more.
        """
        self.folder = folder
        if self.main:
            self.writer = SummaryWriter(str(folder), purge_step=first_step)
            threading.excepthook = _silent_writer

    def say(self, line: str) -> None:
        if self.main:
            try:
                tqdm.write(printable(line), file=sys.stdout)
                sys.stdout.flush()
            except OSError as error:  # a reader that has gone, a full disk
                mute(sys.stdout)
                if not isinstance(error, BrokenPipeError):
                    complain(f"note: the run goes on, its output does not ({error.strerror})")

    def bar(self, iterable: Iterable | None = None, **options) -> tqdm:
        """tqdm, but on the main process and on a terminal only."""
        return tqdm(iterable, disable=None if self.main else True, dynamic_ncols=True, **options)

    def progress(self, line: str, last: bool = False) -> None:
        """The line that stands for a bar where there is no terminal."""
        if sys.stderr.isatty() or (time.monotonic() - self.last_line < QUIET_SECONDS and not last):
            return
        self.last_line = time.monotonic()
        self.say(line)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._draw("add_scalar", tag, value, step)

    def text(self, tag: str, text: str) -> None:
        self._draw("add_text", tag, text)

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        self._draw("add_image", tag, np.asarray(picture), step, dataformats="HWC")

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        """One row of TensorBoard's HPARAMS page, in this run's own folder."""
        plain = {key: value if isinstance(value, bool | int | float | str) else str(value)
                 for key, value in values.items()}  # fmt: skip
        self._draw("add_hparams", plain, metrics, run_name=".")

    def close(self) -> None:
        self._draw("close")

    def _draw(self, method: str, *args, **options) -> None:
        """Curves are worth less than the run: where they cannot be written, it goes on without."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args, **options)
        except OSError as error:  # of the writer's thread, perhaps some updates ago
            self.writer = None
            why = os.strerror(error.errno) if error.errno else str(error)
            self.say(f"note: the curves end here: {self.folder} cannot be written to ({why})")


def _silent_writer(details: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread ends with a traceback of what `_draw` says in one line."""
    if not issubclass(details.exc_type, OSError):
        threading.__excepthook__(details)
