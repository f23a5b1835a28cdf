"""The other implementations, built to do the same work as ours.

Each builder takes (config, img_size, classes, dropout) and returns a module from images to logits;
`load` copies our weights into it. All use the tanh form of GELU and the official places of dropout,
whatever their defaults are. B batch, N tokens, D width, H heads, d width of a head.
"""

import importlib.util
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.configs import ViTConfig, config_name
from models.modeling import VisionTransformer
from models.state_dict import EMBEDDINGS, LAYER, rename
from models.weights import write_google

TIMM_HYBRIDS = {
    "R+ViT-Ti_16": "vit_tiny_r_s16_p8_224",
    "R26+ViT-S_32": "vit_small_r26_s32_224",
    "R50+ViT-B_16": "vit_base_r50_s16_224",
    "R50+ViT-L_32": "vit_large_r50_s32_224",
}


class PeerError(RuntimeError):
    """A peer that cannot take part; the message is the reason."""


def check(package: str, config: ViTConfig | None = None) -> None:
    """Raise PeerError if it is not installed, or if `config` is a hybrid."""
    if importlib.util.find_spec(package) is None:
        raise PeerError(f"{package} is not installed: pip install -r requirements-dev.txt")
    if config is not None and config.resnet_layers is not None:
        raise PeerError(f"{package} has no hybrids")


def build_timm(config: ViTConfig, img_size: int, classes: int, dropout: float) -> nn.Module:
    check("timm")
    import timm
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    options = {"img_size": img_size, "num_classes": classes, "act_layer": "gelu_tanh"}
    options |= {"pos_drop_rate": dropout, "proj_drop_rate": dropout}
    if config.resnet_layers is None:
        return TimmViT(
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_layers,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.hidden_size,
            **options,
        )
    name = TIMM_HYBRIDS.get(config_name(config))
    if name is None:
        raise PeerError("timm has no such hybrid")
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    return model


def load_timm(model: nn.Module, ours: VisionTransformer) -> None:
    """Through a file in Google's format, which timm reads itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.npz"
        np.savez(path, **write_google(ours.state_dict(), ours.config))
        model.load_pretrained(str(path))


def build_transformers(config: ViTConfig, img_size: int, classes: int, dropout: float) -> nn.Module:
    check("transformers", config)
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    class Logits(ViTForImageClassification):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).logits

    their_config = TheirConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        hidden_act="gelu_pytorch_tanh",
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        image_size=img_size,
        patch_size=config.patch_size,
        num_labels=classes,
    )
    model = Logits(their_config)
    for layer in model.vit.layers:  # it has no dropout at this place
        layer.mlp.activation_fn = nn.Sequential(layer.mlp.activation_fn, nn.Dropout(dropout))
    return model


def build_torchvision(config: ViTConfig, img_size: int, classes: int, dropout: float) -> nn.Module:
    check("torchvision", config)
    from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

    depth, heads = config.num_layers, config.num_heads
    sizes = img_size, config.patch_size, depth, heads, config.hidden_size, config.mlp_dim
    model = TorchvisionViT(*sizes, dropout=dropout, num_classes=classes)
    for layer in model.encoder.layers:
        layer.mlp[1] = nn.GELU(approximate="tanh")
    return model


class PortBlock(nn.Module):
    """A block in the earlier port's design: explicit attention."""

    def __init__(self, config: ViTConfig, dropout: float):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, config.mlp_dim), nn.Linear(config.mlp_dim, width)
        self.gelu, self.dropout = nn.GELU(approximate="tanh"), nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3)  # (B, H, N, d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.query(y)), self.split(self.key(y)), self.split(self.value(y))
        weights = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5  # (B, H, N, N)
        y = torch.matmul(weights.softmax(dim=-1), v).permute(0, 2, 1, 3).flatten(2)  # (B, N, D)
        x = x + self.dropout(self.out(y))
        y = self.dropout(self.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(y))


