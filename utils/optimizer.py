"""The optimizers: SGD with momentum 0.9 as in Google's recipes, and AdamW."""

import torch

from utils.precision import Precision


def build_optimizer(
    precision: Precision, name: str, lr: float, weight_decay: float, apex: bool = False
) -> torch.optim.Optimizer:
    """The optimizer `name`, "sgd" or "adamw", of the parameters that `precision` steps.

    With `apex` it is the fused SGD of NVIDIA's apex.
    """
    parameters, options = precision.parameters, {"lr": lr, "weight_decay": weight_decay}
    if apex:
        from apex.optimizers import FusedSGD

        return FusedSGD(parameters, momentum=0.9, **options)
    # On a CPU the fused step of torch 2.11 leaves half-precision parameters (O3) as they are.
    half_on_cpu = parameters[0].device.type == "cpu" and parameters[0].dtype != torch.float32
    options["fused"] = not half_on_cpu
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    # Weights of layers decay; biases, norms, positions and the class token do not.
    decaying, others = [], []
    for label, parameter in zip(precision.names, parameters, strict=True):
        decays = parameter.ndim > 1 and not label.endswith(("embeddings", "token"))
        (decaying if decays else others).append(parameter)
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **options)
