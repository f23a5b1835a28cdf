"""What an evaluation tells beyond one number: per class, the mistakes, and how far to trust it.

`measure` keeps a few numbers of every image; `summary` makes the figures of `results.json` out of
them, and `write_report` the files that people look at. n images, C classes.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import dist_util, figures
from utils.augment import send
from utils.files import written_whole
from utils.stream import EvalStream, ImageSet

BINS = 15  # of the reliability diagram, as in Guo et al., arXiv:1706.04599
MISTAKES = 20  # on the contact sheet
REPORT = {"confusion.csv", "confusion.png", "reliability.png", "mistakes.csv", "mistakes.png"}


@dataclass(frozen=True)
class Outcome:
    """Every image's `label`, `guess`, `confidence` (the guess's probability), `loss`, and whether
    the label is among the likeliest five (`top5`); each (n,), in the order of the image set."""

    label: Tensor
    guess: Tensor
    confidence: Tensor
    loss: Tensor
    top5: Tensor

    @property
    def right(self) -> Tensor:
        return self.guess == self.label

    @property
    def metrics(self) -> dict[str, float]:
        return {"accuracy": self.right.double().mean().item(), "loss": self.loss.mean().item()}


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
        table[:, send(indices, batches.device)] = torch.stack([row.double() for row in rows])
    # Every process has filled in its own images and left the others' at 0.
    label, guess, confidence, loss, top5 = dist_util.sum_over_processes(table).cpu()
    return Outcome(label.long(), guess.long(), confidence, loss, top5.bool())


def summary(outcome: Outcome, classes: Sequence[str]) -> dict:
    """The figures of `results.json`: of all images, and of each class."""
    from sklearn.metrics import precision_recall_fscore_support

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
        **outcome.metrics,
        "top5_accuracy": outcome.top5.double().mean().item(),
        "macro_precision": sum(row["precision"] for row in present) / len(present),
        "macro_recall": sum(row["recall"] for row in present) / len(present),
        "macro_f1": sum(row["f1"] for row in present) / len(present),
        "calibration_error": sum(
            row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins
        ) / len(outcome.label),
        "calibration": bins,
        # A list: two folders' names may differ in nothing but what JSON readers fold together.
        "classes": [{"name": name} | row for name, row in zip(classes, per_class, strict=True)],
    }  # fmt: skip


def calibration(outcome: Outcome) -> list[dict]:
    """The reliability diagram: for every bin of confidence that has images, their number, mean
    confidence and accuracy. The expected calibration error is the mean gap between the two."""
    bin_of = (outcome.confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (low, high]
    rows = []
    for i in range(BINS):
        inside = bin_of == i
        if inside.any():
            rows.append({
                "above": i / BINS,
                "images": int(inside.sum()),
                "confidence": outcome.confidence[inside].mean().item(),
                "accuracy": outcome.right[inside].double().mean().item(),
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
    """Confusion matrix and mistakes (CSV, PNG) and the reliability diagram (PNG).

    Of more than MOST_CLASSES the matrix, gigabytes of zeros, is left out: the mistakes say as much.
    Returns the files' paths. An earlier report's files are replaced or removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, wrong = {"mistakes.csv"}, mistakes(outcome)
    rows = [[images.called(i), classes[outcome.label[i]], classes[outcome.guess[i]],
             f"{outcome.confidence[i]:.6f}"] for i in wrong]  # fmt: skip
    _write_csv(folder / "mistakes.csv", ["image", "label", "guess", "confidence"], rows)
    pictures = {"reliability.png": figures.reliability(results["calibration"], 1 / BINS,
                                                       results["calibration_error"])}  # fmt: skip
    if wrong:
        titles = [f"{figures.plain(guess)} {float(sure):.2f}\nis {figures.plain(label)}"
                  for _, label, guess, sure in rows[:MISTAKES]]  # fmt: skip
        pictures["mistakes.png"] = figures.contact_sheet(images, wrong[:MISTAKES], titles)
    if len(classes) <= figures.MOST_CLASSES:
        counts = confusion(outcome, len(classes))
        matrix = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
        _write_csv(folder / "confusion.csv", ["label \\ guess", *classes], matrix)
        written.add("confusion.csv")
        pictures["confusion.png"] = figures.confusion_picture(counts, classes)
    for name, picture in pictures.items():
        with written_whole(folder / name) as temporary:
            picture.save(temporary)
    for name in REPORT - written - pictures.keys():
        (folder / name).unlink(missing_ok=True)
    return sorted(folder / name for name in written | pictures.keys())


def forget_report(folder: Path) -> None:
    """Remove the files of `write_report`, and the folder unless it holds others."""
    for name in REPORT:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _write_csv(path: Path, head: Sequence[str], rows) -> None:
    with (
        written_whole(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def confusion(outcome: Outcome, classes: int) -> Tensor:
    """(C, C) counts: row is the label, column the guess."""
    cells = outcome.label * classes + outcome.guess
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def mistakes(outcome: Outcome) -> list[int]:
    """Indices of wrongly guessed images, the most confident first."""
    wrong = (~outcome.right).nonzero().flatten()
    order = outcome.confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order].tolist()
