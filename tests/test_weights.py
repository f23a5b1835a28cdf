"""Google's name table in both directions, and the spellings of its files."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from models.checkpoints import open_model, read
from models.configs import CONFIGS, architecture, config_names
from models.errors import UserError
from models.interop import read_foreign
from models.modeling import VisionTransformer
from models.state_dict import load
from models.weights import read_google, write_google
from tests.helpers import GOLDEN, golden_case, golden_config, random_model, save_npz, tiny_config
from tests.test_interop import gap, timm_model

OFFICIAL = json.loads((GOLDEN / "official_shapes.json").read_text())


def google_arrays(**config) -> dict[str, np.ndarray]:
    model = random_model(tiny_config(**config))
    return write_google(model.state_dict(), model.config)


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_of_every_official_model(name, monkeypatch):
    """They are written and recognised. No array is filled or copied: the largest has 2.4 GiB."""
    monkeypatch.setattr(np, "ascontiguousarray", lambda array, dtype=None: array)
    official = {key: tuple(shape) for key, shape in OFFICIAL[name]["shapes"].items()}
    variant, gap, _ = name.partition("-gap-norep")
    config = replace(CONFIGS[variant], classifier="gap" if gap else "token")
    with torch.device("meta"):
        parameters = shapes_of(VisionTransformer(config, 224, 1000).state_dict())

    state = {key: torch.empty(shape) for key, shape in parameters.items()}
    assert shapes_of(write_google(state, config)) == official

    checkpoint = read_google({key: np.zeros(s, np.float32) for key, s in official.items()})
    assert shapes_of(checkpoint.state) == parameters
    assert architecture(checkpoint.config) == architecture(config)
    assert variant in config_names(checkpoint.config)
    assert checkpoint.metadata.keys.keys() == official.keys()
    assert not checkpoint.metadata.left_out
    assert checkpoint.metadata.img_size == (224, 224) and checkpoint.in_channels == 3


CASES = [
    *("vit_token_p16_64", "vit_prelogits", "vit_p14_70", "vit_gap"),
    *("hybrid_r50_like", "hybrid_odd_97", "hybrid_r_ti16_like"),
]


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_the_same_bits(case):
    golden = golden_case(case)
    config, values = golden_config(golden)
    arrays = {k.removeprefix("params/"): v for k, v in golden.items() if k.startswith("params/")}
    assert read_google(arrays).config == config
    model = VisionTransformer(config, tuple(values["image"]), values["num_classes"])
    report = model.load_from(arrays)
    assert sorted(report.loaded) == sorted(arrays) and not report.left_out
    back = write_google(model.state_dict(), config)
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        if values.get("gn_disk_4d") and re.search(r"(^|/)gn\w+/", key):  # as in the first hybrids
            array = array.reshape(array.shape[-1:])
        assert back[key].shape == array.shape and back[key].dtype == array.dtype
        assert back[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", "<f8"])
def test_other_float_types_are_read(dtype):
    arrays = {key: array.astype(np.float16) for key, array in google_arrays().items()}
    model = VisionTransformer(tiny_config(), 32, 5)
    model.load_from({key: array.astype(dtype) for key, array in arrays.items()})
    back = write_google(model.state_dict(), model.config, np.float16)
    assert all(back[key].tobytes() == array.tobytes() for key, array in arrays.items())


def test_bfloat16_in_both_directions():
    arrays, model = google_arrays(), VisionTransformer(tiny_config(), 32, 5)
    kernel = torch.from_numpy(arrays["head/kernel"]).bfloat16()  # (D, classes)
    bits = kernel.view(torch.int16).numpy().view("V2")  # as numpy reads what JAX has saved
    model.load_from(arrays | {"head/kernel": bits})
    assert torch.equal(model.head.weight, kernel.float().T)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert np.array_equal(write_google(state, model.config)["head/kernel"], kernel.float())


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "optimizer/target/params/"])
def test_prefixes_linen_numbers_and_optimizer_state(prefix):
    def linen(key):
        key = key.replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0")
        return key.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")

    arrays = google_arrays()
    training_state = {prefix + linen(key): array for key, array in arrays.items()}
    others = ["opt/state/param_states/cls/momentum", "step"]
    checkpoint = read_google(training_state | {key: np.zeros(3, np.int64) for key in others})
    assert checkpoint.metadata.left_out == dict.fromkeys(others, "optimizer state")
    assert checkpoint.metadata.keys.keys() == training_state.keys()
    back = write_google(checkpoint.state, checkpoint.config)
    assert back.keys() == arrays.keys()
    assert all(back[key].tobytes() == array.tobytes() for key, array in arrays.items())


def test_arrays_that_are_refused_or_left_out():
    arrays, head = google_arrays(), np.zeros((32, 5))
    report = random_model().load_from(arrays | {"extra/kernel": head})
    assert report.left_out == {"extra/kernel": "unknown to this model"}
    refused = {
        "two arrays of the file are head.weight": {"params/head/kernel": head},
        "head/kernel holds int64, not floating-point numbers": {"head/kernel": head.astype(int)},
        "holds <U3": {"head/kernel": head.astype("U3")},
        r"head/kernel has shape \(0, 5\): it is empty": {"head/kernel": head[:0]},
    }
    for message, change in refused.items():
        with pytest.raises(UserError, match=message):
            read_google(arrays | change)


def test_timm_reads_our_file_and_agrees(tmp_path):
    model = random_model(CONFIGS["ViT-Ti_16"], 32, 10, std=0.05)
    save_npz(tmp_path / "ours.npz", model)
    size = {"img_size": 32, "num_classes": 10}
    other = timm.create_model("vit_tiny_patch16_224", **size, act_layer="gelu_tanh").eval()
    other.load_pretrained(str(tmp_path / "ours.npz"))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = model(images), other(images)
    assert ours.std() > 0.01 and (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def big_vision(model, prefix="params/", stacked=False):
    """The model as big_vision saves it: Linen's numbering, no position of the class token."""
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("map_head.")}
    arrays = write_google(state, replace(model.config, pool=None))
    if model.config.pool == "map":
        head, heads, width = model.map_head, model.config.num_heads, model.config.hidden_size
        for name in ("query", "key", "value"):
            layer, to = getattr(head.attn, name), f"MAPHead_0/MultiHeadDotProductAttention_0/{name}"
            arrays[f"{to}/kernel"] = layer.weight.T.reshape(width, heads, -1).numpy()
            arrays[f"{to}/bias"] = layer.bias.reshape(heads, -1).numpy()
        out = "MAPHead_0/MultiHeadDotProductAttention_0/out"
        arrays[f"{out}/kernel"] = head.attn.out.weight.T.reshape(heads, -1, width).numpy()
        arrays[f"{out}/bias"] = head.attn.out.bias.numpy()
        arrays["MAPHead_0/LayerNorm_0/scale"] = head.norm.weight.numpy()
        arrays["MAPHead_0/LayerNorm_0/bias"] = head.norm.bias.numpy()
        for i, layer in enumerate((head.ffn.fc1, head.ffn.fc2)):
            arrays[f"MAPHead_0/MlpBlock_0/Dense_{i}/kernel"] = layer.weight.T.numpy()
            arrays[f"MAPHead_0/MlpBlock_0/Dense_{i}/bias"] = layer.bias.numpy()
        arrays["MAPHead_0/probe"] = head.probe.numpy()
    names = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}
    names |= {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    names |= {"Transformer/posembed_input/": ""}
    for old, new in names.items():
        arrays = {key.replace(old, new): x for key, x in arrays.items()}
    if "cls" in arrays:
        arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
    for key in [key for key in arrays if stacked and "encoderblock_0" in key]:
        blocks = [key.replace("_0/", f"_{i}/", 1) for i in range(model.config.num_layers)]
        array = np.stack([arrays.pop(block) for block in blocks])
        arrays[key.replace("encoderblock_0", "encoderblock")] = array
    return {f"{prefix}{key}": array for key, array in arrays.items()}


@torch.no_grad()
def test_big_visions_siglip(tmp_path):
    config = tiny_config(classifier="gap", pool="map", num_heads=4)
    arrays = big_vision(random_model(config, std=0.3), "params/img/")
    other = {"params/txt/head/bias": np.ones(3), "params/t": np.ones(1)}
    np.savez(tmp_path / "m.npz", **arrays | other)
    siglip = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
    theirs = timm_model(**siglip, num_heads=4)
    theirs.load_pretrained(str(tmp_path / "m.npz"))
    ours, metadata = open_model(tmp_path / "m.npz")
    assert ours.config == config and gap(ours, theirs) < 1e-5
    assert metadata.left_out == dict.fromkeys(other, "not of the tower that sees images")
    assert "its head is the projection to the texts' space" in metadata.notes[0]


def sines_and_cosines(h, w, width):
    """big_vision's posemb_sincos_2d, a number at a time."""
    table, quarter = np.empty((h, w, 4, width // 4)), width // 4
    for row, column, i in np.ndindex(h, w, quarter):
        x, y = (at / 10_000 ** (i / (quarter - 1)) for at in (column, row))
        table[row, column, :, i] = np.sin(x), np.cos(x), np.sin(y), np.cos(y)
    return torch.tensor(table.reshape(1, h * w, width), dtype=torch.float32)


def test_wrong_arrays_of_big_vision_are_one_line(tmp_path):
    arrays = big_vision(random_model(tiny_config(classifier="gap")))
    arrays["params/embedding/kernel"] = np.ones((192, 32), np.float32)
    np.savez(tmp_path / "m.npz", **arrays)
    arrays = big_vision(random_model())
    for shape in ((), (32,), (0,)):
        broken = {
            "params/pos_embedding": np.ones(shape),
            "params/Transformer/encoderblock/x": shape,
        }
        with pytest.raises(
            UserError, match=r"position embeddings have shape|pos_embedding has shape"
        ):
            load(random_model(), read_google(arrays | broken))
    arrays = big_vision(random_model(tiny_config(num_heads=4)))
    kernel = "params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel"
    with pytest.raises(UserError, match=r"encoderblock_1/.*/query/kernel has 2 heads, others .* 4"):
        read_google(arrays | {kernel: arrays[kernel].reshape(32, 2, 16)})
    matrix = {"embeddings.patch_embedding.weight": torch.ones(32, 192)}
    for read_it in (lambda: read(tmp_path / "m.npz"), lambda: read_foreign(matrix)):
        with pytest.raises(UserError, match="flat patches, as in SigLIP 2 NaFlex: unsupported"):
            read_it()


@torch.no_grad()
@pytest.mark.parametrize("rep", [None, 20])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("pool", ["token", "mean", "map"])
def test_big_vision(pool, positions, rep, tmp_path):
    token, prefix = pool == "token", "params/img/" if rep else "img/"
    head = {"pool": "map" if pool == "map" else None, "representation_size": rep}
    theirs = random_model(
        tiny_config(classifier="token" if token else "gap", **head), size := (16, 40), std=0.3
    )
    table = theirs.transformer.embeddings.position_embeddings
    table[:, :token] = 0
    if positions == "sincos":
        table[:, token:] = sines_and_cosines(2, 5, 32)
    for stacked in (False, True):
        arrays = big_vision(theirs, prefix, stacked)
        if positions == "sincos":
            del arrays[f"{prefix}pos_embedding"]
        np.savez(tmp_path / "m.npz", **arrays)
        ours, metadata = open_model(tmp_path / "m.npz", img_size=size)
        assert ours.config == theirs.config and {*metadata.keys} == set(arrays)
        assert gap(ours, theirs, size) < 1e-5
    if positions == "sincos":
        read_again = read(tmp_path / "m.npz").metadata
        assert read_again.img_size == (224, 224)
        assert "no positions in the file: sines and cosines for 224x224 pixels" in read_again.notes
    assert ("the class token has no position: zeros" in metadata.notes[0]) == token
