"""Names of the hub: files that a local server sends, the cache, and what is refused."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

import evaluate
import predict
from models import hub
from models.checkpoints import open_model
from models.errors import RunError, UserError
from models.zoo import expected_variant, resolve_checkpoint
from tests.helpers import ROOT, run_command, words, write_images
from tests.hub_server import HubServer

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZE |= {"mlp_ratio": 2, "num_classes": 2}
PIXELS = {"interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.4] * 3, "std": [0.3] * 3}
TIMM = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def files(seed, **config):
    """(the files of a repository in timm's layout, their model in timm)"""
    torch.manual_seed(seed)
    model = timm.models.VisionTransformer(**SIZE).eval()
    torch.nn.init.normal_(model.head.weight)
    content = {"model_args": SIZE, "label_names": ["cat", "dog"]} | config
    content = {"config.json": json.dumps(content | {"pretrained_cfg": PIXELS}).encode()}
    return content | {"model.safetensors": save(model.state_dict())}, model


@pytest.fixture
def server(workdir, monkeypatch):
    """The hub, with an empty cache in the working folder."""
    monkeypatch.setenv("HF_HOME", str(workdir / "home"))  # of commands that the tests start
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        server.repos |= {"me/vit": [files(0)[0], files(1)[0]], TIMM: [files(2)[0]]}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # huggingface_hub reads the variables when it is imported, for this process too early.
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workdir / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workdir / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def requests(server, method="HEAD"):
    """The paths that were asked for; huggingface_hub also asks for a list of its own."""
    return [path for kind, path in server.seen if kind == method and "agent" not in path]


@torch.no_grad()
def gap(given, seed):
    """The largest difference of logits from timm's model `seed`, which reads its own pixels."""
    model, metadata = open_model(resolve_checkpoint(given))
    pixels = torch.rand(2, 3, 32, 32)
    assert metadata.pixels.crop_fraction == 0.9 and metadata.classes == ("cat", "dog")
    theirs = files(seed)[1]((pixels - 0.4) / 0.3)
    return (model(pixels * 2 - 1) - theirs).abs().max().item()


NAMES = {"hf:me/vit": 1, "hf:me/vit@main": 1, "hf:me/vit@v0": 0, f"hf:me/vit@{'0' * 40}": 0}
NAMES |= {"timm:vit_tiny_patch16_224": 2, "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k": 2}


@pytest.mark.parametrize("given", NAMES)
def test_a_name_and_a_revision(given, server, workdir):
    assert gap(given, NAMES[given]) < 1e-5
    assert gap(given, NAMES[given]) < 1e-5 and len(requests(server, "GET")) == 2  # once each
    path = resolve_checkpoint(given, offline=True)
    assert path.is_relative_to(workdir / "home" / "hub") and path.name == "model.safetensors"
    assert expected_variant(given) is None


def test_all_files_are_of_one_commit(server, monkeypatch):
    """A commit that comes between two downloads."""
    honest = huggingface_hub.hf_hub_download

    def download(name, file, **options):
        path = honest(name, file, **options)
        server.repos["me/vit"].append(files(3)[0])
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.fetch("hf:me/vit").parent.name == "1" * 40
    assert hub.fetch("hf:me/vit").parent.name == "3" * 40  # then the newest


def test_a_preprocessor_is_fetched(server):
    content = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    server.repos["me/vit"][1]["preprocessor_config.json"] = json.dumps(content).encode()
    folder = hub.fetch("hf:me/vit").parent
    assert json.loads((folder / "preprocessor_config.json").read_text()) == content
    assert hub.fetch("hf:me/vit", offline=True).parent == folder


def test_an_older_model_has_a_file_of_pytorch(server):
    content, model = files(3)
    del content["model.safetensors"]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    server.repos["me/old"] = [content | {"pytorch_model.bin": buffer.getvalue()}]
    assert gap("hf:me/old", 3) < 1e-5
    assert hub.fetch("hf:me/old", offline=True).name == "pytorch_model.bin"


REFUSED = """
    hf:me                a model of the hub is hf:ORG/NAME or hf:ORG/NAME@REVISION
    hf:me/vit@           a model of the hub is
    hf:me/../vit         a model of the hub is
    hf:me/none           the hub has no such model, or it is private: `hf auth login` or HF_TOKEN
    hf:me/secret         its owner asks for an agreement
    hf:me/vit@v7         the hub has no such revision of it
    hf:me/empty          it has no model.safetensors and no pytorch_model.bin
    hf:me/-.-vit         Repo id
    timm:vit_tini_patch16_224       timm's table names no file. Did you mean vit_tiny_patch16_224
    timm:vit_tiny_patch16_224.none  timm's table names no file. Did you mean vit_tiny_patch16_224.a
    timm:vit_huge_patch14_gap_224.in1k_ijepa    timm's table names no file
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_is_not_there_is_one_line(line, server):
    given, expected = line.strip().split(maxsplit=1)
    server.repos |= {"me/secret": [{}], "me/empty": [{"config.json": b"{}"}]}
    server.gated = {"me/secret"}
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(given)
    message = str(caught.value)
    assert message.startswith(given) and expected in message and "\n" not in message
    assert not requests(server, "GET") or given == "hf:me/empty"


def test_a_token_opens_what_is_gated(server, monkeypatch):
    server.repos["me/secret"], server.gated, server.token = [files(0)[0]], {"me/secret"}, "abc"
    monkeypatch.setenv("HF_TOKEN", "abc")
    assert hub.fetch("hf:me/secret").is_file()


@pytest.mark.parametrize("why", ["flag", "variable", "no network"])
def test_without_a_network(why, server, monkeypatch, capsys, caplog):
    stored = hub.fetch("hf:me/vit@v0")
    server.seen.clear()
    if why == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif why == "no network":
        nowhere = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.url, "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    offline = why == "flag"
    assert hub.fetch("hf:me/vit@v0", offline) == stored  # as it is in the cache
    cause = "downloads are off" if offline else "the hub cannot be reached"
    for given in ("hf:me/other", "hf:me/vit@v1"):
        with pytest.raises(UserError) as caught:
            hub.fetch(given, offline)
        start, _, by_hand = str(caught.value).partition("; by hand: ")
        assert start == f"{given}: not in the hub's cache, and {cause}"
        name, _, revision = given.removeprefix("hf:").partition("@")
        assert by_hand.startswith(f"hf download {name} model.safetensors config.json")
        assert by_hand.endswith(" --revision v1") is (revision == "v1")
    assert server.seen == [] and capsys.readouterr().err == caplog.text == ""  # no retries


def test_the_command_by_hand_fills_the_cache(server):
    with pytest.raises(UserError) as caught:
        hub.fetch("hf:me/vit@v0", offline=True)
    command = shlex.split(str(caught.value).partition("by hand: ")[2])
    command[0] = Path(sys.executable).with_name("hf")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.fetch("hf:me/vit@v0", offline=True).parent.name == "0" * 40


def test_commands_take_names(server, workdir, capsys):
    images = write_images(workdir / "images", size=(40, 50))
    assert run_command(predict, *images, "--checkpoint", "hf:me/vit", "--format", "csv") == 0
    out, err = capsys.readouterr()
    assert out.count(",dog,") == 4
    assert "predict.py: weights: 32 tensors loaded; heads: 2, GELU: erf" in err
    flags = words("--dataset folder --data_dir images --val_fraction 0.5 --name e")
    assert run_command(evaluate, "--checkpoint", "hf:me/vit@v3", "--offline", *flags) == 2
    err = capsys.readouterr().err
    assert "hf download me/vit" in err and err.count("\n") == 1


def test_the_variables_of_the_hub_hold(server, workdir):
    """In a new process: its mirror, its cache and its offline mode."""
    script = "import sys; from models.hub import fetch; print(fetch(sys.argv[1]))"

    def run(given, **more):
        command = [sys.executable, "-c", script, given]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True
        )

    done = run("hf:me/vit", HF_HUB_CACHE=str(workdir / "other"))
    assert done.stdout.startswith(f"{workdir}/other/models--me--vit/snapshots/"), done.stderr
    before = len(server.seen)
    done = run("hf:me/vit", HF_HUB_OFFLINE="1")
    assert "by hand: hf download me/vit" in done.stderr and len(server.seen) == before


def test_push_makes_a_repository_and_adds_a_commit(server, workdir):
    folder = workdir / "out"
    folder.mkdir()
    for name, data in files(4)[0].items():
        (folder / name).write_bytes(data)
    url = hub.push(folder, "hf:me/new", "weights of run 4")
    assert url == f"{server.url}/me/new/commit/{'1' * 40}" and gap("hf:me/new", 4) < 1e-5
    (folder / "README.md").write_text("card")
    hub.push(folder, "hf:me/new", "card")
    assert [len(commit) for commit in server.repos["me/new"]] == [0, 2, 3]
    assert server.messages == ["weights of run 4", "card"]
    server.token = "abc"
    with pytest.raises(RunError, match=r"to hf:me/new: the hub does not know you: `hf") as caught:
        hub.push(folder, "hf:me/new", "again")
    assert "\n" not in str(caught.value)
