"""A run on the disk: where its files lie, and the save from which it is resumed bit for bit.

The data stream is a function of (seed, step), and dropout is seeded by step. So a save holds no
random generator and no sampler: parameters, optimizer, loss scale and a few numbers are enough.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import inf, isnan
from pathlib import Path
from typing import NamedTuple

from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from models import checkpoints, lora
from models.checkpoints import load_torch, save_torch
from models.configs import ViTConfig
from models.errors import RunError, UserError
from models.state_dict import Checkpoint, Metadata
from utils import dist_util
from utils.background import BackgroundWriter, host_copy
from utils.files import atomic_write
from utils.precision import Precision
from utils.run_log import RunLog

FORMAT = 3  # of a saved run
AUTO = "auto"  # resume the run if it is there, else start it


class RunPaths:
    """The files of the run `name` in the folder `output_dir`."""

    def __init__(self, output_dir: str | Path, name: str):
        start = Path(output_dir) / name
        self.best = start.with_name(f"{name}_checkpoint.bin")  # the best weights
        self.last = start.with_name(f"{name}_last.pt")  # the whole run, for --resume
        self.results = start.with_name(f"{name}_results.json")
        self.adapters = start.with_name(f"{name}_lora.safetensors")  # of the best weights
        self.flags = start.with_name(f"{name}_flags.txt")  # train.py @FILE makes the run again
        self.report = start.with_name(f"{name}_report")  # a folder
        self.lock = start.with_name(f".{name}.lock")

    def resumes_itself(self, file: str | None) -> bool:
        """Whether `--resume FILE` continues this run, and not another one."""
        return file is not None and self.resumed(file).resolve() == self.last.resolve()

    def keep_damaged(self) -> None:
        """Rename what is left of a run that cannot be continued."""
        for path in (self.last, self.best, self.adapters):
            if path.exists():
                path.replace(path.with_name(f"{path.name}.damaged"))

    def delete(self) -> None:
        """Delete the results of an earlier run."""
        for path in (self.last, self.best, self.results, self.flags, self.adapters):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.report, ignore_errors=True)

    def resumed(self, file: str) -> Path:
        """The save to resume from: `file`, or the run's own if that is empty or AUTO."""
        return self.last if file in ("", AUTO) else Path(file)


@dataclass
class RunState:
    """Steps made, figures of evaluations, and seconds that the run has taken."""

    step: int = 0
    retried: int = 0  # steps that overflowed in float16 and were retried
    select: str = "best"  # which weights count, the best or the last
    select_by: str = "accuracy"  # the figure by which the best weights are selected
    best_score: float = -1.0  # which no figure is: none yet
    best_step: int = 0
    averaged: bool = False  # whether the weights that count are the averages of --ema
    last_score: float = -1.0
    last_evaluation: int = 0  # the step of it
    stale: int = 0  # evaluations in a row that were not the best
    seconds: float = 0.0

    def rank(self, score: float) -> float:
        """A number that is larger for a better score."""
        return -inf if isnan(score) else -score if self.select_by == "loss" else score

    def add_evaluation(self, scores: Mapping[str, float], averaged: bool = False) -> bool:
        """Note the evaluation of this step; whether its weights are those that count so far."""
        self.last_score, self.last_evaluation = scores[self.select_by], self.step
        best = self.best_score < 0 or self.rank(self.last_score) > self.rank(self.best_score)
        if best:
            self.best_score, self.best_step = self.last_score, self.step
        if best or self.select == "last":
            self.averaged = averaged
        # A run that was killed after its last save may have found better weights already.
        self.stale = 0 if self.step <= self.best_step else self.stale + 1
        return best or self.select == "last"

    def finished(self, num_steps: int, patience: int) -> bool:
        """Whether all steps are made, or `patience` (0: endless) evaluations were not the best."""
        return self.step >= num_steps or 0 < patience <= self.stale


@dataclass
class Saver:
    """Saves a run and its best weights in the background, from rank 0.

    A save is due after `every` steps; without `every`, after `minutes`.
    """

    paths: RunPaths
    state: RunState
    precision: Precision
    optimizer: Optimizer
    about: Mapping  # flags, config and data of the run
    log: RunLog
    every: int | None
    minutes: float

    def __post_init__(self):
        self.start_time = self.log.start_time - self.state.seconds  # earlier sessions count
        self.last_save = time.monotonic()
        self.pauses = 0.0  # seconds that the training has waited
        self.writer = BackgroundWriter(self.log.print)

    def due(self) -> bool:
        if self.every:
            return self.state.step % self.every == 0
        late = time.monotonic() > self.last_save + 60 * self.minutes
        return late and not self.writer.busy

    def save(self) -> None:
        """Save the whole run, from which --resume continues."""
        self.last_save = time.monotonic()
        self.state.seconds = self.last_save - self.start_time
        content = {"format": FORMAT, **self.about, "state": asdict(self.state)}
        content["precision"] = self.precision.state_dict()
        content["optimizer"] = self.optimizer.state_dict()
        line = f"saved: {self.paths.last}, after step {self.state.step}"
        self._put(self.paths.last, content, write_run, line)

    def save_best(self, config: ViTConfig, metadata: Metadata) -> None:
        """Save the weights that count, in float32, with adapters merged; the adapters too.

        There is always a save of the run to which they belong.
        """
        if self.paths.last not in self.writer.writes and not self.paths.last.exists():
            self.save()
        state = self.precision.model_state_dict(self.state.averaged)
        write = partial(write_best, adapters=self.paths.adapters)
        self._put(self.paths.best, (state, config, metadata), write)

    def _put(self, path: Path, content, write: Callable, line: str = "") -> None:
        start = time.monotonic()
        if self.log.main:
            self.writer.wait(path)  # before the next copy
            self.writer.put(path, partial(write, path, host_copy(content)), line)
        self.pauses += time.monotonic() - start

    def join(self) -> None:
        """Wait for the files. Raises RunError, on all processes, if one cannot be written."""
        start = time.monotonic()
        dist_util.from_main(self.writer.join)
        self.pauses += time.monotonic() - start

    def close(self) -> None:
        self.writer.close()


