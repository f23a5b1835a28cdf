"""Files of a run: written whole or not at all, read without executing anything."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.configs import CONFIGS, ViTConfig
from models.interop import Imported, read_safetensors
from models.modeling import VisionTransformer
from models.weights import name_table, read_npz, to_official
from utils.files import written_whole

ODD_RESNET = ("the earlier port's ResNet pads and normalises in its own way: this one, which is "
              "Google's, gives other numbers with its weights")  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message says why."""


def save_atomic(content: Mapping, path: str | Path) -> None:
    """torch.save, whole or not at all; SaveError as `written_whole` raises it."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's zip writer speaks of positions in the file; the system's word is inside.
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or OSError(" ".join(str(error).split())[:200]) from None


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An `.npz`, whole or not at all; SaveError as `written_whole` raises it."""
    with written_whole(path) as temporary:
        np.savez(temporary, **arrays)


def load(path: str | Path) -> dict:
    """A file of torch.save, tensors and plain values only.

    Raises CheckpointError with one sentence for a file that is missing, damaged, or asks for code
    to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the CRCs
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"bad CRC of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        why = "holds more than tensors and plain values, which is never loaded, or is damaged"
        raise CheckpointError(f"{path} {why}") from None
    except Exception as error:  # a garbled pickle makes torch's reader raise nearly anything
        first = (str(error).strip().splitlines() or ["empty"])[0]
        raise CheckpointError(f"{path} is damaged, or no checkpoint ({first})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def model_record(
    state: Mapping[str, Tensor],
    model: VisionTransformer,
    *,
    variant: str,
    classes: tuple[str, ...],
    step: int,
    metrics: Mapping[str, float],
) -> dict:
    """What `output/<name>_checkpoint.bin` holds: weights, and all that is needed to use them."""
    return {
        "model": dict(state),
        "variant": variant,
        "config": asdict(model.config),
        "img_size": list(model.img_size),
        "in_channels": model.in_channels,
        "classes": list(classes),
        "pixel_mean": 127.5,
        "pixel_std": 127.5,
        "step": step,
        "metrics": dict(metrics),
    }


def load_model(path: str | Path, variant: str | None = None) -> tuple[VisionTransformer, dict]:
    """(model in evaluation mode, record) of a fine-tuned `.bin`; the record is `model_record`'s.

    The earlier port's files hold a bare state dict: parameters tell the row of CONFIGS, which
    `variant` may state; class names are numbers. Raises CheckpointError.
    """
    content = load(path)
    try:
        record = content if "model" in content else _bare_record(path, content, variant)
        model = VisionTransformer(
            ViTConfig(**record["config"]),
            tuple(record["img_size"]),
            len(record["classes"]),
            in_channels=record["in_channels"],
        )
        model.load_state_dict(record["model"])
    except CheckpointError:
        raise
    except Exception as error:  # the record is a stranger's: any field may be anything
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit a model: {why}") from None
    return model.eval(), record


def _bare_record(path: str | Path, state: Mapping[str, Tensor], variant: str | None) -> dict:
    """The record of a bare state dict; its images were square and had three channels."""
    if "head.weight" not in state:
        raise CheckpointError(f"{path} holds no model of this family (no head.weight)")
    found = _variant_of(state) or variant  # which loading then refuses in detail
    if found is None:
        raise CheckpointError(f"{path} holds no variant of this program")
    if variant and CONFIGS[variant] != CONFIGS[found]:
        raise CheckpointError(f"{path} holds {found}, not {variant}")
    config = replace(CONFIGS[found], gelu="erf")  # the earlier port's, where Google's is tanh
    patches = state["transformer.embeddings.position_embeddings"].shape[1] - 1
    return {
        "model": dict(state),
        "variant": found,
        "config": asdict(config),
        "img_size": [isqrt(patches) * config.stride] * 2,
        "in_channels": 3,
        "classes": [str(i) for i in range(len(state["head.weight"]))],
        "named": False,
        "notes": [] if config.resnet_layers is None else [ODD_RESNET],
    }


def _variant_of(state: Mapping[str, Tensor]) -> str | None:
    """The first row of CONFIGS with these parameter names and this patch kernel."""
    kernel = state.get("transformer.embeddings.patch_embeddings.weight")
    for name, row in CONFIGS.items():
        fits = kernel is not None and kernel.shape[::3] == (row.hidden_size, row.patch_size)
        if fits and state.keys() == {entry.name for entry in name_table(row)}:
            return name
    return None


def read_pretrained(
    path: str | Path,
    variant: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> Imported:
    """Official arrays, and what they do not say, of an `.npz`, a `.safetensors` or a `.bin`.

    `variant`, where it is known, says what a bare `.bin` or a `.safetensors` without its config
    does not; `img_size` says the grid of positions where a `.safetensors` does not. Raises
    WeightsError or CheckpointError with one sentence.
    """
    suffix, row = Path(path).suffix, CONFIGS.get(variant)
    if suffix == ".safetensors":
        return read_safetensors(path, row.num_heads if row else None, img_size)
    if suffix == ".pt":
        raise CheckpointError(f"{path} is a saved run, to be resumed; its model is in the "
                              "..._checkpoint.bin beside it")  # fmt: skip
    if suffix == ".onnx":
        raise CheckpointError(f"{path}: an .onnx is for other programs; give the file that it was "
                              "made of")  # fmt: skip
    if suffix != ".bin":
        return Imported(read_npz(path, progress))
    model, record = load_model(path, variant)
    arrays, config = to_official(model.state_dict(), model.config), model.config
    return Imported(arrays, config.gelu, config.norm_eps, tuple(record["classes"]),
                    list(record.get("notes", ())), model.grid)  # fmt: skip
