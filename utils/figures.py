"""Figures for TensorBoard, reports and the notebook: every one is a Pillow image.

matplotlib is imported when the first figure is drawn, and used without pyplot, so that no display
is needed and no figure stays in memory. B batch, C channels, H W pixels, K classes.
"""

import io
import warnings
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from models.modeling import VisionTransformer
from utils.attention import CLIP, different_heads, head_maps, overlay, rollout
from utils.image_set import ImageSet
from utils.images import read_image, seen_part, to_image
from utils.stream import EvalStream

MAX_CLASSES = 1000  # a confusion matrix of more classes is too large to draw at every evaluation
NAMED_CLASSES = 40  # more names are unreadable in a confusion matrix
COUNTED_CLASSES = 20  # and more classes leave no room for the counts
# matplotlib's own font has no Chinese, Japanese or Korean characters. The first of these fonts
# that is installed and has a character draws it: fonts of Linux, of Windows, of macOS.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei"]
CJK_FONTS += ["WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic"]
CJK_FONTS += ["PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"]


def new_figure(width: float, height: float, layout: str | None = "constrained"):
    """A matplotlib Figure of (width, height) inches with 100 pixels each."""
    from matplotlib import font_manager, rcParams
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    rcParams["font.family"] = ["sans-serif", *(name for name in CJK_FONTS if name in installed)]
    return Figure(figsize=(width, height), dpi=100, layout=layout)


def render(figure) -> Image.Image:
    """The figure as an RGB image."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A character that no font has is drawn as a box. One warning for each would be too many.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="rgba")  # a PNG would take most of the time
    size = figure.canvas.get_width_height()
    return Image.frombytes("RGBA", size, buffer.getvalue()).convert("RGB")


def escape_label(name: str, most: int = 24) -> str:
    """A class name as text for matplotlib: at most `most` characters, and $ starts no formula."""
    name = name if len(name) <= most else name[: most - 1] + "…"
    return name.replace("$", r"\$")


def grid(
    pictures: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    side: int = 200,
    gap: int = 2,
    bar: bool = False,
) -> Image.Image:
    """Pictures row by row on white, with a title above each.

    Each picture is scaled to fit into a square of `side` pixels. `gap` is the space between them.
    `bar` adds the colours of overlays, and what they say.
    Titles are matplotlib text of one or more lines; class names in them need `escape_label`.
    """
    fitted = [_fit(picture.convert("RGB"), side) for picture in pictures]
    width, height = (max(sizes) for sizes in zip(*(p.size for p in fitted), strict=True))
    lines = 1 + max(title.count("\n") for title in titles) if titles else 0
    font = max(8, side / 25)  # points: larger pictures are often shown smaller
    line = round(1.75 * font)  # pixels
    above = line * lines + 4 * bool(titles)
    below = 2 * line if bar else 0
    columns = min(columns, len(fitted))
    rows = -(-len(fitted) // columns)
    x_step, y_step = width + gap, above + height + gap
    sheet = Image.new("RGB", (columns * x_step - gap, rows * y_step - gap + below), "white")
    corners = [(i % columns * x_step, i // columns * y_step + above) for i in range(len(fitted))]
    for picture, (x, y) in zip(fitted, corners, strict=True):
        sheet.paste(picture, (x + (width - picture.width) // 2, y))
    if not titles and not bar:
        return sheet
    texts = list(titles or ())
    places = [(x + width / 2, y - 3, "center", "bottom") for x, y in corners] if titles else []
    if bar:
        grey, values = Image.new("L", (sheet.width // 4, line), 128), torch.linspace(0, 1, 99)
        left, top = (sheet.width - grey.width) // 2, sheet.height - line
        sheet.paste(overlay(grey, values[None]), (left, top))
        texts += ["least attention", f"most (top {1 - CLIP:.0%} of patches)"]
        middle, right = top + line / 2, left + grey.width
        places += [(left - 6, middle, "right", "center"), (right + 6, middle, "left", "center")]
    # Half a pixel more, since matplotlib rounds down to whole pixels.
    figure = new_figure((sheet.width + 0.5) / 100, (sheet.height + 0.5) / 100, layout=None)
    figure.figimage(sheet, origin="upper")
    for text, (x, y, ha, va) in zip(texts, places, strict=True):
        figure.text(x / sheet.width, 1 - y / sheet.height, text, fontsize=font, ha=ha, va=va)
    return render(figure)


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Scale to fit into a square; enlarged pixels stay sharp squares."""
    smaller = max(picture.size) > side
    method = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return ImageOps.contain(picture, (side, side), method)


