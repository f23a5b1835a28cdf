"""Files of PyTorch and folders of Hugging Face give the logits of the library that wrote them."""

import argparse
import json
import os
import pickle
import random
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.serialization import get_safe_globals

import evaluate
import export
import predict
import probe
import train
from models import torch_files, zoo
from models.checkpoints import load_torch, open_model, read
from models.configs import CONFIGS
from models.errors import UserError
from models.torch_files import INDEX, unwrap
from tests.helpers import random_model, run_command, tiny_config, write_image, write_images
from tests.test_checkpoints import refused
from tests.test_fuzz import damage
from tests.test_interop import HUGGING_FACE, gap, randomized, timm_model

ARGS = argparse.Namespace(lr=0.1, nested=argparse.Namespace(sizes=[1, 2]), note="reset")
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def swapped(state):
    """The weights of a worse model: other logits."""
    return {key: tensor.flip(0) for key, tensor in state.items()}


def save(path, content):
    """The file, with the heads that no tensor tells beside it."""
    (path.parent / "config.json").write_text('{"num_heads": 2}')
    torch.save(content, path)
    return path


# How trainings store a model -> what its note says.
WRAPPED = {
    "bare": (lambda s: s, None),
    "model": (lambda s: {"model": s}, "taken from 'model'"),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "'state_dict'; not read: 'epoch'"),
    "model_state": (lambda s: {"model_state": s}, "taken from 'model_state'"),
    "DINO's teacher": (
        lambda s: {"student": prefixed(swapped(s), "module."), "teacher": s, "epoch": 1},
        "taken from 'teacher', not from 'student.module'; not read: 'epoch'",
    ),
    "student alone": (lambda s: {"student": s}, "taken from 'student'"),
    "student is last": (
        lambda s: {"student": swapped(s), "net": s},
        "taken from 'net', not from 'student'",
    ),
    "ema": (lambda s: {"model": swapped(s), "ema": s}, "taken from 'ema', not from 'model'"),
    "EMA": (lambda s: {"model": swapped(s), "modelEMA": s}, "taken from 'modelEMA', not from"),
    "SWA": (
        lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
        "left out n_averaged: a counter; taken from 'module'",
    ),
    "timm's average": (
        lambda s: {"state_dict": swapped(s), "state_dict_ema": prefixed(s, "module.")},
        "taken from 'state_dict_ema.module', not from 'state_dict'",
    ),
    "schema is no average": (
        lambda s: {"model": s, "schema": swapped(s)},
        "taken from 'model', not from 'schema'",
    ),
    "deeper": (lambda s: {"a": {"ema": {"shadow": s}, "step": 1}}, "'a.ema.shadow'; not read: 'st"),
    "DeiT's, with flags": (
        lambda s: {"model": s, "optimizer": OPTIMIZER, "mean": torch.ones(3), "args": ARGS},
        "taken from 'model'; not read: 'optimizer', 'mean', 'args'",
    ),
    "in one dict": (
        lambda s: prefixed(swapped(s), "student.") | prefixed(s, "teacher."),
        "taken from 'teacher', not from 'student'",
    ),
    "beside and inside": (
        lambda s: swapped(s) | prefixed(s, "teacher."),
        "taken from 'teacher', not from 'the top level'",
    ),
    "twice the same": (lambda s: {"model": s, "ema": s}, "taken from 'model'; not read: 'ema'"),
}
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "_orig_mod.", "net.vit_b16.")
PREFIXES += ("module.module.", "module.model.encoder.backbone.")
WRAPPED |= {p: (lambda s, p=p: prefixed(s, p), f"taken from '{p[:-1]}'") for p in PREFIXES}
WRAPPED["all at once"] = (
    lambda s: {"state_dict": prefixed(s, "module.encoder.")},
    "taken from 'state_dict.module.encoder'",
)


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_files_give_timms_logits(case, tmp_path):
    theirs, (wrap, note) = timm_model(), WRAPPED[case]
    ours, metadata = open_model(save(tmp_path / "a.pth", wrap(theirs.state_dict())))
    assert gap(ours, theirs) < 1e-5
    endings = sorted(key.rpartition(".")[2] for key in theirs.state_dict())
    assert sorted(key.rpartition(".")[2] for key in metadata.keys) == endings
    [report] = metadata.notes
    assert note in report if note else "taken from" not in report and "not read" not in report
    assert report.startswith("32 tensors loaded; ") and "; ;" not in report  # 2 x 12 + 8


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.ckpt", "a.pth.tar", "a.bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_ending(name, legacy, tmp_path):
    theirs, path = timm_model(), tmp_path / name
    save(path, {})
    content = {"model": theirs.state_dict(), "args": ARGS}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert gap(open_model(path)[0], theirs) < 1e-5