class Port(nn.Module):
    """The design of the earlier PyTorch port, without its faults."""

    def __init__(self, config: ViTConfig, img_size: int, classes: int, dropout: float):
        super().__init__()
        if config.resnet_layers is not None:
            raise PeerError("this copy of the earlier port's design has no hybrids")
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (img_size // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.ModuleList(PortBlock(config, dropout) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = self.dropout(x + self.positions)
        for block in self.layer:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def block_names(prefix: str, theirs: str) -> list[tuple[str, str]]:
    """Rows of a name table for the modules of a block."""
    ours = "attention_norm attn.query attn.key attn.value attn.out ffn_norm ffn.fc1 ffn.fc2"
    pairs = zip(theirs.split(), ours.split(), strict=True)
    return [(f"{prefix}.{a}", f"{LAYER}.{b}") for a, b in pairs]


NORM, IN = "transformer.encoder.encoder_norm", "self_attention.in_proj_"
# Rows (their name, ours) for models.state_dict.rename.
TABLES = {
    "transformers": [
        ("vit.embeddings.patch_embeddings.projection", f"{EMBEDDINGS}.patch_embeddings"),
        ("vit.embeddings.cls_token", f"{EMBEDDINGS}.cls_token"),
        ("vit.embeddings.position_embeddings", f"{EMBEDDINGS}.position_embeddings"),
        *block_names(
            "vit.layers.{}",
            "layernorm_before attention.q_proj attention.k_proj attention.v_proj attention.o_proj "
            "layernorm_after mlp.fc1 mlp.fc2",
        ),
        ("vit.layernorm", NORM),
        ("classifier", "head"),
    ],
    "torchvision": [
        ("conv_proj", f"{EMBEDDINGS}.patch_embeddings"),
        ("class_token", f"{EMBEDDINGS}.cls_token"),
        ("encoder.pos_embedding", f"{EMBEDDINGS}.position_embeddings"),
        *block_names(
            "encoder.layers.encoder_layer_{}",
            f"ln_1 {IN} {IN} {IN} self_attention.out_proj ln_2 mlp.0 mlp.3",
        ),
        ("encoder.ln", NORM),
        ("heads.head", "head"),
    ],
    "port": [
        ("patches", f"{EMBEDDINGS}.patch_embeddings"),
        ("token", f"{EMBEDDINGS}.cls_token"),
        ("positions", f"{EMBEDDINGS}.position_embeddings"),
        *block_names("layer.{}", "norm1 query key value out norm2 fc1 fc2"),
        ("norm", NORM),
        ("head", "head"),
    ],
}


def load_renamed(peer: str, model: nn.Module, ours: VisionTransformer) -> None:
    """torchvision stacks query, key and value, which follow each other in our state dict."""
    state: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        name = rename(name, TABLES[peer], back=True).replace("in_proj_.", "in_proj_")
        state[name] = torch.cat([state[name], tensor]) if name in state else tensor
    model.load_state_dict(state)


# name -> (what builds it, what copies our weights into it)
BUILDERS = {
    "timm": (build_timm, load_timm),
    "transformers": (build_transformers, partial(load_renamed, "transformers")),
    "torchvision": (build_torchvision, partial(load_renamed, "torchvision")),
    "port": (Port, partial(load_renamed, "port")),
}


class PilImages(Dataset):
    """uint8 pixels (n, C, h, w) read as the earlier port does: Pillow images, one at a time."""

    def __init__(self, pixels: Tensor, labels: Tensor, size: int):
        from torchvision import transforms

        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        crop = transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0))
        normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
        self.transform = transforms.Compose([crop, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def pil_batches(pixels: Tensor, labels: Tensor, size: int, batch: int, workers: int, pin: bool):
    """Endless batches (images float32 (B, C, H, W), labels), decoded by worker processes."""
    images = PilImages(pixels, labels, size)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin}
    loader = DataLoader(images, batch, shuffle=True, drop_last=True, **options)
    while True:
        yield from loader
