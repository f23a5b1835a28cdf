"""What an evaluation tells beyond one number: per class, the mistakes, and how far to trust it.

`measure` keeps a few numbers of every image; `summary` makes the figures of `results.json` out of
them, and `write_report` the files that people look at. n images, C classes.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import dist_util
from utils.files import written_whole
from utils.stream import EvalStream, ImageSet, read_image

BINS = 15  # of the reliability diagram, as in Guo et al., arXiv:1706.04599
MISTAKES = 20  # on the contact sheet
NAMED_CLASSES = 40  # more names than that cannot be read beside a confusion matrix


@dataclass(frozen=True)
class Outcome:
    """Every image's `label`, `guess`, `confidence` (the guess's probability), `loss`, and whether
    the label is among the likeliest five (`top5`); each (n,), in the order of the image set."""

    label: Tensor
    guess: Tensor
    confidence: Tensor
    loss: Tensor
    top5: Tensor


@torch.no_grad()
def measure(logits_of: Callable[[Tensor], Tensor], batches: EvalStream, bar=iter) -> Outcome:
    """The Outcome of all images, on every process. `logits_of` maps images to float32 logits."""
    table = torch.zeros(5, len(batches.images), dtype=torch.float64, device=batches.device)
    for indices, (images, labels) in zip(batches.indices, bar(batches), strict=True):
        logits = logits_of(images)  # (B, C)
        confidence, guess = logits.softmax(dim=1).max(dim=1)
        five = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        rows = (labels, guess, confidence, F.cross_entropy(logits, labels, reduction="none"),
                (five == labels[:, None]).any(dim=1))  # fmt: skip
        table[:, indices.to(batches.device)] = torch.stack([row.double() for row in rows])
    # Every process has filled in its own images and left the others' at 0.
    label, guess, confidence, loss, top5 = dist_util.sum_over_processes(table).cpu()
    return Outcome(label.long(), guess.long(), confidence, loss, top5.bool())


def summary(outcome: Outcome, classes: Sequence[str]) -> dict:
    """The figures of `results.json`: of all images, and of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    right = outcome.guess == outcome.label
    scores = precision_recall_fscore_support(
        outcome.label, outcome.guess, labels=range(len(classes)), zero_division=0
    )
    columns = ("precision", "recall", "f1", "images")
    per_class = [dict(zip(columns, (float(p), float(r), float(f), int(n)), strict=True))
                 for p, r, f, n in zip(*scores, strict=True)]  # fmt: skip
    present = [row for row in per_class if row["images"]]
    bins = calibration(outcome)
    return {
        "images": len(outcome.label),
        "accuracy": right.double().mean().item(),
        "top5_accuracy": outcome.top5.double().mean().item(),
        "loss": outcome.loss.mean().item(),
        "macro_precision": sum(row["precision"] for row in present) / len(present),
        "macro_recall": sum(row["recall"] for row in present) / len(present),
        "macro_f1": sum(row["f1"] for row in present) / len(present),
        "calibration_error": sum(
            row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins
        ) / len(right),
        "calibration": bins,
        # A list: two folders' names may differ in nothing but what JSON readers fold together.
        "classes": [{"name": name} | row for name, row in zip(classes, per_class, strict=True)],
    }  # fmt: skip


