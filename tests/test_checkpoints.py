"""Checkpoint files of every format: written, read without running code, and made a model."""

import io
import os
import pickle
import resource
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import checkpoints, weights
from models.checkpoints import load_torch, open_model, read, write
from models.configs import CONFIGS
from models.errors import UserError
from models.state_dict import PATCHES, POSITIONS
from tests.helpers import checkpoint_of, random_model, save_bin, save_npz, tiny_config

CLASSES = ("ant", "bee", "cat", "dog", "eel")
NORM = "transformer.encoder.encoder_norm.bias"
every_format = pytest.mark.parametrize("suffix", [".bin", ".npz", ".safetensors"])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    noise = torch.Generator().manual_seed(2)
    return model(torch.randn(2, model.in_channels, *model.img_size, generator=noise))


def refused(path, *words, **options) -> None:
    """open_model raises a UserError: one line, with the file's name once and all `words`.

    A line that converts the file has the name, too.
    """
    with pytest.raises(UserError) as caught:
        open_model(path, **options)
    message = str(caught.value)
    count = 1 + ("python3 -c" in message)
    assert "\n" not in message and message.count(str(path)) == count, message
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------- files of PyTorch


def saved(content, legacy=False) -> bytes:
    """A file of torch.save; `legacy`, as before it was a zip archive. Some old `.bin` are so."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


NO_CHECKPOINTS = [
    *(b"not a checkpoint\n", b"<!DOCTYPE html>\n<html>\n", bytes(1000)),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"this is text that a pickle machine begins to run",
    *(b"Gone", b"PK\x03\x04"),  # an opcode that wants eight bytes; the first bytes of a zip
]


@pytest.mark.parametrize("kind", [".bin", ".npz", ".safetensors", "legacy .bin"])
def test_files_of_another_kind_and_cut_files(kind, tmp_path):
    path = tmp_path / f"a{kind.removeprefix('legacy ')}"
    write(path, checkpoint_of(random_model(), CLASSES))
    if kind == "legacy .bin":
        path.write_bytes(saved(load_torch(path), legacy=True))
        assert load_torch(path)["classes"] == list(CLASSES)
    whole = path.read_bytes()
    for content in NO_CHECKPOINTS:
        path.write_bytes(content)
        refused(path)
    for length in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:length])
        refused(path, "truncated" if kind == ".npz" and length else "")


@pytest.mark.parametrize("suffix", [".bin", ".npz"])
def test_a_flipped_bit_is_noticed(suffix, tmp_path):
    path, model = tmp_path / f"a{suffix}", random_model()
    torch.nn.init.constant_(model.head.weight, 1.5)
    write(path, checkpoint_of(model, CLASSES))
    whole = path.read_bytes()
    inside = whole.index(np.float32(1.5).tobytes() * 10) + 100
    for position, reason in {inside: "CRC", 0: ""}.items():
        content = bytearray(whole)
        content[position] ^= 0x40
        path.write_bytes(content)
        refused(path, "damaged", reason)


def test_no_code_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path, content = tmp_path / "a.bin", {"model": Trap()}
    for data in (saved(content), saved(content, legacy=True), pickle.dumps(content, protocol=2)):
        path.write_bytes(data)
        refused(path, "more than tensors and plain values")
    path = tmp_path / "a.npz"
    np.savez(path, **{"head/bias": np.array([Trap()], dtype=object)})
    refused(path, "head/bias is a pickled object, never loaded")
    with zipfile.ZipFile(path, "w") as file:  # a pickle that does not claim to be an array
        file.writestr("head/bias.npy", pickle.dumps(Trap()))
    refused(path, "head/bias is no array")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()  # the trap is a real one


def test_files_of_other_kinds(tmp_path):
    torch.save([1, 2], tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "holds a list")
    torch.save({"format": 3, "precision": {"parameters": {}}, "state": {}}, tmp_path / "a.pt")
    (tmp_path / "a.onnx").touch()
    for name, advice in {"a.pt": "a saved run, to be resumed", "a.onnx": "other programs"}.items():
        refused(tmp_path / name, advice, ".bin for example")
    refused(tmp_path / "none.bin", "no such file")
    refused(tmp_path, "a folder")


@every_format
def test_a_disk_that_refuses_is_an_os_error(suffix, tmp_path):
    """As a full disk does; torch hides it behind a RuntimeError."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / f"a{suffix}", checkpoint_of(random_model(), CLASSES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---------------------------------------------------------------------------- models and back

