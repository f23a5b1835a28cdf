"""Predictions of a data set, and metrics against numbers worked out by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch

from utils import metrics
from utils.image_set import ImageSet
from utils.metrics import Predictions, predict_dataset
from utils.precision import Precision
from utils.stream import EvalStream, Shard

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def predictions():
    """Five images of two of the three classes."""
    return Predictions(
        label=torch.tensor([0, 0, 1, 1, 1]),
        prediction=torch.tensor([0, 1, 1, 1, 0]),
        confidence=torch.tensor([0.9, 0.8, 0.8, 0.6, 0.5], dtype=torch.float64),
        loss=torch.tensor([1.0, 2, 3, 4, 5]),
        top5=torch.tensor([True, True, True, True, False]),
    )


def test_metrics_by_hand(predictions):
    scores = metrics.compute_metrics(predictions, CLASSES)
    assert scores["accuracy"] == pytest.approx(0.6) == predictions.accuracy
    assert scores["loss"] == 3 == predictions.mean_loss
    assert scores["top5_accuracy"] == pytest.approx(0.8) and scores["images"] == 5
    ant, bee, cat = scores["classes"]
    assert ant == {"name": "ant", "precision": 0.5, "recall": 0.5, "f1": 0.5, "images": 2}
    assert bee["precision"] == pytest.approx(2 / 3) == bee["recall"] and bee["images"] == 3
    assert cat["images"] == 0  # and is in no average
    for key in ("macro_precision", "macro_recall", "macro_f1"):
        assert scores[key] == pytest.approx((0.5 + 2 / 3) / 2)
    # 0.8 is the upper edge of its bin (11/15, 12/15], and not in the next one.
    gaps = 1 * abs(1 - 0.9) + 2 * abs(0.5 - 0.8) + 1 * abs(1 - 0.6) + 1 * abs(0 - 0.5)
    assert scores["calibration_error"] == pytest.approx(gaps / 5, abs=1e-6)
    bins = metrics.calibration(predictions)
    assert bins == scores["calibration"]
    assert [row["images"] for row in bins] == [1, 1, 2, 1]
    assert [row["above"] for row in bins] == pytest.approx([7 / 15, 8 / 15, 11 / 15, 13 / 15])
    assert metrics.misclassified(predictions) == [1, 4]  # the most confident first
    json.dumps(scores)  # plain Python numbers


@pytest.fixture
def many():
    """300 images of 5 of 6 unequal classes, with many ties; class 4 is never predicted."""
    random = np.random.default_rng(0)
    label = torch.from_numpy(random.choice(5, 300, p=[0.5, 0.3, 0.1, 0.06, 0.04]))
    logits = torch.from_numpy(random.integers(0, 3, (300, 6))).float()
    logits[range(300), label] += 1
    logits[:, 4] = logits[:, 4].clamp(max=1) - 2
    probabilities = logits.softmax(1)
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    confidence, prediction = probabilities.max(1)
    rest = (confidence.double(), loss.double(), torch.ones(300, dtype=torch.bool))
    return Predictions(label, prediction, *rest, probabilities)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_figures_of_classes_are_scikit_learn_s(many):
    """Class 5 has no image, and is in no average; it is predicted all the same."""
    assert many.label.unique().tolist() == [0, 1, 2, 3, 4]
    assert many.prediction.unique().tolist() == [0, 1, 2, 3, 5]
    truth, names = (many.label, many.prediction), "abcdef"
    scores = metrics.compute_metrics(many, names)
    options = {"labels": range(6), "zero_division": 0}
    theirs = sklearn.metrics.precision_recall_fscore_support(*truth, **options)
    for key, column in zip(("precision", "recall", "f1", "images"), theirs, strict=True):
        found = [row[key] for row in scores["classes"]]
        assert found == pytest.approx(column.tolist(), abs=1e-12), key
    options |= {"labels": range(5), "average": "macro"}
    for key in ("precision", "recall", "f1"):
        score = getattr(sklearn.metrics, f"{key}_score")
        assert scores[f"macro_{key}"] == pytest.approx(score(*truth, **options), abs=1e-12)
    balanced = sklearn.metrics.balanced_accuracy_score(*truth)
    assert scores["balanced_accuracy"] == pytest.approx(balanced, abs=1e-12)
    figures = metrics.summary(many, 6)
    assert figures == {name: scores[name] for name in metrics.SCORES}
    assert len({round(figure, 3) for figure in figures.values()}) == 4
    json.dumps(scores)  # plain Python numbers


def test_macro_roc_auc_is_scikit_learn_s(many):
    """With ties. A class without images, or one that all images have, is in no average."""
    columns = [(many.label == label, many.probabilities[:, label]) for label in range(5)]
    areas = [sklearn.metrics.roc_auc_score(*column) for column in columns]
    found = metrics.compute_metrics(many, "abcdef")["macro_roc_auc"]
    assert found == pytest.approx(np.mean(areas), abs=1e-12) and 0.6 < found < 0.95
    assert len(many.probabilities[:, 0].unique()) < 150
    two = replace(many, label=(many.label > 0).long(), probabilities=many.probabilities[:, :2])
    pairs = [(two.label == label, two.probabilities[:, label]) for label in (0, 1)]
    areas = [sklearn.metrics.roc_auc_score(*pair) for pair in pairs]
    assert metrics.macro_roc_auc(two) == pytest.approx(np.mean(areas), abs=1e-12)
    assert metrics.macro_roc_auc(replace(many, label=torch.zeros_like(many.label))) is None
    assert metrics.macro_roc_auc(replace(many, probabilities=None)) is None


def test_confusion_rows_are_labels(predictions):
    predictions = replace(predictions, prediction=torch.tensor([0, 1, 1, 1, 2]))
    counts = metrics.confusion_counts(predictions, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 1], [0, 0, 0]]


class FirstPixel(torch.nn.Module):
    """Its logits are 5 for the class that the first pixel of the image tells, else 0."""

    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(5.0))

    def forward(self, images):
        assert not self.training
        values = (images[:, 0, 0, 0].float() * 127.5 + 127.5).round().long()  # (B,)
        return self.logit * torch.nn.functional.one_hot(values, 7)


PROBABILITY = torch.tensor([5.0, *[0] * 6]).softmax(0)[0]  # of that class


def stream_of(values, labels, world_size=1):
    """An image of 4x4 pixels for each of the values, in batches of 3."""
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    images, shard = ImageSet(labels, pixels), Shard(0, world_size)
    return EvalStream(images, (4, 4), batch_size=3, shard=shard, device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_image_has_its_own_place(world_size):
    """The images of a second process stay 0 here."""
    stream = stream_of(range(7), torch.arange(7) % 6, world_size)
    model, batches = FirstPixel().train(), []

    def bar(stream):
        for batch in stream:
            batches.append(len(batch[0]))
            yield batch

    found = predict_dataset(model, stream, Precision(model), bar, keep=7)
    assert model.training and batches == ([3, 3, 1] if world_size == 1 else [3, 1])
    mine = range(0, 7, world_size)
    assert found.prediction.tolist() == [i if i in mine else 0 for i in range(7)]
    assert found.label.tolist() == [i % 6 if i in mine else 0 for i in range(7)]
    assert found.confidence[2].item() == pytest.approx(PROBABILITY.item())
    assert found.loss[2].item() == pytest.approx(-PROBABILITY.log().item(), abs=1e-6)
    assert found.loss[6] > 5 and not found.correct[6]
    everything = 5 * torch.eye(7)[list(mine)]
    assert found.probabilities.dtype == torch.float32
    assert (found.probabilities[list(mine)] - everything.softmax(1)).abs().max() < 1e-6
    assert found.probabilities.sum().item() == pytest.approx(len(mine), abs=1e-5)


def test_half_precision_logits_are_evaluated_in_float32():
    model = FirstPixel()
    precision = Precision(model, "O3", torch.bfloat16)
    found = predict_dataset(model, stream_of([3], torch.tensor([3])), precision)
    assert found.confidence.item() == PROBABILITY.item() and found.probabilities is None


def test_the_fifth_class_counts_and_the_sixth_does_not():
    model = torch.nn.Linear(1, 1)
    model.forward = lambda batch: torch.arange(7.0, 0, -1).expand(len(batch), 7)
    found = predict_dataset(model, stream_of([0] * 7, torch.arange(7)), Precision(model))
    assert found.top5.tolist() == [True] * 5 + [False] * 2


def test_results_are_valid_json(tmp_path):
    results = {"loss": float("inf"), "classes": [{"f1": float("nan"), "images": 3}]}
    metrics.write_results(tmp_path / "r.json", results)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == {"loss": None, "classes": [{"f1": None, "images": 3}]}
    assert "NaN" not in text and "Infinity" not in text
