"""Every fast path gives the plain path's numbers, and does what it is there for."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from benchmarks.rows import LEVERS
from models import cpu
from models.modeling import VisionTransformer
from tests.helpers import ROOT, tiny_config
from utils import compiling


def tiny_model(**changes):
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(**changes), 32, 5)
    for parameter in (model.head.weight, model.transformer.embeddings.position_embeddings):
        torch.nn.init.normal_(parameter)
    return model


def loss_and_gradients(model, compiled=None):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    labels = torch.randint(5, (6,), generator=generator)
    torch.manual_seed(2)
    loss = F.cross_entropy((model if compiled is None else compiled)(images), labels)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def all_levers_off(monkeypatch):
    for lever in LEVERS.values():
        if lever is not None:
            monkeypatch.setattr(*lever)


def assert_same(a, b):
    assert abs(a[0] - b[0]) < 1e-6
    assert max(grad.abs().max() for grad in a[1]) > 0.1
    for x, y in zip(a[1], b[1], strict=True):
        assert (x - y).abs().max() < 1e-5


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_fast_equals_plain(classifier, monkeypatch):
    model = tiny_model(classifier=classifier)
    monkeypatch.setattr(cpu, "PLAIN_ATTENTION", (torch.float32,))  # bfloat16's path, exactly
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(cpu, "ONEDNN_DTYPES", {torch.float32})
    fast = loss_and_gradients(model)
    all_levers_off(monkeypatch)
    assert_same(fast, loss_and_gradients(model))


@pytest.mark.skipif(not compiling.can_compile(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_compiled_equals_plain(classifier, monkeypatch):
    torch.compiler.reset()
    model = tiny_model(classifier=classifier, num_layers=1)
    fast = loss_and_gradients(model, torch.compile(model, dynamic=False, fullgraph=True))
    all_levers_off(monkeypatch)
    assert_same(fast, loss_and_gradients(model))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_logits_without_gradients(mode, dtype, monkeypatch):
    model = tiny_model().to(dtype).train(mode == "train")
    images = torch.randn(6, 3, 32, 32).to(dtype)
    with torch.no_grad():
        fast = model(images)
        all_levers_off(monkeypatch)
        plain = model(images)
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert (fast - plain).abs().max() < limit * plain.abs().max()


@pytest.mark.parametrize("changes", [{}, {"resnet_layers": (1,)}])
def test_no_product_of_a_widened_model_is_half(changes, monkeypatch):
    """Whatever this CPU has: every convolution, dense layer and attention but the head's."""
    monkeypatch.setattr(cpu, "WIDENED", {torch.bfloat16})
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", set())
    model = tiny_model(**changes).bfloat16()
    multiplied = []
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        plain = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *rest, plain=plain, **how:
                            multiplied.append(x.dtype) or plain(x, *rest, **how))  # fmt: skip
    model(torch.randn(2, 3, 32, 32).bfloat16()).sum().backward()
    assert multiplied.pop() == torch.bfloat16  # the head, a plain layer
    assert len(multiplied) >= 2 * 7 + 1 and set(multiplied) == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_grad_checkpointing_gives_the_same_gradients(dropout):
    model = tiny_model(dropout_rate=dropout, num_layers=3)
    calls = []
    for block in model.transformer.encoder.layer:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = loss_and_gradients(model)
    model.transformer.encoder.grad_checkpointing = True
    kept = loss_and_gradients(model)
    assert len(calls) == 3 + 5  # two blocks are computed again, the last is not
    assert plain[0] == kept[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], kept[1], strict=True))


TINY = ["--model_type", "ViT-Ti_4", "--img_size", "8", "--dataset", "digits", "--name", "run",
        "--pretrained_dir", "none", "--train_batch_size", "8", "--eval_batch_size", "360",
        "--num_steps", "1", "--warmup_steps", "0"]  # fmt: skip


def cuda_full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")


def cpu_full(*_):
    torch.empty(2**56)


def numpy_full(*_):
    np.empty(2**56)


@pytest.mark.parametrize(
    "update, reason",
    [
        (cuda_full, "CUDA out of memory"),
        (cpu_full, "you tried to allocate 288230376151711744 bytes"),
        (numpy_full, "Unable to allocate 512. PiB"),
    ],
)
def test_out_of_memory_is_one_line(update, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "update", update)
    assert train.run(TINY) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("train.py: error: out of memory") and "\n" not in line
    assert reason in line
    assert "--gradient_accumulation_steps" in line and "--grad_checkpointing" in line


def test_flags_reach_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda model, **kw: seen.update(kw, model=model) or model)
    monkeypatch.setattr(compiling, "can_compile", lambda: True)
    assert train.run([*TINY, "--compile", "on", "--grad_checkpointing"]) == 0
    assert seen["dynamic"] is False and seen["model"].transformer.encoder.grad_checkpointing
    seen.clear()
    assert train.run([*TINY, "--overwrite"]) == 0 and not seen


def test_compiling_weighs_the_length_of_the_run(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda: True)
    assert compiling.pays("auto", "cuda", 10_000) and compiling.pays("on", "cpu", 1)
    assert not compiling.pays("auto", "cuda", 100) and not compiling.pays("auto", "cpu", 10_000)
    assert not compiling.pays("off", "cuda", 10_000)
    monkeypatch.setattr(compiling, "can_compile", lambda: False)
    assert not compiling.pays("auto", "cuda", 10_000)


def test_compile_without_a_compiler_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "can_compile", lambda: False)
    assert train.run([*TINY, "--compile", "on"]) == 2
    assert "--compile on needs a C++ compiler" in capsys.readouterr().err


FAULTS = """
import resource, torch
from utils.allocator import keep_freed_memory
if {keep} and not keep_freed_memory(torch.device("cpu")):
    raise SystemExit(77)  # another C library
tensor = torch.ones(2**24)  # 64 MiB
del tensor
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensor = torch.ones(15 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the kernel's page faults")
def test_freed_memory_is_used_again():
    def faults(keep):
        return subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip

    kept = faults(True)
    if kept.returncode == 77:
        pytest.skip("not glibc")
    if int(faults(False).stdout) < 1000:
        pytest.skip("this kernel maps large pages by itself")
    assert int(kept.stdout) < 500
