"""Checkpoints: written whole or not at all, read without running code, and models again."""

import io
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from models.weights import to_official
from tests.helpers import save_bin, tiny_config
from utils.checkpoint import (
    CheckpointError,
    load,
    load_model,
    model_record,
    read_pretrained,
    save_atomic,
    write_npz,
)

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def random_model(config=None, img_size=32, **kw):
    """A model whose every parameter is different from zero, and so its logits."""
    torch.manual_seed(1)
    model = VisionTransformer(config or tiny_config(), img_size, len(CLASSES), **kw)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def record_of(model, variant="tiny"):
    return model_record(model.state_dict(), model, variant=variant, classes=CLASSES, step=7,
                        metrics={"accuracy": 0.5, "loss": 1.25})  # fmt: skip


@torch.no_grad()
def logits(model):
    noise = torch.Generator().manual_seed(2)
    return model(torch.randn(2, model.in_channels, *model.img_size, generator=noise))


def refused(path, *words, read=load, **kw):
    """The one line that CheckpointError says: the file's name and `words` all occur in it."""
    with pytest.raises(CheckpointError) as caught:
        read(path, **kw)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *words)), message


# --------------------------------------------------------------------------------------- writing


def test_save_leaves_one_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    for step in (1, 2):  # new, then over the older one
        content = {"x": torch.arange(5.0) + step, "deep": {"step": step, "names": ["a", "b"]}}
        save_atomic(content, path)
        back = load(str(path))
        assert torch.equal(back["x"], content["x"]) and back["deep"] == content["deep"]
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_all_of_it_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Else a power cut may leave the new name on an empty file."""
    path, events = tmp_path / "a.bin", []
    fsync, rename = os.fsync, os.replace

    def watched_fsync(descriptor):
        fsync(descriptor)
        events.append(("fsync", os.fstat(descriptor).st_size))

    def watched_replace(source, target):
        rename(source, target)
        events.append(("replace", os.stat(target).st_size))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_atomic({"x": torch.ones(3)}, path)
    size = path.stat().st_size
    assert size > 0 and events[:2] == [("fsync", size), ("replace", size)]
    assert [kind for kind, _ in events[2:]] == ["fsync"]  # the folder, so that the name lasts too


@pytest.mark.parametrize("failure", ["unpicklable", "fsync", "replace"])
def test_a_failure_leaves_the_older_file(failure, tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    save_atomic({"x": torch.ones(1000)}, path)
    before = path.read_bytes()
    content = {"x": torch.zeros(1000), "y": no_space if failure == "unpicklable" else 1}
    with monkeypatch.context() as patch:
        if failure != "unpicklable":
            patch.setattr(os, failure, no_space)
        with pytest.raises((OSError, pickle.PicklingError, AttributeError)):
            save_atomic(content, path)
    assert path.read_bytes() == before and load(path)["x"].sum() == 1000
    save_atomic({"x": torch.zeros(1000)}, path)  # what the failure left is in nobody's way
    assert load(path)["x"].sum() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


# --------------------------------------------------------------------------------------- reading


def legacy(content):
    """As torch wrote before its files were zip archives; some old `.bin` still are so."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_legacy_files_are_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(legacy({"x": torch.arange(5)}))
    assert load(tmp_path / "a.bin")["x"].tolist() == [0, 1, 2, 3, 4]


