"""The pictures of notebook, TensorBoard, reports and page: Pillow images, all of them.

Matplotlib is used without pyplot, so that nothing depends on a display or stays in memory.
C channels, h w the grid of patches, H W pixels, K classes.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from math import ceil

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from PIL import Image
from torch import Tensor

from models.modeling import VisionTransformer
from utils.attention import overlay, rollout
from utils.stream import PIL_MODES, EvalStream, ImageSet, Slice, normalize, read_image, to_tensor

MOST_CLASSES = 1000  # whose confusion is worth its quadratic cost at every evaluation
# Fonts with Chinese, Japanese and Korean characters, which matplotlib's own lacks: those of them
# that are installed stand in where it has none.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
             "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans",
             "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "Arial Unicode MS")  # fmt: skip
_installed = set(get_font_names())
rcParams["font.family"] = ["sans-serif", *(name for name in CJK_FONTS if name in _installed)]
# A character that no font has is a box, of which matplotlib would warn at every drawing.
warnings.filterwarnings("ignore", message="Glyph .* missing")

NAMED_CLASSES = 40  # a confusion matrix of more has no room for names,
COUNTED_CLASSES = 20  # and of more than these none for numbers


def to_pixels(image: Image.Image, model: VisionTransformer) -> Tensor:
    """A photograph as the model wants it, (1, C, H, W) in [-1, 1]: plainly resized, as in
    evaluation."""
    resized = image.convert(PIL_MODES[model.in_channels]).resize(
        model.img_size[::-1], Image.Resampling.BILINEAR
    )
    return normalize(to_tensor(resized))[None]


def to_image(pixels: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] as a picture; of other channel counts than 1, 3 and 4, the first."""
    pixels = pixels if pixels.shape[0] in PIL_MODES else pixels[:1]
    array = pixels.detach().float().cpu().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return Image.fromarray(array.permute(1, 2, 0).squeeze(2).numpy() if len(array) == 1
                           else array.permute(1, 2, 0).numpy())  # fmt: skip


