"""Google's name table in both directions, and the spellings of its files."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from models.configs import CONFIGS, architecture, config_names
from models.errors import UserError
from models.modeling import VisionTransformer
from models.weights import read_google, write_google
from tests.helpers import GOLDEN, golden_case, golden_config, random_model, save_npz, tiny_config

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