MODELS = {
    "token": {},
    "pre_logits": {"config": tiny_config(representation_size=24)},
    "stem alone": {"config": tiny_config(resnet_layers=(), patch_size=4)},
    "oblong, four channels": {"img_size": (24, 40), "in_channels": 4},
    "oblong grey gap hybrid": {
        "config": tiny_config(resnet_layers=(1, 2), classifier="gap"),
        "img_size": (37, 64),  # an odd side, which SAME padding rounds up
        "in_channels": 1,
    },
    "numerics": {"config": tiny_config(gelu="erf", norm_eps=1e-3, num_heads=4)},
}


@every_format
@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_the_same(case, suffix, tmp_path):
    model, path = random_model(**MODELS[case]), tmp_path / f"a{suffix}"
    checkpoint = checkpoint_of(model, CLASSES, named=True, step=7, metrics={"loss": 1.25})
    if case == "pre_logits" and suffix == ".safetensors":
        with pytest.raises(UserError, match="timm has no pre_logits layer"):
            write(path, checkpoint)
        return
    write(path, checkpoint)
    tells_all = suffix != ".npz"
    back, metadata = open_model(path, img_size=None if tells_all else model.img_size)
    lost = {} if tells_all else {"gelu": "tanh", "norm_eps": 1e-6}
    assert back.config == replace(model.config, **lost) and not back.training
    assert (back.img_size, back.in_channels) == (model.img_size, model.in_channels)
    assert torch.equal(logits(back), logits(model)) or (lost and case == "numerics")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
    assert metadata.classes == (CLASSES if tells_all else None)
    if suffix == ".bin":
        assert (metadata.named, metadata.step, metadata.metrics) == (True, 7, {"loss": 1.25})
        assert load_torch(path)["pixel_mean"] == load_torch(path)["pixel_std"] == 127.5


@every_format
def test_another_size_resizes_positions_and_nothing_else(suffix, tmp_path):
    model, path = random_model(), tmp_path / f"a{suffix}"
    write(path, checkpoint_of(model, CLASSES))
    larger, metadata = open_model(path, img_size=(64, 48))
    assert larger.img_size == (64, 48) and "resized from 4x4 to 8x6" in metadata.notes[0]
    before, after = model.state_dict(), larger.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [POSITIONS]
    old, new = before[POSITIONS][0], after[POSITIONS][0]
    assert torch.equal(new[0], old[0])  # of the class token
    corners = new[1:].unflatten(0, (8, 6))[::7, ::5]
    assert torch.equal(corners, old[1:].unflatten(0, (4, 4))[::3, ::3])


def test_without_its_head(tmp_path):
    model = random_model(tiny_config(representation_size=24))
    save_npz(path := tmp_path / "a.npz", model)
    headless, metadata = open_model(path, head=False)
    assert headless.num_classes == 1 and not headless.head.weight.any()
    assert "left out pre_logits/kernel" in metadata.notes[0]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(headless.features(images), model.features(images))
    np.savez(path, **{k: v for k, v in np.load(path).items() if "head/" not in k})
    assert open_model(path, head=False)[0].num_classes == 1
    refused(path, "it has no head: fine-tune it")


def test_the_variant_is_checked(tmp_path):
    gap = random_model(replace(CONFIGS["ViT-Ti_16"], classifier="gap"))
    save_npz(path := tmp_path / "a.npz", gap)
    assert read(path, variant="ViT-Ti_16").config.classifier == "gap"
    refused(path, "the file fits ViT-Ti_16, not ViT-S_14", variant="ViT-S_14")


# -------------------------------------------------------------------- .bin of the earlier port

# It left nothing but model.state_dict(). One patch is 4, 32 and 8 pixels wide; two layers tell as
# much as twelve.
BARE = {
    "ViT-Ti_4": (replace(CONFIGS["ViT-Ti_4"], num_layers=2), 20),
    "R+ViT-Ti_16": (replace(CONFIGS["R+ViT-Ti_16"], num_layers=2), 64),
    "tiny hybrid": (tiny_config(resnet_layers=(1, 1), num_heads=1), 40),
}


@pytest.mark.parametrize("variant", BARE)
def test_a_bare_state_dict(variant, tmp_path, monkeypatch):
    config, img_size = BARE[variant]
    monkeypatch.setitem(CONFIGS, variant, config)
    model, path = random_model(config, img_size), tmp_path / "old.bin"
    torch.save(model.state_dict(), path)
    exact = random_model(replace(config, gelu="erf"), img_size)  # the earlier port's GELU
    for given in (None, variant):
        back, metadata = open_model(path, variant=given)
        assert back.config == exact.config and back.img_size == (img_size, img_size)
        assert torch.equal(logits(back), logits(exact))
        assert metadata.classes == ("0", "1", "2", "3", "4") and not metadata.named
        hybrid = config.resnet_layers is not None
        assert ("pads and normalises in another way" in metadata.notes[0]) == hybrid
    larger, _ = open_model(path, img_size=(2 * img_size, img_size))
    assert larger.grid == (2 * back.grid[0], back.grid[1])
    refused(path, f"the file fits {variant}, not ViT-S_14", variant="ViT-S_14")


