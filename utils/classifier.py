"""A trained model of any file, ready to predict the classes of images (B, C, H, W):

pets = Classifier.open("output/pets_checkpoint.bin")
print(pets.predict("a.jpg").top)
for prediction in pets.predict(image_files("photos")):
    print(prediction.path, prediction.top)

D width of the model, H W its image size in pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoints import open_model
from models.cpu import use_cpu_kernels
from models.errors import UserError
from models.labels import label_names
from models.modeling import VisionTransformer
from models.state_dict import Metadata
from utils.augment import normalize
from utils.class_names import read_labels
from utils.hardware import choose_device
from utils.images import Decoding, sample, sampled_bit_depth
from utils.inputs import all_of, is_one, may_be_wide, portable, to_source
from utils.loading import decode_images


@dataclass(frozen=True)
class Prediction:
    """One image's `top`, pairs of class and probability, the likeliest first; or its `error`."""

    path: str | None  # None: it was not given as a path
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
    def named(self) -> bool:
        """Whether the class names are the user's: those of the training data, or of `labels`."""
        return self.metadata.named

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    def to(self, device: str | torch.device) -> "Classifier":
        """Move the model to `device`, and return this object."""
        self.model.to(torch.device(device))
        return self

    def predict(
        self, images, *, top_k: int | None = 5, **loading
    ) -> Prediction | Iterator[Prediction]:
        """The Prediction of one image, or an iterator of those of many, in order.

        `utils.inputs.KINDS` says what an image is. Many are a list, a batch (B, 3 or 1, h, w), or
        anything that is iterated, such as `image_files(folder)`: it is drawn a batch at a time.
        PIL images and bytes are decoded as files are. What cannot be decoded has an `error`.
        With None as `top_k`, `top` has all classes. `loading` may be `batch_size` and
        `num_workers`, as in `decode_images`. Raises TypeError for what is no image: at once, or of
        a generator when it is drawn.
        """
        rows = self._each(images, partial(self._top, top_k=top_k), **loading)
        found = (
            Prediction(path, error=str(pixels))
            if top is None
            else Prediction(path, top, None, torch.from_numpy(pixels))
            for path, pixels, top in rows
        )
        return next(found) if is_one(images) else found

    def features(
        self, images, **loading
    ) -> tuple[str | None, np.ndarray | UserError] | Iterator[tuple]:
        """(path, what the head reads of the image: float32 (D,), or its error), as `predict`."""
        rows = self._each(images, self.model.features, **loading)
        found = ((path, pixels if row is None else row.cpu().numpy()) for path, pixels, row in rows)
        return next(found) if is_one(images) else found

    def _each(self, images, compute: Callable, *, batch_size=64, num_workers=0) -> Iterator[tuple]:
        """(path, pixels or the error, what `compute` gives for the image or None) of each image.

        Raises TypeError at once.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, not {batch_size}")
        images = all_of(images)
        if isinstance(images, list):  # starting a worker takes longer than decoding a few files
            num_workers = min(num_workers, len(images) // 16)
        return self._rows(images, compute, batch_size=batch_size, num_workers=num_workers)

    def _rows(
        self, images: Iterable, compute: Callable[[Tensor], Iterable], **loading
    ) -> Iterator[tuple]:
        how = self.decoding
        sources = (to_source(image, how) for image in images)
        if how.bit_depth is None:  # one for all, and not each image by its own
            if isinstance(images, list):
                some = [to_source(image, how) for image in filter(may_be_wide, sample(images))]
            else:
                some = list(islice(sources, loading["batch_size"]))
                sources = chain(some, sources)
            how = replace(how, bit_depth=sampled_bit_depth(some, how))
        sources, given = tee(portable(source, how) for source in sources)
        names = (str(source) if isinstance(source, str | Path) else None for source in given)
        for batch in decode_images(sources, self.model.img_size, how, **loading):
            readable = [pixels for pixels in batch if not isinstance(pixels, UserError)]
            found = iter(())
            if readable:
                inputs = torch.from_numpy(np.stack(readable)).to(self.device)
                with torch.no_grad():
                    found = iter(compute(normalize(inputs)))  # of (B, C, H, W)
            for pixels in batch:
                yield next(names), pixels, None if isinstance(pixels, UserError) else next(found)

    def _top(self, images: Tensor, top_k: int | None) -> list[tuple[tuple[str, float], ...]]:
        probabilities = self.model(images).float().softmax(dim=1)  # (B, classes)
        count = len(self.classes)
        top = probabilities.topk(count if top_k is None else min(top_k, count))  # (B, top_k)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [tuple((self.classes[i], p) for i, p in zip(*row, strict=True)) for row in rows]
