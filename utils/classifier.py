"""A trained model of any file, ready to say what an image shows:

    for found in Classifier.open("output/pets_checkpoint.bin").predict(["a.jpg", "b.jpg"]):
        print(found.path, found.top)

B batch, C channels, H W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from models.labels import label_names
from models.modeling import CONFIGS, VisionTransformer
from models.structure import (
    WeightsError,
    check_variant,
    infer_config,
    infer_img_size,
    variant_names,
)
from models.weights import canonical, to_official
from utils.augment import normalize, resize
from utils.checkpoint import CheckpointError, load_model, read_pretrained
from utils.signals import leave_to_main
from utils.stream import PIL_MODES, SMALL_SIDE, DataError, read_image, to_tensor


@dataclass(frozen=True)
class Prediction:
    """One file's `top`, pairs of class and probability from the likeliest down; or its `error`."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


@dataclass
class Classifier:
    """A model in evaluation mode on its device, and its class names."""

    model: VisionTransformer
    classes: tuple[str, ...]
    own_names: bool  # whether the file says what its classes are called
    record: dict  # `open_model`'s

    @property
    def variant(self) -> str | None:
        return self.record.get("variant")

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        img_size: int | tuple[int, int] | None = None,
        labels: str | Path | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
    ) -> "Classifier":
        """The model of a `.bin`, `.npz` or `.safetensors` with the head that the file holds.

        Size and classes are the file's own where `img_size` and `labels`, a file of one name a
        line, do not say otherwise; `variant` is needed for a bare state dict, and checked
        against any file.
        Raises CheckpointError or WeightsError with one sentence.
        """
        model, record = open_model(path, img_size=img_size, variant=variant)
        if not model.head.weight.any():
            raise CheckpointError(
                f"{path}: its head is all zeros, so it knows no classes yet: fine-tune it with "
                "train.py, or take a file that is fine-tuned already (imagenet21k+imagenet2012/)"
            )
        classes = tuple(record["classes"] or ())
        numbers = tuple(str(i) for i in range(model.num_classes))
        # Of other programs' files, people name the folders by other names (wordnet's, say).
        own_names = Path(path).suffix == ".bin" and record.get("named", True)
        if labels is not None:
            classes = read_labels(labels, model.num_classes)
        elif not classes:
            classes = known_labels(model.num_classes)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        record.pop("model", None)  # the parameters live in the model now
        return cls(model.to(device), classes or numbers, own_names, record)

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @torch.no_grad()
    def predict(
        self,
        paths: Sequence[str | Path],
        *,
        top_k: int = 5,
        batch: int = 64,
        workers: int = 0,
    ) -> Iterator[Prediction]:
        """One Prediction for each path, in order; a file that cannot be read has an `error`."""
        files = _Files([str(path) for path in paths], self.model.img_size,
                       PIL_MODES[self.model.in_channels])  # fmt: skip
        loader = DataLoader(files, batch, num_workers=workers, collate_fn=list,
                            worker_init_fn=leave_to_main)  # fmt: skip
        for samples in loader:
            good = [pixels for _, pixels in samples if isinstance(pixels, Tensor)]
            found = iter(self._top(torch.stack(good), top_k) if good else ())
            for path, pixels in samples:
                if isinstance(pixels, Tensor):
                    yield Prediction(path, next(found))
                else:
                    yield Prediction(path, error=pixels)

    def pixels(self, path: str | Path) -> Tensor:
        """One file as the model sees it, (1, C, H, W) in [-1, 1]. Raises DataError."""
        files = _Files([str(path)], self.model.img_size, PIL_MODES[self.model.in_channels])
        return normalize(files.read(0)[None].to(self.device))

    def _top(self, pixels: Tensor, top_k: int) -> list[tuple[tuple[str, float], ...]]:
        images = normalize(pixels.to(self.device))  # (B, C, H, W)
        probabilities = self.model(images).float().softmax(dim=1)  # (B, classes)
        values, indices = probabilities.topk(min(top_k, len(self.classes)))  # (B, top_k)
        return [tuple((self.classes[i], value) for i, value in zip(*row, strict=True))
                for row in zip(indices.tolist(), values.tolist(), strict=True)]  # fmt: skip


