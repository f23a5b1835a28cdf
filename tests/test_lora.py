"""Low-rank adapters: peft's formula, merged weights, and files that are taken again."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import train
from models import lora
from models.checkpoints import load_torch, open_model, save_torch
from models.cpu import use_cpu_kernels
from models.errors import UserError
from models.modeling import VisionTransformer
from tests.helpers import random_model, run_command, save_bin, tiny_config, words

NAMES = [str(i) for i in range(10)]
TINY = words(
    "--img_size 8 --dataset digits --warmup_steps 0 --train_batch_size 16 --eval_batch_size 360 "
    "--num_steps 2 --eval_every 1 --learning_rate 0.3 --pretrained_dir base.bin"
)


def adapted(rank=3, layers=("query", "value", "out"), kernels=False):
    model = random_model()
    lora.add_adapters(model, rank, layers)
    if kernels:
        use_cpu_kernels(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_w_x_plus_b_a_x(kernels, dtype):
    model = adapted(kernels=kernels).to(dtype)
    layer = model.transformer.encoder.layer[1].attn.query
    x = torch.randn(2, 5, 32, dtype=dtype)
    delta = layer.lora_b.weight.float() @ layer.lora_a.weight.float()
    wanted = F.linear(x.float(), layer.weight.float() + delta, layer.bias.float())
    assert (layer(x).float() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        images = torch.randn(2, 3, 32, 32)
        merged = VisionTransformer(tiny_config(), 32, 5).eval()
        merged.load_state_dict(lora.merged(model.state_dict()))
        assert (merged(images) - model(images)).abs().max() < 1e-6
        assert (merged(images) - random_model()(images)).abs().max() > 0.01


def test_it_begins_as_the_model_and_trains_little():
    model, images = random_model(), torch.randn(2, 3, 32, 32)
    before = model(images)
    lora.add_adapters(model, 4, ("query", "value"))
    assert model(images).equal(before)
    a = model.transformer.encoder.layer[0].attn.query.lora_a.weight
    assert 0.9 * 32**-0.5 < a.abs().max() <= 32**-0.5  # peft: uniform up to 1 / sqrt(in)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = [f"attn.{x}.lora_{y}.weight" for x in ("query", "value") for y in "ab"]
    wanted = {f"transformer.encoder.layer.{i}.{part}" for i in (0, 1) for part in parts}
    assert trained == wanted | {"head.weight", "head.bias"}


@pytest.fixture
def base(workdir):
    """A model of 8 px images with 10 classes."""
    save_bin("base.bin", random_model(tiny_config(patch_size=4), 8, 10), NAMES)


def run(name, *flags):
    assert run_command(train, *TINY, "--name", name, *flags) == 0


@pytest.mark.parametrize("level", ["", "--bf16", "--bf16 --fp16_opt_level O1"])
def test_saved_weights_are_merged_and_adapters_lie_beside_them(base, level, capsys):
    run("run", *words("--lora 2 --lora_on query,out --select last"), *words(level))
    assert "trained: 842 of " in capsys.readouterr().out  # 2 x 2 x 2 x 2 x 32 + 33 x 10
    record, start = load_torch("output/run_checkpoint.bin"), load_torch("base.bin")["model"]
    state, adapters = record["model"], Path("output/run_lora.safetensors")
    changed = {name for name in start if not state[name].equal(start[name])}
    part = "transformer.encoder.layer.{}.attn.{}.weight"
    wanted = {part.format(i, name) for i in (0, 1) for name in ("query", "out")}
    assert changed == wanted | {"head.weight", "head.bias"}
    with safe_open(adapters, framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == NAMES
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    merged = lora.merged(start | tensors)
    for name, tensor in merged.items():
        assert (tensor - state[name]).abs().max() < 1e-6, name
    results = json.loads(Path("output/run_results.json").read_text())
    assert results["accuracy"] == pytest.approx(record["metrics"]["accuracy"], abs=0.01)


def test_adapters_of_a_file_are_merged_or_train_on(base, capsys):
    run("first", *words("--lora 2"))
    first = load_torch("output/first_checkpoint.bin")
    adapters = words("--lora_from output/first_lora.safetensors")
    # Without steps to speak of, the model is the first one again, its head too.
    still = words("--keep_head --learning_rate 0 --num_steps 1")
    for name, flags in {"merged": [], "trained on": words("--lora 2")}.items():
        run(name, *adapters, *flags, *still)
        state = load_torch(f"output/{name}_checkpoint.bin")["model"]
        for key, tensor in first["model"].items():
            assert (state[key] - tensor).abs().max() < 1e-6, (name, key)
        accuracy = f"step 0: test accuracy {first['metrics']['accuracy']:.4f}"
        assert accuracy in capsys.readouterr().out
    run("new head", *adapters, *words("--learning_rate 0 --num_steps 1"))
    assert not open_model("output/new head_checkpoint.bin")[0].head.weight.any()
    flags = [*TINY, "--name", "wrong", *adapters, *words("--lora 3")]
    assert run_command(train, *flags) == 2
    assert "it holds adapters of rank 2 on query, value" in capsys.readouterr().err
    assert run_command(train, *TINY, "--name", "wrong", "--lora_from", "none.safetensors") == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err
    assert run_command(train, *TINY, "--name", "first", "--overwrite", *adapters) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert Path("output/first_lora.safetensors").exists()


READ = {"pre_logits": {"representation_size": 16}, "pair": {"num_registers": 1, "pool": "pair"}}


@pytest.mark.parametrize("what", READ)
def test_adapters_of_a_head_that_reads_more_than_features(what, workdir):
    model = random_model(tiny_config(patch_size=4, **READ[what]), 8, 10)
    save_bin("base.bin", model, NAMES)
    run("first", *words("--lora 2 --keep_head"))
    still = words("--keep_head --learning_rate 0 --num_steps 1")
    run("again", *words("--lora_from output/first_lora.safetensors"), *still)
    states = [load_torch(f"output/{name}_checkpoint.bin")["model"] for name in ("first", "again")]
    for key, tensor in states[0].items():
        assert (states[1][key] - tensor).abs().max() < 1e-6, key


def test_a_run_that_continues_under_another_name_has_its_adapters(base):
    run("run", *words("--lora 2"))
    record = load_torch("output/run_checkpoint.bin")
    save_torch(record | {"metrics": {"accuracy": 1.0}}, "output/run_checkpoint.bin")
    run("other", *words("--lora 2 --num_steps 3 --resume output/run_last.pt"))
    files = [Path(f"output/{name}_lora.safetensors").read_bytes() for name in ("run", "other")]
    assert files[0] == files[1]


def broken(tensors):
    """what the line says -> (tensors, metadata)"""
    first = next(name for name in tensors if name.endswith(lora.A))
    classes = {"classes": json.dumps(NAMES)}
    return {
        "no adapters": ({"head.weight": tensors["head.weight"]}, classes),
        "it holds no adapters": (tensors, {}),
        "does not fit": (tensors | {first: tensors[first][:, 1:].contiguous()}, classes),
        "fit its 9 classes": (tensors, {"classes": json.dumps(NAMES[:9])}),
        "not finite": (tensors | {first: tensors[first] * float("nan")}, classes),
    }


def test_a_file_that_does_not_fit_is_refused(base):
    run("run", *words("--lora 2 --num_steps 1"))
    with safe_open("output/run_lora.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = load_torch("base.bin")["model"]
    assert str(lora.read_adapters("output/run_lora.safetensors", state)).endswith("query, value")
    for line, (changed, metadata) in broken(tensors).items():
        save_file(changed, "broken.safetensors", metadata)
        with pytest.raises(UserError, match=line):
            lora.read_adapters("broken.safetensors", state)
