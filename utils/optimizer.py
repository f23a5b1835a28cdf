"""The optimizers: SGD with momentum 0.9 as in Google's recipes, and AdamW."""

import re

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
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer `name`, "sgd" or "adamw", of the parameters that `precision` steps.

    With `apex` it is the fused SGD of NVIDIA's apex. `momentum_dtype` is for SGD. Each group keeps
    the factor of its lr as `lr_scale`.
    """
    parameters, options = precision.parameters, {"lr": lr, "weight_decay": weight_decay}
    groups = parameter_groups(precision, weight_decay, name == "sgd", layer_decay)
    if momentum_dtype == "bfloat16":
        return BFloat16MomentumSGD(groups, options)
    if apex:
        from apex.optimizers import FusedSGD

        return FusedSGD(groups, momentum=MOMENTUM, **options)
    # On a CPU the fused step of torch 2.11 leaves half-precision parameters (O3) as they are.
    half_on_cpu = parameters[0].device.type == "cpu" and parameters[0].dtype != torch.float32
    options["fused"] = not half_on_cpu
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, **options)
    return torch.optim.AdamW(groups, **options)


def parameter_groups(
    precision: Precision, weight_decay: float, all_decay: bool, layer_decay: float
) -> list[dict]:
    """The parameters with the same weight decay and the same factor of the lr, together.

    Unless `all_decay`, only weights of layers do: no biases, norms, positions, and tokens.
    """
    groups, blocks = {}, 1 + max(map(block_of, precision.names))
    for name, parameter in zip(precision.names, precision.parameters, strict=True):
        matrix = parameter.ndim > 1 and not name.endswith(("embeddings", "token", "tokens"))
        key = not (all_decay or matrix), layer_decay ** layers_above(name, blocks)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": own, "weight_decay": 0.0 if spared else weight_decay, "lr_scale": scale}
        for (spared, scale), own in sorted(groups.items(), key=lambda item: item[0])
    ]


def block_of(name: str) -> int:
    """The number of a parameter's encoder block, -1 if it is in none."""
    match = re.match(r"transformer\.encoder\.layer\.(\d+)\.", name)
    return int(match[1]) if match else -1


def layers_above(name: str, blocks: int) -> int:
    """How many layers are between a parameter and the logits, as timm counts them.

    The head has none. The last norm counts with the last block, all embeddings as the lowest layer.
    """
    if (block := block_of(name)) >= 0:
        return blocks - block
    if name.startswith("transformer.embeddings"):
        return blocks + 1
    return int(name.startswith("transformer.encoder"))
