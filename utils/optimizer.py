"""The optimizers: SGD with momentum 0.9 as in Google's recipes, and AdamW."""

import torch

from utils.precision import Precision

MOMENTUM = 0.9


class BFloat16MomentumSGD(torch.optim.Optimizer):
    """SGD that keeps momentum in bfloat16, as Google's trainer does with optax.sgd.

    The step itself is float32. Only what is kept is rounded, and the factor: 0.9 is 0.8984375.
    """

    @torch.no_grad()
    def step(self) -> None:
        factor = torch.tensor(MOMENTUM, dtype=torch.bfloat16).item()
        for group in self.param_groups:
            parameters = group["params"]
            momenta = [p.grad.float() for p in parameters]
            torch._foreach_add_(momenta, parameters, alpha=group["weight_decay"])
            if kept := [self.state[p]["momentum"].float() for p in parameters if self.state[p]]:
                torch._foreach_add_(momenta, kept, alpha=factor)
            for parameter, momentum in zip(parameters, momenta, strict=True):
                self.state[parameter]["momentum"] = momentum.bfloat16()
            torch._foreach_add_(parameters, momenta, alpha=-group["lr"])


def build_optimizer(
    precision: Precision,
    name: str,
    lr: float,
    weight_decay: float,
    apex: bool = False,
    momentum_dtype: str = "float32",
) -> torch.optim.Optimizer:
    """The optimizer `name`, "sgd" or "adamw", of the parameters that `precision` steps.

    With `apex` it is the fused SGD of NVIDIA's apex. `momentum_dtype` is for SGD.
    """
    parameters, options = precision.parameters, {"lr": lr, "weight_decay": weight_decay}
    if momentum_dtype == "bfloat16":
        return BFloat16MomentumSGD(parameters, options)
    if apex:
        from apex.optimizers import FusedSGD

        return FusedSGD(parameters, momentum=MOMENTUM, **options)
    # On a CPU the fused step of torch 2.11 leaves half-precision parameters (O3) as they are.
    half_on_cpu = parameters[0].device.type == "cpu" and parameters[0].dtype != torch.float32
    options["fused"] = not half_on_cpu
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=MOMENTUM, **options)
    # Weights of layers decay; biases, norms, positions and the class token do not.
    decaying, others = [], []
    for label, parameter in zip(precision.names, parameters, strict=True):
        decays = parameter.ndim > 1 and not label.endswith(("embeddings", "token"))
        (decaying if decays else others).append(parameter)
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **options)
