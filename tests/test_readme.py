"""What the README says: its commands parse, its flags exist with the defaults it states."""

import re
import shlex
import subprocess

import pytest

import curves
import export
import fewshot
import predict
from benchmarks import survey, throughput
from flags import build_parser, parse_flags
from models.configs import CONFIGS
from tests.helpers import ROOT
from tests.test_modeling import COUNTS

README = (ROOT / "README.md").read_text()


def commands(text):
    """Flags of every train.py command in `text`."""
    text = text.replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"train\.py (--.*?)(?:`|\n|$)", text)]


def test_every_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dry = subprocess.run(["make", "-n", "-C", ROOT, "demo"], capture_output=True, text=True)
    found = commands(README) + commands(dry.stdout)
    assert len(commands(README)) >= 5 and len(commands(dry.stdout)) == 2
    for argv in found:
        if "--help" not in argv:
            args = parse_flags(argv, world=1)
            assert args.name


@pytest.mark.parametrize("script", [curves, export, fewshot, predict])
def test_commands_of_the_other_scripts_parse(script):
    lines = re.findall(rf"python3 {script.__name__}\.py (.*?)(?:`|   |\n)", README)
    assert lines
    for line in lines:
        script.build_parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("script", [survey, throughput])
def test_commands_of_the_benchmarks_parse(script):
    text = README + (ROOT / "benchmarks" / "README.md").read_text()
    lines = re.findall(rf"python benchmarks/{script.__name__.split('.')[1]}\.py (.*)", text)
    assert len(lines) >= 3
    for line in lines:
        script.parse(shlex.split(line, comments=True))


@pytest.mark.parametrize("action", build_parser()._actions[1:], ids=lambda a: a.dest)
def test_every_flag_is_documented(action):
    section = README.split("## Flags")[1].split("\n## ")[0]
    assert f"`{action.option_strings[0]}`" in section


def test_the_specified_defaults():
    """The earlier port's flags keep their names and defaults."""
    args = vars(build_parser().parse_args(["--name", "x"]))
    port = {
        "dataset": "cifar10", "pretrained_dir": "checkpoint/ViT-B_16.npz", "output_dir": "output",
        "img_size": 224, "train_batch_size": 512, "eval_batch_size": 64, "eval_every": 100,
        "learning_rate": 3e-2, "weight_decay": 0, "num_steps": 10000, "decay_type": "cosine",
        "warmup_steps": 500, "max_grad_norm": 1.0, "local_rank": -1, "seed": 42,
        "gradient_accumulation_steps": 1, "fp16": False, "fp16_opt_level": "O2", "loss_scale": 0,
    }  # fmt: skip
    assert {key: args[key] for key in port} == port


def test_the_models_table_is_true():
    rows = re.findall(r"^\| (\S+) \| .*? \| (\d+,\d+,\d+) \|", README, flags=re.M)
    assert len(rows) == len({id(row) for row in CONFIGS.values()})
    for name, count in rows:
        assert COUNTS[name] == int(count.replace(",", ""))
