"""Pictures by their pixels: what is drawn where, and how large."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train
from data_utils import load_data
from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils import figures
from utils.attention import overlay, rollout
from utils.precision import Precision
from utils.run_log import RunLog
from utils.stream import Augmentation, EvalStream, ImageSet, Slice, TrainStream


def test_pixels_and_pictures_are_each_others_inverse():
    model = VisionTransformer(tiny_config(), (16, 24), 2)
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    pixels = figures.to_pixels(Image.fromarray(noise), model)
    assert pixels.shape == (1, 3, 16, 24) and pixels.min() == -1 and pixels.max() == 1
    assert np.array_equal(np.asarray(figures.to_image(pixels[0])), noise)
    grey = figures.to_image(torch.tensor([[[-1.0, 1.0]]]))
    assert grey.mode == "L" and list(grey.tobytes()) == [0, 255]
    assert figures.to_image(torch.zeros(5, 4, 6)).size == (6, 4)


def test_a_tile_is_row_by_row():
    sheet = figures.tile([Image.new("RGB", (4, 3), (i, 0, 0)) for i in range(3)], 2, gap=1)
    assert sheet.size == (9, 7)
    at = [sheet.getpixel(p)[0] for p in ((0, 0), (5, 0), (0, 4), (5, 4))]
    assert at == [0, 1, 2, 255]  # the last place stays white


def test_top_classes():
    ranked = figures.top_classes(torch.tensor([0.0, 2.0, 1.0]), ("a", "b", "c"))
    assert [name for name, _ in ranked] == ["b", "c", "a"]
    assert sum(p for _, p in ranked) == pytest.approx(1)


def test_a_confusion_matrix_is_drawn_row_by_row():
    """The dark cells of two classes: labels downward, guesses to the right."""
    picture = figures.confusion_picture(torch.tensor([[0, 3], [0, 5]]), ("a", "b"))
    dark = (np.asarray(picture.convert("L")) < 80) & (np.asarray(picture)[:, :, 2] > 90)
    columns = np.flatnonzero(dark[:, : picture.width * 3 // 4].sum(axis=0) > 100)
    rows = np.flatnonzero(dark[:, columns].sum(axis=1) > 50)
    assert len(rows) > 1.8 * len(columns)  # one column of cells, both rows of it
    assert columns.min() > picture.width / 3  # the right one
    for classes in (30, 200):  # with names only, and without room for them
        counts = torch.eye(classes, dtype=torch.int64)
        picture = figures.confusion_picture(counts, [str(i) for i in range(classes)])
        assert np.asarray(picture).std() > 10 and max(picture.size) < 1600


def test_a_reliability_diagram_has_its_bars_in_place():
    bins = [{"above": 0.0, "accuracy": 1.0}, {"above": 0.8, "accuracy": 0.5}]
    picture = np.asarray(figures.reliability(bins, 0.2, 0.1)).astype(int)
    bar = (picture[:, :, 2] - picture[:, :, 0]) > 100  # matplotlib's blue
    columns = np.flatnonzero(bar.any(axis=0))
    first, last = bar[:, columns.min() + 20], bar[:, columns.max() - 20]
    assert last.sum() == pytest.approx(first.sum() / 2, rel=0.1)
    width = columns.max() - columns.min()  # of the whole axis, whose middle is empty
    assert not bar[:, columns.min() + width // 4 : columns.max() - width // 4].any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_contact_sheet_shows_the_images_asked_for(channels):
    shades = torch.tensor([0, 100, 200], dtype=torch.uint8)[:, None, None, None]
    images = ImageSet(torch.zeros(3), shades.expand(3, channels, 8, 8).contiguous())
    sheet = figures.contact_sheet(images, [2, 0], ["a", "b"])
    at = [sheet.getpixel((sheet.width * x // 4, sheet.height // 2)) for x in (1, 3)]
    assert at == [(200,) * 3, (0,) * 3]


def test_names_are_no_formulas():
    """matplotlib would read $...$ as one, and fail or draw something else."""
    names = ["$a_$b", r"$\frac$", "plain"]
    assert figures.confusion_picture(torch.eye(3), names).width > 100
    assert figures.bars([(name, 0.3) for name in names]).width > 100
    assert figures.panels([Image.new("RGB", (9, 9))] * 3, names, 3).width > 100
    runs = {name: [{1: 0.5, 2: 0.6}] for name in names}
    assert figures.accuracy_curves(runs, "$a_$b").width > 100


def test_filters_of_a_known_rank():
    """A kernel made of one pattern has that pattern, up to its sign, as first component."""
    model = VisionTransformer(tiny_config(), 32, 2)
    pattern = torch.linspace(-1, 1, 8)[None, None, :].expand(3, 8, 8)  # dark to light
    scales = torch.linspace(0.1, 1, 32)
    model.transformer.embeddings.patch_embeddings.weight.data = (
        scales[:, None, None, None] * pattern
    )
    first = np.asarray(figures.patch_filters(model))[:48, :48, 0].astype(int)
    assert abs(first[24, 0] - first[24, -1]) > 250 and (first[0] == first[-1]).all()


@pytest.mark.parametrize("changes", [{}, {"classifier": "gap"}, {"resnet_layers": (1,)}])
def test_every_model_can_be_drawn(changes):
    model = VisionTransformer(tiny_config(**changes), (32, 64), 2, in_channels=4)
    for draw in (figures.position_similarity, figures.patch_filters):
        assert np.asarray(draw(model)).std() > 5


@pytest.mark.parametrize("files", [False, True])
def test_watched_images_are_spread_and_keep_their_aspect(files, tmp_path):
    shades = range(0, 250, 25)  # ten images, of which the first and the last are watched
    labels = torch.zeros(10, dtype=torch.int64)
    if files:
        for i, shade in enumerate(shades):
            Image.new("RGB", (60, 30), (shade,) * 3).save(tmp_path / f"{i}.png")
        images = ImageSet(labels, paths=tuple(tmp_path / f"{i}.png" for i in range(10)))
    else:
        pixels = torch.tensor(list(shades), dtype=torch.uint8)[:, None, None, None]
        images = ImageSet(labels, pixels.expand(10, 3, 30, 60).contiguous())
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(), 32, 2)
    watch = figures.Watch(images, model.img_size, torch.device("cpu"), count=2)
    picture = watch.picture(model)
    assert picture.size == (640, 320)
    assert picture.getpixel((160, 80)) == (0, 0, 0)
    assert picture.getpixel((480, 80)) == (225, 225, 225)
    below = overlay(Image.new("RGB", (320, 160), (225,) * 3), rollout(model, watch.pixels[1:])[0])
    assert np.array_equal(np.asarray(picture)[160:, 320:], np.asarray(below))


def test_augmented_images_are_shown_as_the_model_sees_them():
    pixels = torch.full((9, 3, 16, 32), -1.0)
    pixels[8] = 1
    sheet = figures.augmented(pixels)
    assert sheet.size == (8 * 98 - 2, 48 * 2 + 2)
    assert sheet.getpixel((10, 10)) == (0, 0, 0) and sheet.getpixel((10, 60)) == (255, 255, 255)


@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_a_run_shows_its_pictures_and_hyperparameters(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--name", "run", "--dataset", "digits", "--model_type", "ViT-Ti_4", "--img_size", "8",
            "--pretrained_dir", "none", "--train_batch_size", "32", "--eval_batch_size", "360",
            "--num_steps", "3", "--warmup_steps", "1", "--eval_every", "2"]  # fmt: skip
    assert train.run([*argv, *flags]) == 0
    events = EventAccumulator("logs/run", size_guidance={"images": 0})
    events.Reload()
    found = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    assert {tag: [image.step for image in images] for tag, images in found.items()} == {
        "train/augmented": [0], "test/attention": [2, 3], "test/confusion": [2, 3]
    }  # fmt: skip
    for images in found.values():
        picture = Image.open(io.BytesIO(images[-1].encoded_image_string))
        assert picture.mode == "RGB" and np.asarray(picture).std() > 10
    # The batch shown is that of the first update, as the stream gives it to the model.
    stream = TrainStream(load_data("digits", ".", val_fraction=0, seed=42).train,
                         Augmentation("crop", (8, 8)), seed=42, batch=32, part=Slice(),
                         device=torch.device("cpu"))  # fmt: skip
    wanted = figures.augmented(stream.prepare(next(stream.updates(0, 1))[0])[0])
    shown = Image.open(io.BytesIO(found["train/augmented"][0].encoded_image_string))
    assert np.array_equal(np.asarray(shown), np.asarray(wanted))
    accuracy = events.Scalars("test/accuracy")[-1].value
    assert events.Scalars("final/last_accuracy")[-1].value == pytest.approx(accuracy)
    row = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(row).session_start_info.hparams
    assert values["learning_rate"].number_value == pytest.approx(0.03)
    assert values["model_type"].string_value == "ViT-Ti_4"


def test_evaluation_counts_each_image_once_in_the_confusion_matrix():
    labels = torch.tensor([0, 1, 2, 1, 0])
    pixels = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    stream = EvalStream(ImageSet(labels, pixels), (8, 8), batch=2, part=Slice(),
                        device=torch.device("cpu"))  # fmt: skip
    model = VisionTransformer(tiny_config(), 8, 3)
    model.head.bias.data[1] = 1.0  # says 1, always
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    outcome = train.evaluate(model, stream, Precision(model), RunLog(False))
    assert train.confusion(outcome, 3).tolist() == [[0, 2, 0], [0, 2, 0], [0, 1, 0]]
    assert modes == [False] * 3 and model.training  # without dropout, and then on with it
    assert outcome.metrics["accuracy"] == 2 / 5
    train.evaluate(model.eval(), stream, Precision(model), RunLog(False))
    assert not model.training
