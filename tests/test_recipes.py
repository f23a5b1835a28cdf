"""The recipes: every file says where it comes from, parses, and makes a step; reproduce.py."""

import re
from pathlib import Path

import pytest

import probe
import reproduce
import train
from flags import parse_flags
from models.zoo import expected_variant
from tests.helpers import ROOT, run_command, words, write_images
from utils.metrics import read_results

RECIPES = sorted((ROOT / "recipes").glob("*.txt"))
TINY = words("--model_type ViT-Mini_8 --img_size 8 --train_batch_size 4 --warmup_steps 0")
TINY += words("--dataset folder --data_dir images --num_workers 0")
TINY += ["--pretrained_dir", str(ROOT / "checkpoint/ViT-Mini_8.npz")]

pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def images():
    for split in ("train", "val", "test"):
        write_images(Path("images") / split, count=3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_makes_a_step(path, images):
    text = path.read_text()
    head = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for field in ("Source: ", "Protocol: ", "Published: ", "Hardware and time: "):
        assert head.count(f"# {field}") == 1, field
    assert "Source: this project" in head or re.search(r"(19|20)\d\d", head)
    if path.stem in ("few-shot", "probe"):
        args = probe.build_parser().parse_args([f"@{path}"])
        assert args.methods == {"few-shot": ["fewshot"], "probe": ["linear"]}[path.stem]
        assert expected_variant(args.checkpoint) == "ViT-B_16"
        return
    args = parse_flags([f"@{path}", "--name", "run"], 1)
    other = path.stem in ("demo", "mae-base-imagenet")  # with weights that are not Google's
    assert expected_variant(args.pretrained_dir) == args.model_type or other
    official = re.match("(google|bigvision)-.*-(?!augreg)", path.stem)
    if official:  # what they have in common
        assert (args.select, args.momentum_dtype) == ("last", "bfloat16")
        assert (args.train_batch_size, args.img_size, args.max_grad_norm) == (512, 384, 1)
    smaller = ["--resize", "9"] if "--resize" in text else []
    one_step = ["--num_steps", "1", "--name", "run", *smaller]
    assert run_command(train, f"@{path}", *TINY, *one_step) == 0
    assert read_results(Path("output/run_results.json"))["training"]["steps"] == 1


def test_a_file_of_flags(capsys):
    Path("flags.txt").write_text("# a comment\n\n--name 'two words'  # why\n--seed 3\n--bf16\n")
    args = parse_flags(["--seed", "1", "@flags.txt", "--num_steps", "7"], 1)
    assert (args.name, args.seed, args.bf16, args.num_steps) == ("two words", 3, True, 7)
    assert parse_flags(["@flags.txt", "--seed", "4"], 1).seed == 4  # what follows wins
    Path("wrong.txt").write_text("--name 'open\n")
    for name, problem in [("wrong.txt", "No closing quotation"), ("none.txt", "none.txt")]:
        assert run_command(train, f"@{name}") == 2
        err = capsys.readouterr().err
        assert problem in err and err.count("\n") == 1


def test_reproduce_compares_and_goes_on(images, capsys, monkeypatch):
    """The second seed fails at first; the same command does not repeat the first one."""
    Path("small.txt").write_text("# Published: 0.9902\n--eval_every 2\n")
    command = ["small.txt", "--seeds", "2", *TINY, "--num_steps", "2"]
    call, calls = reproduce.subprocess.run, []

    def in_this_process(words):
        start = words.index(reproduce.TRAIN)
        calls.append(words[1:start])
        status = 1 if len(calls) == 2 else run_command(train, *words[start + 1 :])
        return call(["sh", "-c", f"exit {status}"])

    monkeypatch.setattr(reproduce.subprocess, "run", in_this_process)
    assert run_command(reproduce, *command) == 1
    assert "seed 2 ended with status 1: the same command goes on" in capsys.readouterr().err
    assert run_command(reproduce, *command) == 0
    out = capsys.readouterr().out
    assert "already finished" in out and calls == [[]] * 4
    scores = [read_results(Path(f"output/small_{seed}_results.json")) for seed in (1, 2)]
    first, second = (result["accuracy"] for result in scores)
    assert scores[0]["training"]["device"].startswith("CPU")
    table = Path("output/small_reproduced.md").read_text()
    assert f"| 1 | {first:.4f} | 2 | 0." in table and table in out
    mean = (first + second) / 2
    assert f"mean {mean:.4f} ({min(first, second):.4f} to {max(first, second):.4f})" in table
    assert f"published 0.9902; difference {mean - 0.9902:+.4f}" in table
    assert run_command(reproduce, *command, "--processes", "2") == 0
    assert calls[-1] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert run_command(reproduce, "none.txt") == 2
    assert "none.txt: no such file" in capsys.readouterr().err
