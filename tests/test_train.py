"""train.py as a user meets it: five official updates, real runs, and every wrong word."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import building
import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from models.weights import LAYOUTS, name_table, to_official
from tests.helpers import ROOT, golden_case, golden_config, random_model, save_bin
from utils import cifar, dist_util
from utils.checkpoint import load, load_model, write_npz
from utils.precision import Precision
from utils.scheduler import learning_rate

TINY = ["--model_type", "ViT-Ti_4", "--img_size", "8", "--dataset", "digits", "--warmup_steps", "2",
        "--train_batch_size", "32", "--eval_batch_size", "360", "--log_every", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scalars(tag, name="run"):
    events = EventAccumulator(f"logs/{name}")
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# ------------------------------------------------------------------------------ official numbers


class GoldenStream:
    def __init__(self, golden, dtype):
        self.images = torch.from_numpy(golden["images"]).permute(0, 1, 4, 2, 3).to(dtype)
        self.labels = torch.from_numpy(golden["labels"]).long()

    def prepare(self, micro):
        step, rows = micro
        return self.images[step, rows], self.labels[step, rows]


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_five_official_updates(case, dtype, micro):
    """Losses, gradient norms and final parameters of the official update function."""
    golden = golden_case("train_sgd_5steps")
    config, facts = golden_config(golden)
    prefix = "" if case == "A" else "B/"
    facts |= json.loads(str(golden["B/config_json"])) if case == "B" else {}
    model = VisionTransformer(config, tuple(facts["image"]), facts["num_classes"]).to(dtype)
    model.load_from({k[5:]: v for k, v in golden.items() if k.startswith("init/")})
    precision = Precision(model)
    optimizer = torch.optim.SGD(precision.parameters, lr=0.1, momentum=0.9)
    args = Namespace(seed=0, max_grad_norm=facts["grad_norm_clip"], label_smoothing=0.0)
    stream = GoldenStream(golden, dtype)
    losses, norms = [], []
    for step in range(5):
        rate = learning_rate(step, base=facts["base_lr"], total=facts["total_steps"],
                             warmup=facts["warmup_steps"], decay=facts["decay_type"])  # fmt: skip
        assert rate == pytest.approx(golden[prefix + "lr_applied"][step], abs=1e-7)
        optimizer.param_groups[0]["lr"] = rate
        rows = [(step, part) for part in torch.arange(8).chunk(micro)]
        loss, norm, _ = train.update(args, step, model, stream, rows, precision, optimizer)
        losses.append(loss.item())
        norms.append(norm.item())
    suffix = "f64" if dtype == torch.float64 else "f32"
    # torch clips to norm + 1e-6, which moves the losses by 3e-8.
    limit = 1e-7 if dtype == torch.float64 else 1e-5
    assert np.abs(np.array(losses) - golden[f"{prefix}loss_{suffix}"]).max() < limit
    # Rounding grows along the trajectory; the norms themselves are about 10.
    assert np.allclose(norms, golden[f"{prefix}grad_norm_f32"], rtol=1e-5)
    state = model.state_dict()
    for row in name_table(config):
        wanted = LAYOUTS[row.layout][0](golden[f"{prefix}final_f32/{row.official}"])
        assert np.abs(state[row.name].numpy() - wanted).max() < 2e-6, row.name


# ------------------------------------------------------------------------------------ real runs


@pytest.fixture
def checkpoint(tmp_path):
    """An npz of ViT-Ti_4 for 8 px images with 7 classes."""
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["ViT-Ti_4"], 8, 7)
    path = tmp_path / "Ti_4.npz"
    write_npz(path, to_official(model.state_dict(), model.config))
    return str(path)


def run(name, *flags, start="none", steps=1):
    argv = ["--name", name, "--pretrained_dir", start, "--num_steps", str(steps)]
    assert train.run([*TINY, *argv, *flags]) == 0


def test_a_run_leaves_what_it_promises(checkpoint, capsys):
    run("run", "--eval_every", "3", start=checkpoint, steps=4)
    out = capsys.readouterr().out
    assert "198 arrays loaded; left out head/kernel, head/bias: the head is new" in out
    assert "update 3: test accuracy" in out and "update 4: test accuracy" in out
    assert "best test accuracy" in out and "output/run_checkpoint.bin" in out and "logs/run" in out
    record = load("output/run_checkpoint.bin")
    assert record["variant"] == "ViT-Ti_4" and record["img_size"] == [8, 8]
    assert record["classes"] == [str(i) for i in range(10)] and record["pixel_mean"] == 127.5
    model, _ = load_model("output/run_checkpoint.bin")
    assert model.head.weight.any()
    assert [step for step, _ in scalars("train/loss")] == [1, 2, 3, 4]
    assert scalars("train/lr")[0][1] == 0 and scalars("train/lr")[2][1] == pytest.approx(0.03)
    assert [step for step, _ in scalars("test/accuracy")] == [3, 4]
    assert min(v for _, v in scalars("train/images_per_second")) > 0
    assert min(v for _, v in scalars("train/grad_norm")) > 0
    assert scalars("train/loss")[0][1] == pytest.approx(np.log(10), abs=1e-4)  # the head is zero
    best = max(v for _, v in scalars("test/accuracy"))
    assert record["metrics"]["accuracy"] == pytest.approx(best)


def test_the_same_command_gives_the_same_bits():
    states = []
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        run(name, "--dropout_rate", "0.1", "--seed", seed, steps=3)
        states.append(load(f"output/{name}_checkpoint.bin")["model"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("flags", [["--fp16"], ["--bf16", "--fp16_opt_level", "O1"],
                                   ["--bf16", "--fp16_opt_level", "O3"]])  # fmt: skip
def test_half_precision_learns_as_float32_does(flags, capsys):
    common = ["--learning_rate", "0.1", "--augmentation", "none"]
    run("run", *common, steps=12)
    run("half", *common, *flags, "--loss_scale", "8", steps=12)
    full, half = scalars("train/loss"), scalars("train/loss", "half")
    assert full[-1][1] < 1.5 < full[0][1]
    # All-half weights lose part of every update, which is what the masters of O2 are for.
    assert half[-1][1] == pytest.approx(full[-1][1], abs=0.3 if "O3" in flags else 0.1)
    assert scalars("train/loss_scale", "half")[-1][1] == 8
    state = load("output/half_checkpoint.bin")["model"]
    assert {v.dtype for v in state.values()} == {torch.float32}
    if "--fp16" in flags and not torch.cuda.is_available():
        assert "--fp16 runs as bfloat16 here" in capsys.readouterr().out


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_bfloat16_is_said(has, monkeypatch, capsys):
    """At the one level where it costs much."""
    monkeypatch.setattr(building, "cpu_has_bfloat16", lambda: has)
    said = {}
    for level in ("O1", "O2"):
        run("run", "--overwrite", "--bf16", "--fp16_opt_level", level, steps=1)
        said[level] = "slower here than O2" in capsys.readouterr().out
    assert said == {"O1": not has and not torch.cuda.is_available(), "O2": False}


def test_overflows_are_counted(monkeypatch, capsys):
    """Update 2 overflows twice; it is made again, and nothing else is."""
    update, left, made = train.update, [2], []

    def overflowing(args, step, *rest):
        if step == 2 and left[0]:
            left[0] -= 1
            return torch.tensor(9.0), torch.tensor(9.0), False
        made.append(step)
        return update(args, step, *rest)

    monkeypatch.setattr(train, "update", overflowing)
    run("run", "--log_every", "1", steps=4)
    assert made == [0, 1, 2, 3]
    assert "2 updates overflowed" in capsys.readouterr().out
    assert [value for _, value in scalars("train/skipped_updates")] == [0, 0, 2, 2]
    assert json.loads(Path("output/run_results.json").read_text())["training"]["skipped"] == 2


def test_the_recipe_for_training_from_scratch():
    recipe = ["--optimizer", "adamw", "--weight_decay", "0.1", "--label_smoothing", "0.1",
              "--mixup", "0.4", "--cutmix", "1.0", "--learning_rate", "1e-3"]  # fmt: skip
    run("run", *recipe, "--augmentation", "none", steps=60)
    assert scalars("test/accuracy")[-1][1] > 0.5


def test_flags_of_the_schedule_and_the_loss_reach_the_run():
    """Each flag's first effect, beside a run without it."""
    run("plain", steps=5)
    run("run", "--decay_type", "linear", "--label_smoothing", "0.2", "--max_grad_norm", "1e-6",
        steps=5)  # fmt: skip
    rates = [learning_rate(i, base=3e-2, total=5, warmup=2, decay="linear") for i in range(5)]
    assert [rate for _, rate in scalars("train/lr")] == pytest.approx(rates)
    assert scalars("train/lr", "plain") != scalars("train/lr")
    first, plain = scalars("train/grad_norm")[0][1], scalars("train/grad_norm", "plain")[0][1]
    # All logits are 0: smoothing moves the targets towards what the head says, and only that.
    assert first == pytest.approx(0.8 * plain, rel=1e-4)
    start, end = (load(f"output/{name}_last.pt")["precision"]["parameters"]["head.weight"].norm()
                  for name in ("plain", "run"))  # fmt: skip
    assert end < 1e-5 < start


