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
        self.start_time = time.monotonic()
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

    def training(self, scalars: dict[str, float], step: int, steps: int, bar: tqdm) -> None:
        """Draw the figures of training, and show some in the `bar`.

        Where there is no bar, print them at most every PROGRESS_SECONDS, but always after `steps`.
        """
        self.scalars({f"train/{tag}": value for tag, value in scalars.items()}, step)
        loss, lr, speed = (scalars[tag] for tag in ("loss", "lr", "images_per_second"))
        bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{speed:.1f}")
        now = time.monotonic()
        late = step == steps or now - self.last_progress >= PROGRESS_SECONDS
        if late and not sys.stderr.isatty():
            self.last_progress = now
            self.print(f"step {step}/{steps}: loss {loss:.4f}, lr {lr:.3g}, {speed:.1f} images/s")

    def open_tensorboard(self, folder: Path, first_step: int, values: dict) -> None:
        """Draw into `folder` from now on. Points of an earlier run from `first_step` are hidden."""
        if self.main:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(folder), purge_step=first_step)
            lines = (f"    {name} {value}" for name, value in values.items())
            self.writer.add_text("flags", printable("\n".join(lines)))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._draw("add_scalar", tag, value, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self._draw("add_image", tag, np.asarray(image), step, dataformats="HWC")

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        """Add one row to TensorBoard's HPARAMS page, in the folder of this run."""
        texts = {k: str(v) for k, v in values.items() if not isinstance(v, int | float)}
        texts = {k: printable(text) for k, text in texts.items()}
        self._draw("add_hparams", values | texts, metrics, run_name=".")

    def close(self) -> None:
        self._draw("close")

    def _draw(self, method: str, *args, **options) -> None:
        """Call a method of the SummaryWriter. A full disk ends the curves, but not the run."""
        try:
            if self.writer:
                getattr(self.writer, method)(*args, **options)
        except OSError as error:
            self.writer = None
            self.print(f"warning: no more curves for TensorBoard ({error.strerror or error})")
