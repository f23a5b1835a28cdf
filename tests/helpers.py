"""What several test files share: golden cases, tiny models, checkpoint files and image folders."""

import json
import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.checkpoints import write
from models.configs import ViTConfig
from models.modeling import VisionTransformer
from models.state_dict import Checkpoint, Metadata
from utils.cli import run_script

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def golden_case(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden case: weights, inputs and outputs of Google's JAX code."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def golden_config(golden: dict) -> tuple[ViTConfig, dict]:
    """(config, the values of its `config_json`) of a golden case."""
    values = json.loads(str(golden["config_json"]))
    resnet = values.get("resnet")
    config = ViTConfig(
        patch_size=values["patch_size"][0],
        hidden_size=values["hidden_size"],
        mlp_dim=values["mlp_dim"],
        num_heads=values["num_heads"],
        num_layers=values["num_layers"],
        classifier=values["classifier"],
        representation_size=values["representation_size"],
        resnet_layers=tuple(resnet["num_layers"]) if resnet else None,
        resnet_width=resnet["width_factor"] if resnet else 1.0,
    )
    return config, values


def tiny_config(**changes) -> ViTConfig:
    """2 layers of width 32: a real ViT that runs in milliseconds."""
    row = {"patch_size": 8, "hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}
    if "resnet_layers" in changes:
        row |= {"patch_size": 1, "resnet_width": 0.5}
    return ViTConfig(**(row | changes))


def random_model(config=None, img_size=32, classes=5, std=0.1, **options) -> VisionTransformer:
    """A model in evaluation mode, none of whose parameters is zero."""
    torch.manual_seed(1)
    model = VisionTransformer(config or tiny_config(), img_size, classes, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def checkpoint_of(model: VisionTransformer, classes=None, **metadata) -> Checkpoint:
    """The model as readers of files return it."""
    metadata = Metadata(img_size=model.img_size, classes=classes, **metadata)
    return Checkpoint(model.state_dict(), model.config, metadata)


def save_bin(path, model: VisionTransformer, classes, metrics=None) -> None:
    """A `.bin` as training writes it."""
    metrics = metrics or {"accuracy": 0.5}
    write(path, checkpoint_of(model, tuple(classes), named=True, step=7, metrics=metrics))


def save_npz(path, model: VisionTransformer) -> None:
    """A file in Google's layout."""
    write(path, checkpoint_of(model))


def words(text: str) -> list[str]:
    """The arguments of a command line."""
    return shlex.split(text)


def run_command(module, *argv) -> int:
    """The exit status of a command, as the shell gets it."""
    return run_script(f"{module.__name__}.py", module.main, [str(word) for word in argv])


def write_image(path: Path, size=(8, 8), mode="RGB", **options) -> Path:
    """A file of noise, which depends on its name; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(path.name.encode()))
    pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def write_images(folder: Path, classes=("cat", "dog"), count=2, **options) -> list[Path]:
    """A folder of images for each class, CLASS/CLASS0.png and so on; `options` of write_image."""
    names = [f"{name}/{name}{i}.png" for name in classes for i in range(count)]
    return [write_image(folder / name, **options) for name in names]