def test_the_head_may_have_less_of_the_prefix():
    state = {"module.backbone.patch_embed.proj.weight": torch.ones(1), "module.head.weight": 2}
    state |= {"module.head.bias": torch.ones(2), "head.x": torch.ones(3), "backbone": torch.ones(4)}
    tensors, own_names, note = unwrap({"teacher": state})
    assert [*tensors] == ["patch_embed.proj.weight", "head.bias", "head.x", "backbone"]
    assert own_names["head.bias"] == "module.head.bias"
    assert note == "taken from 'teacher.module.backbone'; not read: 'module.head.weight'"
    names = ["backbone.patch_embed.proj.weight", "head.bias"]
    both = {f"{who}.{name}": torch.ones(1) for who in ("student", "teacher") for name in names}
    assert [*unwrap(both)[0]] == ["patch_embed.proj.weight", "head.bias"]


def test_models_of_this_program_in_a_wrapper(tmp_path, monkeypatch):
    config = tiny_config(num_heads=1, gelu="erf")
    monkeypatch.setitem(CONFIGS, "tiny", config)
    model = random_model(config)
    torch.save({"model": prefixed(model.state_dict(), "module.")}, tmp_path / "a.pth")
    assert gap(open_model(tmp_path / "a.pth")[0], model) < 1e-6


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
def test_hugging_faces_own_encoder_is_no_prefix(prefix, tmp_path):
    """Its files and its models in memory have other names."""
    transformers = pytest.importorskip("transformers")
    options = HUGGING_FACE | {"intermediate_size": 64}
    theirs = randomized(transformers.ViTForImageClassification(transformers.ViTConfig(**options)))
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.output.dense.bias" in stored
    for state in (stored, theirs.state_dict()):
        bare = {key.removeprefix("vit."): tensor for key, tensor in state.items()}
        for named in (state, bare):
            path = tmp_path / "pytorch_model.bin"
            torch.save(prefixed(named, prefix), path)
            ours, metadata = open_model(path)
            assert gap(ours, theirs) < 1e-5 and ours.config.norm_eps == 1e-12
            assert metadata.notes[0].startswith("40 tensors loaded; ")  # 2 x 16 + 8


# --------------------------------------------------------------------------------- untrusted files


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_no_code_is_run_and_a_line_converts_the_file(tmp_path):
    theirs, sprung = timm_model(), tmp_path / "sprung"
    path = tmp_path / 'it\'s "a" $HOME.pth'
    content = {"model": theirs.state_dict(), "optimizer": OPTIMIZER, "epoch": 3}
    for trap in (Trap(sprung), {"x": [Trap(sprung)]}, argparse.Namespace(x=Trap(sprung))):
        save(path, content | {"args": trap})
        with pytest.raises(
            UserError, match=r"never loaded.*needs posix\.mkdir.*runs its code"
        ) as caught:
            open_model(path)
        assert "\n" not in str(caught.value) and not sprung.exists()
    python, *rest = shlex.split(str(caught.value)[str(caught.value).index("python3 -c") :])
    assert python == "python3"
    subprocess.run([sys.executable, *rest], check=True)
    assert sprung.exists()  # the trap is a real one
    ours, metadata = open_model(f"{path}.converted.pth")
    assert gap(ours, theirs) < 1e-5 and "taken from 'model'" in metadata.notes[0]
    assert "epoch" not in load_torch(f"{path}.converted.pth")