def test_missing_files(tmp_path):
    refused(tmp_path / "none.bin", "no such file")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint\n",
        b"<!DOCTYPE html>\n<html>\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"this is text that a pickle machine begins to run",
        b"Gone",
        b"PK\x03\x04",
        bytes(1000),
    ],
    ids=["empty", "text", "html", "git lfs", "text that a pickle machine begins to run",
         "an opcode that wants eight bytes", "zip's first bytes", "zeros"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_one_line(content, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_cut_files_are_one_line(kind, tmp_path):
    path, content = tmp_path / "a.bin", {"x": torch.arange(10.0), "y": {"z": [1, "text"]}}
    save_atomic(content, path)
    whole = path.read_bytes() if kind == "zip" else legacy(content)
    for length in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:length])
        refused(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "a.bin"
    save_atomic({"x": torch.full((1000,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(1.5).tobytes() * 10) + 100] ^= 0x40
    path.write_bytes(content)
    refused(path, "damaged")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_no_code_is_run(kind, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path, content = tmp_path / "a.bin", {"model": Trap()}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        path.write_bytes(legacy(content))
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    refused(path, "more than tensors and plain values")
    refused(path, "more than tensors and plain values", read=load_model)
    assert not (tmp_path / "sprung").exists()
    if kind == "plain pickle":
        pickle.loads(path.read_bytes())
        assert (tmp_path / "sprung").exists()  # the trap is a real one


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text", None])
def test_what_is_no_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", f"holds a {type(content).__name__}")


# ------------------------------------------------------------------------------- models and back

MODELS = {
    "token": {},
    "gap": {"config": tiny_config(classifier="gap")},
    "pre_logits": {"config": tiny_config(representation_size=24)},
    "hybrid": {"config": tiny_config(resnet_layers=(1, 2)), "img_size": 64},
    "stem alone": {"config": replace(tiny_config(resnet_layers=()), patch_size=4), "img_size": 32},
    "grey": {"in_channels": 1},
    "four channels": {"in_channels": 4},
    "oblong": {"img_size": (24, 40)},
    "oblong grey gap hybrid": {
        "config": tiny_config(resnet_layers=(1, 1), classifier="gap"),
        "img_size": (37, 64),  # an odd side, which SAME padding rounds up
        "in_channels": 1,
    },
    "dropout": {"config": tiny_config(dropout_rate=0.5, attention_dropout_rate=0.5)},
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_the_same(case, tmp_path):
    model = random_model(**MODELS[case])
    record = record_of(model, variant=case)
    save_atomic(record, tmp_path / "a.bin")
    back, read = load_model(tmp_path / "a.bin")
    assert back.config == model.config and back.img_size == model.img_size
    assert back.in_channels == model.in_channels and not back.training
    wanted = logits(model)
    assert wanted.shape == (2, 5) and wanted.std() > 0.01
    assert torch.equal(logits(back), wanted)
    assert {k: v for k, v in read.items() if k != "model"} == {
        k: v for k, v in record.items() if k != "model"}  # fmt: skip
    assert read["classes"] == list(CLASSES) and read["variant"] == case and read["step"] == 7
    assert read["pixel_mean"] == read["pixel_std"] == 127.5
    assert read["metrics"] == {"accuracy": 0.5, "loss": 1.25}


def test_a_half_precision_state_comes_back_in_float32(tmp_path):
    model = random_model()
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_atomic(record_of(model) | {"model": state}, tmp_path / "a.bin")
    back, _ = load_model(tmp_path / "a.bin")
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float())


# The earlier port left nothing but model.state_dict(). One patch is 4, 32 and 8 pixels wide; two
# layers say as much of that as twelve.
BARE = {
    "ViT-Ti_4": (replace(CONFIGS["ViT-Ti_4"], num_layers=2), 20),
    "R+ViT-Ti_16": (replace(CONFIGS["R+ViT-Ti_16"], num_layers=2), 64),
    "tiny hybrid": (tiny_config(resnet_layers=(1, 1)), 40),
}


@pytest.mark.parametrize("variant", BARE)
def test_a_bare_state_dict_of_the_earlier_port(variant, tmp_path, monkeypatch):
    config, img_size = BARE[variant]
    monkeypatch.setitem(CONFIGS, variant, config)
    model, path = random_model(config, img_size), tmp_path / "old.bin"
    torch.save(model.state_dict(), path)
    back, record = load_model(path, variant)
    exact = random_model(replace(config, gelu="erf"), img_size)  # as the earlier port's GELU was
    assert back.img_size == (img_size, img_size) and back.config == exact.config
    assert record["classes"] == ["0", "1", "2", "3", "4"] and record["variant"] == variant
    assert torch.equal(logits(back), logits(exact))
    assert bool(record["notes"]) == (config.resnet_layers is not None)
    assert load_model(path)[1]["variant"] == variant  # its parameters tell
    torch.save(random_model(tiny_config(hidden_size=40)).state_dict(), path)
    refused(path, "no variant of this program", read=load_model)
    torch.save(model.state_dict(), path)
    refused(path, f"holds {variant}, not ViT-S_14", read=load_model, variant="ViT-S_14")


def test_a_bare_state_dict_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config())
    path, state = tmp_path / "a.bin", random_model().state_dict()
    save_atomic({}, path)
    refused(path, "no head.weight", read=load_model, variant="tiny")
    save_atomic({k: v for k, v in state.items() if k != "head.bias"}, path)
    refused(path, "does not fit a model", "head.bias", read=load_model, variant="tiny")
    save_atomic(random_model(img_size=(32, 48)).state_dict(), path)  # 24 patches are no square
    refused(path, "does not fit a model", read=load_model, variant="tiny")


@pytest.mark.parametrize("wrong", ["variant", "no positions", "no tensor"])
def test_a_bare_state_dict_with_what_nobody_expects(wrong, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config())
    path, state = tmp_path / "a.bin", random_model().state_dict()
    if wrong == "no positions":
        del state["transformer.embeddings.position_embeddings"]
    elif wrong == "no tensor":
        state["head.weight"] = 3
    torch.save(state, path)
    variant = "ViT-X_99" if wrong == "variant" else "tiny"
    refused(path, read=load_model, variant=variant)


def test_a_record_that_does_not_fit_is_one_line(tmp_path):
    path, record = tmp_path / "a.bin", record_of(random_model())
    changes = [
        {"config": record["config"] | {"num_layers": 3}},
        {"config": record["config"] | {"temperature": 1}},
        {"config": None},
        {"img_size": [31, 31]},
        {"classes": ["one"]},
        {"in_channels": 1},
        {"model": None},
        {"model": {"head.weight": 3}},
    ]
    for change in changes:
        save_atomic(record | change, path)
        refused(path, "does not fit a model", read=load_model)
    for key in ("config", "img_size", "in_channels", "classes"):
        save_atomic({k: v for k, v in record.items() if k != key}, path)
        refused(path, "does not fit a model", key, read=load_model)


# ---------------------------------------------------------------------------- as a starting point


@pytest.mark.parametrize("case", ["token", "gap", "hybrid", "oblong"])
def test_bin_and_npz_give_the_same_arrays(case, tmp_path):
    model = random_model(**MODELS[case])
    save_atomic(record_of(model), tmp_path / "ours.bin")
    write_npz(tmp_path / "ours.npz", to_official(model.state_dict(), model.config))
    ours = read_pretrained(tmp_path / "ours.bin", "of the record")
    square = read_pretrained(str(tmp_path / "ours.npz"), "of no matter")
    assert ours.grid == model.grid and square.grid is None
    ours, arrays = ours.arrays, square.arrays
    assert ours.keys() == arrays.keys()
    for key, array in arrays.items():
        assert ours[key].dtype == array.dtype and ours[key].shape == array.shape
        assert ours[key].tobytes() == array.tobytes(), key


def test_a_bare_bin_is_a_starting_point_too(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config())
    model = random_model()
    torch.save(model.state_dict(), tmp_path / "old.bin")
    old = read_pretrained(tmp_path / "old.bin", "tiny")
    fresh = VisionTransformer(tiny_config(), 32, 5).eval()
    fresh.load_from(old.arrays, position_grid=old.grid)
    assert torch.equal(logits(fresh), logits(model)) and old.gelu == "erf"
    assert read_pretrained(tmp_path / "old.bin", "tiny").notes == []
    monkeypatch.setitem(CONFIGS, "tiny hybrid", tiny_config(resnet_layers=(1, 1)))
    torch.save(random_model(CONFIGS["tiny hybrid"], 40).state_dict(), tmp_path / "old.bin")
    assert "ResNet" in read_pretrained(tmp_path / "old.bin").notes[0]
    refused(tmp_path / "none.bin", "no such file", read=read_pretrained, variant="tiny")


def test_a_bin_to_start_from_keeps_its_form_of_gelu(tmp_path):
    model = random_model(tiny_config(gelu="erf", norm_eps=1e-5))
    save_bin(tmp_path / "m.bin", model, tuple("abcde"))
    found = read_pretrained(tmp_path / "m.bin")
    assert (found.gelu, found.norm_eps, found.grid) == ("erf", 1e-5, model.grid)
