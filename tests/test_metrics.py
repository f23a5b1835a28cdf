"""Predictions of a data set, and metrics against numbers worked out by hand."""

import json
from dataclasses import replace

import pytest
import torch

from utils import metrics
from utils.metrics import Predictions, predict_dataset
from utils.precision import Precision
from utils.stream import EvalStream, ImageSet, Shard

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

    found = predict_dataset(model, stream, Precision(model), bar)
    assert model.training and batches == ([3, 3, 1] if world_size == 1 else [3, 1])
    mine = range(0, 7, world_size)
    assert found.prediction.tolist() == [i if i in mine else 0 for i in range(7)]
    assert found.label.tolist() == [i % 6 if i in mine else 0 for i in range(7)]
    assert found.confidence[2].item() == pytest.approx(PROBABILITY.item())
    assert found.loss[2].item() == pytest.approx(-PROBABILITY.log().item(), abs=1e-6)
    assert found.loss[6] > 5 and not found.correct[6]


def test_half_precision_logits_are_evaluated_in_float32():
    model = FirstPixel()
    precision = Precision(model, "O3", torch.bfloat16)
    found = predict_dataset(model, stream_of([3], torch.tensor([3])), precision)
    assert found.confidence.item() == PROBABILITY.item()


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