CONVERTED = {  # the file -> what its converted one is taken from
    "module": (lambda model: model, None),
    "module in a dict": (lambda model: {"net": model, "epoch": 3}, "net"),
    "nested": (lambda model: {"a": {"model_state": model.state_dict(), "b": Path()}}, "a.model_s"),
    "pair": (lambda model: (defaultdict(int, model.state_dict()), Path()), "0"),
    "TorchScript": (lambda model: torch.jit.trace(model, torch.ones(1, 3, 32, 32)), None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONVERTED)
def test_the_line_converts_any_container(case, tmp_path):
    theirs, (wrap, origin) = timm_model(), CONVERTED[case]
    path = save(tmp_path / "a.pth", {})
    (torch.jit.save if case == "TorchScript" else torch.save)(wrap(theirs), path)
    with pytest.raises(UserError, match=r"\(it needs [\w.]+\)\. If you trust it") as caught:
        open_model(path)
    words = shlex.split(str(caught.value)[str(caught.value).index("python3 -c") :])
    # In this process: a new one takes seconds to start.
    exec(words[2], {"__builtins__": __builtins__})
    ours, metadata = open_model(f"{path}.converted.pth")
    assert gap(ours, theirs) < 1e-5
    assert f"taken from '{origin}" in metadata.notes[0] if origin else True


def test_nothing_is_kept_of_pickled_flags(tmp_path):
    """Neither by attributes nor by slots, which torch sets one by one: __class__ would be one."""

    class Slots:
        def __init__(self, state):
            self.state = state

        def __reduce__(self):
            return argparse.Namespace, (), self.state

    for state in ({"a": 1}, ({}, {"__class__": torch.nn.Parameter}), (None, {"__setstate__": set})):
        torch.save({"args": Slots(state), "again": [Slots(state)]}, tmp_path / "a.pth")
        content = load_torch(tmp_path / "a.pth")
        for found in (content["args"], *content["again"]):
            assert type(found) is torch_files.Ignored and not hasattr(found, "__dict__")
    assert torch_files.Ignored not in [x[0] for x in get_safe_globals() if isinstance(x, tuple)]
    assert argparse.Namespace not in get_safe_globals()


def test_what_is_no_model_is_one_line(tmp_path):
    state, path, more = timm_model().state_dict(), tmp_path / "a.pth", torch.ones(1)
    loop = {"model": {"epoch": 1}}
    loop["model"]["again"] = loop
    deep = state
    for _ in range(300):
        deep = {"model": deep}
    key = "blocks.0.attn.qkv.weight"
    parameter = torch.nn.Parameter(state[key])
    assert not unwrap(state | {key: parameter})[0][key].requires_grad
    cases = [
        ({}, "no Vision Transformer of a known layout ()"),
        ({"layer1.0.conv2.weight": more}, "known layout ('layer1.0.conv2.weight')"),
        (loop, "known layout ('model')"),
        (deep, "known layout ('model')"),
        ({"a\n" * 99: state["cls_token"], 3: 4}, "known layout ('a\\na"),
        (state | {"a\nb": more}, "'a\\nb' is no name of a tensor"),
        (state | {7: more}, "'int' is no name of a tensor"),
        (state | {"module.norm.bias": more}, "another model: unsupported (module.norm.bias; 1"),
        (prefixed(state, "module.") | {"head.bias": more}, "two of its tensors are head.bias"),
        (
            prefixed(state, "a.") | {"b.head.bias": more},
            "another model: unsupported (b.head.bias; 1",
        ),
        (state | {key: state[key].to_sparse()}, f"{key} is sparse, or otherwise no plain tensor"),
        (state | {key: state[key].to("meta")}, f"{key} is sparse, or otherwise no plain tensor"),
        (state | {key: None}, "lacks"),
        (
            state | {key: torch.quantize_per_tensor(state[key], 0.1, 0, torch.qint8)},
            "is torch.qint8",
        ),
    ]
    for content, words in cases:
        save(path, content)
        refused(path, words)
    many = {f"net{i}": dict(state) for i in range(12)}
    many |= {"\n": {}, ("a", "b"): 1}
    [note] = open_model(save(path, many))[1].notes
    assert "taken from 'net0', not from 'net1', 'net2'" in note and "'net8' and 3 more" in note
    assert "not read: '\\n', 'tuple'" in note and "\n" not in note


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_damaged_files_are_one_line(kind, tmp_path):
    path, chance = tmp_path / "a.pth", random.Random(3)
    content = {"model": timm_model().state_dict(), "args": ARGS}
    torch.save(save(path, {}) and content, path, _use_new_zipfile_serialization=kind == "zip")
    whole, refusals, exact = path.read_bytes(), 0, open_model(path)[0]
    for i in range(150):
        path.write_bytes(whole[: len(whole) * i // 50] if i < 50 else damage(whole, chance))
        try:
            ours, _ = open_model(path)
            assert kind == "legacy" or gap(ours, exact) == 0  # zip archives have CRCs
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error), str(error)
    assert refusals > 100


# ------------------------------------------------------------------------ folders of Hugging Face


@pytest.fixture
def shards(tmp_path):
    """(folder, model): five shards or more, and their index."""
    transformers = pytest.importorskip("transformers")
    names = {i: f"name {i}" for i in range(5)}
    options = HUGGING_FACE | {"intermediate_size": 64, "id2label": names, "hidden_act": "gelu_new"}
    theirs = randomized(transformers.ViTForImageClassification(transformers.ViTConfig(**options)))
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= 5
    return tmp_path / "hf", theirs


def test_a_sharded_folder(shards):
    folder, theirs = shards
    for path in (folder, folder / INDEX):
        ours, metadata = open_model(path)
        assert gap(ours, theirs) < 1e-5 and ours.config.gelu == "tanh"
        assert metadata.classes == tuple(f"name {i}" for i in range(5))
        assert metadata.notes[0].startswith("40 tensors loaded")


def test_a_folder_with_one_file(tmp_path):
    theirs = timm_model()
    save(tmp_path / "pytorch_model.bin", theirs.state_dict())
    assert gap(open_model(tmp_path)[0], theirs) < 1e-5
    other = timm_model(depth=1)
    save_file(other.state_dict(), tmp_path / "model.safetensors")  # comes first
    assert gap(open_model(tmp_path)[0], other) < 1e-5
    (tmp_path / "empty").mkdir()
    names = "model.safetensors, model.safetensors.index.json, pytorch_model.bin"
    refused(tmp_path / "empty", f"a folder without {names}")


def test_shards_that_do_not_fit_are_named(shards):
    folder, _ = shards
    index = json.loads((folder / INDEX).read_text())
    files = index["weight_map"]
    first, name = next(iter(files)), next(iter(files.values()))
    mine = [key for key in files if files[key] == name]
    secret = folder.parent / "secret.safetensors"
    save_file({first: torch.ones(1)}, secret)
    wrong = {
        "'../secret.safetensors' is no file name": {first: "../secret.safetensors"},
        f"{str(secret)[:20]}": {first: str(secret)},
        "'..' is no file name": {first: ".."},
        "'config.json' is no file name": {first: "config.json"},
        "its shard gone.safetensors is missing": {first: "gone.safetensors"},
        f"its shard {name} and the index differ in 'more'": {"more": name},
        "no index of shards, or damaged": {first: None},
    }
    for message, change in wrong.items():
        (folder / INDEX).write_text(json.dumps({"weight_map": files | change}))
        refused(folder, message)
    fewer = {key: files[key] for key in files if key != first}
    (folder / INDEX).write_text(json.dumps({"weight_map": fewer}))
    refused(folder, f"{name} and the index differ in '{first}'" if len(mine) > 1 else "lacks")
    for text in ("", "{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": 1}', "[" * 10**5):
        (folder / INDEX).write_text(text)
        refused(folder, "no index of shards, or damaged")
    (folder / INDEX).write_text(json.dumps(index))
    open_model(folder)
    content = (folder / name).read_bytes()
    for length in (0, 5, 200, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        refused(folder, f"its shard {name}: no safetensors file, or damaged")
    (folder / name).unlink()
    refused(folder, f"its shard {name} is missing: download it, too")


def test_every_command_takes_a_folder(workdir, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config())
    names = {i: name for i, name in enumerate(("ant", "bee", "cat", "dog", "eel"))}
    for folder in ("hub", "hub/inner"):
        theirs = timm_model()
        Path(folder).mkdir()
        save_file(theirs.state_dict(), f"{folder}/model.safetensors")
        Path(f"{folder}/config.json").write_text(
            json.dumps({"num_heads": 2, "label_names": list(names.values())})
        )
    write_image(Path("a.png"))
    write_images(Path("d/test"), names.values(), count=1)
    write_images(Path("d/train"), names.values(), count=4)
    model = ("--checkpoint", "hub")
    assert run_command(predict, *model, "a.png") == 0
    assert run_command(predict, "--checkpoint", "hub/inner/", "a.png") == 0
    assert run_command(export, *model, "m.npz") == 0
    data = ("--dataset", "folder", "--data_dir", "d", "--num_workers", "0")
    assert run_command(evaluate, *model, *data) == 0 and Path("output/hub_results.json").exists()
    assert run_command(probe, *model, "--dataset", "digits", "--num_steps", "5") == 0
    flags = "--name r --dataset digits --pretrained_dir hub --img_size 8 --train_batch_size 8"
    flags += " --num_steps 1 --eval_batch_size 360 --warmup_steps 0"
    assert run_command(train, *flags.split()) == 0
    assert read("output/r_checkpoint.bin").config.num_layers == 2
    assert gap(open_model("m.npz")[0], open_model("hub")[0]) > 0  # npz keeps no GELU
    Path("none").mkdir()
    with pytest.raises(UserError, match="none: a folder"):
        zoo.resolve_checkpoint("none")


def test_evaluate_names_its_files_after_any_checkpoint(workdir):
    write_images(Path("d/test"), "abcde", count=1)
    save(workdir / "best.pth.tar", {"state_dict": timm_model().state_dict()})
    data = ("--dataset", "folder", "--data_dir", "d", "--num_workers", "0")
    assert run_command(evaluate, "--checkpoint", "best.pth.tar", *data) == 0
    assert Path("output/best_results.json").exists()


def test_pickle_files_are_no_torch_files(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": Trap(tmp_path / "sprung")}))
    refused(tmp_path / "a.pth")
    assert not (tmp_path / "sprung").exists()
