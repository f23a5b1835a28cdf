"""The CPU's kernels give the numbers of the plain model, and are really in the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import cpu
from models.modeling import Attention, Mlp, VisionTransformer
from models.modeling_resnet import StdConv2d
from tests.helpers import random_model, tiny_config

F32, BF16 = torch.float32, torch.bfloat16
# (dtype, dtypes that are upcast). Without bfloat16 instructions oneDNN refuses bfloat16.
NO_BFLOAT16 = pytest.mark.skipif(not cpu.cpu_has_bfloat16(), reason="a CPU without bfloat16")
KERNELS = [(F32, set()), pytest.param(BF16, set(), marks=NO_BFLOAT16), (BF16, {BF16})]
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 1e-5}, BF16: {"rtol": 0.02, "atol": 0.05}}


@pytest.fixture(autouse=True)
def same_on_every_processor(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", {F32, BF16})
    monkeypatch.setattr(cpu, "UPCAST_DTYPES", set())


@pytest.fixture
def layer() -> cpu.CpuLinear:
    torch.manual_seed(0)
    return cpu.CpuLinear(24, 32)


def double(module: nn.Module) -> nn.Module:
    """A plain copy in float64."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if type(part) in cpu.FASTER.values():
            part.__class__ = type(part).__base__
    return module


def dtypes_of_products(monkeypatch) -> list:
    """The dtypes of all products that PyTorch's plain functions compute from now on."""
    seen = []
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        plain = getattr(F, name)

        def spy(x, *rest, plain=plain, **options):
            seen.append(x.dtype)
            return plain(x, *rest, **options)

        monkeypatch.setattr(F, name, spy)
    return seen


def test_every_layer_of_the_encoder_gets_its_faster_class():
    model = VisionTransformer(tiny_config(resnet_layers=(1,), representation_size=24), 32, 5)
    plain, names = [type(module) for module in model.modules()], list(model.state_dict())
    for _ in range(2):
        assert cpu.use_cpu_kernels(model) is model and list(model.state_dict()) == names
        for before, (name, module) in zip(plain, model.named_modules(), strict=True):
            faster = before in {nn.Linear, nn.Conv2d, nn.Dropout, StdConv2d, Attention, Mlp}
            faster = faster and name not in ("head", "pre_logits")
            assert isinstance(module, before) and faster == (type(module) is not before)
            assert faster == (type(module) in cpu.FASTER.values())


@ONEDNN
@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("num_queries", [None, 1])
@pytest.mark.parametrize("dtype, upcast", KERNELS)
def test_linear_equals_float64(dtype, upcast, num_queries, avx512, layer, monkeypatch):
    monkeypatch.setattr(cpu, "UPCAST_DTYPES", upcast)
    monkeypatch.setattr(cpu, "HAS_AVX512", avx512)
    tokens, slope = torch.randn(5, 17, 24).to(dtype), torch.linspace(-1, 1, 32).to(dtype)
    found = []
    for linear in (layer.to(dtype), double(layer.to(dtype))):
        x = tokens.to(linear.weight.dtype, copy=True).requires_grad_()
        y = linear(x[:, :num_queries])
        # A mean over tokens gives an expanded gradient, which is not contiguous.
        loss = (y.mean(dim=1) * slope.to(x.dtype)).sum()
        grads = torch.autograd.grad(loss, [x, *linear.parameters()])
        with torch.no_grad():
            found.append([y, linear(x[:, :num_queries]), *grads])
    assert type(found[0][0].grad_fn).__name__ == "LinearFunctionBackward"
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **TOLERANCE[dtype])


@ONEDNN
@pytest.mark.parametrize("dtype, upcast", KERNELS)
@pytest.mark.parametrize("gelu, form", [("tanh", "tanh"), ("erf", "none")])
def test_mlp_is_that_of_float64(dtype, upcast, gelu, form, monkeypatch):
    monkeypatch.setattr(cpu, "UPCAST_DTYPES", upcast)
    model = cpu.use_cpu_kernels(random_model(tiny_config(gelu=gelu), std=0.3)).to(dtype)
    mlp, x = model.transformer.encoder.layer[0].ffn, torch.randn(5, 17, 32).to(dtype)
    expected = double(mlp)(x.double())
    fused, product = [], cpu.product
    monkeypatch.setattr(cpu, "product", lambda *args: fused.append(args[3:]) or product(*args))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(mlp(x).double(), expected, **TOLERANCE[dtype])
        assert ((form,) in fused) == (not grad)  # GELU inside the product only without gradients