def tile(pictures: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side, row by row."""
    width, height = pictures[0].size
    rows = ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def panels(
    pictures: Sequence[Image.Image], titles: Sequence[str], columns: int, width: float = 9.0
) -> Image.Image:
    """Pictures with a title each; `width` in inches, 100 pixels each."""
    rows = ceil(len(pictures) / columns)
    aspect = pictures[0].height / pictures[0].width
    figure = _figure(width, rows * (width / columns * aspect + 0.25))
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(picture, cmap="gray", interpolation="nearest")
        axes.set_title(plain(title, 80), fontsize=8)
        axes.axis("off")
    return _drawn(figure)


def top_classes(logits: Tensor, classes: Sequence[str], count: int = 5) -> list[tuple[str, float]]:
    """The `count` most probable (class, probability) of logits (K,)."""
    best = logits.detach().float().softmax(dim=0).topk(min(count, len(classes)))
    return [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(),
                                            strict=True)]  # fmt: skip


def bars(ranked: Sequence[tuple[str, float]]) -> Image.Image:
    """Class probabilities, the most probable on top."""
    names, values = zip(*reversed(ranked), strict=True)
    names = [plain(name, 60) for name in names]
    figure = _figure(3 + 0.08 * max(12, *map(len, names)), 0.5 + 0.3 * len(ranked))
    axes = figure.add_subplot()
    drawn = axes.barh(range(len(names)), values, color="#5b4a9e")
    axes.set_yticks(range(len(names)), names)
    axes.bar_label(drawn, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
    axes.set_xlim(0, 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def position_similarity(model: VisionTransformer, most: int = 7) -> Image.Image:
    """Cosine similarity of position embeddings: one tile a position, of all positions to it.

    As in figure 7 (centre) of the ViT paper, arXiv:2010.11929; of a finer grid, `most` positions
    along each side are shown.
    """
    h, w = model.grid
    table = model.transformer.embeddings.position_embeddings[0, -h * w :].detach().float().cpu()
    table = torch.nn.functional.normalize(table, dim=1)
    similar = (table @ table.T).view(h, w, h, w)
    rows, columns = (torch.linspace(0, n - 1, min(n, most)).round().long() for n in (h, w))
    figure = _figure(0.8 * len(columns) + 0.8, 0.8 * len(rows) * h / w + 0.5)
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            axes = figure.add_subplot(len(rows), len(columns), i * len(columns) + j + 1)
            drawn = axes.imshow(similar[row, column], vmin=-1, vmax=1, cmap="viridis")
            axes.set_xticks([])
            axes.set_yticks([])
    figure.colorbar(drawn, ax=figure.axes, shrink=0.8, label="cosine similarity")
    return _drawn(figure)


def patch_filters(model: VisionTransformer, count: int = 28) -> Image.Image:
    """Principal components of the first layer's filters, the strongest first.

    As in figure 7 (left) of arXiv:2010.11929. A hybrid's patches are cut from feature maps, which
    nobody can look at: there it is the filters of the ResNet's first convolution.
    """
    embeddings = model.transformer.embeddings
    if model.config.resnet_layers is not None:
        weight = embeddings.hybrid_model.root.conv.weight
    else:
        weight = embeddings.patch_embeddings.weight
    weight = weight.detach().float().cpu()  # (D, C, p, p)
    components = torch.linalg.svd(weight.flatten(1), full_matrices=False).Vh
    tiles = components[:count].view(-1, *weight.shape[1:])
    tiles = tiles[:, :3] if weight.shape[1] > 3 else tiles
    tiles = tiles / tiles.abs().amax(dim=(1, 2, 3), keepdim=True)
    side = 48
    pictures = [to_image(t).resize((side, side), Image.Resampling.NEAREST) for t in tiles]
    return tile(pictures, columns=7)


def confusion_picture(counts: Tensor, classes: Sequence[str]) -> Image.Image:
    """Counts (K, K), a row a true class: each row's shares, with names and numbers while they can
    be read."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = max(5.0, min(14.0, 2 + 0.35 * len(classes)))
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the label's images")
    axes.set(xlabel="guess", ylabel="label")
    if len(classes) <= NAMED_CLASSES:
        names = [plain(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= COUNTED_CLASSES:
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
    return _drawn(figure)


def reliability(bins: Sequence[Mapping], width: float, error: float) -> Image.Image:
    """Accuracy over confidence, a bar for each bin of `width` ("above" is its lower edge)."""
    figure = _figure(5, 5)
    axes = figure.add_subplot()
    axes.bar([row["above"] for row in bins], [row["accuracy"] for row in bins], width,
             align="edge", edgecolor="white")  # fmt: skip
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy",
             title=f"expected calibration error {error:.4f}")  # fmt: skip
    return _drawn(figure)


def contact_sheet(images: ImageSet, indices: Sequence[int], titles: Sequence[str]) -> Image.Image:
    """Some of a set's images as they lie there, with their titles above, five in a row."""
    columns = min(5, len(indices))
    rows = ceil(len(indices) / columns)
    figure = _figure(2.2 * columns, 2.6 * rows)
    for place, (index, title) in enumerate(zip(indices, titles, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(original(images, index))
        axes.set_axis_off()
        axes.set_title(title, fontsize=8)
    return _drawn(figure)


def original(images: ImageSet, index: int) -> Image.Image:
    """One image of a set, before it is resized for a model, no higher than 256 pixels."""
    if images.pixels is None:
        picture = read_image(images.paths[index], images.mode).convert("RGB")
        picture.thumbnail((1024, 256))
        return picture
    return to_image(images.pixels[index].float() / 127.5 - 1).convert("RGB")


def accuracy_curves(groups: dict[str, list[dict[int, float]]], title: str = "") -> Image.Image:
    """Accuracies by update of each label's runs: the mean, in a band from lowest to highest.

    The runs of one label have the same updates.
    """
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    for label, curves in groups.items():
        updates = sorted(curves[0])
        each = [[curve[update] for curve in curves] for update in updates]
        mean = [sum(values) / len(values) for values in each]
        (line,) = axes.plot(updates, mean, marker="o", markersize=3, label=plain(label, 80))
        if len(curves) > 1:
            low, high = [min(values) for values in each], [max(values) for values in each]
            axes.fill_between(updates, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.annotate(f"{mean[-1]:.3f}", (updates[-1], mean[-1]), xytext=(5, 0), va="center",
                      textcoords="offset points", color=line.get_color())  # fmt: skip
    axes.set(xlabel="updates", ylabel="accuracy on held-out images", ylim=(0, 1))
    axes.set_title(plain(title, 80))
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    if len(groups) <= 6:
        axes.legend(loc="lower right", frameon=False)
    else:  # beside the curves, not over them
        axes.legend(loc="center left", bbox_to_anchor=(1.08, 0.5), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


class Watch:
    """A few images of a set, spread over it, on which a run shows its attention.

    `picture` is a row of them and, below, their rollout over them. They are decoded once.
    """

    def __init__(self, images: ImageSet, size: tuple[int, int], device: torch.device, count=4):
        chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
        images = images.subset(chosen)
        stream = EvalStream(images, size, batch=count, part=Slice(), device=device)
        self.pixels = next(iter(stream))[0]
        height = 160  # of every picture; widths follow each image's own aspect
        originals = [original(images, i) for i in range(len(images))]
        self.originals = [
            image.resize((max(1, round(height * image.width / image.height)), height))
            for image in originals
        ]

    def picture(self, model: VisionTransformer) -> Image.Image:
        # One by one: a run has little memory to spare, and four of B/8 at 384 px want a gigabyte.
        heat = [rollout(model, pixels[None])[0] for pixels in self.pixels]
        rows = [self.originals, [overlay(image, h) for image, h in
                                 zip(self.originals, heat, strict=True)]]  # fmt: skip
        sheet = Image.new("RGB", (sum(image.width for image in rows[0]), 2 * 160))
        for y, row in enumerate(rows):
            x = 0
            for image in row:
                sheet.paste(image, (x, y * 160))
                x += image.width
        return sheet


def augmented(pixels: Tensor, most: int = 32) -> Image.Image:
    """The first training images of a batch (B, C, H, W), as the model sees them."""
    pictures = [to_image(p).convert("RGB") for p in pixels[:most]]
    pictures = [p.resize((96, max(1, round(96 * p.height / p.width)))) for p in pictures]
    return tile(pictures, columns=8)


def plain(name: str, most: int = 24) -> str:
    """A class name for a figure: short, and no formula, which a $ would start."""
    name = name if len(name) <= most else name[: most - 1] + "…"
    return name.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _drawn(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def jpeg(picture: Image.Image) -> bytes:
    """Small enough to be stored in a notebook."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
