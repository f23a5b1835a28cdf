"""train.py as a user runs it: five official steps, real runs, and every wrong input."""

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGKILL
from subprocess import PIPE
from threading import Timer

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data_utils import load_data
from models.checkpoints import load_torch, open_model
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from models.pixels import Pixels
from models.weights import read_google
from tests.helpers import (
    ROOT,
    golden_case,
    golden_config,
    run_command,
    save_npz,
    words,
    write_images,
)
from utils import dist_util, metrics
from utils.background import host_copy
from utils.balance import class_weights
from utils.checkpoint import RunState
from utils.optimizer import build_optimizer
from utils.precision import Precision
from utils.scheduler import learning_rate
from utils.stream import global_batch

TINY = words(
    "--model_type ViT-Ti_4 --img_size 8 --dataset digits --warmup_steps 2 --train_batch_size 32 "
    "--eval_batch_size 360 --log_every 1"
)

pytestmark = pytest.mark.usefixtures("workdir")


def run(name, *flags, start="none", steps=1):
    argv = ["--name", name, "--pretrained_dir", start, "--num_steps", steps, *flags]
    assert run_command(train, *TINY, *argv) == 0


def scalars(tag, name="run"):
    events = EventAccumulator(f"logs/{name}")
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def results(name="run"):
    return json.loads(Path(f"output/{name}_results.json").read_text())


# ------------------------------------------------------------------------------ official numbers


class GoldenStream:
    class_weights = None

    def __init__(self, golden, dtype):
        self.images = torch.from_numpy(golden["images"]).permute(0, 1, 4, 2, 3).to(dtype)
        self.labels = torch.from_numpy(golden["labels"]).long()

    def prepare(self, micro_batch):
        step, rows = micro_batch
        return self.images[step, rows], self.labels[step, rows]


def run_of(precision, optimizer, max_grad_norm=1.0):
    args = Namespace(seed=0, label_smoothing=0.0, max_grad_norm=max_grad_norm, loss="ce")
    made = {"precision": precision, "optimizer": optimizer, "drop_path": None}
    return Namespace(args=args, state=RunState(), **made)


def test_five_official_steps_with_bfloat16_momentum():
    """As Google's trainer ships. The figures move by 5.6e-4 from those of float32 momentum."""
    test_five_official_steps("A", torch.float32, 1, "bfloat16")


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_five_official_steps(case, dtype, micro_batches, momentum="float32"):
    """Losses, gradient norms and final parameters of the official update function."""
    golden = golden_case("train_sgd_5steps")
    config, values = golden_config(golden)
    prefix = "" if case == "A" else "B/"
    values |= json.loads(str(golden["B/config_json"])) if case == "B" else {}
    model = VisionTransformer(config, tuple(values["image"]), values["num_classes"]).to(dtype)
    model.load_from({k[5:]: v for k, v in golden.items() if k.startswith("init/")})
    precision = Precision(model)
    optimizer = build_optimizer(precision, "sgd", 0.1, 0.0, momentum_dtype=momentum)
    one_run = run_of(precision, optimizer, values["grad_norm_clip"])
    schedule = {"base": values["base_lr"], "total": values["total_steps"]}
    schedule |= {"warmup": values["warmup_steps"], "decay": values["decay_type"]}
    stream = GoldenStream(golden, dtype)
    losses, norms = [], []
    for step in range(5):
        lr = learning_rate(step, **schedule)
        assert lr == pytest.approx(golden[prefix + "lr_applied"][step], abs=1e-7)
        optimizer.param_groups[0]["lr"] = lr
        rows = [(step, shard) for shard in torch.arange(8).chunk(micro_batches)]
        loss, norm, _ = train.update(one_run, model, stream, rows)
        losses.append(loss.item())
        norms.append(norm.item())
    suffix = "f64" if dtype == torch.float64 else "f32"
    kept, tolerance, limit = "f32", 1e-5, 1e-7 if dtype == torch.float64 else 1e-5
    if momentum == "bfloat16":  # one more bit of rounding moves a momentum by 1 in 256
        suffix, kept, tolerance, limit = "bf16", "bf16", 2e-4, 5e-5
    # torch clips to norm + 1e-6, which moves the losses by 3e-8.
    assert np.abs(np.array(losses) - golden[f"{prefix}loss_{suffix}"]).max() < limit
    # Rounding grows along the trajectory; the norms themselves are about 10.
    assert np.allclose(norms, golden[f"{prefix}grad_norm_{kept}"], rtol=tolerance)
    state, final = model.state_dict(), f"{prefix}final_{kept}/"
    wanted = {k.removeprefix(final): v for k, v in golden.items() if k.startswith(final)}
    for name, tensor in read_google(wanted).state.items():
        assert (state.pop(name) - tensor).abs().max() < tolerance / 5, name
    assert not state


