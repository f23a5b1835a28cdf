"""Faster kernels for a model on a CPU: the same numbers in less time.

`use_cpu_kernels(model)` puts them into a finished model. GPUs, compiled graphs and exported ones
still take PyTorch's own kernels. The gains below are of a whole step of ViT-B_16 at 224 px, batch
16, two threads of an AMD EPYC with AVX512-bf16 and without AMX (benchmarks/README.md).
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.modeling import APPROXIMATE, Attention, Mlp, VisionTransformer
from models.modeling_resnet import StdConv2d

EXPLICIT_ATTENTION = {torch.bfloat16}  # where explicit products are faster; float32: no difference
HAS_AMX = torch.cpu._is_amx_tile_supported()
HAS_AVX512 = torch.cpu._is_avx512_supported()
CPUINFO = Path("/proc/cpuinfo")
VENDOR = CPUINFO.read_text() if CPUINFO.is_file() else platform.processor()


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions that oneDNN uses; else PyTorch uses slow loops."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# Products of these are computed in float32 and rounded once. Without bfloat16 instructions
# PyTorch's own bfloat16 products take 6 to more than 100 times as long, and on Intel's CPUs with
# AVX512 but without AMX 1.5 times: there this gives 57 % more training steps, 56 % evaluations.
FAST_BFLOAT16 = cpu_has_bfloat16() and (HAS_AMX or "GenuineIntel" not in VENDOR)
UPCAST_DTYPES = set() if FAST_BFLOAT16 else {torch.bfloat16}

# PyTorch gives float32 products to MKL, which uses only AVX2 on AMD's CPUs: oneDNN gives 1.7 times
# as many training steps and twice the evaluations (with AVX2 only: 1.03). bfloat16 products go to
# oneDNN anyway, but F.linear copies the bias first: 1 % and 4 %.
ONEDNN_DTYPES = {torch.bfloat16} if cpu_has_bfloat16() else set()
if torch.backends.mkldnn.is_available() and "AuthenticAMD" in VENDOR:
    ONEDNN_DTYPES.add(torch.float32)


def is_eager_cpu(x: Tensor) -> bool:
    """Whether `x` is on a CPU and no graph is being compiled, exported or traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and not traced


def uses_custom_kernel(x: Tensor, *others: Tensor) -> bool:
    """Whether products of these tensors are computed here. Under autocast PyTorch does it."""
    faster = x.dtype in ONEDNN_DTYPES | UPCAST_DTYPES
    same_dtype = all(x.dtype == other.dtype for other in others)
    return faster and same_dtype and is_eager_cpu(x) and not torch.is_autocast_enabled("cpu")


def upcast(*tensors: Tensor | None) -> list[Tensor | None]:
    """float32 copies of the tensors whose dtype is slow here; the others as they are."""
    return [t.float() if t is not None and t.dtype in UPCAST_DTYPES else t for t in tensors]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str = "") -> Tensor:
    """x (..., K) @ weight (O, K)^T + bias -> (..., O), then GELU in the form `gelu`, if any."""
    if x.dtype in UPCAST_DTYPES:
        y = product(*upcast(x, weight, bias)).to(x.dtype)  # GELU is faster in bfloat16
    elif x.dtype in ONEDNN_DTYPES:
        # GELU while the product is still in the cache: 6 % more evaluations.
        kind = "gelu" if gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], gelu)
    else:
        y = F.linear(x, weight, bias)
    return F.gelu(y, approximate=gelu) if gelu else y


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a @ b."""
    # matmul uses oneDNN for bfloat16 anyway. With AVX2 only, oneDNN is no faster at these products.
    onednn = a.dtype == torch.float32 and a.dtype in ONEDNN_DTYPES and HAS_AVX512
    return product(a, b.t()) if onednn and b.numel() > 0 else a @ b


class LinearFunction(torch.autograd.Function):
    """F.linear, (..., K), (O, K), (O,) -> (..., O); no second derivatives, no torch.func."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()  # oneDNN is 100 times slower at a strided view of class tokens
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, x, weight = upcast(grad.flatten(0, -2).contiguous(), *ctx.saved_tensors)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad_x = matmul(rows, weight).view(x.shape) if for_x else None  # (..., K)
        grad_weight = matmul(rows.t(), x.flatten(0, -2)) if for_weight else None  # (O, K)
        grad_bias = rows.sum(dim=0) if for_bias else None  # (O,)
        return grad_x, grad_weight, grad_bias  # autograd casts them to the inputs' dtypes


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    """F.conv2d; `options` are its stride and padding."""
    if not uses_custom_kernel(x, weight) or x.dtype not in UPCAST_DTYPES:
        return F.conv2d(x, weight, bias, **options)
    return F.conv2d(*upcast(x, weight, bias), **options).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, H, N, d) each, with dropout `p` of the softmax."""
    if uses_custom_kernel(q) and q.dtype in UPCAST_DTYPES:
        return attention(*upcast(q, k, v), p).to(q.dtype)
    # In bfloat16 the fused kernel and its backward pass take 2.5 times as long as explicit products
    # (18 % more training steps); without AMX its forward pass alone takes twice as long.
    explicit = is_eager_cpu(q) and q.dtype in EXPLICIT_ATTENTION
    if not explicit or (HAS_AMX and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    q = q * q.shape[-1] ** -0.5
    weights = (q @ k.contiguous().mT).softmax(dim=-1)  # (B, H, num_queries, N)
    return (dropout(weights, p) if p else weights) @ v


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements with probability `p`, rounded to 1/65536, and scale the others up."""
    if not is_eager_cpu(x):
        return F.dropout(x, p)
    # F.dropout draws a double for every element, on one thread. 16 random bits are enough, in a
    # quarter of the time: 23 % more training steps at p = 0.1.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**16), 2**16 - 1)
    kept = bits.ge_(dropped - 2**15).to(x.dtype)  # in place: 0 and 1, which vectorise; not bools
    return x * kept * (2**16 / (2**16 - dropped))


class CpuLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not uses_custom_kernel(x, self.weight):
            return super().forward(x)
        kernel = LinearFunction.apply if torch.is_grad_enabled() else product
        return kernel(x, self.weight, self.bias)


class CpuConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding)


class CpuStdConv2d(StdConv2d):
    def convolve(self, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        return conv2d(x, weight, stride=self.stride, padding=padding)


class CpuDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class CpuAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.attention_dropout_rate if self.training else 0.0)


class CpuMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        gelu = APPROXIMATE.get(self.activation)  # None: oneDNN fuses no other activation
        if not gelu or torch.is_grad_enabled() or not uses_custom_kernel(x, self.fc1.weight):
            return super().forward(x)  # a backward pass needs the product and its GELU
        x = product(x, self.fc1.weight, self.fc1.bias, gelu)  # (B, N, mlp_dim)
        return self.dropout(self.fc2(self.dropout(x)))


FASTER = {  # plain class -> the one that replaces it
    new.__base__: new
    for new in (CpuLinear, CpuConv2d, CpuStdConv2d, CpuDropout, CpuAttention, CpuMlp)
}


def use_cpu_kernels(model: VisionTransformer) -> VisionTransformer:
    """Change the classes of the layers of a model on a CPU, but not of `pre_logits` and `head`.

    Parameters and their names stay. A model on a GPU stays as it is.
    """
    if model.head.weight.device.type == "cpu":
        for module in model.transformer.modules():
            module.__class__ = FASTER.get(type(module), type(module))
    return model
