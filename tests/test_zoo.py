"""The table of Google's files, the files that names mean, and train.py from an empty folder."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models import vision_transformer, vision_transformer_hybrid

import train
from models import zoo
from models.checkpoints import load_torch
from models.configs import CONFIGS, config_names
from models.errors import UserError
from models.labels import label_names
from models.modeling import VisionTransformer
from models.state_dict import infer_config, square_size
from models.weights import write_google
from tests.bucket import Bucket
from tests.helpers import ROOT, random_model, run_command, tiny_config, words


@pytest.fixture(autouse=True)
def empty_folder(workdir, monkeypatch):
    monkeypatch.delenv("VIT_MODELS_URL", raising=False)


# ------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("file", zoo.FILES, ids=lambda file: file.key)
def test_every_row_describes_a_model(file):
    row = CONFIGS[file.variant]
    width = row.hidden_size if file.pre_logits else None
    config = replace(row, classifier=file.classifier, representation_size=width)
    with torch.device("meta"):
        model = VisionTransformer(config, file.resolution, file.classes)
    state = model.state_dict()
    assert file.parameters == sum(tensor.numel() for tensor in state.values())
    found = infer_config(state)  # what a file of these shapes is taken for
    assert file.variant in config_names(found) and found.classifier == file.classifier
    assert found.representation_size == width
    assert square_size(state, found) == (file.resolution, file.resolution)


def test_the_table_as_a_whole():
    assert len({file.key for file in zoo.FILES}) == len(zoo.FILES) == 73
    counts = [sum(file.bucket == bucket for file in zoo.FILES) for bucket in zoo.BUCKETS]
    assert counts == [9, 8, 47, 5, 4]
    assert [f.bucket for f in zoo.FILES if f.note == zoo.ZERO_HEAD] == ["imagenet21k"] * 9
    assert {file.source for file in zoo.FILES} <= {"", *zoo.SOURCES}
    # Sizes in MiB that Google's README gives for the nine recommended pre-trained files.
    names = words("L_16 B_16 S_16 R50_L_32 R26_S_32 Ti_16 B_32 S_32 R_Ti_16")
    published = dict(zip(names, (1243, 391, 115, 1337, 170, 37, 398, 118, 40), strict=True))
    recommended = [f for f in zoo.FILES if f.bucket == "augreg" and f.source == "Google"]
    assert len(recommended) == 9
    for file in recommended:
        start = zoo.find("augreg/" + file.name.split("--")[0])
        size = published[file.name.split("-")[0]]
        assert start.classes == 21843 and abs(start.parameters * 4 / 2**20 - size) < 1


def test_timm_knows_the_same_augreg_and_sam_files():
    modules = vision_transformer, vision_transformer_hybrid
    models = [model for module in modules for model in module.default_cfgs.values()]
    urls = {cfg.url: cfg for model in models for cfg in model.cfgs.values()}
    found = {file: urls[file.url] for file in zoo.FILES if file.url in urls}
    assert len(found) == sum("googleapis.com/vit_models/" in (url or "") for url in urls) > 30
    for file, cfg in found.items():
        assert (file.classes, file.resolution) == (cfg.num_classes, cfg.input_size[-1]), file.url


def test_listing_and_one_file(capsys):
    def shown(*argv):
        zoo.main(list(argv))
        return capsys.readouterr().out

    assert len(shown().splitlines()) == len(zoo.FILES) + 1
    row = shown("gsam/", "b_16").splitlines()[1]
    assert row.split() == words("ViT-B_16 1000 224 330 gap - - gsam/ViT-B_16.npz")
    one = shown("ViT-B_16")
    assert "checkpoint/imagenet21k/ViT-B_16.npz, not here yet" in one and "103,186,515" in one
    assert "sam/ViT-B_16.npz" in one and "all zeros" in one and "token+pre_logits" in one
    assert "81.2 % (Google's README)" in shown("imagenet21k+imagenet2012/ViT-B_16-224.npz")
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["ViT-B_17"])
    assert "no file has 'ViT-B_17'. Did you mean imagenet21k/ViT-B_16" in capsys.readouterr().err


# --------------------------------------------------------------------------------- names to files


def npz(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Stands in for every bucket; each file's one array is its own name."""
    with Bucket({f.key: npz({f.key: np.zeros(1)}) for f in zoo.FILES}) as server:
        monkeypatch.setenv("VIT_MODELS_URL", server.url + "/")
        yield server


B8 = "imagenet21k+imagenet2012/ViT-B_8.npz"
LONG = "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
PLACES = {
    # what is given: (what is downloaded, where it goes)
    "checkpoint/ViT-B_16.npz": ("imagenet21k/ViT-B_16.npz", "checkpoint/ViT-B_16.npz"),
    "x/ViT-B_16-224.npz": ("imagenet21k+imagenet2012/ViT-B_16-224.npz", "x/ViT-B_16-224.npz"),
    "x/R50-ViT-B_16.npz": ("imagenet21k/R50+ViT-B_16.npz", "x/R50-ViT-B_16.npz"),
    "x/sam/ViT-B_16.npz": ("sam/ViT-B_16.npz", "x/sam/ViT-B_16.npz"),
    "sam/ViT-B_16": ("sam/ViT-B_16.npz", "checkpoint/sam/ViT-B_16.npz"),
    LONG: (f"{LONG}.npz", f"checkpoint/{LONG}.npz"),
    "gs://vit_models/sam/ViT-S_16.npz": ("sam/ViT-S_16.npz", "checkpoint/sam/ViT-S_16.npz"),
    f"URL/{B8.replace('+', '%2B')}?download=true": (B8, f"checkpoint/{B8}"),
}


