"""Figures against numbers worked out by hand, and the files that people look at."""

import csv
import json

import pytest
import torch
from PIL import Image

from utils.report import (
    Outcome,
    calibration,
    forget_report,
    measure,
    mistakes,
    summary,
    write_report,
    write_results,
)
from utils.stream import EvalStream, ImageSet, Slice

CLASSES = ("ant", "$bee", "cat")


def outcome():
    """Five images of two of three classes: label, guess, confidence."""
    rows = torch.tensor([[0, 0, 0.9], [0, 1, 0.8], [1, 1, 0.8], [1, 1, 0.6], [1, 0, 0.5]],
                        dtype=torch.float64)  # fmt: skip
    return Outcome(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2].double(),
                   torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([True] * 4 + [False]))  # fmt: skip


def test_figures_by_hand():
    figures = summary(outcome(), CLASSES)
    assert figures["accuracy"] == pytest.approx(0.6) and figures["loss"] == 3
    assert figures["top5_accuracy"] == pytest.approx(0.8) and figures["images"] == 5
    ant, bee, cat = figures["classes"]
    assert ant == {"name": "ant", "precision": 0.5, "recall": 0.5, "f1": 0.5, "images": 2}
    assert bee["precision"] == pytest.approx(2 / 3) == bee["recall"] and bee["images"] == 3
    assert cat["images"] == 0 and figures["macro_f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    # Bins (0.8, 0.867] hold none of 0.8: 12/15 is the upper edge of its bin.
    gaps = 1 * abs(1 - 0.9) + 2 * abs(0.5 - 0.8) + 1 * abs(1 - 0.6) + 1 * abs(0 - 0.5)
    assert figures["calibration_error"] == pytest.approx(gaps / 5, abs=1e-6)
    rows = calibration(outcome())
    assert [row["images"] for row in rows] == [1, 1, 2, 1]
    assert [row["above"] for row in rows] == pytest.approx([7 / 15, 8 / 15, 11 / 15, 13 / 15])
    assert mistakes(outcome()) == [1, 4]


@pytest.mark.parametrize("world", [1, 2])
def test_measure_puts_every_image_in_its_place(world):
    """Logits that say the image's own first pixel; a second process's images stay 0 here."""
    pixels = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 4, 4)
    images = ImageSet(torch.arange(7) % 6, pixels.contiguous())
    stream = EvalStream(images, (4, 4), batch=3, part=Slice(0, world), device=torch.device("cpu"))

    def logits_of(batch):
        values = (batch[:, 0, 0, 0] * 127.5 + 127.5).round().long()  # (B,)
        return 5 * torch.nn.functional.one_hot(values, 7).float()

    found = measure(logits_of, stream)
    assert found.guess.tolist() == ([0, 1, 2, 3, 4, 5, 6] if world == 1 else [0, 0, 2, 0, 4, 0, 6])
    share = torch.tensor([5.0, *[0] * 6]).softmax(0)[0].item()
    assert found.confidence[2].item() == pytest.approx(share)
    assert found.loss[2].item() == pytest.approx(-torch.tensor(share).log().item(), abs=1e-6)
    assert found.label[6] == 0 and found.loss[6] > 5


def test_the_fifth_guess_counts_and_the_sixth_does_not():
    images = ImageSet(torch.arange(7), torch.zeros(7, 3, 4, 4, dtype=torch.uint8))
    stream = EvalStream(images, (4, 4), batch=7, part=Slice(), device=torch.device("cpu"))
    found = measure(lambda batch: torch.arange(7.0, 0, -1).expand(len(batch), 7), stream)
    assert found.top5.tolist() == [True] * 5 + [False] * 2


def test_report_files(tmp_path):
    pixels = torch.zeros(5, 3, 6, 6, dtype=torch.uint8)
    found = outcome()
    figures = summary(found, CLASSES)
    images = ImageSet(found.label, pixels)
    files = write_report(tmp_path / "r", found, figures, images, CLASSES)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "confusion.csv", "confusion.png", "mistakes.csv", "mistakes.png", "reliability.png"
    ]  # fmt: skip
    with files[0].open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == list(CLASSES)
    assert rows[1:] == [["ant", "1", "1", "0"], ["$bee", "1", "2", "0"], ["cat", "0", "0", "0"]]
    assert (tmp_path / "r" / "mistakes.csv").read_text().splitlines() == [
        "image,label,guess,confidence", "1,ant,$bee,0.800000", "4,$bee,ant,0.500000"]  # fmt: skip
    for path in [path for path in files if path.suffix == ".png"]:
        with Image.open(path) as drawn:
            assert drawn.size[0] > 200 and len(drawn.convert("RGB").getcolors(1 << 24)) > 2
    right = Outcome(found.label, found.label, found.confidence, found.loss, found.top5)
    write_report(tmp_path / "r", right, summary(right, CLASSES), images, CLASSES)
    assert not (tmp_path / "r" / "mistakes.png").exists()  # nothing of the earlier report stays
    (tmp_path / "r" / "notes.txt").touch()
    forget_report(tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["notes.txt"]
    (tmp_path / "r" / "notes.txt").unlink()
    forget_report(tmp_path / "r")
    forget_report(tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_a_matrix_of_very_many_classes_is_left_out(tmp_path):
    classes = tuple(str(i) for i in range(100_000))  # whose matrix would take 75 GiB
    images = ImageSet(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 3, 6, 6).byte())
    (tmp_path / "confusion.csv").touch()
    files = write_report(tmp_path, outcome(), summary(outcome(), classes), images, classes)
    assert [path.name for path in files] == ["mistakes.csv", "mistakes.png", "reliability.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_results_are_json_for_everybody(tmp_path):
    write_results(tmp_path / "r.json", {"loss": float("inf"), "classes": [{"f1": float("nan")}]})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == {"loss": None, "classes": [{"f1": None}]} and "NaN" not in text
