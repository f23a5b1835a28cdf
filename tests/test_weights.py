"""The name table in both directions, the strict report, and every way a file can be wrong."""

import json
import os
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from models.structure import WeightsError, infer_config, structure, variant_names
from models.weights import (
    canonical,
    name_table,
    official_shape,
    read_npz,
    resize_positions,
    to_official,
)
from tests.helpers import GOLDEN, golden_case, golden_config, tiny_config
from utils.checkpoint import write_npz

OFFICIAL = json.loads((GOLDEN / "official_shapes.json").read_text())


def random_model(config=None, img_size=32, classes=5, **kw):
    """A model whose every parameter is different from zero."""
    torch.manual_seed(1)
    model = VisionTransformer(config or tiny_config(), img_size, classes, **kw)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def official(config=None, **kw):
    model = random_model(config, **kw)
    return to_official(model.state_dict(), model.config)


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_of_every_official_model(name):
    shapes = {key: tuple(shape) for key, shape in OFFICIAL[name]["shapes"].items()}
    gap = name.endswith("-gap-norep")
    config = CONFIGS[name.removesuffix("-gap-norep")]
    config = replace(config, classifier="gap") if gap else config
    with torch.device("meta"):
        parameters = dict(VisionTransformer(config, 224, 1000).named_parameters())
    rows = name_table(config)
    assert {row.name for row in rows} == set(parameters)
    ours = {r.official: official_shape(r, parameters[r.name].shape, config.num_heads) for r in rows}
    assert ours == shapes
    assert structure(infer_config(shapes)) == structure(config)
    assert name.removesuffix("-gap-norep") in variant_names(infer_config(shapes))


@pytest.mark.parametrize(
    "case", ["vit_token_p16_64", "vit_prelogits", "vit_gap", "hybrid_r50_like", "hybrid_odd_97"]
)
def test_round_trip_is_bit_for_bit(case):
    golden = golden_case(case)
    config, facts = golden_config(golden)
    arrays = {k.removeprefix("params/"): v for k, v in golden.items() if k.startswith("params/")}
    model = VisionTransformer(config, tuple(facts["image"]), facts["num_classes"])
    report = model.load_from(arrays)
    assert sorted(report.loaded) == sorted(arrays) and not report.left_out
    back = to_official(model.state_dict(), config)
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        if facts.get("gn_disk_4d") and re.search(r"(^|/)gn\w+/", key):  # as in the first hybrids
            array = array.reshape(array.shape[-1:])
        assert back[key].shape == array.shape and back[key].dtype == array.dtype
        assert back[key].tobytes() == array.tobytes(), key


def test_float16_round_trip(tmp_path):
    arrays = {k: v.astype(np.float16) for k, v in official().items()}
    write_npz(tmp_path / "half.npz", arrays)
    model = VisionTransformer(tiny_config(), 32, 5)
    model.load_from(np.load(tmp_path / "half.npz"))
    back = to_official(model.state_dict(), model.config, dtype=np.float16)
    assert all(back[k].tobytes() == arrays[k].tobytes() for k in arrays)
    assert [p.name for p in tmp_path.iterdir()] == ["half.npz"]


def test_bfloat16_arrays_load():
    arrays = official()
    key = "head/kernel"
    upper = (arrays[key].view(np.uint32) >> 16).astype(np.uint16)
    model = VisionTransformer(tiny_config(), 32, 5)
    model.load_from(arrays | {key: upper.view("V2")})
    wanted = torch.from_numpy(arrays[key].T.copy())
    assert (model.head.weight - wanted).abs().max() < 2e-3 and model.head.weight.any()


@pytest.mark.parametrize("prefix", ["opt/target/", "params/"])
def test_prefixes_linen_numbers_and_optimizer_state(prefix):
    def linen(key):
        key = key.replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0")
        return key.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")

    arrays = official()
    dressed = {prefix + linen(key): array for key, array in arrays.items()}
    dressed["opt/state/param_states/cls/momentum"] = np.zeros(3, np.float32)
    stripped, left_out = canonical(dressed)
    assert stripped.keys() == arrays.keys()
    assert left_out == {"opt/state/param_states/cls/momentum": "optimizer state"}
    report = VisionTransformer(tiny_config(), 32, 5).load_from(dressed)
    assert "optimizer state" in str(report)


def test_timm_reads_our_file_and_agrees(tmp_path):
    config = replace(CONFIGS["ViT-Ti_16"], num_layers=12)
    model = random_model(config, 32, 10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    write_npz(tmp_path / "ours.npz", to_official(model.state_dict(), config))
    peer = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=10, act_layer="gelu_tanh"
    ).eval()
    peer.load_pretrained(str(tmp_path / "ours.npz"))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = model(images), peer(images)
    assert ours.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


# --------------------------------------------------------------------------- positions, channels


def test_positions_resize_as_officially():
    with np.load(GOLDEN / "posemb_zoom.npz") as file:
        pairs = [key for key in file.files if key.startswith("old_")]
        for key in pairs:
            m, n = (int(x) for x in re.findall(r"\d+", key))
            resized = resize_positions(file[key], (m, m), (n, n))
            assert np.abs(resized - file[key.replace("old", "new", 1)]).max() < 1e-6, key
        assert len(pairs) >= 12
        # scipy's artefact: the official result has zeros in its last row, ours has not.
        ours = resize_positions(file["edge_artefact_old_28_48"], (28, 28), (48, 48))
        ours = ours[0, 1:].reshape(48, 48, -1)
        theirs = file["edge_artefact_new_28_48"][0, 1:].reshape(48, 48, -1)
        assert not theirs[-1].any() and ours[-1].all()
        assert np.abs(ours[:-1, :-1] - theirs[:-1, :-1]).max() < 1e-6


