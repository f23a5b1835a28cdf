"""A run on the disk: where its files lie, and the save from which it is resumed bit for bit.

The data stream is a function of (seed, step), and dropout is seeded by step. So a save holds no
random generator and no sampler: parameters, optimizer, loss scale and a few numbers are enough.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, isnan
from pathlib import Path

from torch.optim import Optimizer

from models.checkpoints import load_torch, save_torch
from models.configs import ViTConfig
from models.errors import UserError
from utils import dist_util
from utils.files import atomic_write
from utils.precision import Precision

FORMAT = 3  # of a saved run


class RunPaths:
    """The files of the run `name` in the folder `output_dir`."""

    def __init__(self, output_dir: str | Path, name: str):
        start = Path(output_dir) / name
        self.best = start.with_name(f"{name}_checkpoint.bin")  # the best weights
        self.last = start.with_name(f"{name}_last.pt")  # the whole run, for --resume
        self.results = start.with_name(f"{name}_results.json")
        self.report = start.with_name(f"{name}_report")  # a folder
        self.lock = start.with_name(f".{name}.lock")

    def delete(self) -> None:
        """Delete the results of an earlier run."""
        for path in (self.last, self.best, self.results):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.report, ignore_errors=True)

    def resumed(self, file: str) -> Path:
        """The save to resume from: `file`, or the run's own if that is empty."""
        return Path(file) if file else self.last


@dataclass
class RunState:
    """Steps made, figures of evaluations, and seconds that the run has taken."""

    step: int = 0
    retried: int = 0  # steps that overflowed in float16 and were retried
    select_by: str = "accuracy"  # the figure by which the best weights are selected
    best_score: float = -1.0
    best_step: int = 0  # 0: none yet
    last_score: float = -1.0
    last_evaluation: int = 0  # the step of it
    seconds: float = 0.0

    def add_evaluation(self, scores: Mapping[str, float]) -> bool:
        """Note the evaluation of this step; whether its weights are the best so far."""
        self.last_score, self.last_evaluation = scores[self.select_by], self.step
        sign, pair = -1 if self.select_by == "loss" else 1, (self.last_score, self.best_score)
        new, old = (-inf if isnan(score) else sign * score for score in pair)
        best = not self.best_step or new > old
        if best:
            self.best_score, self.best_step = self.last_score, self.step
        return best


def save_run(
    path: Path, state: RunState, precision: Precision, optimizer: Optimizer, about: Mapping
) -> None:
    """Write the whole run to `path`; `about` holds its flags, config and data. Raises RunError."""
    content = {"format": FORMAT, **about, "state": asdict(state)}
    content |= {"precision": precision.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_write(path) as temporary:
        save_torch(content, temporary)


def read_run(path: Path) -> tuple[dict, RunState, ViTConfig]:
    """(content, state, config) of a saved run. Raises UserError if it is none, or damaged."""
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
    return content, state, config


def restore_run(
    path: Path, content: Mapping, precision: Precision, optimizer: Optimizer, fingerprint: str
) -> None:
    """Put parameters, optimizer and loss scale back. Raises UserError if they do not fit."""
    if content["data"] != fingerprint:
        advice = "in place of a deleted image put an empty file, and give --skip_unreadable"
        what = f"other data: {content['data']}, not {fingerprint}"
        raise UserError(f"{path} was trained on {what} ({advice})")
    try:
        precision.load_state_dict(content["precision"])
        # Whether a fused kernel steps depends on this device, not on that of the save.
        pairs = zip(content["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
        kernels = ("fused", "foreach")
        groups = [saved | {k: own[k] for k in kernels if k in own} for saved, own in pairs]
        optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit this run ({error})") from error


def adopt_best(saved: Path, paths: RunPaths, state: RunState, log: Callable[[str], None]) -> None:
    """Copy the best weights of a run that is resumed under another name, and believe the file.

    Without best weights, the best of the following evaluations is kept.
    """
    source = saved.with_name(saved.name.removesuffix("_last.pt") + "_checkpoint.bin")
    if dist_util.is_main() and not paths.best.is_file() and source.is_file():
        with atomic_write(paths.best) as temporary:
            shutil.copyfile(source, temporary)
    found = dist_util.is_main() and paths.best.is_file()
    if found:  # a killed run may have written it after its last save
        record = load_torch(paths.best)
        state.best_score, state.best_step = record["metrics"][state.select_by], record["step"]
    if not dist_util.all_reduce_max(int(found)) and state.best_step:
        log(f"note: {paths.best} is missing: the best of the following evaluations is kept")
        state.best_step, state.last_evaluation = 0, 0
