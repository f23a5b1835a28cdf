"""The hub: config from shapes, and how a checkpoint enters a model."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.configs import CONFIGS
from models.errors import UserError
from models.modeling import VisionTransformer
from models.state_dict import (
    PATCHES,
    POSITIONS,
    RESNET_ROOT,
    LoadReport,
    check_architecture,
    infer_config,
    load,
    rename,
    resize_positions,
)
from tests.helpers import GOLDEN, checkpoint_of, random_model, tiny_config

NORM = "transformer.encoder.encoder_norm.bias"


def load_into(checkpoint, config=None, img_size=32, classes=5, **options):
    """(a new model with the checkpoint, the report)."""
    model = VisionTransformer(config or checkpoint.config, img_size, classes, **options).eval()
    return model, load(model, checkpoint)


def test_rename_in_both_directions():
    table = [("a.{}.b.{}", "x{+1}.y{+1}"), ("a.{}.b", "z.{}"), ("norm", "last.norm")]
    pairs = {"a.0.b.9.weight": "x1.y10.weight", "a.12.b.bias": "z.12.bias", "norm": "last.norm"}
    for theirs, ours in pairs.items():
        assert rename(theirs, table) == ours and rename(ours, table, back=True) == theirs
    for key in ("a.0.b.9.weight.x", "b.a.0.b", "a.x.b", "anorm"):
        assert rename(key, table) is None, key


# ------------------------------------------------------------------------------------- config


CONFIGURATIONS = [
    {"classifier": "gap", "num_layers": 3},
    {"representation_size": 24, "patch_size": 4, "mlp_dim": 48},
    {"resnet_layers": (1, 2)},
    {"resnet_layers": (), "patch_size": 2, "resnet_width": 1.5},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS)
def test_infer_config(changes):
    config = tiny_config(**changes)
    state = random_model(config).state_dict()
    assert infer_config(state, 2) == config
    assert infer_config(state) == replace(config, num_heads=1)  # 64 of width for each head
    with torch.device("meta"):  # the width of ViT-H, which has 16 heads
        known = VisionTransformer(replace(config, hidden_size=1280), 32, 5)
    assert infer_config(known.state_dict()).num_heads == 16


def test_infer_config_refuses_other_models():
    state = random_model(tiny_config(resnet_layers=(1,))).state_dict()
    refused = {
        "it lacks a patch embedding or encoder blocks": {PATCHES: torch.zeros(64)},
        "its patches are 1x2 pixels": {PATCHES: torch.zeros(32, 128, 1, 2)},
        r"kernel of shape \(33, 3, 7, 7\)": {RESNET_ROOT: torch.zeros(33, 3, 7, 7)},
        r"kernel of shape \(32,\)": {RESNET_ROOT: torch.zeros(32)},
    }
    for message, change in refused.items():
        with pytest.raises(UserError, match=message):
            infer_config(state | change)
    with pytest.raises(UserError, match="width 32 is not a multiple of 3 heads"):
        infer_config(state, 3)


def test_the_variant_that_fits_is_named():
    with pytest.raises(UserError) as caught:
        check_architecture(CONFIGS["ViT-Ti_16"], CONFIGS["ViT-S_16"])
    assert "fits ViT-Ti_16, not ViT-S_16 (hidden_size: file 192, model 384; " in str(caught.value)
    free = {"representation_size": 5, "dropout_rate": 0.3, "gelu": "erf", "norm_eps": 1e-5}
    check_architecture(tiny_config(), tiny_config(attention_dropout_rate=0.1, **free))
    with pytest.raises(UserError, match="num_heads: file 2, model 4"):
        load_into(checkpoint_of(random_model()), tiny_config(num_heads=4))


# ------------------------------------------------------------------------ positions, channels


def test_positions_are_resized_as_by_google():
    with np.load(GOLDEN / "posemb_zoom.npz") as file:
        pairs = [key for key in file.files if key.startswith("old_")]
        for key in pairs:
            m, n = map(int, re.findall(r"\d+", key))
            resized = resize_positions(file[key], (m, m), (n, n))
            assert np.abs(resized - file[key.replace("old", "new", 1)]).max() < 1e-6, key
        assert len(pairs) >= 12
        # Google's result has zeros in its last row, by rounding in scipy. Ours must not.
        ours = resize_positions(file["edge_artefact_old_28_48"], (28, 28), (48, 48))
        both = ours, file["edge_artefact_new_28_48"]
        ours, google = (positions[0, 1:].reshape(48, 48, -1) for positions in both)
    assert not google[-1].any() and ours[-1].all()
    assert np.abs(ours[:-1, :-1] - google[:-1, :-1]).max() < 1e-6


def test_positions_of_every_form():
    wide = checkpoint_of(random_model(img_size=(16, 64)))  # 2 x 8 patches, as many as 4 x 4
    same, report = load_into(wide, img_size=(16, 64))
    assert torch.equal(same.state_dict()[POSITIONS], wide.state[POSITIONS]) and not report.notes
    wide.metadata.img_size = None  # a square, if the file does not tell
    note = "positions resized from 4x4 to 2x8 (linear)"
    assert load_into(wide, img_size=(16, 64))[1].notes == [note]
    notes = load_into(wide, img_size=64)[1].notes
    assert notes[1:] == ["the file was made for 32 pixels, 4 times fewer patches"]
    oblong = checkpoint_of(random_model(img_size=(32, 48)))
    oblong.metadata.img_size = None  # 24 patches form no square: the model's grid, if it fits
    assert not load_into(oblong, img_size=(32, 48))[1].notes
    with pytest.raises(
        UserError, match=r"positions of 24 patches, not 4x4, and their grid is no square: give"
    ):
        load_into(oblong)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        gap = checkpoint_of(random_model(tiny_config(classifier="gap")))
        positions = gap.state[POSITIONS] = gap.state[POSITIONS].to(dtype)
        resized = load_into(gap, img_size=(32, 40))[0].state_dict()[POSITIONS].numpy()
        wanted = resize_positions(positions.float().numpy(), (4, 4), (4, 5))
        assert np.abs(resized - wanted).max() < 1e-6


def test_the_first_kernel_is_fitted_to_other_channels():
    rgb, grey = random_model(), random_model(in_channels=1)
    images = torch.randn(2, 1, 32, 32)
    copies = images.expand(-1, 3, -1, -1)
    from_rgb, report = load_into(checkpoint_of(rgb), in_channels=1)
    from_grey, _ = load_into(checkpoint_of(grey), in_channels=3)
    assert report.notes == ["first layer fitted from 3 to 1 channels"]
    with torch.no_grad():
        assert (from_rgb(images) - rgb(copies)).abs().max() < 1e-5
        assert (from_grey(copies) - grey(images)).abs().max() < 1e-5
    four = load_into(checkpoint_of(rgb), in_channels=4)[0].state_dict()[PATCHES]
    assert torch.equal(four, rgb.state_dict()[PATCHES][:, [0, 1, 2, 0]] * 0.75)
    hybrid = checkpoint_of(random_model(tiny_config(resnet_layers=(1,))))
    fitted = load_into(hybrid, in_channels=1)[0].state_dict()
    assert torch.equal(fitted[RESNET_ROOT], hybrid.state[RESNET_ROOT].sum(dim=1, keepdim=True))
    assert torch.equal(fitted[PATCHES], hybrid.state[PATCHES])


# ------------------------------------------------------------------------------- head, report


def test_head_rules():
    plain, deep = tiny_config(), tiny_config(representation_size=24)
    checkpoint = checkpoint_of(random_model(deep))
    checkpoint.state["extra"] = torch.zeros(1)
    checkpoint.metadata.keys = {name.upper(): name for name in checkpoint.state}
    with pytest.raises(UserError, match=r"pre_logits layer: use a config with representation_size"):
        load_into(checkpoint, plain)
    with pytest.raises(UserError, match="head has 5 classes, the model 7"):
        load_into(checkpoint, classes=7)

    fresh = random_model(plain, classes=7, zero_head=True)
    report = load(fresh, checkpoint)
    assert not fresh.head.weight.any() and not fresh.head.bias.any()
    names = ["HEAD.WEIGHT", "HEAD.BIAS", "PRE_LOGITS.WEIGHT", "PRE_LOGITS.BIAS"]
    unknown = {"EXTRA": "unknown to this model"}
    assert report.left_out == dict.fromkeys(names, "the head is new") | unknown
    assert {*report.loaded, *report.left_out} == checkpoint.metadata.keys.keys()

    whole, report = load_into(checkpoint)
    assert report.left_out == unknown and len(report.loaded) == len(whole.state_dict())
    assert all(torch.equal(v, checkpoint.state[k]) for k, v in whole.state_dict().items())
    checkpoint.state["head.weight"] = torch.zeros(5, 24)
    assert "head is all zeros: its predictions mean nothing" in str(load_into(checkpoint)[1])
    left_out = dict.fromkeys("abcde", "unused") | {"g": "unknown"}
    line = "2 tensors loaded; left out a, b, c, d and 1 more: unused; left out g: unknown; a note"
    assert str(LoadReport(["x", "y"], left_out, ["a note"])) == line


def test_nothing_is_partly_loaded():
    model, good = random_model(), checkpoint_of(random_model(std=0.2))
    good.metadata.keys = {"their norm": NORM}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    others = {name: value for name, value in good.state.items() if name != NORM}
    wrong = {
        rf"the file lacks {NORM} \(1 in all\)": others,
        "their norm holds values that are not finite": others
        | {NORM: torch.full((32,), torch.nan)},
        r"their norm has shape \(7,\), not \(32,\)": others | {NORM: torch.zeros(7)},
    }
    for message, state in wrong.items():
        with pytest.raises(UserError, match=message):
            load(model, replace(good, state=state))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load(model, good)
    assert not torch.equal(model.state_dict()[NORM], before[NORM])