# ------------------------------------------------------------------------------------ real runs


@pytest.fixture
def checkpoint(tmp_path):
    """An npz of ViT-Ti_4 for 8 px images with 7 classes."""
    torch.manual_seed(0)
    save_npz(tmp_path / "Ti_4.npz", VisionTransformer(CONFIGS["ViT-Ti_4"], 8, 7))
    return str(tmp_path / "Ti_4.npz")


def test_a_run_leaves_what_it_promises(checkpoint, capsys):
    run("run", "--eval_every", "3", start=checkpoint, steps=4)
    out = capsys.readouterr().out
    assert "198 tensors loaded; left out head/kernel, head/bias: the head is new" in out
    assert "step 3: test accuracy" in out and "step 4: test accuracy" in out
    assert "best test accuracy" in out and "output/run_checkpoint.bin" in out and "logs/run" in out
    assert "overflow" not in out
    record = load_torch("output/run_checkpoint.bin")
    assert record["variant"] == "ViT-Ti_4" and record["img_size"] == [8, 8]
    assert record["classes"] == [str(i) for i in range(10)] and record["pixel_mean"] == 127.5
    assert open_model("output/run_checkpoint.bin")[0].head.weight.any()
    assert [step for step, _ in scalars("train/loss")] == [1, 2, 3, 4]
    assert scalars("train/lr")[0][1] == 0 and scalars("train/lr")[2][1] == pytest.approx(0.03)
    assert [step for step, _ in scalars("test/accuracy")] == [3, 4]
    assert min(v for _, v in scalars("train/images_per_second")) > 0
    assert min(v for _, v in scalars("train/grad_norm")) > 0
    assert scalars("train/loss")[0][1] == pytest.approx(np.log(10), abs=1e-4)  # the head is zero
    best = max(v for _, v in scalars("test/accuracy"))
    assert record["metrics"]["accuracy"] == pytest.approx(best)


