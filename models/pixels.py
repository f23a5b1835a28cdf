"""How an image becomes the pixels of a model: the recipe that belongs to a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import NamedTuple

from models.errors import UserError

ALIASED = "bilinear_no_antialias"  # tf.image.resize's default, of Google's own code
INTERPOLATIONS = ("bilinear", "bicubic", ALIASED)
RESIZES = ("squash", "smaller_side")
LONGEST = 16  # longest side / smaller side: of a longer strip only the middle is resized


class Window(NamedTuple):
    """What a model sees of an image, in pixels."""

    box: tuple[int, int, int, int]  # top, left, height, width: this part of the image is cut out
    whole: tuple[int, int]  # and resized to this height and width;
    corner: tuple[int, int]  # the pixels of the model begin at this row and column of it


@dataclass(frozen=True)
class Pixels:
    """The recipe of an evaluation, for a model of any size. UserError for an unknown one."""

    interpolation: str = "bilinear"
    resize: str = "squash"  # to the size of the model; or "smaller_side", which keeps the shape
    crop_fraction: float = 1.0  # the model's size as a fraction of the resized image
    # A central crop may begin half a pixel off: round its place down (Hugging Face), or as Python's
    # `round` does (timm).
    round_down: bool = False
    # Pixel means and deviations of a library's file, for exports. `models.interop` folds them into
    # the first layer, so that all models here read pixels from -1 to 1.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        known = self.interpolation in INTERPOLATIONS and self.resize in RESIZES
        known = known and type(self.round_down) is bool
        if not known or not isinstance(self.crop_fraction, int | float):
            given = f"{self.interpolation!s:.40}, {self.resize!s:.40}, {self.crop_fraction!s:.40}"
            raise UserError(f"images are resized in an unknown way ({given})")
        if not 0.1 <= self.crop_fraction <= 1:
            limits = "from 0.1 to 1 of the resized image"
            raise UserError(f"the crop must be {limits}, not {self.crop_fraction!s:.20}")

    @classmethod
    def stored(cls, values: object) -> "Pixels":
        """The recipe that a file of this program holds as a dict. Raises UserError."""
        try:
            means = {name: tuple(map(float, values.get(name, ()))) for name in ("mean", "std")}
            return cls(**values | means)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"images are resized in an unknown way ({values!r:.200})") from error

    def covered(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that the resized image covers at least, for a model of `size`."""
        # The small number undoes rounding where the fraction comes from two whole numbers.
        h, w = (floor(side / self.crop_fraction + 1e-6) for side in size)
        return h, w

    def window(
        self, height: int, width: int, size: tuple[int, int], place: Sequence[float] | None = None
    ) -> Window:
        """What a model of `size` (H, W) sees of an image: the centre, unless `place` moves it.

        `place` are two numbers in [0, 1): 0 is the upper or left end.
        """
        h, w = self.covered(size)
        box = 0, 0, height, width
        if self.resize == "smaller_side":
            box_h, box_w = min(height, LONGEST * width), min(width, LONGEST * height)
            box = (height - box_h) // 2, (width - box_w) // 2, box_h, box_w
            whole = floor if h == w else round  # as torchvision and timm do
            h, w = max(h, whole(w * box_h / box_w)), max(w, whole(h * box_w / box_h))
        margins = h - size[0], w - size[1]
        if place is not None:
            corner = (floor(at * (m + 1)) for at, m in zip(place, margins, strict=True))
        else:
            corner = (m // 2 if self.round_down else round(m / 2) for m in margins)
        return Window(box, (h, w), tuple(corner))

    def changed(self, size: tuple[int, int], **given) -> "Pixels":
        """The recipe with other values of some fields, for a model of `size` (H, W).

        `resize` may also be the length of the smaller side in pixels. Raises UserError.
        """
        if isinstance(pixels := given.get("resize"), int):
            least = min(size)
            if "crop_fraction" in given:
                raise UserError("a resize in pixels sets the crop already: give one of the two")
            if not least <= pixels <= 10 * least:
                limits = f"give it {least} to {10 * least} pixels"
                raise UserError(f"a resize to {pixels} pixels does not suit this model: {limits}")
            given |= {"resize": "smaller_side", "crop_fraction": least / pixels}
        return replace(self, **given)

    def describe(self, size: tuple[int, int]) -> str:
        """The recipe in words, for a model of `size`."""
        h, w = self.window(*size, size).whole
        shape = f"smaller side to {h}" if h == w else f"cover {h}x{w}"
        words = f"squash to {h}x{w}" if self.resize == "squash" else shape
        if self.resize != "squash" or self.crop_fraction < 1:
            words += f", central crop {size[0]}x{size[1]}"
        return f"{self.interpolation.replace('_no_', ' without ')}, {words}"


PLAIN = Pixels()
GOOGLE = Pixels(ALIASED)  # for the published accuracies of the files of `models.zoo`


def library_recipe(values: Mapping) -> Pixels:
    """The recipe in a config of timm or Hugging Face. Raises UserError for one that is not known.

    Sources: timm's data/transforms_factory.py, transformers' ViTImageProcessor and
    BitImageProcessor.
    """
    try:
        if "interpolation" in values:  # timm's
            mode = values.get("crop_mode") or "center"
            resize = {"center": "smaller_side"}.get(mode, mode)
            return Pixels(values["interpolation"], resize, values.get("crop_pct", 0.875))
        kind = values.get("image_processor_type", values.get("feature_extractor_type", ""))
        if not (kind or "resample" in values) or not values.get("do_resize", True):
            return PLAIN
        # What transformers takes where a file does not say it.
        smaller, crops = kind.startswith(("CLIP", "Bit")), kind.startswith(("CLIP", "Bit", "DeiT"))
        size, crop = values.get("size", 256 if kind[:4] == "DeiT" else 224), values.get("crop_size")
        if isinstance(size, dict):
            smaller = "shortest_edge" in size
            size = size["shortest_edge" if smaller else "height"]
        crop = crop["height"] if isinstance(crop, dict) else crop or 224
        fraction = crop / size if values.get("do_center_crop", crops) else 1.0
        mode = values.get("resample", 2 if kind.startswith("ViT") else 3)
        interpolation = {2: "bilinear", 3: "bicubic"}.get(mode, mode)
        return Pixels(interpolation, "smaller_side" if smaller else "squash", fraction, True)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"images are resized in an unknown way ({error!r:.100})") from error
