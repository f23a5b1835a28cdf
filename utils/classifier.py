"""A trained model of any file, ready to predict the classes of images (B, C, H, W):

for prediction in Classifier.open("output/pets_checkpoint.bin").predict(["a.jpg", "b.jpg"]):
    print(prediction.path, prediction.top)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoints import open_model
from models.configs import config_name
from models.cpu import use_cpu_kernels
from models.errors import UserError
from models.labels import label_names
from models.modeling import VisionTransformer
from models.state_dict import Metadata
from utils.augment import normalize
from utils.class_names import read_labels
from utils.hardware import choose_device
from utils.images import Decoding, sampled_bit_depth
from utils.loading import decode_files


@dataclass(frozen=True)
class Prediction:
    """One file's `top`, pairs of class and probability, the likeliest first; or its `error`."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    input: Tensor | None = field(default=None, repr=False, compare=False)  # as the model saw it


@dataclass
class Classifier:
    """A model in evaluation mode on its device, its class names, and its file's metadata."""

    model: VisionTransformer
    classes: tuple[str, ...]
    metadata: Metadata
    decoding: Decoding

    @classmethod
    def open(
        cls, path: str | Path, *, labels=None, device=None, decoding=None, **options
    ) -> "Classifier":
        """The model of a `.bin`, `.npz` or `.safetensors` with the head that the file holds.

        Image size and classes are the file's own, unless `img_size` or `labels`, a file for
        `read_labels`, says otherwise. `device` is the GPU, if there is one. `decoding` may be
        a dict of some fields of `Decoding`; `options` are `img_size`,
        `variant` and `pixels`, as in `open_model`. Raises UserError.
        """
        model, metadata = open_model(path, **options)
        if not model.head.weight.any():
            advice = "fine-tune it with train.py, or take a file of imagenet21k+imagenet2012/"
            raise UserError(f"{path}: its head is all zeros, so it knows no classes yet: {advice}")
        count = model.num_classes
        classes = read_labels(labels, count) if labels else metadata.classes or label_names(count)
        metadata.named = metadata.named or bool(labels)
        model = use_cpu_kernels(model.to(device or choose_device("auto")))
        how = Decoding.of(model, metadata, **(decoding or {}))
        return cls(model, classes or tuple(map(str, range(count))), metadata, how)

    @property
    def variant(self) -> str | None:
        """The model's row of CONFIGS, if it is one."""
        return config_name(self.model.config)

    @property
    def named(self) -> bool:
        """Whether the class names are the user's: those of the training data, or of `labels`."""
        return self.metadata.named

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @torch.no_grad()
    def predict(self, paths: Sequence[str | Path], *, top_k=5, **loading) -> Iterator[Prediction]:
        """One Prediction for each path, in order; a file that cannot be read has an `error`.

        `loading` may be `batch_size` and `num_workers`, as in `decode_files`.
        """
        how = self.decoding
        if how.bit_depth is None:  # one for all, and not each image by its own
            how = replace(how, bit_depth=sampled_bit_depth(paths, how))
        names = map(str, paths)
        for batch in decode_files(paths, self.model.img_size, how, **loading):
            readable = [pixels for pixels in batch if not isinstance(pixels, UserError)]
            tops = iter(self._top(np.stack(readable), top_k) if readable else ())
            for pixels in batch:
                if isinstance(pixels, UserError):
                    yield Prediction(next(names), error=str(pixels))
                else:
                    yield Prediction(next(names), next(tops), None, torch.from_numpy(pixels))

    def _top(self, pixels: np.ndarray, top_k: int) -> list[tuple[tuple[str, float], ...]]:
        images = normalize(torch.from_numpy(pixels).to(self.device))  # (B, C, H, W)
        probabilities = self.model(images).float().softmax(dim=1)  # (B, classes)
        top = probabilities.topk(min(top_k, len(self.classes)))  # (B, top_k)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [tuple((self.classes[i], p) for i, p in zip(*row, strict=True)) for row in rows]