def test_unreadable_images_are_left_out_if_asked(capsys):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            images_in(train.Path(part) / name, broken=name == "dog")
    run("run", "--dataset", "folder", "--data_dir", ".", "--skip_unreadable", "--num_workers", "0",
        "--train_batch_size", "4")  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("left out: ") == 2 and "4 to train on, 4 val" in out


def test_adamw_decays_matrices_only():
    model = VisionTransformer(CONFIGS["ViT-Ti_4"], 8, 7)
    precision = Precision(model)
    args = Namespace(learning_rate=1e-3, weight_decay=0.1, optimizer="adamw", apex=False)
    decaying, others = train.build_optimizer(args, precision, torch.device("cpu")).param_groups
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in decaying["params"]} == {"weight"}
    spared = {names[id(p)] for p in others["params"]}
    assert "transformer.embeddings.position_embeddings" in spared
    assert "transformer.embeddings.cls_token" in spared
    assert len(decaying["params"]) == 12 * 6 + 2 and len(decaying["params"]) + len(spared) == 200


def test_validation_split_keeps_the_test_images_for_the_end(capsys):
    run("run", "--val_fraction", "0.1", steps=2)
    out = capsys.readouterr().out
    assert "val accuracy" in out and "test accuracy of the best weights" in out
    assert "1295 to train on, 143 val" in out
    assert len(scalars("test/accuracy")) == len(scalars("val/accuracy")) == 1
    results = json.loads(Path("output/run_results.json").read_text())
    assert results["split"] == "test" and results["images"] == 359


