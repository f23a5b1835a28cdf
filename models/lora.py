"""Low-rank adapters beside frozen layers (LoRA, Hu et al. 2021, arXiv:2106.09685).

An adapted layer computes y = W x + b + B (A x): A (R, in) starts random and B (out, R) as zeros, as
in peft with `lora_alpha` equal to the rank R. Merged, it is a plain layer with the weight W + B A.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.errors import UserError
from models.modeling import VisionTransformer
from models.torch_files import read_tensors

LAYERS = ("query", "key", "value", "out")  # of the attention of every block
A, B = ".lora_a.weight", ".lora_b.weight"


@dataclass
class Adapters:
    """A file of adapters: their tensors and those of the head, and the head's class names."""

    state: dict[str, Tensor]
    classes: tuple[str, ...]

    def __str__(self) -> str:
        names = [name.removesuffix(A) for name in self.state if name.endswith(A)]
        layers = dict.fromkeys(name.rpartition(".")[2] for name in names)
        return f"adapters of rank {len(self.state[names[0] + A])} on {', '.join(layers)}"


def add_adapters(model: VisionTransformer, rank: int, layers) -> None:
    """Put new adapters beside `layers` of every block. Only they and the head train."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.transformer.encoder.layer:
        for name in layers:
            linear = getattr(block.attn, name)
            # nn.Linear's own initialisation is that of peft's A.
            linear.lora_a = nn.Linear(linear.in_features, rank, bias=False)
            linear.lora_b = nn.Linear(rank, linear.out_features, bias=False)
            nn.init.zeros_(linear.lora_b.weight)
            linear.register_forward_hook(_add_adapter)


def _add_adapter(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + linear.lora_b(linear.lora_a(*inputs))


def load_adapters(model: VisionTransformer, adapters: Adapters) -> None:
    """Copy adapters from a file into those of a model. Raises UserError if they are others."""
    own = {name: p for name, p in model.named_parameters() if name.endswith((A, B))}
    saved = {name: adapters.state[name] for name in adapters.state if name.endswith((A, B))}
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in saved.items()}:
        raise UserError(f"it holds {adapters}: train the same, or merge it and train all")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every adapter is added to the weight of its layer."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((A, B))}
    for name in state:
        if name.endswith(A):
            layer = name.removesuffix(A)
            weight = plain[f"{layer}.weight"]
            change = state[f"{layer}{B}"].double() @ state[name].double()
            plain[f"{layer}.weight"] = (weight.double() + change).to(weight.dtype)
    return plain


def write_adapters(path: Path, state: Mapping[str, Tensor], classes) -> None:
    """Write the adapters and the head of a state dict as `.safetensors`, in float32."""
    own = {n: tensor for n, tensor in state.items() if n.endswith((A, B)) or n.startswith("head.")}
    path.write_bytes(save(own, {"format": "pt", "classes": json.dumps(classes)}))


def read_adapters(path: Path, state: Mapping[str, Tensor]) -> Adapters:
    """Read what `write_adapters` wrote for a model with this `state`. Raises UserError."""
    if not Path(path).is_file():
        raise UserError("no such file")
    tensors, stored = read_tensors(path)
    own = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    wanted = {layer + part for layer in own for part in (A, B)} | {"head.weight", "head.bias"}
    if not own or set(tensors) != wanted or not isinstance(stored.get("classes"), list):
        raise UserError("it holds no adapters of train.py")
    for layer in own:
        a, b, weight = tensors[layer + A], tensors[layer + B], state.get(f"{layer}.weight")
        fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1] and weight is not None
        if not fits or (len(b), a.shape[1]) != weight.shape:
            raise UserError(f"the adapter of {layer} does not fit the pre-trained weights")
    head, bias, classes = tensors["head.weight"], tensors["head.bias"], stored["classes"]
    if head.ndim != 2 or bias.shape != (len(classes),) or len(head) != len(classes):
        raise UserError(f"its head does not fit its {len(classes)} classes")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError("it holds values that are not finite")
    return Adapters(tensors, tuple(map(str, classes)))
