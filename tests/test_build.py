"""What a training begins with, and what of it trains."""

import json
from pathlib import Path

import pytest
import torch

import train
from build import freeze
from evaluate import main as evaluate
from models.checkpoints import load_torch
from models.cpu import use_cpu_kernels
from tests.helpers import random_model, run_command, save_bin, save_npz, tiny_config, words
from utils.precision import Precision

NAMES = [str(i) for i in range(10)]
TINY = words(
    "--img_size 8 --dataset digits --warmup_steps 0 --train_batch_size 16 --eval_batch_size 360 "
    "--num_steps 2 --eval_every 1 --pretrained_dir base.bin --name run"
)

pytestmark = pytest.mark.usefixtures("workdir")


def tiny_model():
    return random_model(tiny_config(patch_size=4, num_layers=3, dropout_rate=0.5), 8, 10)


@pytest.mark.parametrize("blocks", [0, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_have_no_dropout_no_gradient_and_the_same_bits(blocks, checkpointing):
    model = use_cpu_kernels(tiny_model()).train()
    model.transformer.encoder.grad_checkpointing = checkpointing
    freeze(model, blocks)
    images, seen = torch.randn(4, 3, 8, 8), []
    layers = model.transformer.encoder.layer
    hook = layers[blocks] if blocks < 3 else model.transformer.encoder.encoder_norm
    hook.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    precision = Precision(model, "O0")
    optimizer = torch.optim.SGD(precision.parameters, lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        model(images).square().sum().backward()
        assert all((p.grad is None) != p.requires_grad for p in model.parameters())
        precision.step(optimizer, 0)
    assert seen[0].equal(seen[-1]) and not seen[0].requires_grad  # no dropout, and no graph below
    for name, p in model.named_parameters():
        frozen = "embeddings" in name or any(f".layer.{i}." in name for i in range(blocks))
        if "key.bias" not in name:  # softmax takes no notice of it
            assert p.equal(before[name]) == frozen, name


def test_frozen_layers_hold_through_a_run(capsys):
    """In half precision too: what is saved are the float32 weights of the file."""
    save_bin("base.bin", tiny_model(), NAMES)
    assert run_command(train, *TINY, *words("--freeze 1 --bf16 --drop_path 0.5")) == 0
    state, start = load_torch("output/run_checkpoint.bin")["model"], load_torch("base.bin")["model"]
    frozen = {name for name in start if "embeddings" in name or ".layer.0." in name}
    assert {n for n in start if state[n].equal(start[n]) and n.endswith("weight")} <= frozen
    assert all(state[name].equal(start[name]) for name in frozen)
    total = sum(tensor.numel() for tensor in start.values())
    trained = total - sum(start[name].numel() for name in frozen)
    assert f"trained: {trained:,} of {total:,} parameters" in capsys.readouterr().out


def test_a_head_that_is_kept_begins_as_it_was(capsys):
    """By name: the file has the classes in another order."""
    model, order = tiny_model(), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    save_bin("ordered.bin", model, NAMES)
    model.head.weight.data = model.head.weight.data[order]
    model.head.bias.data = model.head.bias.data[order]
    save_bin("base.bin", model, [NAMES[i] for i in order])
    evaluate(words("--checkpoint ordered.bin --dataset digits --output_dir evaluated"))
    accuracy = json.loads(next(Path("evaluated").glob("*results.json")).read_text())["accuracy"]
    assert run_command(train, *TINY, "--keep_head") == 0
    assert f"step 0: test accuracy {accuracy:.4f}" in capsys.readouterr().out
    save_bin("base.bin", model, [*NAMES[:9], "ten"])
    assert run_command(train, *TINY, "--keep_head", "--overwrite") == 2
    assert "base.bin has 10; one of them alone has 9, ten" in capsys.readouterr().err
    save_bin("base.bin", model, [*NAMES[:9], "1"])  # which row is that of 1?
    assert run_command(train, *TINY, "--keep_head", "--overwrite") == 2
    assert "needs a head with named classes" in capsys.readouterr().err


def test_a_head_that_is_kept_has_its_pre_logits():
    model = random_model(tiny_config(patch_size=4, representation_size=16), 8, 10)
    save_bin("base.bin", model, NAMES)
    assert run_command(train, *TINY, *words("--keep_head --learning_rate 0")) == 0
    record = load_torch("output/run_checkpoint.bin")
    for name, tensor in model.state_dict().items():
        assert record["model"][name].equal(tensor), name
    assert record["config"]["representation_size"] == 16
    save_npz("base.npz", model)
    flags = words("--keep_head --pretrained_dir base.npz --overwrite")
    assert run_command(train, *TINY, *flags) == 2
