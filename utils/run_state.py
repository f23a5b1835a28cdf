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

FORMAT = 2  # of the file: 1 knew the data by their counts alone


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


def read(path: Path) -> tuple[dict, RunState, ViTConfig]:
    """(content, state, config) of a saved run. Raises CheckpointError if it is damaged."""
    content = load(path)
    if content.get("format") == 1:
        raise CheckpointError(f"{path} was saved by an earlier version of this program")
    if content.get("format") != FORMAT or "data" not in content:
        raise CheckpointError(f"{path} is no saved run: --resume takes output/<name>_last.pt")
    try:
        if not isinstance(content["flags"], dict):
            raise TypeError("its flags are no table")
        names = {field.name for field in fields(RunState)}
        state = RunState(**{k: v for k, v in content["state"].items() if k in names})
        if not all(isinstance(value, int | float) for value in vars(state).values()):
            raise TypeError("its state holds more than numbers")
        config = ViTConfig(**content["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a run to resume ({error!r})") from None
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
        # Whether a fused kernel updates is up to this device, not to that of the save.
        groups = [saved | {key: own[key] for key in ("fused", "foreach") if key in own}
                  for saved, own in zip(content["optimizer"]["param_groups"],
                                        optimizer.param_groups, strict=True)]  # fmt: skip
        optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this run ({error})") from None
