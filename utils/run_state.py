"""Where a run stands: `output/<name>_last.pt`, from which `--resume` goes on bit for bit.

The data stream is a function of (seed, step) and dropout is seeded by step, so that no generator
or sampler has to be saved: parameters, optimizer, loss scale and this handful of numbers are all.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from models.configs import ViTConfig
from utils.checkpoint import CheckpointError, load, save_atomic
from utils.files import written_whole
from utils.precision import Precision

# Flags that may differ when a run goes on: they say where and how, not what is computed.
FREE_FLAGS = {
    "name", "resume", "overwrite", "output_dir", "data_dir", "num_workers", "eval_batch_size",
    "log_every", "save_every", "gradient_accumulation_steps", "local_rank", "timeout",
    "deterministic", "offline", "compile", "grad_checkpointing", "eval_only",
}  # fmt: skip

FORMAT = 1  # of the file


@dataclass
class RunState:
    """Counts of updates, accuracies as fractions, and the open window of the loss curve."""

    step: int = 0  # updates made
    skipped: int = 0  # updates that overflowed and were made again
    best_accuracy: float = -1.0
    best_step: int = 0
    last_accuracy: float = -1.0
    evaluation_due: bool = False  # the run was stopped between an update and its evaluation
    window_loss: float = 0.0  # sum of the losses since the last point of the curve
    window_updates: int = 0
    seconds: float = 0.0  # that the run has taken so far


def save(
    path: Path,
    state: RunState,
    precision: Precision,
    optimizer: torch.optim.Optimizer,
    *,
    flags: Mapping,
    config: ViTConfig,
    data: str,
) -> None:
    """Write the whole run to `path`; plain values and tensors only. Raises SaveError."""
    content = {
        "format": FORMAT,
        "flags": dict(flags),
        "config": asdict(config),
        "data": data,
        "state": asdict(state),
        "precision": precision.capture(),
        "optimizer": optimizer.state_dict(),
    }
    save_atomic(content, path)


def read(path: Path, flags: Mapping) -> tuple[dict, RunState, ViTConfig]:
    """(content, state, config) of a saved run that `flags` may continue.

    Raises CheckpointError if it is damaged, or names the flags that would make it another run.
    """
    content = load(path)
    if content.get("format") != FORMAT or "data" not in content:
        raise CheckpointError(f"{path} is no saved run: --resume takes output/<name>_last.pt")
    try:
        saved = content["flags"]
        changed = [
            f"--{name} {flags[name]} (was {saved[name]})"
            for name in flags
            if name in saved and name not in FREE_FLAGS and flags[name] != saved[name]
        ]
        names = {field.name for field in fields(RunState)}
        state = RunState(**{k: v for k, v in content["state"].items() if k in names})
        if not all(isinstance(value, int | float) for value in vars(state).values()):
            raise TypeError("its state holds more than numbers")
        config = ViTConfig(**content["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a run to resume ({error!r})") from None
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run: {', '.join(changed)}; give the same flags to resume, "
            "or another --name"
        )
    return content, state, config


def bring_best(saved: Path, best: Path) -> bool:
    """Whether the best weights of the run that was saved in `saved` lie in `best`.

    They are copied there where the run goes on under another name. Raises SaveError.
    """
    source = saved.with_name(saved.name.removesuffix("_last.pt") + "_checkpoint.bin")
    if not best.is_file() and source.is_file():
        with written_whole(best) as temporary:
            shutil.copyfile(source, temporary)
    return best.is_file()


def restore(
    path: Path, content: Mapping, precision: Precision, optimizer: torch.optim.Optimizer, data: str
) -> None:
    """Put parameters, optimizer and scale back. Raises CheckpointError, nothing half restored."""
    if content["data"] != data:
        raise CheckpointError(f"{path} was trained on other data: {content['data']}, not {data}")
    try:
        precision.restore(content["precision"])
        optimizer.load_state_dict(content["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this run ({error})") from None
