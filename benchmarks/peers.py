"""The other implementations that ours is measured against, built to do the same work.

Each builder takes (config, img_size, classes, dropout) and returns a module that maps images to
logits; `load` gives it our weights. All get the tanh form of GELU and the official places of
dropout, whatever their own defaults are. B batch, N tokens, D width, H heads, d width per head.
"""

import importlib.util
import re
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.configs import ViTConfig
from models.modeling import VisionTransformer
from models.weights import to_official
from utils.checkpoint import write_npz


class PeerError(RuntimeError):
    """A peer that cannot take part; the message says why."""


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise PeerError(f"{package} is not installed: pip install -r requirements-dev.txt")


def _no_hybrid(config: ViTConfig, who: str) -> None:
    if config.resnet_layers is not None:
        raise PeerError(f"{who} has no hybrids")


def build_timm(config: ViTConfig, img_size: int, classes: int, dropout: float) -> nn.Module:
    _need("timm")
    import timm
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    options = {"img_size": img_size, "num_classes": classes, "act_layer": "gelu_tanh",
               "pos_drop_rate": dropout, "proj_drop_rate": dropout}  # fmt: skip
    if config.resnet_layers is None:
        return TimmViT(
            patch_size=config.patch_size, embed_dim=config.hidden_size, depth=config.num_layers,
            num_heads=config.num_heads, mlp_ratio=config.mlp_dim / config.hidden_size, **options
        )  # fmt: skip
    names = {
        (768, (3, 4, 9)): "vit_base_r50_s16_224",
        (384, (2, 2, 2, 2)): "vit_small_r26_s32_224",
        (1024, (3, 4, 6, 3)): "vit_large_r50_s32_224",
        (192, ()): "vit_tiny_r_s16_p8_224",
    }
    if (config.hidden_size, config.resnet_layers) not in names:
        raise PeerError("timm has no such hybrid")
    model = timm.create_model(names[config.hidden_size, config.resnet_layers], **options)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    return model


