"""The Vision Transformer, exact to google-research/vision_transformer (vit_jax/models_vit.py).

Parameter names are the earlier PyTorch port's, so that its state dicts load. In shape comments
B is batch, N tokens (class token first), D width, H heads, d width per head, C channels, h w grid.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import CONFIGS, ViTConfig
from models.cpu import attend, conv2d, dense, dense_gelu, dropout
from models.modeling_resnet import ResNetV2, lecun_normal_
from models.weights import LoadReport, load_official

__all__ = ["CONFIGS", "ViTConfig", "VisionTransformer"]


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class Dense(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight, self.bias)


class Patches(nn.Conv2d):
    """A dense layer over patches: stride and kernel are the same."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, stride=self.stride)


class Embeddings(nn.Module):
    """Image -> tokens: patches (of a ResNet's map in a hybrid), class token, positions."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int], in_channels: int):
        super().__init__()
        if config.resnet_layers is not None:
            self.hybrid_model = ResNetV2(config.resnet_layers, config.stem_width, in_channels)
            in_channels = config.feature_channels
        patch, width = config.patch_size, config.hidden_size
        self.patch_embeddings = Patches(in_channels, width, patch, patch)
        has_token = config.classifier == "token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_token else None
        tokens = grid[0] * grid[1] + has_token
        self.position_embeddings = nn.Parameter(torch.empty(1, tokens, width))
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "hybrid_model"):
            x = self.hybrid_model(x)  # (B, C, h, w)
        x = self.patch_embeddings(x)  # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        if self.cls_token is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([cls, x], dim=1)  # (B, N, D)
        return self.dropout(x + self.position_embeddings)


class Attention(nn.Module):
    """Multi-head self-attention: all tokens of (B, N, D), or the first `keep`, look at all."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.query = Dense(width, width)
        self.key = Dense(width, width)
        self.value = Dense(width, width)
        self.out = Dense(width, width)
        self.attention_dropout_rate = config.attention_dropout_rate
        self.proj_dropout = Dropout(config.dropout_rate)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        q = self.split_heads(self.query(x[:, :keep]))
        k, v = self.split_heads(self.key(x)), self.split_heads(self.value(x))
        x = attend(q, k, v, self.attention_dropout_rate if self.training else 0.0)  # (B, H, N, d)
        x = x.transpose(1, 2).flatten(2)  # (B, N, D)
        return self.proj_dropout(self.out(x))


class Mlp(nn.Module):
    """Two dense layers with GELU between them, in the form that the config names."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = Dense(config.hidden_size, config.mlp_dim)
        self.fc2 = Dense(config.mlp_dim, config.hidden_size)
        self.approximate = {"tanh": "tanh", "erf": "none"}[config.gelu]
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(dense_gelu(x, self.fc1, self.approximate))  # (B, N, mlp_dim)
        return self.dropout(self.fc2(x))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block. `keep` asks for the first tokens only (None: all of them)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = Mlp(config)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        x = x[:, :keep] + self.attn(self.attention_norm(x), keep)
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.grad_checkpointing = False  # keep block inputs only, compute the rest again

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        *blocks, last = self.layer
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        # A token head reads one row, so the last block computes keys and values of all tokens
        # but everything else for that row alone: exact, and 7 % fewer operations in B/16.
        return self.encoder_norm(last(x, keep))


class Transformer(nn.Module):
    """Images (B, C, H, W) -> encoded tokens (B, N, D), or only the first `keep` of them."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int], in_channels: int):
        super().__init__()
        self.embeddings = Embeddings(config, grid, in_channels)
        self.encoder = Encoder(config)

    def forward(self, images: Tensor, keep: int | None = None) -> Tensor:
        return self.encoder(self.embeddings(images), keep)


class VisionTransformer(nn.Module):
    """Images (B, in_channels, H, W) in [-1, 1] -> logits (B, num_classes), always.

    `img_size` is the side in pixels, or (height, width). A new model has the official
    initialisation: the head all zeros, positions N(0, 0.02). With `zero_head`, `load_from` leaves
    the file's head out and keeps those zeros, as fine-tuning wants it.
    Raises ValueError where the patches do not tile the image.
    """

    def __init__(
        self,
        config: ViTConfig,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 21843,
        zero_head: bool = False,
        in_channels: int = 3,
    ):
        super().__init__()
        self.config = config
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.grid = config.grid(self.img_size)
        self.num_classes = num_classes
        self.zero_head = zero_head
        self.in_channels = in_channels
        self.transformer = Transformer(config, self.grid, in_channels)
        width = config.hidden_size
        if config.representation_size is not None:
            self.pre_logits = nn.Linear(width, config.representation_size)
            width = config.representation_size
        self.head = nn.Linear(width, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter as the official code does for training from scratch."""
        embeddings = self.transformer.embeddings
        lecun_normal_(embeddings.patch_embeddings.weight)
        nn.init.zeros_(embeddings.patch_embeddings.bias)
        nn.init.normal_(embeddings.position_embeddings, std=0.02)
        for block in self.transformer.encoder.layer:
            for linear in (block.attn.query, block.attn.key, block.attn.value, block.attn.out):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
            for linear in (block.ffn.fc1, block.ffn.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        if hasattr(self, "pre_logits"):
            lecun_normal_(self.pre_logits.weight)
            nn.init.zeros_(self.pre_logits.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """The class token, or the mean of all: (B, D)."""
        keep = 1 if self.config.classifier == "token" else None
        return self.transformer(images, keep).mean(dim=1)  # the mean of one token is itself

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        if hasattr(self, "pre_logits"):
            x = torch.tanh(self.pre_logits(x))
        return self.head(x)  # (B, num_classes)

    def load_from(
        self, weights: Mapping, position_grid: tuple[int, int] | None = None
    ) -> LoadReport:
        """Take the parameters of an official file: `np.load(path)`, or a mapping of its keys.

        Everything is checked before the first parameter changes. `position_grid` is the (h, w)
        in patches that the file was made for, where that is not square.
        Returns a report of every key; raises WeightsError if anything is missing or does not fit.
        """
        return load_official(self, weights, position_grid)