def calibration(outcome: Outcome) -> list[dict]:
    """The reliability diagram: for every bin of confidence that has images, their number, mean
    confidence and accuracy. The expected calibration error is the mean gap between the two."""
    right = (outcome.guess == outcome.label).double()
    bin_of = (outcome.confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (low, high]
    rows = []
    for i in range(BINS):
        inside = bin_of == i
        if inside.any():
            rows.append({
                "above": i / BINS,
                "images": int(inside.sum()),
                "confidence": outcome.confidence[inside].mean().item(),
                "accuracy": right[inside].mean().item(),
            })  # fmt: skip
    return rows


def write_results(path: Path, results: Mapping) -> None:
    """JSON that any reader takes: a loss that is not finite becomes null."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(_finite(results), indent=1) + "\n", encoding="utf-8")


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: Mapping, most: int = 30) -> str:
    """The figures for the console: all classes, or where there are many, the worst of them."""
    rows = [row for row in results["classes"] if row["images"]]
    lines = []
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: row["f1"])[:most]
        lines.append(f"the {most} classes of lowest F1:")
    width = max([5, *(len(row["name"]) for row in rows)])
    lines.append(f"{'class':{width}}  precision  recall      f1  images")
    lines += [f"{row['name']:{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  "
              f"{row['f1']:6.4f}  {row['images']:6d}" for row in rows]  # fmt: skip
    return "\n".join(lines)


def write_report(
    folder: Path, outcome: Outcome, results: Mapping, images: ImageSet, classes: Sequence[str]
) -> list[Path]:
    """Confusion matrix (CSV, PNG), the most confident mistakes and the reliability diagram (PNG).

    Returns the files' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix = confusion(outcome, len(classes))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["label \\ guess", *classes])
    rows.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    paths = [folder / name for name in ("confusion.csv", "confusion.png", "reliability.png")]
    with written_whole(paths[0]) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    _save(paths[1], _draw_confusion(matrix, classes))
    _save(paths[2], _draw_reliability(results))
    wrong = most_confident_mistakes(outcome)
    if len(wrong):
        paths.append(folder / "mistakes.png")
        _save(paths[-1], _draw_mistakes(wrong, outcome, images, classes))
    else:  # an earlier report's would be believed
        (folder / "mistakes.png").unlink(missing_ok=True)
    return paths


def confusion(outcome: Outcome, classes: int) -> Tensor:
    """(C, C) counts: row is the label, column the guess."""
    cells = outcome.label * classes + outcome.guess
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def most_confident_mistakes(outcome: Outcome, most: int = MISTAKES) -> list[int]:
    """Indices of wrongly guessed images, the most confident first."""
    wrong = (outcome.guess != outcome.label).nonzero().flatten()
    order = outcome.confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order][:most].tolist()


# -------------------------------------------------------------------------------------- drawing


def _figure(width: float, height: float):
    """A figure that belongs to no window system; its size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(path: Path, figure) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plain(name: str, most: int = 24) -> str:
    """A class name for a figure: short, and no formula, which a $ would start."""
    name = name if len(name) <= most else name[: most - 1] + "…"
    return name.replace("$", r"\$")


def _draw_confusion(matrix: Tensor, classes: Sequence[str]):
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    side = max(5.0, min(14.0, 2 + 0.35 * len(classes)))
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="guess", ylabel="label", title="share of each class's images")
    if len(classes) <= NAMED_CLASSES:
        names = [plain(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= 20:
        for i, j in matrix.nonzero().tolist():
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color=color, fontsize=7)
    figure.colorbar(shown)
    return figure


def _draw_reliability(results: Mapping):
    figure = _figure(5, 5)
    axes = figure.add_subplot()
    rows = results["calibration"]
    axes.bar([row["above"] for row in rows], [row["accuracy"] for row in rows], 1 / BINS,
             align="edge", edgecolor="white")  # fmt: skip
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy",
             title=f"expected calibration error {results['calibration_error']:.4f}")  # fmt: skip
    return figure


def _draw_mistakes(wrong: Sequence[int], outcome: Outcome, images: ImageSet, classes):
    columns = min(5, len(wrong))
    rows = math.ceil(len(wrong) / columns)
    figure = _figure(2.2 * columns, 2.6 * rows)
    for place, index in enumerate(wrong, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(_picture(images, index))
        axes.set_axis_off()
        label, guess = (plain(classes[i]) for i in (outcome.label[index], outcome.guess[index]))
        axes.set_title(f"{guess} {outcome.confidence[index]:.2f}\nis {label}", fontsize=8)
    return figure


def _picture(images: ImageSet, index: int) -> Image.Image:
    if images.pixels is None:
        picture = read_image(images.paths[index]).convert("RGB")
        picture.thumbnail((256, 256))
        return picture
    pixels = images.pixels[index].cpu()  # (C, h, w)
    pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy()).convert("RGB")
