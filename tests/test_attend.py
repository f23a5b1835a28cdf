"""The page: its models, its pictures, its errors, and a real browser if one is installed."""

import io
import shutil
import socket
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import attend
from digits import digits_model
from models.pixels import Pixels
from tests.helpers import random_model, run_command, save_bin, save_npz, write_image
from utils import attention
from utils.images import Decoding, seen_part, to_input

CLASSES = ("ant", "bee", "cat")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_digits_model_learns(capsys):
    model, data = digits_model(steps=60)
    start, accuracy = capsys.readouterr().out.rsplit(" ", 1)
    assert start == "trained on scikit-learn's handwritten digits: test accuracy"
    assert float(accuracy) > 0.4 and not model.training
    assert len(data.classes) == model.num_classes == 10


def test_the_patch_under_a_click():
    image = Image.new("RGB", (300, 100))
    clicks = ((0, 0), (299, 0), (150, 99), (300, 100))
    assert [attend.patch_at(x, y, image, (2, 3)) for x, y in clicks] == [0, 2, 4, 5]


def test_every_view_is_the_map_that_it_names(tmp_path):
    model = random_model(img_size=(32, 48), classes=3)
    image = Image.open(write_image(tmp_path / "a.png", (50, 20)))
    how = Decoding(pixels=Pixels(crop_fraction=0.5))  # so that the model sees a part of the image
    pixels, part = to_input(image, model, how), seen_part(image, (32, 48), how.pixels)
    best = model(pixels).argmax(dim=1)
    for patch in (None, 7):
        heads = attention.head_maps(model, pixels, patch)[:, 0]
        wanted = {attend.LAYER: heads[0].mean(0), attend.HEAD: heads[0, 1]}
        wanted[attend.CLASS] = attention.gradient_rollout(model, pixels, best)[0]
        for fuse in ("mean", "max", "min"):
            heat = attention.rollout(model, pixels, fuse, 0.5, patch)[0]
            wanted[f"rollout, {fuse} of heads"] = heat
        assert set(wanted) == set(attend.VIEWS)
        for view, heat in wanted.items():
            shown = attend.draw_view(model, image, view, 1, 2, 0.5, patch, how)
            assert np.array_equal(np.asarray(shown), np.asarray(attention.overlay(part, heat)))


def test_a_checkpoint_is_shown_with_its_classes(workdir, monkeypatch, capsys):
    model = random_model(img_size=32, classes=3)
    save_bin("x.bin", model, CLASSES)
    save_npz("x.npz", model)
    build_page = Mock()
    monkeypatch.setattr(attend, "build_page", build_page)
    monkeypatch.setattr(attend, "threading", Mock())  # it does not wait
    monkeypatch.setitem(sys.modules, "gradio", Mock())
    assert run_command(attend, "--checkpoint", "x.bin", "--port", 81) == 0
    assert run_command(attend, "--checkpoint", "x.npz", "--img_size", "64x40") == 0
    calls = [call.args for call in build_page.call_args_list]
    models, classes, titles, how = zip(*calls, strict=True)
    assert [opened.grid for opened in models] == [(4, 4), (8, 5)]
    assert classes == (CLASSES, None) and titles == ("x.bin", "x.npz")
    assert [each.background for each in how] == [(255, 255, 255)] * 2
    assert all(torch.equal(opened.head.weight, model.head.weight) for opened in models)
    launched = build_page().launch.call_args_list[0].kwargs
    assert launched["server_name"] == "127.0.0.1" and not launched["share"]
    assert "open http://127.0.0.1:81" in capsys.readouterr().out


MISTAKES = {
    "": "the page needs gradio: pip install -r requirements-page.txt",
    "--checkpoint no.npz": "no.npz: no such file",
    "--checkpoint x.bin --img_size 33": "33x33",
    "--img_size 64": "--img_size, --model_type and pixel flags need a file",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line(flags, workdir, monkeypatch, capsys):
    # None: not installed. In the other cases it is, but the error comes before it is used.
    monkeypatch.setitem(sys.modules, "gradio", sys if flags else None)
    save_bin("x.bin", random_model(classes=3), CLASSES)
    assert run_command(attend, *flags.split()) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("attend.py: error: ") and MISTAKES[flags] in line and "\n" not in line


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_in_a_browser(workdir, monkeypatch):
    """Drop an image, see classes and attention, click a patch, choose a head."""
    gradio = pytest.importorskip("gradio", reason="requirements-page.txt is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    model = random_model(img_size=(32, 48), classes=3)
    save_bin("tiny.bin", model, CLASSES)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((1800, 1200))  # larger than its place on the page
    image.save("photo.png")
    best = CLASSES[model(to_input(image, model)).argmax()]
    image.thumbnail((900, 900))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(attend, "threading", Mock())  # the server has a thread of its own
    assert run_command(attend, "--checkpoint", "tiny.bin", "--port", port) == 0

    def expect(view, patch):
        """Wait until the picture of this view is on the page."""
        drawn = attend.draw_view(model, image, view, 2, 1, 0.0, patch, Decoding())
        wanted = np.asarray(drawn).astype(int)
        for _ in range(300):
            source = tab.locator("#attention img").get_attribute("src")
            shown = np.asarray(Image.open(io.BytesIO(tab.request.get(source).body())))
            if shown.shape == (600, 900, 3) and np.abs(shown - wanted).max() <= 1:
                return
            tab.wait_for_timeout(100)
        pytest.fail(f"{view} with the patch {patch} as query was never shown")

    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1300, "height": 1000})
        tab.set_default_timeout(60_000)
        requests = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"http://127.0.0.1:{port}")
        tab.locator("#image input[type=file]").set_input_files("photo.png")
        tab.wait_for_selector("#attention img")
        tab.wait_for_selector(f"#classes :text('{best}')")
        expect(attend.VIEWS[0], None)
        box = tab.locator("#attention img").bounding_box()
        tab.mouse.click(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.6)
        tab.wait_for_selector("#query :text('row 3, column 1')")
        expect(attend.VIEWS[0], 12)
        tab.locator("#view input").click()
        tab.get_by_role("option", name=attend.HEAD).click()
        expect(attend.HEAD, 12)
        browser.close()
    gradio.close_all()
    # Gradio's own page names web fonts. The page works without them, and sends nothing.
    local = ("data:", "blob:", f"http://127.0.0.1:{port}")
    assert not [url for url in requests if not url.startswith(local) and "fonts." not in url]
