"""Mixed precision in four levels (those of NVIDIA's apex), for float16 and bfloat16.

O0: float32. O1: float32 parameters with autocast. O2: half-precision parameters and activations,
with float32 master parameters in the optimizer. O3: half precision everywhere. No layer needs an
exception: PyTorch's LayerNorm and GroupNorm compute their statistics in float32 anyway, and the
ResNet standardises its weights in float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from models.cpu import cpu_has_bfloat16
from models.errors import RunError, UserError
from utils import dist_util
from utils.ema import Average

LEVELS = ("O0", "O1", "O2", "O3")


class Precision:
    """The numerics of a step: cast the model once, then autocast, backward and optimizer step.

    `dtype` is torch.float16 or torch.bfloat16 and does not matter at O0. A `loss_scale` of 0
    means dynamic scaling for float16 at O1 and O2, and no scaling elsewhere; any other value is
    the static scale. Give the optimizer `parameters`: the float32 masters at O2, else the
    parameters of the model. With `ema`, a decay, their `average` follows every step.
    """

    GROWTH_INTERVAL = 2000  # clean steps before the scale doubles, as in apex

    def __init__(
        self, model: nn.Module, level="O0", dtype=torch.bfloat16, loss_scale=0.0, ema: float = 0.0
    ):
        first = next(model.parameters())
        self.device_type = first.device.type
        self.model_dtype = dtype if level in ("O2", "O3") else first.dtype
        self.autocast_dtype = dtype if level == "O1" else None
        self.dynamic = loss_scale == 0 and dtype == torch.float16 and level in ("O1", "O2")
        self.scale = loss_scale or (2.0**16 if self.dynamic else 1.0)
        self.scales = self.dynamic or self.scale != 1.0
        self.clean_steps = 0

        named = dict(model.named_parameters())
        self.frozen_parameters = {name: p for name, p in named.items() if not p.requires_grad}
        # Frozen parameters are saved from this copy, because half precision rounds the others.
        self.frozen = {
            name: p.detach().to("cpu", torch.float32, copy=True)
            for name, p in self.frozen_parameters.items()
        }
        self.names = [name for name, p in named.items() if p.requires_grad]
        self.model_parameters = self.parameters = [named[name] for name in self.names]
        self.has_masters = level == "O2"
        if self.has_masters:
            self.parameters = [p.detach().float().clone() for p in self.model_parameters]
        self.gradients = None  # of the masters, one after the other in one tensor
        model.to(self.model_dtype)
        self.average = Average(self.parameters, ema) if ema else None

    def autocast(self) -> AbstractContextManager:
        """The context of every forward pass."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device_type, self.autocast_dtype, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the scaled loss of one micro-batch to those of the step."""
        (loss * self.scale).backward()
        if not self.has_masters:
            return
        # The masters sum in float32: a half-precision sum would lose small contributions.
        sizes = [master.numel() for master in self.parameters]
        block = torch.empty(sum(sizes), device=self.parameters[0].device)
        pairs = zip(block.split(sizes), self.parameters, strict=True)
        views = [part.view_as(master) for part, master in pairs]
        torch._foreach_copy_(views, [p.grad for p in self.model_parameters])
        for parameter in self.model_parameters:
            parameter.grad = None
        if self.gradients is not None:
            self.gradients.add_(block)
            return
        self.gradients = block
        for master, view in zip(self.parameters, views, strict=True):
            master.grad = view

    def average_gradients(self) -> None:
        """Take the mean over all processes of the gradients of the masters."""
        dist_util.all_reduce_sum(self.gradients).div_(dist_util.world_size())

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[Tensor, bool]:
        """Unscale and clip the gradients, make the optimizer step, and clear the gradients.

        `max_norm` limits the global norm of the gradients; 0 means no clipping. Returns (norm
        before clipping, whether the step was made): with dynamic scaling, a step with infinite
        gradients is skipped and the scale is halved. Raises RunError if the gradients are not
        finite and the scale is static or cannot get smaller.
        """
        grads = [p.grad for p in self.parameters]
        if self.scales:
            torch._foreach_div_(grads, self.scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, max_norm or float("inf"))
        # Reading the norm waits for the device, so only a scaled loss, which can overflow, pays.
        finite = not self.scales or bool(torch.isfinite(norm))
        if finite:
            optimizer.step()
            if self.has_masters:
                torch._foreach_copy_(self.model_parameters, self.parameters)
            if self.average:
                self.average.update(self.parameters)
        self.gradients = None
        for parameter in self.parameters:
            parameter.grad = None
        self._adjust_scale(finite)
        return norm, finite

    def _adjust_scale(self, finite: bool) -> None:
        if not finite and (not self.dynamic or self.scale <= 2.0**-10):
            kind = "dynamic" if self.dynamic else "static"
            raise RunError(f"gradients are not finite at {kind} loss scale {self.scale:g}")
        if not finite:
            self.scale, self.clean_steps = self.scale / 2, 0
        elif self.dynamic:
            self.clean_steps += 1
            if self.clean_steps == self.GROWTH_INTERVAL:
                self.scale, self.clean_steps = 2 * self.scale, 0

    @torch.no_grad()
    def take_from_main(self) -> None:
        """Give every process the parameters of rank 0."""
        for parameter in self.parameters + self._averages():
            dist_util.broadcast(parameter)
        if self.has_masters:
            torch._foreach_copy_(self.model_parameters, self.parameters)

    def norm(self) -> Tensor:
        """The norm of all parameters. It is not finite once a loss was not."""
        return nn.utils.get_total_norm(self.parameters)

    def _trained(self) -> dict[str, Tensor]:
        parameters = (p.detach() for p in self.parameters)
        return dict(zip(self.names, parameters, strict=True))

    def _averages(self) -> list[Tensor]:
        return self.average.parameters if self.average else []

    def model_state_dict(self, averaged: bool = False) -> dict[str, Tensor]:
        """The parameters of the model, from the masters if there are any, or their averages.

        They are no copies.
        """
        averages = dict(zip(self.names, self._averages(), strict=True)) if averaged else {}
        return self.frozen | self._trained() | averages

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """The model computes with the averages meanwhile."""
        own = [p.clone() for p in self.model_parameters]
        torch._foreach_copy_(self.model_parameters, self.average.parameters)
        try:
            yield
        finally:
            torch._foreach_copy_(self.model_parameters, own)

    def state_dict(self) -> dict:
        """All that the next step depends on: parameters as the optimizer sees them, and scale.

        The parameters are no copies.
        """
        return {
            "parameters": self._trained(),
            "frozen": self.frozen,
            "averages": self._averages(),
            "scale": self.scale,
            "clean_steps": self.clean_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict()`. Raises UserError, with nothing changed, if it does not
        fit this model or holds values that are not finite."""
        own = self._trained() | self.frozen_parameters
        saved = state["parameters"] | state["frozen"]
        if {name: p.shape for name, p in saved.items()} != {n: p.shape for n, p in own.items()}:
            raise UserError("its parameters are not those of this model")
        averages = state.get("averages", [])
        if not all(tensor.isfinite().all() for tensor in [*saved.values(), *averages]):
            raise UserError("it holds values that are not finite")
        for name, tensor in saved.items():
            own[name].copy_(tensor)
        for average, tensor in zip(self._averages(), averages, strict=True):
            average.copy_(tensor)
        self.frozen = state["frozen"]
        if self.has_masters:
            torch._foreach_copy_(self.model_parameters, self.parameters)
        if self.dynamic:  # a run that was moved to a CPU has no dynamic scale any more
            self.scale, self.clean_steps = state["scale"], state["clean_steps"]


def build_precision(
    model, device: torch.device, fp16: bool, bf16: bool, level: str, loss_scale=0.0, ema=0.0, *, log
) -> Precision:
    """The precision that is asked for: float32, or `level` in float16 or bfloat16.

    A CPU computes in bfloat16 where float16 is asked for. `log(line)` gets notes on what is slow.
    """
    dtype = torch.float16 if fp16 and device.type != "cpu" else torch.bfloat16
    if fp16 and device.type == "cpu":
        log("float16 is slow on a CPU: this run uses bfloat16")
    if not (fp16 or bf16):
        level = "O0"
        if device.type != "cpu":
            log("note: float32 is several times slower on a GPU than bfloat16 or float16")
    elif device.type == "cpu" and level == "O1" and not cpu_has_bfloat16():
        slow = "O1 is many times slower here than O2, which multiplies in float32"
        log(f"note: this CPU has no bfloat16 instructions: {slow}")
    return Precision(model, level, dtype, loss_scale, ema)