def test_results_are_those_of_the_best_weights_not_the_last(monkeypatch):
    update = train.update

    def spoiled(args, step, model, *rest):
        made = update(args, step, model, *rest)
        if step == 3:
            with torch.no_grad():
                model.head.weight.neg_()
                model.head.bias.neg_()
        return made

    monkeypatch.setattr(train, "update", spoiled)
    run("run", "--eval_every", "2", "--learning_rate", "0.3", steps=4)
    results = json.loads(Path("output/run_results.json").read_text())
    assert results["accuracy"] == results["training"]["best_accuracy"]
    assert results["training"]["best_accuracy"] > results["training"]["last_accuracy"] + 0.1


def test_every_micro_batch_of_every_process_drops_its_own_units(monkeypatch):
    """And gradients travel once an update, with the last micro-batch."""
    held, seeds, seed = [], [], torch.manual_seed

    class Shared(torch.nn.Linear):
        @contextmanager
        def no_sync(self):
            held.append(1)
            yield

    class Stream:
        def prepare(self, micro):
            return torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)

    model = Shared(4, 3)
    precision = Precision(model)
    optimizer = torch.optim.SGD(precision.parameters, lr=0.1)
    args = Namespace(seed=0, max_grad_norm=1.0, label_smoothing=0.0)
    monkeypatch.setattr(dist_util, "world", lambda: 2)
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    for rank in (0, 1):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        for step in (0, 1):
            train.update(args, step, model, Stream(), [0] * 4, precision, optimizer)
    assert len(held) == 4 * 3 and len(set(seeds)) == 2 * 2 * 4


