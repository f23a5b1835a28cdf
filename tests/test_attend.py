"""The page: checkpoints, its pictures, wrong words, and a real browser where there is one."""

import io
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import attend
from models.modeling import VisionTransformer
from models.weights import to_official
from tests.helpers import ROOT, tiny_config
from utils import attention, figures
from utils.checkpoint import model_record, save_atomic, write_npz

CLASSES = ("ant", "bee", "cat")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def tiny(size=(32, 48), **changes):
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(**changes), size, 3).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def save(model, path):
    if path.suffix == ".npz":
        write_npz(path, to_official(model.state_dict(), model.config))
    else:
        record = model_record(model.state_dict(), model, variant="ViT-Ti_16", classes=CLASSES,
                              step=0, metrics={})  # fmt: skip
        save_atomic(record, path)
    return path


@pytest.mark.parametrize("changes", [{}, {"classifier": "gap"}, {"representation_size": 16},
                                     {"resnet_layers": (1, 1)}])  # fmt: skip
def test_an_npz_opens_with_its_own_head_at_its_own_size(changes, tmp_path):
    model = tiny(32, **changes)
    opened, classes = attend.open_model(save(model, tmp_path / "x.npz"))
    images = torch.randn(2, 3, 32, 32)
    assert classes == ("0", "1", "2") and not opened.training
    assert (opened(images) - model(images)).abs().max() < 1e-5


def test_a_bin_opens_oblong_and_at_another_size(tmp_path):
    model = tiny()
    opened, classes = attend.open_model(save(model, tmp_path / "x.bin"))
    images = torch.randn(1, 3, 32, 48)
    assert classes == CLASSES and torch.equal(opened(images), model(images))
    larger, classes = attend.open_model(tmp_path / "x.bin", (64, 40))
    assert larger.grid == (8, 5) and torch.equal(larger.head.weight, model.head.weight)


def test_the_patch_under_a_click():
    image = Image.new("RGB", (300, 100))
    at = [
        attend.patch_at(x, y, image, (2, 3)) for x, y in ((0, 0), (299, 0), (150, 99), (300, 100))
    ]
    assert at == [0, 2, 4, 5]


def test_every_view_is_the_map_that_it_names():
    model = tiny()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    pixels = figures.to_pixels(image, model)
    best = model(pixels).argmax(dim=1)
    for patch in (None, 7):
        heads = attention.head_maps(model, pixels, patch)[:, 0]
        wanted = {
            "rollout, mean of heads": attention.rollout(model, pixels, "mean", 0.5, patch)[0],
            "rollout, max of heads": attention.rollout(model, pixels, "max", 0.5, patch)[0],
            "rollout, min of heads": attention.rollout(model, pixels, "min", 0.5, patch)[0],
            attend.LAYER: heads[0].mean(0),
            attend.HEAD: heads[0, 1],
            attend.CLASS: attention.gradient_rollout(model, pixels, best)[0],
        }
        assert set(wanted) == set(attend.VIEWS)
        for kind, heat in wanted.items():
            shown = attend.view(model, image, kind, 1, 2, 0.5, patch)
            assert np.array_equal(np.asarray(shown), np.asarray(attention.overlay(image, heat)))


def test_without_gradio_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert attend.run([]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("attend.py: error: the page needs gradio: pip install -r req")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--checkpoint", "no.npz"], "no.npz: no such file"),
     (["--checkpoint", "no.bin"], "no.bin: no such file"),
     (["--checkpoint", "x.bin", "--img_size", "33"], "33x33 is not a multiple"),
     (["--img_size", "64"], "--img_size is for a --checkpoint"),
     (["--port", "http"], "'http' is not a whole number")],
)  # fmt: skip
def test_wrong_words(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", sys)  # there, but never reached
    save(tiny(), tmp_path / "x.bin")
    assert attend.run(flags) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("attend.py: error: ") and message in line and "\n" not in line


def test_the_page_in_a_browser(tmp_path):
    """Drop an image, see classes and attention, click a patch, choose a head."""
    pytest.importorskip("gradio", reason="gradio is not installed (requirements-page.txt)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    model = tiny()
    save(model, tmp_path / "tiny.bin")
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((1800, 1200))  # larger than its place on the page
    image.save(tmp_path / "photo.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "attend.py"), "--checkpoint", "tiny.bin",
               "--port", str(port)]  # fmt: skip
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        assert f"open http://127.0.0.1:{port}" in server.stdout.readline()
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1300, "height": 1000})
            tab.set_default_timeout(60_000)
            outside = []
            tab.on("request", lambda r: outside.append(r.url) if "127.0.0.1" not in r.url else None)
            tab.goto(f"http://127.0.0.1:{port}")
            tab.locator("#image input[type=file]").set_input_files(tmp_path / "photo.png")
            tab.wait_for_selector("#attention img")
            logits = model(figures.to_pixels(image, model))[0]
            best = figures.top_classes(logits, CLASSES)
            tab.wait_for_selector(f"#classes :text('{best[0][0]}')")

            screen = attend.for_screen(image)

            def expect(kind, patch):
                wanted = np.asarray(attend.view(model, screen, kind, 2, 1, 0.0, patch))
                assert wanted.shape == (600, 900, 3)
                for _ in range(300):  # until it is drawn
                    source = tab.locator("#attention img").get_attribute("src")
                    shown = Image.open(io.BytesIO(tab.request.get(source).body()))
                    if np.abs(np.asarray(shown).astype(int) - wanted).max() <= 1:
                        return
                    tab.wait_for_timeout(100)
                pytest.fail(f"{kind}, asked by {patch}, was never shown")

            def click(x, y, message):
                box = tab.locator("#attention img").bounding_box()
                tab.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
                tab.wait_for_selector(f"#asked :text('{message}')")

            expect(attend.VIEWS[0], None)
            click(0.9, 0.9, "row 4, column 6")
            expect(attend.VIEWS[0], 23)
            tab.locator("#kind input").click()
            tab.get_by_role("option", name=attend.HEAD).click()
            # At once, while the new choice is being drawn: no click may be lost.
            click(0.1, 0.6, "row 3, column 1")
            expect(attend.HEAD, 12)
            if folder := os.environ.get("SCREENSHOTS"):
                tab.screenshot(path=f"{folder}/page.png")
            browser.close()
        # Gradio's own page names web fonts; it must work all the same, and send nothing.
        assert all("fonts." in url or url.startswith(("data:", "blob:")) for url in outside), (
            outside
        )
    finally:
        server.terminate()
        server.wait()