def thumbnail(images: ImageSet, index: int) -> Image.Image:
    """One image of a set, before it is resized for a model, at most 256 pixels high."""
    if images.pixels is not None:
        return to_image(images.pixels[index].float() / 127.5 - 1).convert("RGB")
    picture = read_image(images.paths[index], images.decoding).convert("RGB")
    picture.thumbnail((1024, 256))
    return picture


def augmented_batch(pixels: Tensor, most: int = 32) -> Image.Image:
    """The first training images of a batch (B, C, H, W), as the model sees them."""
    return grid([to_image(image) for image in pixels[:most]], side=96)


def attention_sheet(
    model: VisionTransformer, pixels: Tensor, image: Image.Image, side: int = 300
) -> Image.Image:
    """`image`, its rollout, and the three heads of the last four layers that differ most, in a row.

    `pixels` (1, C, H, W) is `image` as the model sees it. The rollout is "min": large models use
    some patches of the background as memory, but not in all heads.
    """
    image = ImageOps.contain(image.convert("RGB"), (side, side))
    maps = head_maps(model, pixels)[-4:, 0]  # (layers, H, h, w)
    heat, titles = [rollout(model, pixels, "min")[0]], ["image", "rollout, min of heads"]
    for layer, head in different_heads(maps):
        heat.append(maps[layer, head])
        number = model.config.num_layers - len(maps) + layer + 1
        titles.append(f"layer {number}, head {head + 1}")
    return grid([image, *(overlay(image, h) for h in heat)], titles, side=side, bar=True)


class AttentionPreview:
    """Some images of a set, and below each the model's rollout on it.

    `count` images are taken at equal distances, and decoded once. `size` is the model's (H, W).
    """

    def __init__(
        self, images: ImageSet, size: tuple[int, int], device: torch.device, count: int = 4
    ):
        images = images.readable()
        chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
        images = images.subset(chosen)
        self.pixels = next(iter(EvalStream(images, size, batch_size=count, device=device)))[0]
        how, numbers = images.decoding.pixels, range(len(images))
        originals = [seen_part(thumbnail(images, index), size, how) for index in numbers]
        self.originals = [ImageOps.contain(original, (160, 160)) for original in originals]

    def draw(self, model: VisionTransformer) -> Image.Image:
        # One image at a time: the maps of four images in B/8 at 384 pixels need a gigabyte.
        heat = [rollout(model, image[None])[0] for image in self.pixels]
        overlays = [overlay(image, h) for image, h in zip(self.originals, heat, strict=True)]
        return grid([*self.originals, *overlays], columns=len(heat), side=160, gap=0)


def confusion_matrix(counts: Tensor, classes: Sequence[str]) -> Image.Image:
    """Counts (K, K), a row for each label, as fractions of the row.

    Names are written up to NAMED_CLASSES, and counts up to COUNTED_CLASSES.
    """
    fractions = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = max(5.0, min(14.0, 2 + 0.35 * len(classes)))
    figure = new_figure(side + 1, side)
    axes = figure.add_subplot()
    drawn = axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="fraction of the images with this label")
    axes.set(xlabel="prediction", ylabel="label")
    if len(classes) <= NAMED_CLASSES:
        names = [escape_label(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= COUNTED_CLASSES:
        style = {"ha": "center", "va": "center", "fontsize": 7}
        for i, j in counts.nonzero().tolist():
            colour = "white" if fractions[i, j] > 0.5 else "black"
            axes.text(j, i, int(counts[i, j]), color=colour, **style)
    return render(figure)


def reliability_diagram(bins: Sequence[Mapping], width: float, error: float) -> Image.Image:
    """Accuracy by confidence: a bar for each bin of `width`, whose lower edge is "above".

    `error` is the expected calibration error, for the title.
    """
    figure = new_figure(5, 5)
    axes = figure.add_subplot()
    edges, accuracies = [row["above"] for row in bins], [row["accuracy"] for row in bins]
    axes.bar(edges, accuracies, width, align="edge", edgecolor="white")
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_title(f"expected calibration error {error:.4f}")
    return render(figure)