def test_flags_reach_data_streams_and_model(monkeypatch):
    seen = {}
    for name in ("load_data", "Augmentation", "TrainStream", "EvalStream"):
        made = getattr(train, name)

        def spy(*args, name=name, made=made, **kw):
            seen[name] = (args, kw)
            return made(*args, **kw)

        monkeypatch.setattr(train, name, spy)
    run("run", "--seed", "7", "--crop_min_area", "0.3", "--mixup", "0.4", "--cutmix", "1",
        "--augmentation", "crop+flip", "--num_workers", "3", "--eval_batch_size", "90",
        "--dropout_rate", "0.25")  # fmt: skip
    assert seen["load_data"][1]["seed"] == seen["TrainStream"][1]["seed"] == 7
    assert seen["Augmentation"][0] == ("crop+flip", (8, 8), 0.3, 0.4, 1.0)
    assert (seen["EvalStream"][1]["batch"], seen["EvalStream"][1]["workers"]) == (90, 3)
    assert load("output/run_checkpoint.bin")["config"]["dropout_rate"] == 0.25


def test_a_fine_tuned_bin_can_be_the_start(capsys):
    run("first")
    run("second", "--img_size", "16", start="output/first_checkpoint.bin")
    assert "positions resized from 2x2 to 4x4" in capsys.readouterr().out


def test_oblong_and_grey_images(checkpoint):
    run("run", "--img_size", "8x12", "--in_channels", "1", start=checkpoint)
    model, record = load_model("output/run_checkpoint.bin")
    assert model.grid == (2, 3) and record["in_channels"] == 1


def test_warm_up_beyond_the_end_is_said(capsys):
    run("run", "--warmup_steps", "500")
    assert "--warmup_steps 500 is not below --num_steps 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- wrong words


def images_in(folder, count=2, broken=False):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (70, 80), (i, 0, 0)).save(folder / f"{i}.png")
    if broken:
        (folder / "broken.png").write_bytes(b"not an image")