class _Files(torch.utils.data.Dataset):
    """path -> (path, uint8 pixels (C, H, W)), or (path, what is wrong with it)."""

    def __init__(self, paths: list[str], size: tuple[int, int], mode: str):
        self.paths, self.size, self.mode = paths, size, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        try:
            return self.paths[index], self.read(index)
        except DataError as error:
            return self.paths[index], str(error)

    def read(self, index: int) -> Tensor:
        image = read_image(self.paths[index], self.mode)
        if max(image.size) <= SMALL_SIDE:  # as evaluation resizes what it holds in memory
            return resize(to_tensor(image)[None], self.size)[0].byte()
        return to_tensor(image.resize(self.size[::-1], Image.Resampling.BILINEAR))


def open_model(
    path: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    variant: str | None = None,
    head: bool = True,
) -> tuple[VisionTransformer, dict]:
    """(model in evaluation mode, record) of a `.bin`, `.npz` or `.safetensors`.

    The model has the file's own head; with `head=False` an official or foreign file's is not read
    and may be missing (zeros for one class stand there). A `variant` must be the file's. The image
    size is the file's own unless `img_size` says another. The record has `variant`,
    `classes` (None where the file names none) and `notes` on what was changed.
    Raises CheckpointError or WeightsError with one sentence.
    """
    if Path(path).suffix == ".bin":
        model, record = load_model(path, variant)
        if variant and variant not in (fitting := variant_names(model.config)):
            raise CheckpointError(f"{path} holds {'/'.join(fitting) or 'no known variant'}, not "
                                  f"{variant}")  # fmt: skip
        wanted = (img_size, img_size) if isinstance(img_size, int) else img_size
        if wanted not in (None, model.img_size):
            arrays = to_official(model.state_dict(), model.config)
            old, model = model, _sized(path, model.config, wanted, model.num_classes,
                                       model.in_channels)  # fmt: skip
            model.load_from(arrays, position_grid=old.grid)
        _check_channels(path, model)
        return model.eval(), {"notes": [], "metrics": None, "step": None} | record
    found = read_pretrained(path, variant, img_size)
    try:
        arrays, _ = canonical(found.arrays)
        shapes = {key: array.shape for key, array in arrays.items()}
        config = replace(infer_config(shapes), gelu=found.gelu, norm_eps=found.norm_eps)
        if variant:
            check_variant(replace(CONFIGS[variant], classifier=config.classifier), shapes)
        if head and not {"head/kernel", "head/bias"} <= shapes.keys():
            raise WeightsError("has no head: fine-tune it with train.py first")
        if not head:
            config = replace(config, representation_size=None)
        count = shapes["head/bias"][0] if head else 1
        size = img_size or _stored_size(config, shapes, found.grid)
        kernel = shapes["conv_root/kernel" if config.resnet_layers is not None else
                        "embedding/kernel"]  # fmt: skip
        model = _sized(path, config, size, count, kernel[2])
        model.zero_head = not head
        report = model.load_from(arrays, position_grid=found.grid)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    _check_channels(path, model)
    names = variant_names(config)
    record = {"variant": names[0] if names else None, "classes": found.classes,
              "notes": [str(report), *found.notes], "metrics": None, "step": None}  # fmt: skip
    return model.eval(), record


def _check_channels(path, model: VisionTransformer) -> None:
    if model.in_channels not in PIL_MODES:
        raise CheckpointError(f"{path}: its images have {model.in_channels} channels; files have "
                              "1, 3 or 4")  # fmt: skip


def _sized(path, config, size, classes: int, channels: int) -> VisionTransformer:
    try:
        return VisionTransformer(config, size, classes, in_channels=channels)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _stored_size(config, shapes, grid) -> tuple[int, int]:
    """(height, width) in pixels that a file's positions were made for; square unless `grid`."""
    if grid is not None:
        return grid[0] * config.stride, grid[1] * config.stride
    side = infer_img_size(shapes)
    if side is None:
        raise WeightsError("its positions form no square: say --img_size, 192x256 for example")
    return side, side


def read_labels(path: str | Path, count: int) -> tuple[str, ...]:
    """Class names, one a line, as many as the model has classes. Raises CheckpointError."""
    try:
        names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8 text"
        raise CheckpointError(f"{path}: class names cannot be read ({why})") from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise CheckpointError(f"{path} has {len(names)} class names, the model {count} classes")
    return tuple(names)


def known_labels(count: int) -> tuple[str, ...]:
    """Names of ImageNet's 1000 or 21843 classes, () for any other number."""
    return tuple(label_names(count) or ())