def test_upcast_products_are_rounded_once(layer, monkeypatch):
    """Equal to the products of float64, rounded to bfloat16 at the end."""
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", set())
    monkeypatch.setattr(cpu, "UPCAST_DTYPES", {BF16})
    layer, x = layer.bfloat16(), torch.randn(5, 17, 24).bfloat16()
    images, kernels = torch.randn(2, 3, 9, 8).bfloat16(), torch.randn(4, 3, 3, 3).bfloat16()
    q, k, v = torch.randn(3, 2, 4, 7, 16).bfloat16()
    options = {"stride": 2, "padding": (1, 0)}
    expected = [double(layer)(x.double())]
    expected.append(F.conv2d(images.double(), kernels.double(), **options))
    expected.append(F.scaled_dot_product_attention(q.double(), k.double(), v.double()))
    seen = dtypes_of_products(monkeypatch)
    found = [layer(x), cpu.conv2d(images, kernels, **options), cpu.attention(q, k, v, 0.0)]
    assert seen == [F32] * 3
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == BF16 and (a != b.bfloat16()).float().mean() < 0.01  # ties


@pytest.mark.parametrize("changes", [{}, {"resnet_layers": (1,)}])
@pytest.mark.parametrize("upcast, dtype", [({BF16}, F32), (set(), BF16)])
def test_all_products_of_a_model_are_upcast_or_none(upcast, dtype, changes, monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", set())
    monkeypatch.setattr(cpu, "UPCAST_DTYPES", upcast)
    model = cpu.use_cpu_kernels(random_model(tiny_config(**changes))).bfloat16()
    seen = dtypes_of_products(monkeypatch)
    model(torch.randn(2, 3, 32, 32).bfloat16()).sum().backward()
    assert seen.pop() == BF16  # the head
    fused_attention = bool(upcast)  # in bfloat16 its products are explicit
    assert len(seen) >= 2 * (6 + fused_attention) + 1 and set(seen) == {dtype}


def test_autocast_and_compiled_graphs_use_pytorchs_kernels(layer, monkeypatch):
    x = torch.randn(5, 17, 24)
    assert cpu.uses_custom_kernel(x, layer.weight)
    with torch.autocast("cpu", BF16):
        assert not cpu.uses_custom_kernel(x, layer.weight)
        assert layer(x).dtype == BF16
    assert not cpu.uses_custom_kernel(x, layer.weight.bfloat16())
    assert not cpu.uses_custom_kernel(x.half(), layer.weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not cpu.uses_custom_kernel(x, layer.weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit.trace
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_exported_models_have_plain_operations():
    plain, images = random_model(), torch.randn(2, 3, 32, 32)
    model = cpu.use_cpu_kernels(copy.deepcopy(plain))
    traced = torch.jit.trace(model, images)
    assert "mkldnn" not in str(traced.inlined_graph)
    exported = torch.export.export(model, (images,))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    for other in (traced, exported.module()):
        assert torch.equal(other(images + 1), plain(images + 1))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dropout_zeroes_its_fraction_and_scales_the_rest(dtype):
    torch.manual_seed(0)
    x = torch.full((1001, 999), 3.0, dtype=dtype, requires_grad=True)
    y = cpu.dropout(x, 0.3)
    assert y.dtype == dtype and y.shape == x.shape
    dropped = y == 0
    assert abs(dropped.float().mean() - 0.3) < 0.002  # four standard deviations
    assert abs(dropped.float().mean(dim=0) - 0.3).max() < 0.08  # five, of every column
    assert y.max().item() == pytest.approx(3 / 0.7, rel=1e-2 if dtype == BF16 else 1e-4)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.equal(grad == 0, dropped) and torch.allclose(grad * 3, y, rtol=1e-2)
    torch.manual_seed(0)
    assert torch.equal(cpu.dropout(x, 0.3), y) and not torch.equal(cpu.dropout(x, 0.3), y)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_drops_weights(grad, dtype):
    """With the identity as values, attention returns the weights themselves."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 4, 64, 64, dtype=dtype).unbind(0)
    v = torch.eye(64, dtype=dtype).expand(8, 4, 64, 64)
    with torch.set_grad_enabled(grad):
        all_weights, weights = cpu.attention(q, k, v, 0.0), cpu.attention(q, k, v, 0.25)
    kept = weights != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    rtol = 1e-3 if dtype == F32 else 0.02
    assert torch.allclose(weights[kept], all_weights[kept] / 0.75, rtol=rtol)
