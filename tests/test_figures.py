"""Figures by their pixels: what is drawn where, and how large."""

import io
import re
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import curves
import train
from data_utils import load_data
from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils import figures
from utils.attention import head_maps, overlay, rollout
from utils.augment import Augmentation
from utils.image_set import ImageSet
from utils.images import Decoding, to_image
from utils.stream import Shard, TrainStream


def test_a_grid_is_filled_row_by_row():
    sheet = figures.grid([Image.new("L", (2, 1), i) for i in range(3)], columns=2, side=4, gap=1)
    assert sheet.size == (9, 5)  # enlarged to (4, 2) each
    corners = np.asarray(sheet)[::3, ::5, 0]
    assert corners.tolist() == [[0, 1], [2, 255]]  # the last place stays white


def test_a_grid_keeps_aspects_and_has_its_titles_above():
    pictures = [Image.new("RGB", (400, 200), "red"), Image.new("RGB", (100, 200), "blue")]
    plain = np.asarray(figures.grid(pictures, side=100))
    titled = np.asarray(figures.grid(pictures, ["one", "two\nlines"], side=100))
    assert plain.shape == (100, 202, 3) and titled.shape == (132, 202, 3)
    assert np.array_equal(titled[32:], plain)  # titles change no pixel of a picture
    red, blue = ((plain == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert red[:50, :100].all() and red.sum() == 5000
    assert blue[:, 127:177].all() and blue.sum() == 5000  # in the middle of its place
    dark = titled[:32].min(axis=2) < 128
    assert not dark[:16, :100].any() and dark[16:, 30:70].any()  # one line, next to its picture
    assert dark[:16, 132:172].any() and dark[16:, 132:172].any()


def test_a_bar_explains_the_colours_of_overlays():
    pictures = [Image.new("RGB", (300, 200), "blue")] * 3
    plain, barred = (np.asarray(figures.grid(pictures, side=300, bar=bar)) for bar in (False, True))
    assert np.array_equal(barred[:200], plain)
    coloured = np.ptp(barred[-10].astype(int), axis=1) > 20
    left, right = np.flatnonzero(coloured)[[0, -1]]
    assert left > 300 and right < 604 and right - left > 150  # in the middle
    low, high = (np.array(colormaps["inferno"](value)[:3]) * 255 for value in (0.0, 1.0))
    ends = barred[-10, [barred.shape[1] // 2 - 113, barred.shape[1] // 2 + 112]]
    wanted = [128 * 0.6 + low * 0.4, 128 * 0.2 + high * 0.8]  # over a grey of 128
    assert np.abs(ends - np.array(wanted)).max() < 3
    dark = barred[200:].max(axis=2) < 100
    assert dark[:, :330].any() and dark[:, 580:].any()  # words on both sides


def test_an_attention_sheet_shows_the_heads_that_its_titles_name(monkeypatch):
    torch.manual_seed(0)
    model = VisionTransformer(replace(tiny_config(), num_layers=6), (32, 48), 2)
    pixels = torch.randn(1, 3, 32, 48)
    image = to_image(pixels[0]).resize((90, 60))
    monkeypatch.setattr(figures, "grid", grid := Mock())
    figures.attention_sheet(model, pixels, image, side=90)
    (first, second, *shown), (_, title, *titles) = grid.call_args.args
    assert np.array_equal(first, image)
    heat = rollout(model, pixels, "min")[0]
    assert "min" in title and np.array_equal(second, overlay(image, heat))
    maps = head_maps(model, pixels)[:, 0]
    chosen = [tuple(map(int, re.findall(r"\d+", title))) for title in titles]
    wanted = [overlay(image, maps[layer - 1, head - 1]) for layer, head in chosen]
    assert all(np.array_equal(a, b) for a, b in zip(shown, wanted, strict=True))
    assert len(set(chosen)) == 3 and min(chosen)[0] >= 3  # of the last four layers


def test_a_confusion_matrix_is_drawn_row_by_row():
    """The dark cells of two classes: a row is a label, a column a prediction."""
    picture = figures.confusion_matrix(torch.tensor([[0, 3], [0, 5]]), ("a", "b"))
    dark = (np.asarray(picture.convert("L")) < 80) & (np.asarray(picture)[:, :, 2] > 90)
    columns = np.flatnonzero(dark[:, : picture.width * 3 // 4].sum(axis=0) > 100)
    rows = np.flatnonzero(dark[:, columns].sum(axis=1) > 50)
    assert len(rows) > 1.8 * len(columns)  # one column of cells, both rows of it
    assert columns.min() > picture.width / 3  # the right one
    for classes in (30, 200):  # with names but no counts, and with neither
        counts = torch.eye(classes, dtype=torch.int64)
        picture = figures.confusion_matrix(counts, [str(i) for i in range(classes)])
        assert np.asarray(picture).std() > 10 and max(picture.size) < 1600


def test_a_reliability_diagram_has_its_bars_in_place():
    bins = [{"above": 0.0, "accuracy": 1.0}, {"above": 0.8, "accuracy": 0.5}]
    picture = np.asarray(figures.reliability_diagram(bins, 0.2, 0.1)).astype(int)
    bar = (picture[:, :, 2] - picture[:, :, 0]) > 100  # matplotlib's blue
    columns = np.flatnonzero(bar.any(axis=0))
    first, last = bar[:, columns.min() + 20], bar[:, columns.max() - 20]
    assert last.sum() == pytest.approx(first.sum() / 2, rel=0.1)
    width = columns.max() - columns.min()  # of the whole axis, whose middle is empty
    assert not bar[:, columns.min() + width // 4 : columns.max() - width // 4].any()


def test_class_names_are_not_formulas():
    """matplotlib reads $...$ as a formula, and fails or draws something else."""
    names = ["$a_$b", r"$\frac$", "plain"]
    labels = [figures.escape_label(name) for name in names]
    assert figures.confusion_matrix(torch.eye(3), names).width > 100
    assert figures.grid([Image.new("RGB", (9, 9))] * 3, labels).width > 100
    assert curves.draw({name: ([1], [[0.5]]) for name in names}, "$a_$b")[0].width > 100
    assert figures.escape_label("abcdef", most=4) == "abc…"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("files", [False, True])
def test_a_preview_spreads_over_the_images_and_keeps_their_aspect(files, channels, tmp_path):
    shades = range(0, 250, 25)  # of ten images; the first and the last are shown
    labels = torch.zeros(10, dtype=torch.int64)
    if files:
        paths = tuple(tmp_path / f"{shade}.png" for shade in shades)
        for path, shade in zip(paths, shades, strict=True):
            Image.new("RGB", (60, 30), (shade,) * 3).save(path)
        images = ImageSet(labels, paths=paths, decoding=Decoding(channels))
    else:
        pixels = torch.tensor(shades, dtype=torch.uint8)[:, None, None, None]
        images = ImageSet(labels, pixels.repeat(1, channels, 30, 60))
    assert figures.thumbnail(images, 4).getpixel((59, 29)) == (100,) * 3
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(), 32, 2, in_channels=channels)
    preview = figures.AttentionPreview(images, model.img_size, torch.device("cpu"), count=2)
    picture = preview.draw(model)
    assert picture.size == (320, 160)
    assert [picture.getpixel((x, 40)) for x in (80, 240)] == [(0,) * 3, (225,) * 3]
    heat = rollout(model, preview.pixels[1:])[0]
    below = overlay(Image.new("RGB", (160, 80), (225,) * 3), heat)
    assert np.array_equal(np.asarray(picture)[80:, 160:], np.asarray(below))


def test_a_run_logs_its_figures_and_hyperparameters(workdir):
    flags = "--name run --dataset digits --model_type ViT-Ti_4 --img_size 8 --pretrained_dir none"
    flags += " --train_batch_size 32 --num_steps 3 --warmup_steps 1 --eval_every 2"
    assert not train.main(flags.split())
    events = EventAccumulator("logs/run", size_guidance={"images": 0}).Reload()
    found = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    steps = {tag: [image.step for image in images] for tag, images in found.items()}
    after = {"test/attention": [2, 3], "test/confusion": [2, 3]}
    assert steps == {"train/augmented": [0]} | after
    encoded = {tag: io.BytesIO(images[-1].encoded_image_string) for tag, images in found.items()}
    drawn = {tag: np.asarray(Image.open(data)) for tag, data in encoded.items()}
    assert all(picture.std() > 10 for picture in drawn.values())
    # The batch shown is the one of the first step, as the stream gives it to the model.
    images = load_data("digits", ".", val_fraction=0, seed=42).train
    options = {"seed": 42, "batch_size": 32, "shard": Shard(), "device": torch.device("cpu")}
    stream = TrainStream(images, Augmentation("crop", (8, 8)), **options)
    wanted = figures.augmented_batch(stream.prepare(next(stream.steps(0, 1))[0])[0])
    assert np.array_equal(drawn["train/augmented"], np.asarray(wanted))
    accuracy = events.Scalars("test/accuracy")[-1].value
    assert events.Scalars("final/last_accuracy")[-1].value == pytest.approx(accuracy)
    row = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(row).session_start_info.hparams
    assert values["learning_rate"].number_value == pytest.approx(0.03)
    assert values["model_type"].string_value == "ViT-Ti_4"
