"""The average of the weights: the formula, timm's, and what a run keeps."""

import json
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3

import train
from models.checkpoints import load_torch
from tests.helpers import run_command, words
from utils.precision import Precision

TINY = words(
    "--model_type ViT-Mini_8 --img_size 8 --dataset digits --warmup_steps 2 --train_batch_size 16 "
    "--eval_batch_size 360 --pretrained_dir none --num_steps 4 --eval_every 2"
)


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_average_is_timm_s(level):
    """The average of the masters in float32, whatever the model computes in."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    precision = Precision(model, level, torch.bfloat16, ema=0.9)
    followed = torch.nn.ParameterList([p.detach().float().clone() for p in precision.parameters])
    theirs = ModelEmaV3(followed, decay=0.9, foreach=False)
    optimizer = torch.optim.SGD(precision.parameters, lr=0.3)
    for _ in range(4):
        precision.backward(model(torch.randn(2, 5, dtype=precision.model_dtype)).square().sum())
        precision.step(optimizer, 0)
        for mine, p in zip(followed, precision.parameters, strict=True):
            mine.data.copy_(p)
        theirs.update(followed)
    for ours, wanted, p in zip(
        precision.average.parameters, theirs.module, precision.parameters, strict=True
    ):
        assert ours.dtype == torch.float32 and (ours - wanted).abs().max() < 1e-6
        assert (ours - p).abs().max() > 1e-4

    before = [p.clone() for p in model.parameters()]
    with precision.averaged():
        for p, average in zip(model.parameters(), precision.average.parameters, strict=True):
            assert p.equal(average.to(p.dtype))
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))
    assert precision.model_state_dict(averaged=True)["bias"].equal(precision.average.parameters[1])


@pytest.mark.parametrize("level", ["", "--bf16"])
def test_the_better_of_both_is_kept_and_said(level, workdir, capsys):
    """Averages with a decay near 1 stay at the start, which knows nothing; with 0 they follow."""
    best = {}
    for decay in ("0.9999", "1e-9"):
        name = f"run{decay}"
        flags = ["--name", name, "--ema", decay, "--select_by", "loss"]
        assert run_command(train, *TINY, *words(level), *flags) == 0
        training = json.loads(Path(f"output/{name}_results.json").read_text())["training"]
        best[decay] = training["averaged"], training["best_loss"]
    out = capsys.readouterr().out
    assert "step 4: test_averaged accuracy" in out
    assert best["0.9999"][0] is False
    assert best["0.9999"][1] == best["1e-9"][1]  # the weights themselves are not changed


def test_averages_are_saved_if_they_are_better(workdir, capsys):
    """The file then holds them, and its figures are those of a later evaluation of it."""
    flags = words("--ema 0.5 --learning_rate 1 --warmup_steps 0 --select_by loss --eval_every 4")
    assert run_command(train, *TINY, *flags, "--name", "run") == 0
    record = load_torch("output/run_checkpoint.bin")
    results = json.loads(Path("output/run_results.json").read_text())
    assert results["training"]["averaged"] and record["metrics"]["averaged"] is True
    assert "these are the averaged weights" in capsys.readouterr().out
    assert results["loss"] == pytest.approx(record["metrics"]["loss"], rel=1e-5)
    save = load_torch("output/run_last.pt")["precision"]
    names = list(save["parameters"])
    averages = dict(zip(names, save["averages"], strict=True))
    assert any(not averages[name].equal(save["parameters"][name]) for name in names)
    assert record["step"] == 4
    assert all(record["model"][name].equal(averages[name]) for name in names)
