"""Predictions for a set of images, and the metrics of them. n images, C classes, B batch."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import dist_util
from utils.augment import send
from utils.files import atomic_write
from utils.precision import Precision
from utils.stream import EvalStream

SCORES = ("accuracy", "loss", "macro_f1", "balanced_accuracy")  # by which weights are selected
BINS = 15  # of the reliability diagram, as in Guo et al. 2017 (arXiv:1706.04599)


@dataclass(frozen=True)
class Predictions:
    """One value per image, each field (n,), in the order of the image set.

    `confidence` is the probability of the `prediction`; `top5` says whether the label is among
    the five most probable classes. `probabilities` float32 (n, C) are kept on request.
    """

    label: Tensor
    prediction: Tensor
    confidence: Tensor
    loss: Tensor
    top5: Tensor
    probabilities: Tensor | None = None

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
    model: nn.Module, stream: EvalStream, precision: Precision, bar=iter, keep: int = 0
) -> Predictions:
    """Predictions for every image once, computed by all processes and returned on each of them.

    The model is in evaluation mode meanwhile. `bar` wraps the stream, to show the progress. The
    probabilities of `keep` classes, which is 0 or all of them, are part of the predictions.
    """
    training = model.training
    model.eval()
    rows = []
    for images, labels in bar(stream):
        with precision.autocast():
            logits = model(images.to(precision.model_dtype))  # (B, C)
        logits = at_least_float32(logits)
        probabilities = logits.softmax(dim=1)  # (B, C)
        confidence, prediction = probabilities.max(dim=1)  # (B,) each
        loss = F.cross_entropy(logits, labels, reduction="none")  # (B,)
        five = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        top5 = (five == labels[:, None]).any(dim=1)  # (B,)
        columns = torch.stack([labels, prediction, confidence, loss, top5], dim=1)  # (B, 5)
        rows.append(torch.cat([columns, probabilities[:, :keep]], dim=1))  # (B, 5 + keep)
    model.train(training)
    # Whole numbers up to 2^24 are exact in float32, which all devices have.
    table = torch.zeros(len(stream.images), 5 + keep, device=stream.device)  # (n, 5 + keep)
    if rows:
        (own,) = send(stream.device, torch.cat(stream.indices))
        table[own] = torch.cat(rows).float()
    # Each process has filled in its own images, and the others are 0: the sum has all of them.
    # Only here the CPU waits for a GPU.
    table = dist_util.all_reduce_sum(table).cpu()
    label, prediction, confidence, loss, top5 = table[:, :5].double().T
    kept = table[:, 5:].clone() if keep else None
    return Predictions(label.long(), prediction.long(), confidence, loss, top5.bool(), kept)


def class_scores(predictions: Predictions, num_classes: int) -> dict[str, Tensor]:
    """Precision, recall, F1 and number of images of each class (C,); 0 where nothing is counted."""
    label, prediction, correct = predictions.label, predictions.prediction, predictions.correct
    counts = (x.bincount(minlength=num_classes) for x in (label, prediction, label[correct]))
    images, predicted, hits = counts
    wholes = {"precision": predicted, "recall": images, "f1": (images + predicted) / 2}
    rates = {name: hits / whole.double().clamp(min=0.5) for name, whole in wholes.items()}
    return rates | {"images": images}


def summary(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """The figures of SCORES. Those of classes are means over the classes that have images."""
    scores = class_scores(predictions, num_classes)
    f1, recall = (scores[name][scores["images"] > 0].mean().item() for name in ("f1", "recall"))
    figures = (predictions.accuracy, predictions.mean_loss, f1, recall)
    return dict(zip(SCORES, figures, strict=True))


def compute_metrics(predictions: Predictions, classes: Sequence[str]) -> dict:
    """The metrics of `results.json`, over all images and for each class.

    The macro averages are over the classes that have images. Balanced accuracy is the macro recall.
    """
    columns = {k: v.tolist() for k, v in class_scores(predictions, len(classes)).items()}
    rows = zip(classes, *columns.values(), strict=True)
    per_class = [dict(zip(("name", *columns), row, strict=True)) for row in rows]
    scores = summary(predictions, len(classes))
    bins = calibration(predictions)
    n = len(predictions.label)
    gaps = (row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    return {
        "images": n,
        **scores,
        "top5_accuracy": predictions.top5.double().mean().item(),
        "macro_precision": fmean(row["precision"] for row in per_class if row["images"]),
        "macro_recall": scores["balanced_accuracy"],
        "macro_roc_auc": macro_roc_auc(predictions),
        "calibration_error": sum(gaps) / n,
        "calibration": bins,
        # A list and not a mapping, because some JSON readers merge names that differ in case.
        "classes": per_class,
    }


def macro_roc_auc(predictions: Predictions) -> float | None:
    """The mean area under the ROC curve of one class against the rest.

    An area is the fraction of pairs (an image of the class, another one) in which the first has
    the higher probability; a tie is half a pair. None without probabilities, or without a pair.
    """
    if predictions.probabilities is None:
        return None
    labels, areas = predictions.label.numpy(), []
    for label, column in enumerate(predictions.probabilities.numpy().T):
        # numpy sorts 1000 columns of 50,000 images in a second, torch in many.
        own, rest = column[labels == label], np.sort(column[labels != label])
        if len(own) and len(rest):
            beaten = sum(np.searchsorted(rest, own, side).sum() for side in ("left", "right"))
            areas.append(int(beaten) / (2 * len(own) * len(rest)))
    return fmean(areas) if areas else None


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


def read_results(path: Path) -> dict:
    """What `write_results` has written; nothing if there is no such file."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def write_results(path: str | Path, results: Mapping) -> None:
    """Write JSON that every reader accepts: a number that is not finite becomes null."""
    finite = json.loads(json.dumps(results), parse_constant=lambda _: None)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
