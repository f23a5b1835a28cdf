"""Every fast path gives the plain path's numbers, and what the hardware module decides."""

import copy
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import train
from benchmarks.rows import LEVERS
from models import cpu
from models.configs import CONFIGS
from models.modeling import Transformer
from tests.helpers import random_model, run_command, save_bin, tiny_config, words
from utils import hardware
from utils.classifier import Classifier


def tiny_model(**changes):
    return random_model(tiny_config(**changes), std=0.3).train()


def loss_and_gradients(model) -> tuple[float, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 32, generator=generator).to(model.head.weight.dtype)
    labels = torch.randint(5, (6,), generator=generator)
    torch.manual_seed(2)
    loss = F.cross_entropy(model(images).float(), labels)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def assert_close(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    largest = max(grad.abs().max() for grad in a[1])
    assert largest > 0.1
    assert all((x - y).abs().max() < 1e-5 * largest for x, y in zip(a[1], b[1], strict=True))


def assert_equal(a, b):
    assert a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.fixture
def all_kernels(monkeypatch):
    """Every kernel in float32, where differences are small."""
    monkeypatch.setattr(cpu, "EXPLICIT_ATTENTION", {torch.float32})
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(cpu, "ONEDNN_DTYPES", {torch.float32})


@pytest.mark.usefixtures("all_kernels")
@pytest.mark.parametrize("changes", [{}, {"classifier": "gap"}, {"resnet_layers": (1,)}])
def test_fast_equals_plain(changes, monkeypatch):
    """With gradients, and without them in either mode."""
    plain, images = tiny_model(**changes), torch.randn(6, 3, 32, 32)
    model = cpu.use_cpu_kernels(copy.deepcopy(plain))
    fast, logits = loss_and_gradients(model), plain(images)
    with torch.no_grad():
        for mode in (True, False):
            assert (model.train(mode)(images) - logits).abs().max() < 1e-5 * logits.abs().max()
    monkeypatch.setattr(Transformer, "forward", LEVERS["last block"][2])
    assert_close(fast, loss_and_gradients(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("all_kernels")
def test_without_levers_the_kernels_compute_the_plain_bits(dtype, monkeypatch):
    plain = tiny_model(dropout_rate=0.2, attention_dropout_rate=0.2).to(dtype)
    model = cpu.use_cpu_kernels(copy.deepcopy(plain))
    fast = loss_and_gradients(model)
    for lever in LEVERS.values():
        if lever is not None:
            monkeypatch.setattr(*lever)
    slow = loss_and_gradients(model)
    assert_equal(slow, loss_and_gradients(plain))
    assert fast[0] != slow[0]
    images = torch.randn(2, 3, 32, 32).to(dtype)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))


NEEDS_COMPILER = pytest.mark.skipif(not hardware.can_compile(), reason="needs a C++ compiler")
BACKENDS = [("token", "aot_eager"), pytest.param("gap", "inductor", marks=NEEDS_COMPILER)]


@pytest.mark.parametrize("classifier, backend", BACKENDS)
def test_compiled_blocks_equal_plain(classifier, backend, monkeypatch):
    """In training. All share one graph, but a last block with one query; evaluation is eager."""
    torch.compiler.reset()
    counters.clear()
    plain, calls = cpu.use_cpu_kernels(tiny_model(classifier=classifier, num_layers=3)), []
    fast, images, compile = copy.deepcopy(plain), torch.randn(2, 3, 32, 32), torch.compile

    def spy(forward, **options):
        assert options == {"dynamic": False}
        compiled = compile(forward, backend=backend, fullgraph=True, **options)
        return lambda *args: calls.append(1) or compiled(*args)

    monkeypatch.setattr(torch, "compile", spy)
    hardware.compile_blocks(fast)
    assert torch.equal(fast.eval()(images), plain.eval()(images)) and not calls
    assert_close(loss_and_gradients(fast.train()), loss_and_gradients(plain.train()))
    assert len(calls) == 3
    assert counters["stats"]["unique_graphs"] == {"token": 2, "gap": 1}[classifier]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_grad_checkpointing_gives_the_same_gradients(dropout, fast):
    model = tiny_model(dropout_rate=dropout, num_layers=3)
    if fast:
        cpu.use_cpu_kernels(model)
    encoder, calls = model.transformer.encoder, []
    for block in encoder.layer:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = loss_and_gradients(model)
    encoder.grad_checkpointing = True
    assert_equal(plain, loss_and_gradients(model))
    assert len(calls) == 3 + 5  # two blocks are computed again, the last one is not


TINY = words(
    "--model_type ViT-Ti_4 --img_size 8 --dataset digits --name run --pretrained_dir none "
    "--train_batch_size 8 --eval_batch_size 360 --num_steps 1 --warmup_steps 0"
)


CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")
TOO_MUCH = [
    (Mock(side_effect=CUDA_FULL), "CUDA out of memory"),
    (lambda *_: torch.empty(2**56), "you tried to allocate 288230376151711744 bytes"),
    (lambda *_: np.empty(2**56), "Unable to allocate 512. PiB"),
]


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("update, reason", TOO_MUCH, ids=["cuda", "cpu", "numpy"])
def test_out_of_memory_is_one_line(update, reason, monkeypatch, capsys):
    monkeypatch.setattr(train, "update", update)
    assert run_command(train, *TINY) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: out of memory")
    assert reason in line and "a smaller batch" in line


@pytest.mark.usefixtures("workdir")
def test_flags_and_kernels_reach_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr(hardware, "compile_blocks", seen.append)
    monkeypatch.setattr(hardware, "can_compile", lambda: True)
    assert run_command(train, *TINY, "--compile", "on", "--grad_checkpointing") == 0
    encoder = seen[0].transformer.encoder
    assert encoder.grad_checkpointing
    assert all(type(block.attn) is cpu.CpuAttention for block in encoder.layer)
    seen.clear()
    assert run_command(train, *TINY, "--overwrite") == 0 and not seen
    save_bin("tiny.bin", random_model(), "abcde")
    classifier = Classifier.open("tiny.bin", device="cpu")
    assert type(classifier.model.transformer.encoder.layer[0].ffn) is cpu.CpuMlp


@pytest.mark.usefixtures("workdir")
def test_compiling_needs_a_long_run_and_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "can_compile", lambda: True)
    gpu, host = (Namespace(weight=Namespace(is_cuda=is_cuda)) for is_cuda in (True, False))
    large = Namespace(head=gpu, grid=(14, 14), config=CONFIGS["ViT-B_16"])
    small = Namespace(head=gpu, grid=(4, 4), config=tiny_config())
    on_host = Namespace(head=host, grid=(14, 14), config=CONFIGS["ViT-B_16"])
    long = ("auto", large, 512, 10_000)
    assert hardware.should_compile(*long) and hardware.should_compile("on", on_host, 1, 1)
    for run in (("auto", large, 512, 100), ("auto", large, 5, 10_000), ("off", *long[1:])):
        assert not hardware.should_compile(*run)
    for model in (small, on_host):
        assert not hardware.should_compile("auto", model, 512, 10_000)
    monkeypatch.setattr(hardware, "can_compile", lambda: False)
    assert not hardware.should_compile(*long)
    assert run_command(train, *TINY, "--compile", "on") == 2
    assert "--compile on needs a C++ compiler" in capsys.readouterr().err