def refused_changes(path, content, changes) -> None:
    """Each {message: entries that replace the content's} is refused; None takes an entry away."""
    for message, change in changes.items():
        torch.save({k: v for k, v in (content | change).items() if v is not None}, path)
        refused(path, message)


def test_a_bare_state_dict_that_does_not_fit(tmp_path, monkeypatch):
    path, state = tmp_path / "a.bin", random_model(tiny_config(num_heads=1)).state_dict()
    refused_changes(path, state, {"no known variant": {}})  # nothing tells its heads
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config(num_heads=1))
    ones = torch.ones(5, 31)
    changes = {
        "it holds no model of this family": {"head.weight": None},
        f"lacks {NORM}": {NORM: None},
        "it has no head": {"head.bias": None},
        "form no square": {POSITIONS: None},
        "give the image size": {POSITIONS: torch.zeros(1, 25, 32)},
        "more than floating-point tensors": {"epoch": 3},
        "optimizer.x (1 in all) are unknown": {"optimizer.x": ones},
        "head.weight has shape (5, 31), not (5, 32)": {"head.weight": ones},
        "not a Vision Transformer": {PATCHES: None},
    }
    refused_changes(path, state, changes)


def test_records_that_do_not_fit(tmp_path):
    save_bin(path := tmp_path / "a.bin", random_model(), CLASSES)
    record = load_torch(path)
    changes = {
        "(num_layers: file 2, model 3)": {"config": record["config"] | {"num_layers": 3}},
        "unexpected keyword argument 'x'": {"config": {"x": 1}},
        "it fits no known variant, so its number of heads is unknown": {"config": None},
        "image size 31x31 is not a multiple": {"img_size": [31, 31]},
        "its image size is (32, -32), not two numbers": {"img_size": [32, -32]},
        "its image size is ('x',), not two numbers": {"img_size": "x"},
        "not a checkpoint of this program (TypeError": {"classes": 3},
        "names 4 classes, which do not fit its head": {"classes": "abcd"},
        "not a checkpoint of this program (no state dict)": {"model": [1]},
        "positions are resized in an unknown way ('up')": {"positions": "up"},
        "no ViT has 0 as its patch_size": {"config": record["config"] | {"patch_size": 0}},
        "no ViT has nan as its norm_eps": {"config": record["config"] | {"norm_eps": np.nan}},
        "no ViT has None as its gelu": {"config": record["config"] | {"gelu": None}},
        "no ViT has [2] as its resnet_layers": {
            "config": record["config"] | {"resnet_layers": [2]}
        },
        "(num_layers: file 2, model 10": {"config": record["config"] | {"num_layers": 10**30}},
        "more than floating-point tensors": {"model": {"head.weight": 3}},
        "are unknown": {"model": {"conv1.weight": torch.zeros(1)}},
    }
    refused_changes(path, record, changes)


def test_an_npz_is_normalised_once_and_its_config_inferred_once(tmp_path, monkeypatch):
    save_npz(tmp_path / "m.npz", random_model())
    read_google, infer_config, calls = weights.read_google, weights.infer_config, []
    monkeypatch.setattr(weights, "infer_config", lambda *a: calls.append("c") or infer_config(*a))
    monkeypatch.setattr(checkpoints, "infer_config", weights.infer_config)
    counted = lambda *a, **given: calls.append("g") or read_google(*a, **given)  # noqa: E731
    monkeypatch.setattr(checkpoints, "read_google", counted)
    open_model(tmp_path / "m.npz")
    assert sorted(calls) == ["c", "g"]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_files_keep_how_images_were_decoded(suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    for bit_depth, background in ((None, (255, 255, 255)), (12, (0, 9, 255)), (0, None)):
        stored = checkpoint_of(random_model(), CLASSES, bit_depth=bit_depth, background=background)
        write(path, stored)
        found = open_model(path)[1]
        assert (found.bit_depth, found.background) == (bit_depth, background)


def test_decoding_of_earlier_and_of_damaged_files(tmp_path):
    """Earlier versions took the upper 8 of 16 bits, and dropped the alpha."""
    save_bin(path := tmp_path / "m.bin", random_model(), CLASSES)
    record = load_torch(path)
    old = {key: x for key, x in record.items() if key not in ("bit_depth", "background")}
    torch.save(old, path)
    found = open_model(path)[1]
    assert (found.bit_depth, found.background) == (16, None)
    for change in ({"bit_depth": 129}, {"bit_depth": "x"}, {"background": [1, 2]}):
        torch.save(record | change, path)
        refused(path, "unknown bit depth")
    torch.save(record | {"background": [0, 0, 256]}, path)
    refused(path, "three numbers up to 255")
