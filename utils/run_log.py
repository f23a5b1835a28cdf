"""The output of a run: lines and bars on the console, curves in TensorBoard and metrics.jsonl."""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from models.errors import UserError
from utils.cli import printable
from utils.files import atomic_write

PROGRESS_SECONDS = 15  # between two lines of progress, where there is no terminal for a bar


class RunLog:
    """Prints and draws on rank 0 (`main`), and does nothing on the other processes."""

    def __init__(self, main: bool):
        self.main = main
        self.start_time = time.monotonic()
        # After `open`: a SummaryWriter, a file of lines, and a run of Weights & Biases, if asked.
        self.writer = self.lines = self.wandb = None
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
        names = ("epoch", "loss", "lr", "images_per_second")
        epoch, loss, lr, speed = (scalars[name] for name in names)
        bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{speed:.1f}")
        now = time.monotonic()
        late = step == steps or now - self.last_progress >= PROGRESS_SECONDS
        if late and not sys.stderr.isatty():
            self.last_progress = now
            where, rest = f"step {step}/{steps} (epoch {epoch:.2f})", f"{speed:.1f} images/s"
            self.print(f"{where}: loss {loss:.4f}, lr {lr:.3g}, {rest}")

    def open(self, folder: Path, first_step: int, values: dict, wandb_project: str | None) -> None:
        """Draw into `folder` from now on. Points of an earlier run from `first_step` are hidden.

        With a project, Weights & Biases gets the figures too. Raises UserError if it refuses.
        """
        if not self.main:
            return
        if wandb_project:
            import wandb

            names = {"project": wandb_project, "name": folder.name, "group": folder.name}
            try:
                self.wandb = wandb.init(**names, config=values)
                # wandb's own counter refuses the final figures of an earlier step.
                self.wandb.define_metric("*", step_metric="step")
            except wandb.Error as error:
                raise UserError(f"Weights & Biases: {error}") from error
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        lines = (f"    {name} {value}" for name, value in values.items())
        self.writer.add_text("flags", printable("\n".join(lines)))
        self.lines = _open_lines(folder / "metrics.jsonl", first_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to the curve of every tag, and one line to metrics.jsonl."""
        for tag, value in values.items():
            self._draw("add_scalar", tag, value, step)
        finite = {tag: value if isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | finite)
        self._call("lines", "write", line + "\n")
        if self.wandb:
            self.wandb.log(values | {"step": step})

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self._draw("add_image", tag, np.asarray(image), step, dataformats="HWC")

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        """Add one row to TensorBoard's HPARAMS page, in the folder of this run."""
        texts = {k: str(v) for k, v in values.items() if not isinstance(v, int | float)}
        texts = {k: printable(text) for k, text in texts.items()}
        self._draw("add_hparams", values | texts, metrics, run_name=".")

    def close(self) -> None:
        self._draw("close")
        self._call("lines", "close")
        if self.wandb:
            self.wandb.finish()

    def _draw(self, method: str, *args, **options) -> None:
        self._call("writer", method, *args, **options)

    def _call(self, target: str, method: str, *args, **options) -> None:
        """Call a method of `writer` or `lines`. A full disk ends them, but not the run."""
        try:
            if getattr(self, target):
                getattr(getattr(self, target), method)(*args, **options)
        except OSError as error:
            setattr(self, target, None)
            what = {"writer": "curves for TensorBoard", "lines": "lines in metrics.jsonl"}[target]
            self.print(f"warning: no more {what} ({error.strerror or error})")


def _open_lines(path: Path, first_step: int) -> TextIO:
    """Open `path` to add lines, after those of an earlier run before `first_step`."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError):  # a kill may cut the last line
                if line.endswith("\n") and json.loads(line)["step"] < first_step:
                    kept.append(line)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8", buffering=1)  # a line is there as soon as it is written
