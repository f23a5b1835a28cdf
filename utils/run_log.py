"""The output of a run: lines and progress bars on the console, curves in TensorBoard."""

import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cli import printable

PROGRESS_SECONDS = 15  # between two lines of progress, where there is no terminal for a bar


class RunLog:
    """Prints and draws on rank 0 (`main`), and does nothing on the other processes."""

    def __init__(self, main: bool):
        self.main = main
        self.writer = None  # a SummaryWriter after open_tensorboard
        self.last_progress = 0.0

    def print(self, line: str) -> None:
        if self.main:
            with suppress(OSError):  # a closed terminal or a full disk must not end the run
                tqdm.write(printable(line), file=sys.stdout)
                sys.stdout.flush()

    def bar(self, iterable: Iterable | None = None, **options) -> tqdm:
        """A progress bar on rank 0 if stderr is a terminal; nothing elsewhere."""
        return tqdm(iterable, disable=None if self.main else True, dynamic_ncols=True, **options)

    def evaluation_bar(self, iterable: Iterable) -> tqdm:
        return self.bar(iterable, desc="evaluate", unit="batch", leave=False)

    def progress(self, line: str, last: bool = False) -> None:
        """Print `line` where there is no bar, at most every PROGRESS_SECONDS but always at last."""
        now = time.monotonic()
        if not sys.stderr.isatty() and (last or now - self.last_progress >= PROGRESS_SECONDS):
            self.last_progress = now
            self.print(line)

    def open_tensorboard(self, folder: Path, first_step: int, values: dict) -> None:
        """Draw into `folder` from now on. Points of an earlier run from `first_step` are hidden."""
        if self.main:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(folder), purge_step=first_step)
            lines = (f"    {name} {value}" for name, value in values.items())
            self.writer.add_text("flags", printable("\n".join(lines)))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items() if self.writer else ():
            self.writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        if self.writer:
            self.writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        """Add one row to TensorBoard's HPARAMS page, in the folder of this run."""
        if self.writer:
            texts = {k: str(v) for k, v in values.items() if not isinstance(v, int | float)}
            texts = {k: printable(text) for k, text in texts.items()}
            self.writer.add_hparams(values | texts, metrics, run_name=".")

    def close(self) -> None:
        if self.writer:
            self.writer.close()