def test_positions_of_any_shape():
    model = random_model(img_size=(16, 64))  # 2 x 8 = 16 patches, which also form a square
    arrays = to_official(model.state_dict(), model.config)
    same = VisionTransformer(tiny_config(), (16, 64), 5)
    report = same.load_from(arrays, position_grid=(2, 8))
    assert "resized" not in str(report)
    square = VisionTransformer(tiny_config(), (16, 64), 5).load_from(arrays)
    assert "positions resized from 4x4 to 2x8" in str(square)
    oblong = random_model(img_size=(32, 48))  # 4 x 6 = 24 patches form no square
    arrays = to_official(oblong.state_dict(), oblong.config)
    assert "resized" not in str(VisionTransformer(tiny_config(), (32, 48), 5).load_from(arrays))
    with pytest.raises(WeightsError, match="24 patches, not 4x4"):
        VisionTransformer(tiny_config(), 32, 5).load_from(arrays)


def test_grey_image_gives_what_it_gave_as_rgb():
    model = random_model()
    grey = VisionTransformer(tiny_config(), 32, 5, in_channels=1).eval()
    report = grey.load_from(to_official(model.state_dict(), model.config))
    assert "fitted from 3 to 1 channels" in str(report)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert (grey(images) - model(images.expand(-1, 3, -1, -1))).abs().max() < 1e-5


# ------------------------------------------------------------------------------- heads, variants


def test_head_rules():
    config = tiny_config(representation_size=24)
    arrays = official(config)
    plain = tiny_config()
    with pytest.raises(WeightsError, match="pre_logits layer: use a config with representation_si"):
        VisionTransformer(plain, 32, 5).load_from(arrays)
    with pytest.raises(WeightsError, match="head has 5 classes, the model 7"):
        VisionTransformer(config, 32, 7).load_from(arrays)
    fresh = VisionTransformer(plain, 32, 7, zero_head=True)
    fresh.head.weight.data.fill_(1.0)
    report = fresh.load_from(arrays)
    assert not fresh.head.weight.any()
    assert report.left_out.keys() == {
        "head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}  # fmt: skip
    zeroed = arrays | {"head/kernel": np.zeros_like(arrays["head/kernel"])}
    report = VisionTransformer(config, 32, 5).load_from(zeroed)
    assert "all zeros" in str(report)


def test_wrong_variant_is_named():
    shapes = {k: tuple(s) for k, s in OFFICIAL["ViT-Ti_16"]["shapes"].items()}
    arrays = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()}
    model = VisionTransformer(CONFIGS["ViT-S_16"], 224, 10, zero_head=True)
    with pytest.raises(WeightsError, match=r"fits ViT-Ti_16, not ViT-S_16 \(hidden_size: file 192"):
        model.load_from(arrays)


def test_nothing_is_partly_loaded():
    model = random_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = official(tiny_config(), classes=5)
    bad = np.full_like(good["Transformer/encoder_norm/bias"], np.nan)
    wrong = {
        "lacks Transformer/encoder_norm/bias": {"Transformer/encoder_norm/bias": None},
        "not finite": {"Transformer/encoder_norm/bias": bad},
        "has shape": {"Transformer/encoder_norm/bias": np.zeros(7, np.float32)},
        "holds int64": {"Transformer/encoder_norm/bias": np.zeros(32, np.int64)},
        "not a ViT in Google's layout": {"embedding/kernel": None},
    }
    for message, change in wrong.items():
        arrays = {k: v for k, v in (good | change).items() if v is not None}
        with pytest.raises(WeightsError, match=message):
            model.load_from({k: v + 0 if v.dtype.kind == "f" else v for k, v in arrays.items()})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_unknown_keys_are_named():
    report = random_model().load_from(official() | {"extra/kernel": np.zeros(3, np.float32)})
    assert report.left_out == {"extra/kernel": "unknown to this model"}


# -------------------------------------------------------------------------------------- bad files


def test_bad_files_are_one_sentence_each(tmp_path):
    good = tmp_path / "good.npz"
    write_npz(good, official())
    data = good.read_bytes()

    def expect(name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(WeightsError, match=message) as caught:
            read_npz(path)
        assert "\n" not in str(caught.value) and name in str(caught.value)

    expect("missing.npz", None, "no such file")
    expect("text.npz", b"not an archive", "not an .npz archive")
    expect("empty.npz", b"", "not an .npz archive")
    expect("cut.npz", data[: len(data) // 2], "truncated")
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 0xFF
    expect("flipped.npz", bytes(flipped), "damaged")


def test_pickled_objects_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "trap.npz"
    np.savez(path, **{"head/bias": np.array([Trap()], dtype=object)})
    with pytest.raises(WeightsError, match="head/bias is a pickled object"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as file:  # a pickle that does not even claim to be an array
        file.writestr("head/bias.npy", b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError):
        read_npz(path)
    assert not (tmp_path / "sprung").exists()
