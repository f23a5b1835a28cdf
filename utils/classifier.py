"""A trained model of any file, ready to predict the classes of images (B, C, H, W):

for prediction in Classifier.open("output/pets_checkpoint.bin").predict(["a.jpg", "b.jpg"]):
    print(prediction.path, prediction.top)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
        cls, path: str | Path, *, labels=None, device=None, decoding=None, head=True, **options
    ) -> "Classifier":
        """The model of a `.bin`, `.npz` or `.safetensors` with the head that the file holds.

        Image size and classes are the file's own, unless `img_size` or `labels`, a file for
        `read_labels`, says otherwise. `device` is the GPU, if there is one. `decoding` may be
        a dict of some fields of `Decoding`; `options` are `img_size`,
        `variant` and `pixels`, as in `open_model`. With `head=False` a file needs no head, and
        only `features` are of use. Raises UserError.
        """
        model, metadata = open_model(path, head=head, **options)
        if head and not model.head.weight.any():
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
        for path, pixels, top in self._each(paths, partial(self._top, top_k=top_k), **loading):
            if top is None:
                yield Prediction(path, error=str(pixels))
            else:
                yield Prediction(path, top, None, torch.from_numpy(pixels))

    @torch.no_grad()
    def features(
        self, paths: Sequence[str | Path], **loading
    ) -> Iterator[tuple[str, np.ndarray | UserError]]:
        """(path, what the head reads of the image: float32 (D,), or its error), as `predict`."""
        for path, pixels, row in self._each(paths, self.model.features, **loading):
            yield path, pixels if row is None else row.cpu().numpy()

    def _each(
        self, paths: Sequence[str | Path], compute: Callable[[Tensor], Iterable], **loading
    ) -> Iterator[tuple]:
        """(path, pixels or the error, what `compute` gives for the image or None) of each path."""
        how = self.decoding
        if how.bit_depth is None:  # one for all, and not each image by its own
            how = replace(how, bit_depth=sampled_bit_depth(paths, how))
        names = map(str, paths)
        for batch in decode_files(paths, self.model.img_size, how, **loading):
            readable = [pixels for pixels in batch if not isinstance(pixels, UserError)]
            found = iter(())
            if readable:
                images = torch.from_numpy(np.stack(readable)).to(self.device)
                found = iter(compute(normalize(images)))  # of (B, C, H, W)
            for pixels in batch:
                yield next(names), pixels, None if isinstance(pixels, UserError) else next(found)

    def _top(self, images: Tensor, top_k: int) -> list[tuple[tuple[str, float], ...]]:
        probabilities = self.model(images).float().softmax(dim=1)  # (B, classes)
        top = probabilities.topk(min(top_k, len(self.classes)))  # (B, top_k)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [tuple((self.classes[i], p) for i, p in zip(*row, strict=True)) for row in rows]