def test_pauses_count_in_the_speed_and_are_summed(monkeypatch, capsys):
    clock, late = time.monotonic, []

    def slow(function, seconds, *args):
        late.append(seconds)
        return function(*args)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(late))
    predict = partial(slow, metrics.predict_dataset, 100)
    monkeypatch.setattr("utils.metrics.predict_dataset", predict)
    monkeypatch.setattr("utils.checkpoint.host_copy", partial(slow, host_copy, 10))
    run("run", "--eval_every", "2", "--save_every", "3", "--learning_rate", "0", steps=4)
    speeds = [value for _, value in scalars("train/images_per_second")]
    assert speeds[2] < 0.32 < speeds[3] < 3.2 < min(speeds[:2])  # of batches of 32
    found = re.search(r"pauses: (.*) s for evaluation, (.*) s for saving", capsys.readouterr().out)
    # Two evaluations; the first saves the run and the best weights, then steps 3 and 4 the run.
    assert (float(found[1]) // 100, float(found[2]) // 10) == (2, 4)


def test_the_same_command_gives_the_same_bits():
    states = []
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        run(name, "--dropout_rate", "0.1", "--seed", seed, steps=3)
        states.append(load_torch(f"output/{name}_checkpoint.bin")["model"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize(
    "flags", ["--fp16", "--bf16 --fp16_opt_level O1", "--bf16 --fp16_opt_level O3"]
)
def test_half_precision_learns_as_float32_does(flags, capsys):
    common = ["--learning_rate", "0.1", "--augmentation", "none"]
    run("run", *common, steps=12)
    run("half", *common, *words(flags), "--loss_scale", "8", steps=12)
    full, half = scalars("train/loss"), scalars("train/loss", "half")
    assert full[-1][1] < 1.5 < full[0][1]
    # All-half weights lose part of every step, which is what the masters of O2 are for.
    assert half[-1][1] == pytest.approx(full[-1][1], abs=0.3 if "O3" in flags else 0.1)
    assert scalars("train/loss_scale", "half")[-1][1] == 8
    state = load_torch("output/half_checkpoint.bin")["model"]
    assert {v.dtype for v in state.values()} == {torch.float32}
    if "--fp16 " in f"{flags} ":
        assert "this run uses bfloat16" in capsys.readouterr().out


def test_overflows_are_counted(monkeypatch, capsys):
    """Step 2 overflows twice; it is retried, and nothing else is."""
    update, left, made = train.update, [2], []

    def overflowing(one_run, *rest):
        if one_run.state.step == 2 and left[0]:
            left[0] -= 1
            return torch.tensor(9.0), torch.tensor(9.0), False
        made.append(one_run.state.step)
        return update(one_run, *rest)

    monkeypatch.setattr(train, "update", overflowing)
    run("run", steps=4)
    assert made == [0, 1, 2, 3]
    assert "2 steps overflowed and were retried" in capsys.readouterr().out
    assert [value for _, value in scalars("train/retried_steps")] == [0, 0, 2, 2]
    assert results()["training"]["retried"] == 2


def test_the_recipe_for_training_from_scratch():
    recipe = "--optimizer adamw --weight_decay 0.1 --label_smoothing 0.1 --mixup 0.4 --cutmix 1.0"
    run("run", *words(recipe), "--learning_rate", "1e-3", "--augmentation", "none", steps=60)
    assert scalars("test/accuracy")[-1][1] > 0.5


def test_flags_of_the_schedule_and_the_loss_reach_the_run():
    """Each flag's first effect, beside a run without it."""
    run("plain", steps=5)
    flags = "--decay_type linear --label_smoothing 0.2 --max_grad_norm 1e-6"
    run("run", *flags.split(), steps=5)
    lrs = [learning_rate(i, base=3e-2, total=5, warmup=2, decay="linear") for i in range(5)]
    assert [lr for _, lr in scalars("train/lr")] == pytest.approx(lrs)
    assert scalars("train/lr", "plain") != scalars("train/lr")
    first, plain = scalars("train/grad_norm")[0][1], scalars("train/grad_norm", "plain")[0][1]
    # All logits are 0: smoothing moves the targets towards what the head says, and only that.
    assert first == pytest.approx(0.8 * plain, rel=1e-4)
    start, end = (
        load_torch(f"output/{name}_last.pt")["precision"]["parameters"]["head.weight"].norm()
        for name in ("plain", "run")
    )
    assert end < 1e-5 < start


def test_class_weights_reach_the_loss():
    """The head is zero, so that every image has the loss log(10) before it is weighed."""
    run("run", "--balance", "loss", "--gradient_accumulation_steps", "2")
    labels = load_data("digits", ".", seed=42).train.labels
    indices, _ = global_batch(len(labels), 42, 0, 32)
    wanted = class_weights(labels)[labels[indices]].mean().item()
    assert abs(wanted - 1) > 1e-4
    assert scalars("train/loss")[0][1] == pytest.approx(wanted * np.log(10), rel=1e-6)


def test_a_validation_set_keeps_the_test_images_for_the_end(capsys):
    run("run", "--val_fraction", "0.1", steps=2)
    out = capsys.readouterr().out
    assert "val accuracy" in out and "test accuracy of the best weights" in out
    assert "images: 1295 train, 143 val, 359 test" in out
    assert len(scalars("test/accuracy")) == len(scalars("val/accuracy")) == 1
    assert results()["split"] == "test" and results()["images"] == 359


def test_results_are_those_of_the_best_weights_not_the_last(monkeypatch):
    update = train.update

    def spoiled(one_run, *rest):
        made = update(one_run, *rest)
        if one_run.state.step == 3:
            with torch.no_grad():
                one_run.model.head.weight.neg_()
                one_run.model.head.bias.neg_()
        return made

    monkeypatch.setattr(train, "update", spoiled)
    run("run", "--eval_every", "2", "--learning_rate", "0.3", steps=4)
    found = results()
    assert found["accuracy"] == found["training"]["best_accuracy"]
    assert found["training"]["best_accuracy"] > found["training"]["last_accuracy"] + 0.1


def evaluations(monkeypatch, *scores):
    """The first evaluations of a run find these figures, in the order of SCORES."""
    own, left = metrics.summary, [dict(zip(metrics.SCORES, row, strict=True)) for row in scores]
    monkeypatch.setattr(metrics, "summary", lambda *args: left.pop(0) if left else own(*args))


FIGURES = [(0.9, 2.0, 0.5, 0.6), (0.8, 1.0, 0.4, 0.5), (0.7, 3.0, 0.6, 0.5), (0.6, 1.0, 0.5, 0.7)]


@pytest.mark.parametrize("by, step", [("accuracy", 1), ("loss", 2), ("macro_f1", 3)])
def test_another_figure_selects_other_weights(by, step, monkeypatch, capsys):
    evaluations(monkeypatch, *FIGURES)
    run("run", "--select_by", by, "--eval_every", "1", "--val_fraction", "0.1", steps=4)
    wanted = [dict(zip(metrics.SCORES, values, strict=True)) for values in FIGURES]
    record, training = load_torch("output/run_checkpoint.bin"), results()["training"]
    assert (record["step"], record["metrics"]) == (step, wanted[step - 1])
    best, last = wanted[step - 1][by], wanted[3][by]
    found = [training[key] for key in ("select_by", "best_step", f"best_{by}", f"last_{by}")]
    assert found == [by, step, best, last]
    assert scalars(f"final/best_{by}")[0][1] == pytest.approx(best)
    assert [v for _, v in scalars(f"val/{by}")] == pytest.approx([each[by] for each in wanted])
    test = results()[by]
    assert scalars(f"test/{by}") == [(step, pytest.approx(test))]
    out = capsys.readouterr().out
    assert f"best val {by} {best:.4f} at step {step}, last {last:.4f}" in out
    assert f"test {by} of the best weights {test:.4f}" in out
    assert f"step 1: val accuracy 0.9000, loss 2.0000{', macro_f1 0.5000' * (step == 3)}\n" in out


def test_a_loss_that_is_no_number_is_never_the_best(monkeypatch):
    """Not even where it comes first: the run needs some weights, until there are better ones."""
    nan = float("nan")
    evaluations(monkeypatch, *((0.5, loss, 0.5, 0.5) for loss in (nan, nan, 3.0, nan)))
    run("run", "--select_by", "loss", "--eval_every", "1", steps=4)
    assert load_torch("output/run_checkpoint.bin")["step"] == 3
    training = results()["training"]
    assert (training["best_loss"], training["best_step"], training["last_loss"]) == (3, 3, None)


def test_every_micro_batch_of_every_process_drops_its_own_units(monkeypatch):
    """And gradients travel once in a step, with the last micro-batch."""
    held, seeds, seed = [], [], torch.manual_seed

    class Shared(torch.nn.Linear):
        @contextmanager
        def no_sync(self):
            held.append(1)
            yield

    class Stream:
        class_weights = None

        def prepare(self, micro_batch):
            return torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)

    model = Shared(4, 3)
    precision = Precision(model)
    one_run = run_of(precision, torch.optim.SGD(precision.parameters, lr=0.1))
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    for rank in (0, 1):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        for one_run.state.step in (0, 1):
            train.update(one_run, model, Stream(), [0] * 4)
    assert len(held) == 4 * 3 and len(set(seeds)) == 2 * 2 * 4


def test_flags_reach_data_streams_and_model(monkeypatch):
    seen = {}
    for name in ("load_data", "Augmentation", "TrainStream", "EvalStream", "use_cpu_kernels"):
        made = getattr(train, name)

        def spy(*args, name=name, made=made, **kw):
            seen[name] = (args, kw)
            return made(*args, **kw)

        monkeypatch.setattr(train, name, spy)
    flags = "--seed 7 --crop_min_area 0.3 --mixup 0.4 --cutmix 1 --flip --exact_decode"
    flags += " --rand_augment 2,9 --random_erasing 0.25"
    more = "--num_workers 3 --eval_batch_size 90 --dropout_rate 0.25 --balance sampling"
    more += " --interpolation bicubic --resize 12"
    run("run", *flags.split(), *words(more))
    assert seen["load_data"][1]["seed"] == seen["TrainStream"][1]["seed"] == 7
    assert seen["Augmentation"][0] == ("crop", (8, 8), 0.3, 0.4, 1.0, True, (2, 9), 0.25)
    decoding = seen["load_data"][1]["decoding"]
    assert decoding.exact and decoding.pixels == Pixels("bicubic", "smaller_side", 8 / 12)
    assert "use_cpu_kernels" in seen and seen["TrainStream"][1]["balance"] == "sampling"
    evaluation = seen["EvalStream"][1]
    assert (evaluation["batch_size"], evaluation["num_workers"]) == (90, 3)
    assert load_torch("output/run_checkpoint.bin")["config"]["dropout_rate"] == 0.25


def test_oblong_and_grey_images(checkpoint):
    run("run", "--img_size", "8x12", "--in_channels", "1", start=checkpoint)
    model, _ = open_model("output/run_checkpoint.bin")
    assert model.grid == (2, 3) and model.in_channels == 1


def test_a_model_of_no_known_variant_can_be_the_start(capsys):
    config = CONFIGS["ViT-Ti_4"]
    shallow = VisionTransformer(type(config)(**vars(config) | {"num_layers": 2}), 8, 7)
    save_npz("shallow.npz", shallow)
    argv = [word for word in TINY if word not in ("--model_type", "ViT-Ti_4")]
    start = ["--name", "run", "--pretrained_dir", "shallow.npz", "--num_steps", "1"]
    assert run_command(train, *argv, *start) == 0
    assert open_model("output/run_checkpoint.bin")[0].config.num_layers == 2


def test_warm_up_beyond_the_end_is_said(capsys):
    run("run", "--warmup_steps", "500")
    assert "--warmup_steps 500 >= --num_steps 1" in capsys.readouterr().out


def test_pictures_are_drawn_about_ten_times():
    run("run", "--num_steps", "24", "--eval_every", "1", "--val_fraction", "0.02")
    events = EventAccumulator("logs/run", size_guidance={"images": 0})
    events.Reload()
    steps = [event.step for event in events.Images("val/confusion")]
    assert steps == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert steps == [event.step for event in events.Images("val/attention")]


# ------------------------------------------------------------------------------ wrong input


def wrong(checkpoint):
    """name -> (flags, what the line says)"""
    Path("text.npz").write_text("hello")
    np.savez("other.npz", **{"weights": np.zeros(3)})
    with np.load(checkpoint) as arrays:
        np.savez("nan.npz", **dict(arrays) | {"embedding/bias": np.full(192, np.nan)})
    Path("file").write_text("")
    for name in ("broken", "unsplit", "odd"):
        write_images(Path(name, "train"), size=(70, 80))
    Path("broken/train/dog/broken.png").write_bytes(b"not an image")
    write_images(Path("odd/val"), ["eel"])
    npz, scratch = "--pretrained_dir", "--pretrained_dir none"
    folder = f"--dataset folder {scratch} --val_fraction 0.5 --data_dir"
    first = "--dataset folder --pretrained_dir no.npz --data_dir"  # refused before the weights
    probe = f"{npz} {checkpoint} --freeze backbone --dropout_rate 0.5"
    named = "--keep_head needs a head with named classes"
    layers = "give some of query,key,value,out"
    return {
        "missing": (f"{npz} no.npz", "no.npz: no such file"),
        "text": (f"{npz} text.npz", "text.npz: not an .npz archive"),
        "other": (f"{npz} other.npz", "other.npz: not a Vision Transformer"),
        "NaN": (f"{npz} nan.npz", "nan.npz: embedding/bias holds values that are not finite"),
        "variant": (
            f"{npz} {checkpoint} --model_type ViT-S_14 --img_size 14",
            "fits ViT-Ti_4, not ViT-S_14",
        ),
        "size": (f"{scratch} --img_size 30", "30x30 is not a multiple of the patch size 4"),
        "batch": (f"{scratch} --gradient_accumulation_steps 3", "must be a multiple of 3"),
        "unreadable": (f"{folder} broken", "broken.png is not a readable image"),
        "odd class": (f"{first} odd", "odd/val/eel"),
        "unsplit": (f"{first} unsplit", "--val_fraction 0.1"),
        "no folder": (f"{first} nowhere", "nowhere: no such folder"),
        "both halves": ("--fp16 --bf16", "not allowed with argument"),
        "output": (f"{scratch} --output_dir file/x", "file/x"),
        "odd pairs": (f"{scratch} --mixup 1 --train_batch_size 33", "33 is odd"),
        "name": (f"{scratch} --name ../x", "plain file name"),
        "linear probe": (probe, "uses neither --dropout_rate nor --drop_path"),
        "blocks": (f"{npz} {checkpoint} --freeze 13", "--freeze 13: the model has 12 blocks"),
        "frozen twice": (f"{npz} {checkpoint} --freeze 1 --lora 2", "leave --freeze out"),
        "nothing to freeze": (f"{scratch} --freeze 1", "--freeze needs pre-trained weights"),
        "no adapters": (f"{npz} {checkpoint} --lora_from {checkpoint}", "no safetensors file"),
        "adapted": (f"{npz} {checkpoint} --lora 2 --lora_on fc1", layers),
        "head": (f"{npz} {checkpoint} --keep_head", named),
        "RandAugment": (f"{scratch} --rand_augment 2,31", "magnitude up to 30"),
        "RGBA": (f"{scratch} --rand_augment 2,9 --in_channels 4", "leave it or --in_channels"),
        "decay": (f"{scratch} --layer_decay 0", "'0' is not above 0, at most 1"),
        "wandb": (f"{scratch} --wandb x", "pip install wandb"),
        "unknown": (f"{scratch} --learning_rat 1", "unrecognized arguments: --learning_rat"),
        "apex": (f"{scratch} --apex", "--apex: NVIDIA's apex and its kernels are not installed"),
    }


def test_every_wrong_input_is_one_line_and_exit_2(tmp_path, checkpoint, capsys):
    for case, (flags, message) in wrong(checkpoint).items():
        argv = [*TINY, "--name", "run", "--num_steps", "1", *words(flags)]
        assert run_command(train, *argv) == 2, case
        line = capsys.readouterr().err.strip()
        assert message in line and line.startswith("train.py: error: "), (case, line)
        assert "\n" not in line, case
        assert not {"output", "logs"} & set(os.listdir(tmp_path)), case


def test_a_refused_command_leaves_the_curves_alone():
    run("run")
    before = scalars("train/loss")
    write_images(Path("broken/train"), size=(70, 80))
    Path("broken/train/cat/broken.png").write_bytes(b"not an image")
    refused = ["--dataset", "folder", "--data_dir", "broken", "--val_fraction", "0.5"]
    argv = ["--name", "run", "--pretrained_dir", "none", "--num_steps", "1", "--overwrite"]
    assert run_command(train, *TINY, *argv, *refused) == 2
    assert before and scalars("train/loss") == before


def test_one_name_is_trained_by_one_process_at_a_time(capsys):
    """`--resume auto` waits for one that is still stopping."""
    run("run")
    before = Path("output/run_last.pt").read_bytes()
    code = (
        "import sys; from utils.files import exclusive_lock\n"
        "with exclusive_lock('output/.run.lock'):\n"
        "    print(flush=True); sys.stdin.read()"
    )
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, env=path) as other:
        other.stdout.readline()
        argv = [*TINY, "--name", "run", "--pretrained_dir", "none", "--num_steps", "1"]
        for flag, waits in (("--overwrite", False), ("--resume=auto", True)):
            assert run_command(train, *argv, flag, "--timeout", "0.001") == 2
            err = capsys.readouterr().err
            assert "another process trains 'run' in output" in err
            assert ("note: waiting until another process" in err) == waits
        assert Path("output/run_last.pt").read_bytes() == before
        Timer(0.2, other.kill).start()
        assert run_command(train, *argv, "--resume", "auto") == 0
        assert other.wait() == -SIGKILL and "already finished" in capsys.readouterr().out
    assert run_command(train, *argv, "--overwrite") == 0
    assert Path("output/run_last.pt").read_bytes() != before


# Python imports it at every start, also in the workers. What Windows lacks is gone, and workers are
# started anew instead of forked, as on macOS. PyTorch needs register_at_fork and SIGCHLD on Linux.
WITHOUT_POSIX = """
import multiprocessing, os, signal, sys
for module in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[module] = None
for name in ("fork", "setsid", "killpg", "getuid", "sched_getaffinity"):
    delattr(os, name)
for name in ("alarm", "pause", "SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn", force=True)
"""


def test_a_run_without_what_only_posix_has(tmp_path):
    Path("sitecustomize.py").write_text(WITHOUT_POSIX)
    write_images(Path("images/train"), count=4, size=(70, 80))
    write_images(Path("images/val"), count=2, size=(70, 80))
    flags = words("--dataset folder --data_dir images --train_batch_size 4 --num_workers 2")
    flags = [*TINY, *flags, *words("--pretrained_dir none --warmup_steps 0 --num_steps 1 --name")]
    assert run_command(train, *flags, "here") == 0
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train.py"), *flags, "there"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    here, there = (load_torch(f"output/{name}_last.pt") for name in ("here", "there"))
    parameters = there["precision"]["parameters"]
    assert parameters["head.weight"].any() and not list(Path("output").glob(".*"))
    for key, parameter in here["precision"]["parameters"].items():
        assert torch.equal(parameter, parameters[key]), key


def test_a_name_that_was_trained_meanwhile_is_not_replaced(monkeypatch, capsys):
    """Flags are checked before the lock is held: another run may end in between."""
    argv = [*TINY, "--name", "run", "--pretrained_dir", "none", "--num_steps", "1"]
    lock = train.lock_run

    def late(args):
        Path("output").mkdir()
        Path("output/run_last.pt").write_bytes(b"another run's")
        return lock(args)

    monkeypatch.setattr(train, "lock_run", late)
    assert run_command(train, *argv) == 2
    assert "output/run_last.pt exists already" in capsys.readouterr().err
    assert Path("output/run_last.pt").read_bytes() == b"another run's"
