"""Predictions for a set of images, and the metrics of them. n images, C classes, B batch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import dist_util
from utils.augment import send
from utils.files import atomic_write
from utils.precision import Precision
from utils.stream import EvalStream

BINS = 15  # of the reliability diagram, as in Guo et al. 2017 (arXiv:1706.04599)


@dataclass(frozen=True)
class Predictions:
    """One value per image, each field (n,), in the order of the image set.

    `confidence` is the probability of the `prediction`; `top5` says whether the label is among
    the five most probable classes.
    """

    label: Tensor
    prediction: Tensor
    confidence: Tensor
    loss: Tensor
    top5: Tensor

    @property
    def correct(self) -> Tensor:
        return self.prediction == self.label

    @property
    def accuracy(self) -> float:
        return self.correct.double().mean().item()

    @property
    def mean_loss(self) -> float:
        return self.loss.mean().item()


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32, or unchanged if they are float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def predict_dataset(
    model: nn.Module, stream: EvalStream, precision: Precision, bar=iter
) -> Predictions:
    """Predictions for every image once, computed by all processes and returned on each of them.

    The model is in evaluation mode meanwhile. `bar` wraps the stream, to show the progress.
    """
    training = model.training
    model.eval()
    table = torch.zeros(5, len(stream.images), dtype=torch.float64, device=stream.device)  # (5, n)
    for indices, (images, labels) in zip(stream.indices, bar(stream), strict=True):
        with precision.autocast():
            logits = model(images.to(precision.model_dtype))  # (B, C)
        logits = at_least_float32(logits)
        confidence, prediction = logits.softmax(dim=1).max(dim=1)  # (B,) each
        loss = F.cross_entropy(logits, labels, reduction="none")  # (B,)
        five = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        top5 = (five == labels[:, None]).any(dim=1)  # (B,)
        rows = [row.double() for row in (labels, prediction, confidence, loss, top5)]
        table[:, send(indices, stream.device)] = torch.stack(rows)
    model.train(training)
    # Each process has filled in its own images, and the others are 0: the sum has all of them.
    label, prediction, confidence, loss, top5 = dist_util.all_reduce_sum(table).cpu()
    return Predictions(label.long(), prediction.long(), confidence, loss, top5.bool())


def compute_metrics(predictions: Predictions, classes: Sequence[str]) -> dict:
    """The metrics of `results.json`, over all images and for each class.

    The macro averages are over the classes that have images.
    """
    from sklearn.metrics import precision_recall_fscore_support  # slow to import

    scores = precision_recall_fscore_support(
        predictions.label, predictions.prediction, labels=range(len(classes)), zero_division=0
    )
    keys = ("name", "precision", "recall", "f1", "images")
    rows = zip(classes, *(column.tolist() for column in scores), strict=True)
    per_class = [dict(zip(keys, row, strict=True)) for row in rows]
    present = [row for row in per_class if row["images"]]
    macro = {f"macro_{key}": fmean(row[key] for row in present) for key in keys[1:4]}
    bins = calibration(predictions)
    n = len(predictions.label)
    gaps = (row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    return {
        "images": n,
        "accuracy": predictions.accuracy,
        "loss": predictions.mean_loss,
        "top5_accuracy": predictions.top5.double().mean().item(),
        **macro,
        "calibration_error": sum(gaps) / n,
        "calibration": bins,
        # A list and not a mapping, because some JSON readers merge names that differ in case.
        "classes": per_class,
    }


def calibration(predictions: Predictions) -> list[dict]:
    """The reliability diagram: number of images, mean confidence and accuracy of each bin of
    confidence that is not empty. The expected calibration error is the mean gap of the two."""
    upper = (predictions.confidence * BINS).ceil()
    bin_of = upper.long().clamp(1, BINS) - 1  # bin i is (i / BINS, (i + 1) / BINS]
    rows = []
    for i in bin_of.unique().tolist():  # in ascending order
        inside = bin_of == i
        confidence = predictions.confidence[inside].mean().item()
        accuracy = predictions.correct[inside].double().mean().item()
        row = {"above": i / BINS, "images": int(inside.sum())}
        rows.append(row | {"confidence": confidence, "accuracy": accuracy})
    return rows


def confusion_counts(predictions: Predictions, num_classes: int) -> Tensor:
    """(C, C) numbers of images: the row is the label, the column the prediction."""
    cells = predictions.label * num_classes + predictions.prediction
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def misclassified(predictions: Predictions) -> list[int]:
    """Indices of the images with a wrong prediction, the most confident first."""
    wrong = (~predictions.correct).nonzero().flatten()
    order = predictions.confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order].tolist()


def write_results(path: str | Path, results: Mapping) -> None:
    """Write JSON that every reader accepts: a number that is not finite becomes null."""
    finite = json.loads(json.dumps(results), parse_constant=lambda _: None)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
