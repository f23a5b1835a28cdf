"""The table against the official counts, names to files, and train.py from an empty folder."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models import vision_transformer, vision_transformer_hybrid

import train
from models import zoo
from models.configs import CONFIGS
from models.download import DownloadError
from models.labels import label_names
from models.modeling import VisionTransformer
from models.structure import infer_config, infer_img_size, structure, variant_names
from models.weights import load_official, name_table, official_shape, to_official
from tests.bucket import Bucket
from tests.helpers import GOLDEN, ROOT, golden_case, golden_config, tiny_config
from utils.checkpoint import load

OFFICIAL = json.loads((GOLDEN / "official_shapes.json").read_text())
IDS = [file.key for file in zoo.FILES]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIT_MODELS_URL", raising=False)


# ------------------------------------------------------------------------------------- the table


def official_shapes(file):
    """name -> shape of the file's arrays, from the official shapes at 224 pixels, 1000 classes."""
    shapes = {key: tuple(shape) for key, shape in OFFICIAL[file.variant]["shapes"].items()}
    if file.classifier == "gap":
        del shapes["cls"]
    width = shapes["head/kernel"][0]
    shapes |= {"head/kernel": (width, file.classes), "head/bias": (file.classes,)}
    if file.pre_logits:
        shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    positions = "Transformer/posembed_input/pos_embedding"
    tokens = (file.resolution // CONFIGS[file.variant].stride) ** 2 + (file.classifier == "token")
    return shapes | {positions: (1, tokens, width)}


@pytest.mark.parametrize("file", zoo.FILES, ids=IDS)
def test_every_row_against_the_official_shapes(file):
    shapes = official_shapes(file)
    assert file.parameters == sum(np.prod(shape) for shape in shapes.values())
    assert structure(infer_config(shapes)) == structure(file.config)
    assert file.variant in variant_names(infer_config(shapes))
    assert infer_img_size(shapes) == file.resolution
    assert infer_config(shapes).representation_size == file.config.representation_size
    # Every name and shape is one of ours, and every one of ours is in the file.
    with torch.device("meta"):
        model = VisionTransformer(file.config, file.resolution, file.classes)
    parameters = dict(model.named_parameters())
    rows = name_table(file.config)
    heads = file.config.num_heads
    assert shapes == {
        row.official: official_shape(row, parameters[row.name].shape, heads) for row in rows
    }


def test_the_table_as_a_whole():
    assert len({file.key for file in zoo.FILES}) == len(zoo.FILES)
    count = {bucket: sum(f.bucket == bucket for f in zoo.FILES) for bucket in zoo.BUCKETS}
    assert count["imagenet21k"] == 9 and count["imagenet21k+imagenet2012"] == 8
    assert count["sam"] == 5 and count["gsam"] == 4
    recommended = [f for f in zoo.FILES if f.bucket == "augreg" and f.source == zoo.README]
    assert len(recommended) == 9
    assert {zoo.find(f.name.split("--")[0] + ".npz", "augreg").classes for f in recommended} == {
        21843
    }
    # Sizes in MiB that Google's README gives for the nine pre-trained files.
    published = {"L_16": 1243, "B_16": 391, "S_16": 115, "R50_L_32": 1337, "R26_S_32": 170,
                 "Ti_16": 37, "B_32": 398, "S_32": 118, "R_Ti_16": 40}  # fmt: skip
    for file in recommended:
        start = zoo.find(file.name.split("--")[0] + ".npz", "augreg")
        assert start.mib == pytest.approx(published[file.name.split("-")[0]], abs=1)
    assert all(bool(f.accuracy) == bool(f.source) for f in zoo.FILES)


def test_timm_knows_the_same_augreg_and_sam_files():
    base = "https://storage.googleapis.com/vit_models/"
    cfgs = [
        cfg
        for module in (vision_transformer, vision_transformer_hybrid)
        for model in module.default_cfgs.values()
        for cfg in model.cfgs.values()
        if (cfg.url or "").startswith(base)
    ]
    rows = {file.url: file for file in zoo.FILES}
    assert len(cfgs) > 30
    for cfg in cfgs:
        file = rows[cfg.url]
        assert (file.classes, file.resolution) == (cfg.num_classes, cfg.input_size[-1]), cfg.url


def test_listing_and_one_row(capsys):
    def said(*words):
        assert zoo.main(list(words)) == 0
        return capsys.readouterr().out

    assert len(said().splitlines()) == len(zoo.FILES) + 1
    lines = said("gsam/", "b_16").splitlines()
    assert len(lines) == 2 and lines[1].split() == [
        "ViT-B_16", "1000", "224", "330", "gap", "-", "-", "gsam/ViT-B_16.npz"]  # fmt: skip
    one = said("ViT-B_16")
    assert "checkpoint/imagenet21k/ViT-B_16.npz, not here yet" in one and "103,186,515" in one
    assert "sam/ViT-B_16.npz" in one and "all zeros" in one
    assert "85.49 % (Google's README)" in said(
        "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-"
        "lr_0.03-res_384"
    )
    assert "81.2 % (Google's README)" in said("imagenet21k+imagenet2012/ViT-B_16-224.npz")
    assert zoo.main(["ViT-B_17"]) == 2
    captured = capsys.readouterr()
    assert "imagenet21k/ViT-B_16" in captured.err and captured.err.count("\n") == 1


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


LONG = "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
PLACES = {
    # what is given: (what is fetched, where it goes)
    "checkpoint/ViT-B_16.npz": ("imagenet21k/ViT-B_16.npz", "checkpoint/ViT-B_16.npz"),
    "ViT-L_32.npz": ("imagenet21k/ViT-L_32.npz", "ViT-L_32.npz"),
    "x/ViT-B_16-224.npz": ("imagenet21k+imagenet2012/ViT-B_16-224.npz", "x/ViT-B_16-224.npz"),
    "x/R50-ViT-B_16.npz": ("imagenet21k/R50+ViT-B_16.npz", "x/R50-ViT-B_16.npz"),
    "x/sam/ViT-B_16.npz": ("sam/ViT-B_16.npz", "x/sam/ViT-B_16.npz"),
    "sam/ViT-B_16": ("sam/ViT-B_16.npz", "checkpoint/sam/ViT-B_16.npz"),
    "gsam/ViT-B_16.npz": ("gsam/ViT-B_16.npz", "checkpoint/gsam/ViT-B_16.npz"),
    LONG: (f"{LONG}.npz", f"checkpoint/{LONG}.npz"),
    "gs://vit_models/sam/ViT-S_16.npz": ("sam/ViT-S_16.npz", "checkpoint/sam/ViT-S_16.npz"),
    "URL/imagenet21k%2Bimagenet2012/ViT-B_8.npz": (
        "imagenet21k+imagenet2012/ViT-B_8.npz",
        "checkpoint/imagenet21k+imagenet2012/ViT-B_8.npz",
    ),
}


@pytest.mark.parametrize("given", PLACES)
def test_what_a_name_means(given, server, tmp_path):
    key, stored = PLACES[given]
    given = given.replace("URL", server.url)
    assert zoo.locate(given).resolve() == tmp_path / stored
    assert np.load(tmp_path / stored).files == [key]
    assert zoo.locate(given, offline=True).resolve() == tmp_path / stored  # it is here now
    assert [path for path, _ in server.seen] == [key]


def test_a_file_that_is_here_is_taken_as_it_is(server, tmp_path):
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam" / "ViT-B_16.npz").write_bytes(b"mine")
    assert zoo.locate("sam/ViT-B_16.npz").read_bytes() == b"mine" and server.seen == []
    (tmp_path / "sam" / "ViT-B_16.npz.sha256").write_text("0" * 64)
    with pytest.raises(DownloadError, match="has changed"):
        zoo.locate("sam/ViT-B_16.npz")


def test_the_variant_of_what_would_be_fetched(server, tmp_path):
    assert zoo.variant_of("checkpoint/ViT-B_16.npz") == "ViT-B_16"
    assert zoo.variant_of("m.npz") is None
    (tmp_path / "ViT-B_16.npz").touch()  # which may be another one
    assert zoo.variant_of("ViT-B_16.npz") is None and server.seen == []


def test_refusals_come_before_any_request(server, tmp_path):
    for given, options, words in [
        ("no.npz", {}, ["no.npz: no such file", "models.zoo"]),
        ("checkpoint/ViT-B_17.npz", {}, ["no such file", "Did you mean", "imagenet21k/ViT-B_16"]),
        ("sam/ViT-H_14", {}, ["no such file"]),
        ("ViT-L_16.npz", {"variant": "ViT-B_16"}, ["fits ViT-L_16, not ViT-B_16", "21k/ViT-B_16"]),
        ("imagenet21k/ViT-B_16", {"head": True}, ["its head is all zeros", "+imagenet2012/"]),
        ("output/x_checkpoint.bin", {}, ["output/x_checkpoint.bin: no such file"]),
        ("http://example.org/x.npz", {}, ["only https"]),
        ("gs://other/x.npz", {}, ["only https"]),
        ("https://example.org/a/../x.npz", {}, ["names no file"]),
        ("https://example.org/%2e%2e/x.npz", {}, ["names no file"]),
        ("https://example.org/", {}, ["names no file"]),
        ("https://example.org/x.npz", {"offline": True}, ["checkpoint/example.org/x.npz", "curl"]),
        ("a b/ViT-B_16.npz", {"offline": True},
         ["--offline", f"curl -fL --create-dirs -o 'a b/ViT-B_16.npz' {server.url}/imagenet21k/"]),
    ]:  # fmt: skip
        with pytest.raises(DownloadError) as caught:
            zoo.locate(given, **options)
        line = str(caught.value)
        assert all(word in line for word in words) and "\n" not in line, line
    assert server.seen == [] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ train.py, no file present


@pytest.fixture
def tiny(monkeypatch):
    """A variant of that name, and a file of it for 32 pixels like those of imagenet21k."""
    monkeypatch.setitem(CONFIGS, "tiny", tiny_config())
    return random_file(tiny_config(representation_size=32))


def random_file(config):
    torch.manual_seed(0)
    return npz(to_official(VisionTransformer(config, 32, 33).state_dict(), config))


FLAGS = ["--dataset", "digits", "--img_size", "16", "--num_steps", "2", "--warmup_steps", "1",
         "--train_batch_size", "8", "--eval_batch_size", "360", "--name", "run"]  # fmt: skip


def test_the_main_command_with_no_file_present(server, tiny, monkeypatch, capsys):
    """The README's command, but for the size; the file arrives in two halves."""
    rows = [replace(f, variant="tiny") if f.name == "ViT-B_16.npz" else f for f in zoo.FILES]
    monkeypatch.setattr(zoo, "FILES", tuple(rows))
    server.files["imagenet21k/ViT-B_16.npz"], server.faults = tiny, ["drop"]
    assert train.run([*FLAGS, "--pretrained_dir", "checkpoint/ViT-B_16.npz"]) == 0
    out = capsys.readouterr().out
    assert f"fetching {server.url}/imagenet21k/ViT-B_16.npz to checkpoint/ViT-B_16.npz" in out
    assert "trying again" in out and "model: tiny from checkpoint/ViT-B_16.npz" in out
    assert "left out pre_logits/kernel, pre_logits/bias, head/kernel, head/bias: the head" in out
    assert load("output/run_checkpoint.bin")["variant"] == "tiny"
    # A second run asks for nothing; neither does one that is told to.
    asked = len(server.seen)
    again = ["--pretrained_dir", "checkpoint/ViT-B_16.npz", "--offline"]
    assert train.run([*FLAGS, *again, "--model_type", "tiny", "--overwrite"]) == 0
    assert len(server.seen) == asked == 2


def test_wrong_words_about_weights_are_one_line(server, tiny, tmp_path, capsys):
    (tmp_path / "tiny.npz").write_bytes(tiny)
    server.files = {}
    default = "checkpoint/ViT-B_16.npz"
    for flags, words in [
        (["--offline"], [default, f"{server.url}/imagenet21k/ViT-B_16.npz", "curl -fL"]),
        ([], ["404", default, "curl -fL"]),
        (["--pretrained_dir", "no.npz"], ["no.npz: no such file"]),
        (["--model_type", "ViT-L_16"], ["fits ViT-B_16, not ViT-L_16"]),
        (["--img_size", "225"], ["225x225 is not a multiple of the patch size 16"]),
        (["--eval_only", "imagenet21k/ViT-B_16"], ["its head is all zeros"]),
        (
            ["--eval_only", "sam/ViT-B_16", "--dataset", "folder", "--data_dir", "no"],
            ["no: no such folder"],
        ),
        (["--pretrained_dir", "tiny.npz", "--model_type", "ViT-B_16"], ["fits tiny, not"]),
        (["--pretrained_dir", "tiny.npz", "--img_size", "20"], ["multiple of the patch size 8"]),
        (["--pretrained_dir", "none", "--freeze", "backbone"], ["--freeze backbone needs"]),
    ]:
        assert train.run([*FLAGS, *flags]) == 2, flags
        err = capsys.readouterr().err.strip()
        assert err.startswith("train.py: error: ") and "\n" not in err, err
        assert all(word in err for word in words), err
    assert not (tmp_path / "output" / "run_checkpoint.bin").exists()


def test_two_processes_of_one_run_fetch_once(server, tmp_path):
    server.files["augreg/x.npz"] = random_file(CONFIGS["ViT-Ti_4"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(ROOT / "train.py"), *FLAGS, "--pretrained_dir"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, f"{server.url}/augreg/x.npz", "--num_steps", "1"], env=env,
                          cwd=tmp_path, capture_output=True, text=True, timeout=90)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model: ViT-Ti_4 from" in done.stdout and done.stdout.count("fetching") == 1
    assert server.seen == [("augreg/x.npz", None)]


# ------------------------------------------------------------------------------------ linear probe


@pytest.mark.parametrize("half", [[], ["--bf16"], ["--bf16", "--loss_scale", "8"]])
def test_freezing_the_backbone_trains_the_head_alone(half, tiny, tmp_path, capsys):
    (tmp_path / "tiny.npz").write_bytes(tiny)
    flags = ["--pretrained_dir", "tiny.npz", "--img_size", "32", "--weight_decay", "0.1", *half]
    assert train.run([*FLAGS, *flags, "--freeze", "backbone"]) == 0
    assert "only the head trains" in capsys.readouterr().out
    record = load("output/run_checkpoint.bin")
    model = VisionTransformer(tiny_config(), 32, 10, zero_head=True)
    with np.load(tmp_path / "tiny.npz") as file:
        model.load_from(file)
    moved = {key for key, value in model.state_dict().items()
             if not torch.equal(value, record["model"][key])}  # fmt: skip
    assert moved == {"head.weight", "head.bias"}
    assert record["model"].keys() == model.state_dict().keys()
    assert (
        train.run([*FLAGS, *flags, "--learning_rate", "1", "--overwrite"]) == 0
    )  # without it, more moves
    key = "transformer.encoder.layer.0.attn.query.weight"
    trained = load("output/run_checkpoint.bin")["model"]
    assert not torch.equal(trained[key], record["model"][key])


# --------------------------------------------------------------------------- structures of files


STRUCTURES = ["vit_token_p16_64", "vit_prelogits", "vit_gap", "hybrid_r50_like", "hybrid_odd_97",
              "hybrid_r_ti16_like"]  # fmt: skip


def linen(key):
    key = key.replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0")
    return key.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")


@pytest.mark.parametrize("groupnorm_4d", [False, True])
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "optimizer/target/params/"])
@pytest.mark.parametrize("case", STRUCTURES)
def test_every_structure_gives_its_own_logits(case, prefix, groupnorm_4d):
    """With its own head: what evaluating a published file needs; every array is accounted for."""
    golden = golden_case(case)
    config, facts = golden_config(golden)
    arrays = {k[7:]: v for k, v in golden.items() if k.startswith("params/")}
    shapes = {key: array.shape for key, array in arrays.items()}
    assert infer_config(shapes) == config
    if facts["image"][0] % config.stride == 0:
        assert infer_img_size(shapes) == facts["image"][0]
    dressed = {}
    for key, array in arrays.items():
        norm = "/gn" in key or key.startswith("gn")
        array = array.reshape((1, 1, 1, -1) if norm and groupnorm_4d else array.shape)
        dressed[prefix + (linen(key) if prefix else key)] = array
    if prefix:  # momentum or the two moments of Adam, and a counter that is no float
        beside = {"opt/state/step": np.int64(7), "opt/0/mu/cls": np.zeros(3), "opt_state/nu/x": 0.0}
        dressed |= beside
    model = VisionTransformer(infer_config(shapes), facts["image"], facts["num_classes"]).eval()
    report = load_official(model, dressed)
    assert len(report.loaded) == len(arrays)
    assert set(report.left_out.values()) == ({"optimizer state"} if prefix else set())
    assert ("optimizer state" in str(report)) == bool(prefix)
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["input"]).permute(0, 3, 1, 2)).numpy()
    limit = 3e-5 if config.resnet_layers is not None else 1e-5
    assert np.abs(logits - golden["logits"]).max() < limit


def test_resolution_of_odd_files():
    with torch.device("meta"):
        model = VisionTransformer(tiny_config(), (32, 48), 5)
    rows = name_table(model.config)
    parameters = dict(model.named_parameters())
    shapes = {r.official: official_shape(r, parameters[r.name].shape, 2) for r in rows}
    assert infer_img_size(shapes) is None  # 4 x 6 patches


# ------------------------------------------------------------------------------------------ labels


def test_label_names():
    names = label_names(1000)
    assert len(names) == 1000 and (names[0], names[4]) == (
        "tench, Tinca tinca",
        "hammerhead, hammerhead shark",
    )
    assert names[207].startswith("golden retriever") and names[281].startswith("tabby")
    many = label_names(21843)
    assert len(many) == 21843 and many[0].startswith("organism")
    assert set(names) - set(many) == {"teddy, teddy bear"}  # the 1000 are otherwise among them
    assert label_names(10) is None
