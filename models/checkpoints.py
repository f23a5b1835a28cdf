"""Checkpoint files: every format that is read or written, and a model made of any of them."""

import errno
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.configs import CONFIGS, ViTConfig, as_in, config_name, for_new_head, is_count
from models.errors import DamagedFile, UserError
from models.interop import read_foreign, write_safetensors
from models.library_config import library_config
from models.modeling import VisionTransformer
from models.pixels import GOOGLE, Pixels
from models.state_dict import (
    EMBEDDINGS,
    FAMILIES,
    Checkpoint,
    Metadata,
    check_architecture,
    infer_config,
    load,
    square_size,
)
from models.torch_files import (
    INDEX,
    SUFFIXES,
    Ignored,
    conversion,
    read_shards,
    read_tensors,
    unwrap,
    weights_in,
)
from models.weights import google_name, read_google, write_google
from models.zoo import find

PORT_RESNET = "made for the earlier port's ResNet, which pads and normalises in another way"


def read(
    path: str | Path,
    variant: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Read a `.npz`, a `.safetensors`, a file of PyTorch, or a folder of Hugging Face.

    `variant`, a name of CONFIGS, must be the file's; it also gives the number of heads where the
    file does not. `img_size` gives the grid of positions where other libraries' files do not.
    Raises UserError with one line.
    """
    path = Path(path)
    path = weights_in(path) if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = load_torch(path) if path.suffix in SUFFIXES else {}
    if path.suffix == ".onnx" or {"format", "precision", "state"} <= content.keys():
        kind = "for other programs" if path.suffix == ".onnx" else "a saved run, to be resumed"
        raise UserError(f"{path} is {kind}: give the file of its model, .bin for example")
    heads = CONFIGS[variant].num_heads if variant else None
    with naming(path):
        if path.suffix == ".safetensors":
            tensors, metadata = read_tensors(path)
            # Config files beside an export of ours are about other weights.
            metadata = metadata or library_config(path.parent)
            checkpoint = read_foreign(tensors, metadata, heads, img_size)
        elif path.name.endswith(INDEX):
            tensors = read_shards(path)
            checkpoint = read_foreign(tensors, library_config(path.parent), heads, img_size)
        elif path.suffix in SUFFIXES:
            checkpoint = _read_torch(content, path.parent, heads, img_size)
        else:
            checkpoint = read_google(read_npz(path, progress), img_size=img_size)
            row, bias = find(path.name), checkpoint.state.get("head.bias", ())
            if row and len(bias) == row.classes:
                checkpoint.metadata.pixels = GOOGLE
        if variant:
            check_architecture(checkpoint.config, as_in(CONFIGS[variant], checkpoint.config))
    return checkpoint


def write(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Write a `.npz` in Google's layout, a `.safetensors` in timm's, or a `.bin` of this program.

    A `.bin` keeps the dtypes of the state. Raises OSError if the disk refuses.
    """
    path = Path(path)
    if path.suffix == ".npz":
        numpy_dtype = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
        np.savez(path, **write_google(checkpoint.state, checkpoint.config, numpy_dtype))
    elif path.suffix == ".safetensors":
        write_safetensors(path, checkpoint, dtype)
    else:
        metadata = checkpoint.metadata
        record = {
            "model": dict(checkpoint.state),
            "variant": config_name(checkpoint.config),
            "config": asdict(checkpoint.config),
            "img_size": list(metadata.img_size),
            "in_channels": checkpoint.in_channels,
            "classes": list(metadata.classes),
            "pixel_mean": 127.5,
            "pixel_std": 127.5,
            "step": metadata.step,
            "metrics": dict(metadata.metrics),
            "bit_depth": metadata.bit_depth,
            "background": list(metadata.background or ()),
            "pixels": asdict(metadata.pixels),
            "positions": metadata.positions,
        }
        save_torch(record, path)


def open_model(
    path: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    variant: str | None = None,
    head: bool = True,
    pixels: Mapping | None = None,
) -> tuple[VisionTransformer, Metadata]:
    """(model in evaluation mode on the CPU, its metadata) of any checkpoint file.

    The image size is the file's own unless `img_size` in pixels says another. With `head=False`
    the file's head is not read and may be missing; zeros for one class take its place. `pixels`
    changes the file's recipe: arguments of Pixels.changed. Raises UserError with one line.
    """
    checkpoint = read(path, variant=variant, img_size=img_size)
    state, config, metadata = checkpoint.state, checkpoint.config, checkpoint.metadata
    with naming(path):
        if head and "head.bias" not in state:
            why = [why for why in metadata.left_out.values() if why.startswith("the head reads")]
            reason = f" of use here ({why[0]})" if why else ""
            raise UserError(f"it has no head{reason}: fine-tune it with train.py first")
        size = img_size or metadata.img_size
        if size is None:
            raise UserError("its positions form no square: give the image size, such as 192x256")
        if not head:
            config = for_new_head(config)
        num_classes = len(state["head.bias"]) if head else 1
        model = VisionTransformer(
            config, size, num_classes, zero_head=not head, in_channels=checkpoint.in_channels
        )
        report = load(model, checkpoint)
    metadata.notes = [str(report)]
    metadata.pixels = metadata.pixels.changed(model.img_size, **(pixels or {}))
    return model.eval(), metadata


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name in front of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_npz(path: Path, progress: bool = False) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`. Reading them checks the archive's CRCs; nothing is unpickled.

    Raises UserError for a file that is truncated, damaged, no `.npz`, or holds pickled objects.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(4) == b"PK\x03\x04"
        raise UserError("truncated: download it again" if truncated else "not an .npz archive")
    arrays, key = {}, None
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in tqdm(archive.files, desc=f"read {path.name}", disable=not progress or None):
                arrays[key] = archive[key]
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive makes zipfile and numpy raise anything
        if key and "allow_pickle" in str(error):
            raise UserError(f"{key} is a pickled object, never loaded") from error
        raise UserError(f"damaged, download it again ({_one_line(error)})") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or not key.isprintable():
            what = "no name" if isinstance(array, np.ndarray) else "no array"
            raise UserError(f"{ascii(key)[1:-1]:.60} is {what}")
    return arrays


def _read_torch(content: dict, folder: Path, heads: int | None, img_size) -> Checkpoint:
    """A file of PyTorch, of this program, the earlier port or another library."""
    bare = any(isinstance(key, str) and key.startswith(EMBEDDINGS) for key in content)
    if bare or {"model", "classes", "img_size", "config"} <= content.keys():
        return _read_bin(content)
    tensors, _, note = unwrap(content)
    if not any(name.startswith(EMBEDDINGS) for name in tensors):
        return read_foreign(content, library_config(folder), heads, img_size)
    checkpoint = _read_bin(tensors)
    checkpoint.metadata.notes[:0] = [note] if note else []
    return checkpoint


def _read_bin(content: dict) -> Checkpoint:
    """A `.bin`: a record of this program, or the bare state dict of the earlier port."""
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError("not a checkpoint of this program (no state dict)")
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in state.values()):
        raise UserError("its state dict holds more than floating-point tensors")
    own = [name for name in state if not name.startswith(FAMILIES)]
    if unknown := [name for name in own if google_name(name) is None]:
        raise UserError(f"{', '.join(unknown[:4])} ({len(unknown)} in all) are unknown")
    if "model" in content:
        try:
            config = ViTConfig(**content["config"])
            classes = tuple(map(str, content["classes"]))
            size, metrics = tuple(content["img_size"]), dict(content.get("metrics") or {})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a checkpoint of this program ({error!r:.200})") from error
        if len(size) != 2 or not all(map(is_count, size)):
            raise UserError(f"its image size is {size!r:.60}, not two numbers of pixels")
        check_architecture(found := infer_config(state, config.num_heads), config)
        if found.representation_size != config.representation_size:
            width = config.representation_size
            raise UserError(f"its pre_logits layer does not have the width {width!r:.40}")
        if "head.bias" in state and state["head.bias"].shape != (len(classes),):
            raise UserError(f"it names {len(classes)} classes, which do not fit its head")
        metadata = Metadata(img_size=size, classes=classes, named=True, metrics=metrics)
        metadata.step = content.get("step")
        # Earlier versions took the upper 8 of 16 bits, and dropped the alpha.
        metadata.set_decoding(content.get("bit_depth", 16), content.get("background", []))
        metadata.pixels = Pixels.stored(content.get("pixels", {}))
        metadata.set_positions(content.get("positions", "linear"))
    else:
        if "head.weight" not in state:
            raise UserError("it holds no model of this family (no head.weight)")
        config = replace(infer_config(state), gelu="erf")  # the port's; Google's is tanh
        if config_name(config) is None:
            raise UserError("it fits no known variant, so its number of heads is unknown")
        metadata = Metadata(img_size=square_size(state, config))
        metadata.classes = tuple(str(i) for i in range(len(state["head.weight"])))
        metadata.notes = [PORT_RESNET] if config.resnet_layers is not None else []
    metadata.keys = {name: name for name in state}
    return Checkpoint(dict(state), config, metadata)


def load_torch(path: str | Path) -> dict:
    """The dict in a file of torch.save: tensors and plain values only, never code.

    Raises DamagedFile for a file that is damaged or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not check the CRCs
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"bad CRC of {damaged}")
        with torch.serialization.safe_globals([(Ignored, "argparse.Namespace")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive or pickle makes torch's reader raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of an impossible offset
            raise  # the file may be whole
        code = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
        if code or isinstance(error, pickle.UnpicklingError):
            why = "holds more than tensors and plain values, which is never loaded, or is damaged"
            if code:
                why += f" (it needs {code[1] or code[2]:.80}). If you trust it, this runs its code "
                why += f"and keeps its tensors: {conversion(path)}"
            raise DamagedFile(f"{path} {why}") from error
        raise DamagedFile(f"{path} is damaged, or no checkpoint ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def save_torch(content: Mapping, path: str | Path) -> None:
    """torch.save to `path`; a full disk is an OSError, which torch hides behind a RuntimeError."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