def write_run(path: Path, content: Mapping) -> None:
    """Write the whole run to `path`. Raises RunError, also if a parameter is not finite."""
    if not get_total_norm(content["precision"]["parameters"].values()).isfinite():
        raise RunError(f"{path} is not written: a weight is not finite")
    with atomic_write(path) as temporary:
        save_torch(content, temporary)


def write_best(path: Path, content: tuple[dict, ViTConfig, Metadata], adapters: Path) -> None:
    """Write the best weights to `path`, and `adapters` if there are any. Raises RunError."""
    state, config, metadata = content
    state = {name: tensor.float() for name, tensor in state.items()}
    if any(name.endswith(lora.A) for name in state):
        with atomic_write(adapters) as temporary:
            lora.write_adapters(temporary, state, metadata.classes)
    with atomic_write(path) as temporary:
        checkpoints.write(temporary, Checkpoint(lora.merged(state), config, metadata))


class SavedRun(NamedTuple):
    """A run to continue, and its file."""

    content: dict
    state: RunState
    config: ViTConfig
    path: Path

    def describe(self, num_steps: int) -> str:
        line = f"resumed: {self.path}, after step {self.state.step} of {num_steps}"
        steps = self.content["flags"]["num_steps"]
        if num_steps == steps:
            return line
        why = f"not the result of an uninterrupted run of {num_steps}"
        return f"{line} (extended from {steps}: the schedule changes here, so this is {why})"


def read_run(path: Path) -> SavedRun:
    """Read a saved run. Raises UserError if it is none, or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = load_torch(path)
    if content.get("format") in (1, 2):
        raise UserError(f"{path} was saved by an earlier version of this program")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is no saved run: give output/<name>_last.pt")
    names = {field.name for field in fields(RunState)}
    try:
        # In older saves the score is the accuracy, and has its name.
        values = {k.replace("_accuracy", "_score"): v for k, v in content["state"].items()}
        state = RunState(**{k: v for k, v in values.items() if k in names})
        config = ViTConfig(**content["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a run to resume ({error!r})") from error
    return SavedRun(content, state, config, path)


def restore_run(
    saved: SavedRun, precision: Precision, optimizer: Optimizer, fingerprint: str
) -> None:
    """Put parameters, optimizer and loss scale back. Raises UserError if they do not fit."""
    path, content = saved.path, saved.content
    if content["data"] != fingerprint:
        advice = "in place of a deleted image put an empty file, and give --skip_unreadable"
        what = f"other data: {content['data']}, not {fingerprint}"
        raise UserError(f"{path} was trained on {what} ({advice})")
    try:
        precision.load_state_dict(content["precision"])
        # Whether a fused kernel steps depends on this device, not on that of the save.
        pairs = zip(content["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
        kernels = ("fused", "foreach")
        groups = [old | {k: own[k] for k in kernels if k in own} for old, own in pairs]
        optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit this run ({error})") from error


def adopt_best(saved: Path, paths: RunPaths, state: RunState, log: Callable[[str], None]) -> None:
    """Copy the best weights of a run that is resumed under another name, and believe the file.

    Without best weights, the best of the following evaluations is kept.
    """
    start = RunPaths(saved.parent, saved.name.removesuffix("_last.pt"))

    def find_best() -> tuple[float, int, bool] | None:
        pairs = ((start.adapters, paths.adapters), (start.best, paths.best))
        for source, own in pairs if not paths.best.is_file() else ():
            if source.is_file():
                with atomic_write(own) as temporary:
                    shutil.copyfile(source, temporary)
        if not paths.best.is_file():
            return None
        record = load_torch(paths.best)
        scores = record["metrics"]
        return scores[state.select_by], record["step"], bool(scores.get("averaged"))

    best = dist_util.from_main(find_best)
    if best and state.select == "best":  # a killed run may have written it after its last save
        state.best_score, state.best_step, state.averaged = best
    elif not best and state.best_score >= 0:
        log(f"note: {paths.best} is missing: the best of the following evaluations is kept")
        state.best_score, state.last_evaluation = -1.0, 0