@pytest.mark.parametrize("given", PLACES)
def test_what_a_name_means(given, server, tmp_path):
    (key, stored), given = PLACES[given], given.replace("URL", server.url)
    head = "imagenet21k/" not in key  # these have none
    assert zoo.resolve_checkpoint(given, head=head).resolve() == tmp_path / stored
    assert np.load(tmp_path / stored).files == [key]
    assert zoo.resolve_checkpoint(given, offline=True).resolve() == tmp_path / stored
    assert [path for path, _ in server.seen] == [key]


def test_a_file_that_is_here_is_taken_as_it_is(server, tmp_path):
    name = "sam/ViT-B_16.npz"
    assert zoo.expected_variant(name) == "ViT-B_16" and zoo.expected_variant("m.npz") is None
    (tmp_path / "sam").mkdir()
    (tmp_path / name).write_bytes(b"mine")
    assert zoo.resolve_checkpoint(name).read_bytes() == b"mine" and server.seen == []
    assert zoo.expected_variant(name) is None  # it can be any


REFUSED = """
    no.npz                                      no.npz: no such file. `python3 -m models.zoo` lists
    checkpoint/ViT-B_17.npz                     no such file. Did you mean imagenet21k/ViT-B_16 or
    sam/ViT-H_14                                sam/ViT-H_14: no such file
    ViT-L_16.npz                                fits ViT-L_16, not ViT-B_16. Did you mean
    imagenet21k/ViT-B_16                        its head is all zeros: for fine-tuning only
    gs://other/x.npz                            only https
    https://example.org/%2e%2e/x.npz            names no file
    https://example.org/..\\x.npz                names no file
    URL/../x.npz                                names no file
    https://example.org/                        names no file
    https://example.org/x.npz                   checkpoint/example.org/x.npz is missing
    a/ViT-B_16-224.npz                          downloads are off; by hand: curl -fL --create-dirs
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_refusals_come_before_any_request(line, server, tmp_path):
    given, expected = line.strip().split(maxsplit=1)
    options = {"head": "head" in expected, "offline": "missing" in expected or "off" in expected}
    with pytest.raises(UserError) as caught:
        zoo.resolve_checkpoint(given.replace("URL", server.url), variant="ViT-B_16", **options)
    message = str(caught.value)
    assert expected in message and "\n" not in message and "--offline" not in message
    assert server.seen == [] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ train.py, no file present

FLAGS = words("--dataset digits --img_size 16 --num_steps 2 --warmup_steps 1 --eval_batch_size 360")
FLAGS += words("--train_batch_size 8 --name run --pretrained_dir")


def test_the_main_command_with_no_file_present(server, monkeypatch, capsys):
    """The README's command, but for the size; the file arrives in two halves."""
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config())
    rows = [replace(f, variant="tiny") if f.name == "ViT-B_16.npz" else f for f in zoo.FILES]
    monkeypatch.setattr(zoo, "FILES", tuple(rows))
    start = random_model(tiny_config(representation_size=32))
    server.files["imagenet21k/ViT-B_16.npz"] = npz(write_google(start.state_dict(), start.config))
    server.faults = ["drop"]
    default = "checkpoint/ViT-B_16.npz"
    assert run_command(train, *FLAGS, default, "--offline") == 2
    assert f"error: {default} is missing and downloads are off" in capsys.readouterr().err
    assert run_command(train, *FLAGS, default) == 0
    captured = capsys.readouterr()
    assert f"downloading {server.url}/imagenet21k/ViT-B_16.npz to {default}\n" in captured.err
    assert "trying again" in captured.err and default in captured.out
    assert "pre_logits/kernel" in captured.out and "head/kernel" in captured.out  # left out
    # A second run, here a linear probe, asks for nothing. Only its head changes.
    flags = words("--offline --model_type tiny --overwrite --freeze backbone --img_size 32")
    assert run_command(train, *FLAGS, default, *flags) == 0
    assert [begin is None for _, begin in server.seen] == [True, False]
    model = VisionTransformer(tiny_config(), 32, 10, zero_head=True)
    model.load_from(np.load(default))
    trained = load_torch("output/run_checkpoint.bin")["model"]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, trained[k])}
    assert changed == {"head.weight", "head.bias"} and trained.keys() == model.state_dict().keys()


def test_two_processes_of_one_run_download_once(server, tmp_path):
    start = random_model(CONFIGS["ViT-Ti_4"])
    server.files["augreg/x.npz"] = npz(write_google(start.state_dict(), start.config))
    launcher = words("-m torch.distributed.run --standalone --nproc_per_node 2")
    script = [str(ROOT / "train.py"), *FLAGS, f"{server.url}/augreg/x.npz"]
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ViT-Ti_4" in done.stdout and done.stderr.count("downloading") == 1
    assert server.seen == [("augreg/x.npz", None)]


def test_label_names():
    names, many = label_names(1000), label_names(21843)
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca"
    assert names[281].startswith("tabby") and len(many) == 21843 and many[0].startswith("organism")
    assert set(names) - set(many) == {"teddy, teddy bear"}  # the others are among the many
    assert label_names(10) is None