def load_timm(model: nn.Module, ours: VisionTransformer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.npz"
        write_npz(path, to_official(ours.state_dict(), ours.config))
        model.load_pretrained(str(path))


def build_transformers(config: ViTConfig, img_size: int, classes: int, dropout: float) -> nn.Module:
    _need("transformers")
    _no_hybrid(config, "transformers")
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    class Logits(ViTForImageClassification):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).logits

    model = Logits(
        TheirConfig(
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
    )
    for layer in model.vit.layers:  # theirs leaves this place of dropout out
        layer.mlp.activation_fn = nn.Sequential(layer.mlp.activation_fn, nn.Dropout(dropout))
    return model


def build_torchvision(config: ViTConfig, img_size: int, classes: int, dropout: float) -> nn.Module:
    _need("torchvision")
    _no_hybrid(config, "torchvision")
    from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

    model = TorchvisionViT(
        img_size, config.patch_size, config.num_layers, config.num_heads, config.hidden_size,
        config.mlp_dim, dropout=dropout, num_classes=classes,
    )  # fmt: skip
    for layer in model.encoder.layers:
        layer.mlp[1] = nn.GELU(approximate="tanh")
    return model


class PortBlock(nn.Module):
    """A block in the earlier port's design: three products, explicit attention."""

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
        weights = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        y = torch.matmul(weights.softmax(dim=-1), v).permute(0, 2, 1, 3).flatten(2)  # (B, N, D)
        x = x + self.dropout(self.out(y))
        y = self.dropout(self.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(y))


class Port(nn.Module):
    """The earlier port's design, without its faults."""

    def __init__(self, config: ViTConfig, img_size: int, classes: int, dropout: float):
        super().__init__()
        _no_hybrid(config, "this stand-in for the earlier port")
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (img_size // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.ModuleList(PortBlock(config, dropout) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = self.dropout(x + self.positions)
        for block in self.layer:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


# Our names, without `transformer.`, to theirs: (pattern, replacement), the first that fits.
RENAMED = {
    "transformers": [
        (r"embeddings\.patch_embeddings\.", r"vit.embeddings.patch_embeddings.projection."),
        (r"embeddings\.", r"vit.embeddings."),
        (r"encoder\.layer\.(\d+)\.attn\.out\.", r"vit.layers.\1.attention.o_proj."),
        (r"encoder\.layer\.(\d+)\.attn\.(.)\w+\.", r"vit.layers.\1.attention.\2_proj."),
        (r"encoder\.layer\.(\d+)\.attention_norm\.", r"vit.layers.\1.layernorm_before."),
        (r"encoder\.layer\.(\d+)\.ffn_norm\.", r"vit.layers.\1.layernorm_after."),
        (r"encoder\.layer\.(\d+)\.ffn\.", r"vit.layers.\1.mlp."),
        (r"encoder\.encoder_norm\.", r"vit.layernorm."),
        (r"head\.", r"classifier."),
    ],
    "torchvision": [
        (r"embeddings\.patch_embeddings\.", r"conv_proj."),
        (r"embeddings\.cls_token", r"class_token"),
        (r"embeddings\.position_embeddings", r"encoder.pos_embedding"),
        (r"encoder\.layer\.(\d+)\.attn\.out\.",
         r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
        (r"encoder\.layer\.(\d+)\.attn\.(?:query|key|value)\.",
         r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
        (r"encoder\.layer\.(\d+)\.attention_norm\.", r"encoder.layers.encoder_layer_\1.ln_1."),
        (r"encoder\.layer\.(\d+)\.ffn_norm\.", r"encoder.layers.encoder_layer_\1.ln_2."),
        (r"encoder\.layer\.(\d+)\.ffn\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
        (r"encoder\.layer\.(\d+)\.ffn\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
        (r"encoder\.encoder_norm\.", r"encoder.ln."),
        (r"head\.", r"heads.head."),
    ],
    "port": [
        (r"embeddings\.patch_embeddings\.", r"patches."),
        (r"embeddings\.cls_token", r"token"),
        (r"embeddings\.position_embeddings", r"positions"),
        (r"encoder\.layer\.(\d+)\.(?:attn|ffn)\.", r"layer.\1."),
        (r"encoder\.layer\.(\d+)\.attention_norm\.", r"layer.\1.norm1."),
        (r"encoder\.layer\.(\d+)\.ffn_norm\.", r"layer.\1.norm2."),
        (r"encoder\.encoder_norm\.", r"norm."),
    ],
}  # fmt: skip


def load_renamed(table: str, model: nn.Module, ours: VisionTransformer) -> None:
    """Our query, key and value follow each other, so arrays of one new name are stacked."""
    state: dict[str, Tensor] = {}
    for name, array in ours.state_dict().items():
        name = name.removeprefix("transformer.")
        for pattern, replacement in RENAMED[table]:
            name, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                break
        state[name] = torch.cat([state[name], array]) if name in state else array
    model.load_state_dict(state)


# name -> (what builds it, what gives it our weights)
BUILDERS = {
    "timm": (build_timm, load_timm),
    "transformers": (build_transformers, partial(load_renamed, "transformers")),
    "torchvision": (build_torchvision, partial(load_renamed, "torchvision")),
    "port": (Port, partial(load_renamed, "port")),
}


class PilImages(Dataset):
    """uint8 pixels (n, C, h, w) as the earlier port reads them: Pillow images, one at a time."""

    def __init__(self, pixels: Tensor, labels: Tensor, size: int):
        from torchvision import transforms

        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0)),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def pil_batches(pixels: Tensor, labels: Tensor, size: int, batch: int, workers: int, pin: bool):
    """Endless batches (images float32 (B, C, H, W), labels), decoded by worker processes."""
    loader = DataLoader(PilImages(pixels, labels, size), batch, shuffle=True, num_workers=workers,
                        drop_last=True, pin_memory=pin, persistent_workers=workers > 0)  # fmt: skip
    while True:
        yield from loader