def wrong(tmp_path, checkpoint):
    """name -> (flags, what the line says)"""
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "Ti_4.npz").read_bytes()[:5000])
    np.savez(tmp_path / "pickled.npz", **{"cls": np.array([print], dtype=object)})
    np.savez(tmp_path / "other.npz", **{"weights": np.zeros(3)})
    (tmp_path / "file").write_text("")
    images_in(tmp_path / "one" / "train" / "cat")
    images_in(tmp_path / "empty" / "train" / "cat")
    (tmp_path / "empty" / "train" / "dog").mkdir()
    for name in ("cat", "dog"):
        images_in(tmp_path / "broken" / "train" / name, broken=name == "dog")
        images_in(tmp_path / "unsplit" / "train" / name)
        images_in(tmp_path / "odd" / "train" / name)
    images_in(tmp_path / "odd" / "val" / "eel")
    folder = ["--dataset", "folder", "--pretrained_dir", "none", "--val_fraction", "0.5",
              "--data_dir"]  # fmt: skip
    scratch = ["--pretrained_dir", "none"]
    return {
        "missing": (["--pretrained_dir", "no.npz"], "no.npz: no such file"),
        "text": (["--pretrained_dir", "text.npz"], "text.npz: not an .npz archive"),
        "cut": (["--pretrained_dir", "cut.npz"], "cut.npz: truncated"),
        "pickled": (["--pretrained_dir", "pickled.npz"], "cls is a pickled object"),
        "other": (["--pretrained_dir", "other.npz"], "not a ViT in Google's layout"),
        "variant": (["--pretrained_dir", checkpoint, "--model_type", "ViT-S_14",
                     "--img_size", "14"], "fits ViT-Ti_4, not ViT-S_14"),
        "size": ([*scratch, "--img_size", "30"], "30x30 is not a multiple of the patch size 4"),
        "batch": ([*scratch, "--gradient_accumulation_steps", "3"], "must be a multiple of 3"),
        "one class": ([*folder, "one"], "only 'cat'"),
        "empty class": ([*folder, "empty"], "dog holds no images"),
        "unreadable": ([*folder, "broken"], "broken.png is not a readable image"),
        "odd class": (["--dataset", "folder", "--data_dir", "odd", "--pretrained_dir", "no.npz"],
                      "odd/val/eel is a class that the training images lack"),
        "unsplit": (["--dataset", "folder", "--data_dir", "unsplit", "--pretrained_dir", "no.npz"],
                    "hold out a part"),  # before the weights, too
        "no folder": (
            ["--dataset", "folder", "--data_dir", "nowhere", "--pretrained_dir", "no.npz"],
            "nowhere: no such folder"),  # before the weights, which may be far away
        "no data": ([*folder, "nowhere"], "nowhere: no such folder"),
        "dataset": (["--dataset", "cifar11"], "invalid choice: 'cifar11'"),
        "level": (["--fp16", "--fp16_opt_level", "O5"], "invalid choice: 'O5'"),
        "both halves": (["--fp16", "--bf16"], "exclude each other"),
        "output": ([*scratch, "--output_dir", "file/x"], "cannot be written to: Not a directory"),
        "odd pairs": ([*scratch, "--mixup", "1", "--train_batch_size", "33"], "33 is odd"),
        "name": ([*scratch, "--name", "../x"], "plain file name"),
        "long name": ([*scratch, "--name", "x" * 201], "longer than 200 bytes"),
        "linear probe": (["--pretrained_dir", checkpoint, "--freeze", "backbone",
                          "--dropout_rate", "0.5"], "leave --dropout_rate out"),
        "superscript": ([*scratch, "--num_steps", "²"], "'²' is not a whole number"),
        "number": ([*scratch, "--num_steps", "ten"], "'ten' is not a whole number"),
        "unknown": ([*scratch, "--learning_rat", "1"], "unrecognized arguments: --learning_rat"),
        "apex and adamw": ([*scratch, "--apex", "--optimizer", "adamw"],
                           "--apex is for --optimizer sgd, not adamw"),
        "apex and bfloat16": ([*scratch, "--apex", "--bf16", "--fp16_opt_level", "O3"],
                              "--apex updates no bfloat16 parameters"),
        "apex": ([*scratch, "--apex"], "--apex: NVIDIA's apex is not installed"),
    }  # fmt: skip


def test_every_wrong_word_is_one_line_and_exit_2(tmp_path, checkpoint, capsys):
    for case, (flags, message) in wrong(tmp_path, checkpoint).items():
        assert train.run([*TINY, "--name", "run", "--num_steps", "1", *flags]) == 2, case
        captured = capsys.readouterr()
        line = captured.err.strip()
        assert message in line and line.startswith("train.py: error: "), (case, line)
        assert "\n" not in line, case
        assert not {"output", "logs"} & set(os.listdir(tmp_path)), case


def test_a_refused_command_leaves_the_curves_alone():
    run("run")
    before = scalars("train/loss")
    for name in ("cat", "dog"):
        images_in(Path("broken") / "train" / name, broken=True)
    refused = ["--dataset", "folder", "--data_dir", "broken", "--val_fraction", "0.5"]
    argv = ["--name", "run", "--pretrained_dir", "none", "--num_steps", "1", "--overwrite"]
    assert train.run([*TINY, *argv, *refused]) == 2
    assert before and scalars("train/loss") == before


