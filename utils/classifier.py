"""A trained model of any file, ready to predict the classes of images (B, C, H, W):

for prediction in Classifier.open("output/pets_checkpoint.bin").predict(["a.jpg", "b.jpg"]):
    print(prediction.path, prediction.top)
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.checkpoints import open_model
from models.configs import config_name
from models.cpu import use_cpu_kernels
from models.errors import UserError
from models.labels import label_names
from models.modeling import VisionTransformer
from models.state_dict import Metadata
from utils.augment import normalize
from utils.stream import decode_files

INDEX, NAME, SEPARATOR = r"(?P<index>\d{1,9})", "(?P<name>.+)", r"\s*[,;\t]\s*"


@dataclass(frozen=True)
class Prediction:
    """One file's `top`, pairs of class and probability, the likeliest first; or its `error`."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    input: Tensor | None = field(default=None, repr=False, compare=False)  # as the model saw it
    image: Image.Image | None = field(default=None, repr=False, compare=False)  # if kept


@dataclass
class Classifier:
    """A model in evaluation mode on its device, its class names, and its file's metadata."""

    model: VisionTransformer
    classes: tuple[str, ...]
    metadata: Metadata

    @classmethod
    def open(cls, path: str | Path, *, labels=None, device=None, **options) -> "Classifier":
        """The model of a `.bin`, `.npz` or `.safetensors` with the head that the file holds.

        Image size and classes are the file's own, unless `img_size` or `labels`, a file for
        `read_labels`, says otherwise. `device` is the GPU, if there is one. `options` are
        `img_size` and `variant`, as in `open_model`. Raises UserError.
        """
        model, metadata = open_model(path, **options)
        if not model.head.weight.any():
            advice = "fine-tune it with train.py, or take a file of imagenet21k+imagenet2012/"
            raise UserError(f"{path}: its head is all zeros, so it knows no classes yet: {advice}")
        count = model.num_classes
        classes = read_labels(labels, count) if labels else metadata.classes or label_names(count)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = use_cpu_kernels(model.to(device))
        return cls(model, classes or tuple(map(str, range(count))), metadata)

    @property
    def variant(self) -> str | None:
        """The model's row of CONFIGS, if it is one."""
        return config_name(self.model.config)

    @property
    def named(self) -> bool:
        """Whether the file's class names are the folder names of its training data."""
        return self.metadata.named

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @torch.no_grad()
    def predict(self, paths: Sequence[str | Path], *, top_k=5, **loading) -> Iterator[Prediction]:
        """One Prediction for each path, in order; a file that cannot be read has an `error`.

        `loading` may be `batch_size`, `num_workers` and `keep_images`, as in `decode_files`.
        """
        size, channels = self.model.img_size, self.model.in_channels
        for batch in decode_files(paths, size, channels, **loading):
            readable = [pixels for _, pixels, _ in batch if not isinstance(pixels, UserError)]
            tops = iter(self._top(np.stack(readable), top_k) if readable else ())
            for path, pixels, image in batch:
                if isinstance(pixels, UserError):
                    yield Prediction(str(path), error=str(pixels))
                else:
                    yield Prediction(str(path), next(tops), None, torch.from_numpy(pixels), image)

    def _top(self, pixels: np.ndarray, top_k: int) -> list[tuple[tuple[str, float], ...]]:
        images = normalize(torch.from_numpy(pixels).to(self.device))  # (B, C, H, W)
        probabilities = self.model(images).float().softmax(dim=1)  # (B, classes)
        top = probabilities.topk(min(top_k, len(self.classes)))  # (B, top_k)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [tuple((self.classes[i], p) for i, p in zip(*row, strict=True)) for row in rows]


def read_labels(path: str | Path, count: int) -> tuple[str, ...]:
    """The names of `count` classes: one a line; or lines of index and name in any order, perhaps
    after a header; or all in one line. Commas, semicolons or tabs separate. Raises UserError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the class names are not UTF-8 text") from error
    lines = list(filter(None, map(str.strip, lines)))
    for mark in ",;\t":
        if len(lines) == 1 < count == len(fields := lines[0].split(mark)):
            return tuple(field.strip(' "') for field in fields)
    wrong = False
    for pattern in (INDEX + SEPARATOR + NAME, NAME + SEPARATOR + INDEX):
        rows = [re.fullmatch(pattern, line) for line in lines]
        rows = rows[1:] if rows and not rows[0] else rows  # without the header
        if rows and all(rows):
            names = {int(row["index"]): row["name"].strip(' "') for row in rows}
            if sorted(names) == list(range(count)) and len(rows) == count:
                return tuple(names[i] for i in range(count))
            wrong |= min(names) < 2  # else the numbers belong to the names
    if wrong:
        raise UserError(f"{path}: the indices must be 0 to {count - 1}, each of them once")
    if len(lines) != count:
        found = f"{len(lines)} class name{'s' * (len(lines) != 1)}, the model {count} classes"
        raise UserError(f"{path} has {found}: write one name a line, or lines like 0,cat")
    return tuple(lines)
