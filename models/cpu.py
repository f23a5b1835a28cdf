"""What a CPU is given another way than PyTorch's own: the same numbers in less time.

Gains are of a whole step of ViT-B_16 at 224 px, batch 16, two threads of an AMD EPYC with
AVX512-bf16 and without AMX (benchmarks/README.md). GPUs and compiled graphs take PyTorch's paths,
but for a single query's attention.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLAIN_ATTENTION = (torch.bfloat16,)  # where plain products win; float32 is even
HAS_AMX = torch.cpu._is_amx_tile_supported()
HAS_AVX512 = torch.cpu._is_avx512_supported()


def eager_cpu(x: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and not traced


def cpu_has_bfloat16() -> bool:
    """oneDNN, and instructions for its bfloat16; without them PyTorch computes in plain loops."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cpu_is(vendor: str) -> bool:
    info = Path("/proc/cpuinfo")
    return vendor in (info.read_text() if info.is_file() else platform.processor())


# Products of these are made of float32 copies: the same sums, rounded once. Without instructions
# for bfloat16 PyTorch's own take 6 to more than 100 times as long; Intel's of AVX512 alone,
# without AMX, 1.5 times: there 57 % more training steps, 56 % more evaluations.
WIDENED = {torch.bfloat16}
if cpu_has_bfloat16() and (HAS_AMX or not cpu_is("GenuineIntel")):
    WIDENED = set()

# PyTorch gives float32 products to MKL, which keeps to AVX2 on AMD's processors: 1.7 times as many
# training steps, twice the evaluations (with AVX2 only 1.03). In bfloat16 they are oneDNN's
# already, but F.linear copies the bias first: 1 % and 4 %.
ONEDNN_DTYPES = {torch.bfloat16} if cpu_has_bfloat16() else set()
if torch.backends.mkldnn.is_available() and cpu_is("AuthenticAMD"):
    ONEDNN_DTYPES.add(torch.float32)


def own_way(x: Tensor, *others: Tensor) -> bool:
    """Whether products of these are made here. Autocast's are left to it."""
    return (
        eager_cpu(x)
        and x.dtype in ONEDNN_DTYPES | WIDENED
        and all(x.dtype == other.dtype for other in others)
        and not torch.is_autocast_enabled("cpu")
    )


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each as it is multiplied."""
    return [t.float() if t is not None and t.dtype in WIDENED else t for t in tensors]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str = "") -> Tensor:
    """x (..., K) @ weight (O, K)^T + bias -> (..., O), then GELU in the form named."""
    if x.dtype in WIDENED:
        y = product(*widened(x, weight, bias)).to(x.dtype)  # GELU is faster in bfloat16
    elif x.dtype in ONEDNN_DTYPES:
        # GELU while the product is still in the cache: 6 % more evaluations.
        kind = "gelu" if gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], gelu)
    else:
        y = F.linear(x, weight, bias)
    return F.gelu(y, approximate=gelu) if gelu else y


class Product(torch.autograd.Function):
    """F.linear, and its gradients, made here: (..., K), (O, K), (O,) -> (..., O).

    Not for gradients of gradients, nor for torch.func's transforms.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()  # oneDNN is a hundred times slower at a class token's rows in place
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.flatten(0, -2).contiguous()  # (R, O)
        rows, x, weight = widened(rows, *ctx.saved_tensors)
        grads = [None, None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = times(rows, weight).view(x.shape)  # (..., K)
        if ctx.needs_input_grad[1]:
            grads[1] = times(rows.t(), x.flatten(0, -2))  # (O, K)
        if ctx.needs_input_grad[2]:
            grads[2] = rows.sum(dim=0)
        return tuple(g if g is None else g.to(grad.dtype) for g in grads)


def times(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a @ b."""
    # In bfloat16 matmul is oneDNN's already; with AVX2 only it is no faster at these.
    onednn = a.dtype == torch.float32 and a.dtype in ONEDNN_DTYPES and HAS_AVX512
    return product(a, b.t()) if onednn and b.numel() > 0 else a @ b


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear."""
    if not own_way(x, weight):
        return F.linear(x, weight, bias)
    return (Product.apply if torch.is_grad_enabled() else product)(x, weight, bias)


def dense_gelu(x: Tensor, layer: nn.Linear, approximate: str) -> Tensor:
    """GELU of a dense layer: its tanh form, or the exact one where `approximate` is "none"."""
    if own_way(x, layer.weight) and not torch.is_grad_enabled():
        return product(x, layer.weight, layer.bias, approximate)
    return F.gelu(layer(x), approximate=approximate)  # training needs both


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **how) -> Tensor:
    """F.conv2d, with its `stride` and `padding`."""
    if not own_way(x, weight) or x.dtype not in WIDENED:
        return F.conv2d(x, weight, bias, **how)
    return F.conv2d(*widened(x, weight, bias), **how).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, H, N, d) each, dropping weights with probability `p`."""
    if own_way(q) and q.dtype in WIDENED:
        return attend(*widened(q, k, v), p).to(q.dtype)
    # In bfloat16 the fused kernel and its backward pass take 2.5 times as long as plain products
    # (18 % more training steps), and without AMX the kernel alone twice.
    plain = eager_cpu(q) and q.dtype in PLAIN_ATTENTION
    plain = plain and not (HAS_AMX and not torch.is_grad_enabled())
    # A class token that asks alone on a GPU: its row of weights is small, and the gradients of
    # cuDNN's fused kernel have been NaN for one query (issue 1072 of NVIDIA's cudnn-frontend).
    alone = q.is_cuda and q.shape[-2] == 1
    if not plain and not alone:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    q = q * q.shape[-1] ** -0.5
    weights = (q @ k.contiguous().mT).softmax(dim=-1)  # (B, H, queries, N)
    return (dropout(weights, p) if p else weights) @ v


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements with probability `p`, to 1/65536, and scale the others up."""
    if not eager_cpu(x):
        return F.dropout(x, p)
    # F.dropout draws a double for every element, on one thread; 16 random bits are enough. A
    # quarter of its time: 23 % more training steps at p = 0.1.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**16), 2**16 - 1)
    kept = bits.ge_(dropped - 2**15).to(x.dtype)  # in place: numbers, which vectorise, not bools
    return x * kept * (2**16 / (2**16 - dropped))