def test_one_name_is_trained_by_one_process_at_a_time(capsys):
    run("run")
    before = Path("output/run_last.pt").read_bytes()
    code = "import pathlib, sys; from utils.files import locked\n" \
           "with locked(pathlib.Path('output/.run.lock')):\n" \
           "    print(flush=True); sys.stdin.read()"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:  # fmt: skip
        other.stdout.readline()
        argv = [*TINY, "--name", "run", "--pretrained_dir", "none", "--num_steps", "1"]
        assert train.run([*argv, "--overwrite"]) == 2
        assert "another process is training 'run' in output" in capsys.readouterr().err
        assert Path("output/run_last.pt").read_bytes() == before
        other.kill()
    assert train.run([*argv, "--overwrite"]) == 0
    assert Path("output/run_last.pt").read_bytes() != before
    assert not list(Path("output").glob(".*"))


def test_a_name_that_was_trained_meanwhile_is_not_replaced(monkeypatch, capsys):
    """Flags are checked before the lock is there: somebody may end in between."""
    argv = [*TINY, "--name", "run", "--pretrained_dir", "none", "--num_steps", "1"]
    held = train.name_held

    def late(*args):
        Path("output").mkdir()
        Path("output/run_last.pt").write_bytes(b"another run's")
        return held(*args)

    monkeypatch.setattr(train, "name_held", late)
    assert train.run(argv) == 2
    assert "output/run_last.pt is there already" in capsys.readouterr().err
    assert Path("output/run_last.pt").read_bytes() == b"another run's"


@pytest.mark.parametrize("only", [[], ["--eval_only", "m.bin"]])
def test_offline_fetches_no_data(only, monkeypatch, capsys):
    save_bin("m.bin", random_model(), "abcde")

    def fetch(*_):
        raise AssertionError

    monkeypatch.setattr(cifar, "_fetch", fetch)
    flags = ["--name", "other", "--pretrained_dir", "none", "--dataset", "cifar10", "--offline"]
    assert train.run([*(only or TINY), *flags]) == 2
    assert "--offline forbids it" in capsys.readouterr().err


def test_pictures_are_drawn_about_ten_times():
    run("run", "--num_steps", "24", "--eval_every", "1", "--val_fraction", "0.02")
    events = EventAccumulator("logs/run", size_guidance={"images": 0})
    events.Reload()
    steps = [event.step for event in events.Images("val/confusion")]
    assert steps == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert steps == [event.step for event in events.Images("val/attention")]


def test_a_resumed_run_is_compiled_as_the_whole_one_was(monkeypatch):
    asked = []
    monkeypatch.setattr(train.compiling, "pays", lambda *facts: asked.append(facts[2]))
    run("run", "--num_steps", "3", "--eval_every", "1")
    run("run", "--num_steps", "3", "--eval_every", "1", "--resume")
    assert asked == [3, 3]


@pytest.mark.parametrize("name", ["logs", "data"])
def test_a_file_where_a_folder_should_be(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text("")
    monkeypatch.setattr("shutil.which", lambda name: "npm")
    monkeypatch.setattr("utils.cifar._fetch", lambda *_: (_ for _ in ()).throw(OSError("no")))
    flags = ["--dataset", "cifar10", "--data_dir", "data/x"] if name == "data" else []
    assert train.run([*TINY, "--name", "run", "--pretrained_dir", "none", *flags]) == 2
    line = capsys.readouterr().err.strip()
    assert name in line and "\n" not in line and line.startswith("train.py: error: ")


def test_a_launch_without_a_meeting_place(monkeypatch, capsys):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert train.run([*TINY, "--name", "run", "--pretrained_dir", "none"]) == 2
    line = capsys.readouterr().err.strip()
    assert "MASTER_ADDR" in line and "torchrun" in line and "\n" not in line


def test_the_wrong_apex_is_told_apart(tmp_path, monkeypatch, capsys):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('an unrelated package')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert train.run([*TINY, "--name", "run", "--pretrained_dir", "none", "--apex"]) == 2
    assert "the apex that is installed is not NVIDIA's" in capsys.readouterr().err
