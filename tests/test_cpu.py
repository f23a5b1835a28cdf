"""What a CPU computes its own way: products by oneDNN, attention, dropout."""

import pytest
import torch
import torch.nn.functional as F

from models import cpu
from models.modeling import VisionTransformer
from tests.helpers import tiny_config

# A dtype, and which are multiplied as float32. Without its instructions oneDNN refuses bfloat16.
WAYS = [
    pytest.param(torch.float32, set()),
    pytest.param(torch.bfloat16, set(), marks=pytest.mark.skipif(
        not cpu.cpu_has_bfloat16(), reason="a CPU without bfloat16")),
    pytest.param(torch.bfloat16, {torch.bfloat16}),
]  # fmt: skip
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def whatever_the_processor(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", set(DTYPES))
    monkeypatch.setattr(cpu, "WIDENED", set())


def linear_inputs(dtype):
    """Tokens, of which the first of each image is asked for, a weight, a bias."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                            for shape in ((5, 17, 24), (32, 24), (32,)))  # fmt: skip
    return tokens.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@ONEDNN
@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("dtype, wide", WAYS)
def test_products_are_those_of_float64(dtype, wide, keep, avx512, monkeypatch):
    monkeypatch.setattr(cpu, "WIDENED", wide)
    monkeypatch.setattr(cpu, "HAS_AVX512", avx512)
    x, weight, bias = inputs = linear_inputs(dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = F.linear(exact[0][:, :keep], *exact[1:])
    assert cpu.own_way(x, weight)
    for found in (cpu.dense(x[:, :keep], weight, bias), cpu.product(x[:, :keep], weight, bias)):
        torch.testing.assert_close(found.double(), wanted, **tolerance(dtype))
    found = cpu.dense(x[:, :keep], weight, bias)
    slope = torch.linspace(-1, 1, 32)
    # An expanded gradient, as a mean over tokens gives it.
    grads = torch.autograd.grad((found.mean(dim=1) * slope.to(dtype)).sum(), inputs)
    wanted = torch.autograd.grad((wanted.mean(dim=1) * slope.to(dtype).double()).sum(), exact)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance(dtype))


def test_widened_products_are_rounded_once(monkeypatch):
    """Of bfloat16 numbers, in float32: what float64 gives, rounded to bfloat16 at the end."""
    monkeypatch.setattr(cpu, "WIDENED", {torch.bfloat16})
    multiplied = []
    linear, convolve, fused = F.linear, F.conv2d, F.scaled_dot_product_attention
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", set())
    for name, plain in [("linear", linear), ("conv2d", convolve),
                        ("scaled_dot_product_attention", fused)]:  # fmt: skip
        monkeypatch.setattr(cpu.F, name, lambda x, *rest, plain=plain, **how:
                            multiplied.append(x.dtype) or plain(x, *rest, **how))  # fmt: skip
    x, weight, bias = linear_inputs(torch.bfloat16)
    wanted = linear(x.double(), weight.double(), bias.double()).bfloat16()
    assert (cpu.dense(x, weight, bias) != wanted).float().mean() < 0.01  # ties
    images, kernels = torch.randn(2, 3, 9, 8).bfloat16(), torch.randn(4, 3, 3, 3).bfloat16()
    how = {"stride": 2, "padding": (1, 0)}
    wanted = convolve(images.double(), kernels.double(), **how).bfloat16()
    assert (cpu.conv2d(images, kernels, **how) != wanted).float().mean() < 0.01
    q, k, v = torch.randn(3, 2, 4, 7, 16).bfloat16()
    wanted = fused(q.double(), k.double(), v.double()).bfloat16()
    found = cpu.attend(q, k, v, 0.0)
    assert found.dtype == torch.bfloat16 and (found != wanted).float().mean() < 0.01
    assert multiplied == [torch.float32] * 3


def test_bfloat16_keeps_its_own_products_where_they_are_fast(monkeypatch):
    images, kernels = torch.randn(2, 3, 9, 8).bfloat16(), torch.randn(4, 3, 3, 3).bfloat16()
    seen = []
    convolve = F.conv2d
    monkeypatch.setattr(cpu.F, "conv2d", lambda x, *rest, **how:
                        seen.append(x.dtype) or convolve(x, *rest, **how))  # fmt: skip
    cpu.conv2d(images, kernels)
    assert seen == [torch.bfloat16]


def tolerance(dtype):
    share, least = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.05)
    return {"rtol": share, "atol": least}


@ONEDNN
@pytest.mark.parametrize("dtype, wide", WAYS)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_inside_the_product(dtype, wide, approximate, monkeypatch):
    monkeypatch.setattr(cpu, "WIDENED", wide)
    x, weight, bias = linear_inputs(dtype)
    layer = torch.nn.Linear(24, 32, dtype=dtype)
    layer.weight, layer.bias = map(torch.nn.Parameter, (weight.detach(), bias.detach()))
    wanted = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate=approximate)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = cpu.dense_gelu(x, layer, approximate)
        torch.testing.assert_close(found.double(), wanted, **tolerance(dtype))


@ONEDNN
def test_frozen_layers_cost_no_products(monkeypatch):
    x, weight, bias = linear_inputs(torch.float32)
    calls = []
    times = cpu.times
    monkeypatch.setattr(cpu, "times", lambda a, b: calls.append(1) or times(a, b))
    frozen = weight.detach(), bias.detach()
    cpu.dense(x, *frozen).sum().backward()
    assert len(calls) == 1 and x.grad is not None
    cpu.dense(x.detach(), weight, bias).sum().backward()
    assert len(calls) == 2 and weight.grad is not None


def test_autocast_and_compiled_graphs_are_left_alone(monkeypatch):
    x, weight, bias = linear_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.own_way(x, weight)
        assert cpu.dense(x, weight, bias).dtype == torch.bfloat16
    assert not cpu.own_way(x, weight.bfloat16()) and not cpu.own_way(x.half(), weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not cpu.own_way(x, weight)


@ONEDNN
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of jit.trace
def test_no_images_and_traced_models():
    _, weight, bias = linear_inputs(torch.float32)
    cpu.dense(torch.zeros(0, 24), weight, bias).sum().backward()
    assert not weight.grad.any() and not bias.grad.any()
    model = VisionTransformer(tiny_config(), 32, 5).eval()
    images = torch.randn(2, 3, 32, 32)
    traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images + 1), model(images + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_part_and_scales_the_rest(dtype):
    torch.manual_seed(0)
    x = torch.full((1001, 999), 3.0, dtype=dtype, requires_grad=True)
    y = cpu.dropout(x, 0.3)
    assert y.dtype == dtype and y.shape == x.shape
    dropped = y == 0
    assert abs(dropped.float().mean() - 0.3) < 0.002  # four deviations
    assert abs(dropped.float().mean(dim=0) - 0.3).max() < 0.08  # five, of every column's
    assert y.max().item() == pytest.approx(3 / 0.7, rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.equal(grad == 0, dropped)
    assert torch.allclose(grad * 3, y, rtol=1e-2)
    torch.manual_seed(0)
    assert torch.equal(cpu.dropout(x, 0.3), y)
    assert not torch.equal(cpu.dropout(x, 0.3), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_drops_weights(grad, dtype):
    """With the identity as values, attention gives the weights themselves."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 4, 64, 64, dtype=dtype).unbind(0)
    v = torch.eye(64, dtype=dtype).expand(8, 4, 64, 64)
    with torch.set_grad_enabled(grad):
        whole = cpu.attend(q, k, v, 0.0)
        part = cpu.attend(q, k, v, 0.25)
    kept = part != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    assert torch.allclose(
        part[kept], whole[kept] / 0.75, rtol=1e-3 if dtype == torch.float32 else 0.02
    )
