"""The Vision Transformer, exact to google-research/vision_transformer (vit_jax/models_vit.py).

Parameter names are those of the earlier PyTorch port (jeonsworld/ViT-pytorch), so that its state
dicts load. Shapes in comments: B batch, N tokens (class token first, then registers), D width, H
heads, d width of a head, C channels, h w grid of patches, P their number. A CPU computes the same
faster after `models.cpu.use_cpu_kernels(model)`.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import CONFIGS, ViTConfig, both_sides
from models.map_head import MapHead
from models.modeling_resnet import ResNetV2, lecun_normal_
from models.state_dict import LoadReport, load
from models.weights import read_google

__all__ = ["CONFIGS", "ViTConfig", "VisionTransformer"]
APPROXIMATE = {"tanh": "tanh", "erf": "none"}  # form of GELU -> PyTorch's word for it


def layer_norm(config: ViTConfig, here: bool = True) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if here else nn.Identity()


class Embeddings(nn.Module):
    """Image to tokens: patches (of the ResNet's map in a hybrid), class token, positions."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int], in_channels: int):
        super().__init__()
        if config.resnet_layers is not None:
            self.hybrid_model = ResNetV2(config.resnet_layers, config.stem_width, in_channels)
            in_channels = config.feature_channels
        patch, width = config.patch_size, config.hidden_size
        self.patch_embeddings = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.has_token = config.classifier == "token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if self.has_token else None
        tokens = grid[0] * grid[1] + self.has_token
        self.position_embeddings = nn.Parameter(torch.empty(1, tokens, width))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, width))
        self.dropout = nn.Dropout(config.dropout_rate)
        self.pre_norm = layer_norm(config, config.pre_norm)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "hybrid_model"):
            x = self.hybrid_model(x)  # (B, C, H, W) of the feature map
        x = self.patch_embeddings(x).flatten(2).transpose(1, 2)  # (B, P, D)
        if self.cls_token is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
            x = torch.cat([cls, x], dim=1)  # (B, 1 + P, D)
        x = x + self.position_embeddings
        if hasattr(self, "register_tokens"):
            registers, at = self.register_tokens.expand(x.shape[0], -1, -1), self.has_token
            x = torch.cat([x[:, :at], registers, x[:, at:]], dim=1)  # (B, N, D)
        return self.pre_norm(self.dropout(x))


class Attention(nn.Module):
    """Multi-head self-attention of (B, N, D).

    All tokens are queries, or only the first `num_queries`, or instead of them the `probe`
    (B, queries, D). Every query attends to all N tokens.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.attention_dropout_rate = config.attention_dropout_rate
        self.proj_dropout = nn.Dropout(config.dropout_rate)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v; all are (B, H, N, d)."""
        p = self.attention_dropout_rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)

    def forward(self, x: Tensor, num_queries: int | None = None, probe=None) -> Tensor:
        queries = x[:, :num_queries] if probe is None else probe
        q = self.split_heads(self.query(queries))  # (B, H, num_queries, d)
        k = self.split_heads(self.key(x))  # (B, H, N, d)
        v = self.split_heads(self.value(x))  # (B, H, N, d)
        x = self.attend(q, k, v)  # (B, H, num_queries, d)
        x = x.transpose(1, 2).flatten(2)  # (B, num_queries, D)
        return self.proj_dropout(self.out(x))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, in the form that the config names, or SwiGLU."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        gated = config.mlp == "swiglu"  # then fc1 gives gates, and what they multiply
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_dim * (1 + gated))
        self.fc2 = nn.Linear(config.mlp_dim, config.hidden_size)
        self.activation = "swiglu" if gated else config.gelu
        self.dropout = nn.Dropout(config.dropout_rate)

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gates, x = x.chunk(2, dim=-1)
            return F.silu(gates) * x
        if self.activation == "quick":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate=APPROXIMATE[self.activation])

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.fc1(x))  # (B, N, mlp_dim)
        return self.dropout(self.fc2(self.dropout(x)))  # (B, N, D)


def scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    """A residual branch (B, N, D), times a factor (B, 1, 1) of each image, if any."""
    return branch if factor is None else branch * factor


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) to the same, or to the first `num_queries` tokens.

    `paths` are the factors of its two branches.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attn = Attention(config)
        self.ffn_norm = layer_norm(config)
        self.ffn = Mlp(config)

    def forward(self, x: Tensor, num_queries: int | None = None, paths=(None, None)) -> Tensor:
        x = x[:, :num_queries] + scaled(self.attn(self.attention_norm(x), num_queries), paths[0])
        return x + scaled(self.ffn(self.ffn_norm(x)), paths[1])


class Encoder(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.encoder_norm = layer_norm(config, not config.fc_norm)
        self.grad_checkpointing = False  # True: keep only the blocks' inputs, recompute the rest

    def forward(self, x: Tensor, num_queries: int | None = None, paths=None) -> Tensor:
        *blocks, last = self.layer
        *lower, top = paths or [(None, None)] * len(self.layer)
        recompute = self.grad_checkpointing and self.training
        for block, own in zip(blocks, lower, strict=True):
            args = (x, None, own)
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        # Where the head reads only the class token, the last block computes keys and values of all
        # tokens, but the rest for that token alone: exact, with 7 % fewer operations in B/16.
        return self.encoder_norm(last(x, num_queries, top))


class Transformer(nn.Module):
    """Images (B, C, H, W) to encoded tokens (B, N, D), or only the first `num_queries` of them."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int], in_channels: int):
        super().__init__()
        self.embeddings = Embeddings(config, grid, in_channels)
        self.encoder = Encoder(config)

    def forward(self, images: Tensor, num_queries: int | None = None, paths=None) -> Tensor:
        return self.encoder(self.embeddings(images), num_queries, paths)


class VisionTransformer(nn.Module):
    """Images (B, in_channels, H, W) in [-1, 1] to logits (B, num_classes).

    `img_size` is the side in pixels, or (height, width). A new model has the official
    initialisation: a head of zeros, positions N(0, 0.02). With `zero_head`, `load_from` does not
    load the file's head and keeps the zeros, as fine-tuning needs it.
    Raises UserError if the patches do not tile the image.
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
        self.img_size = both_sides(img_size)
        self.grid = config.grid(self.img_size)
        self.num_classes = num_classes
        self.zero_head = zero_head
        self.in_channels = in_channels
        self.transformer = Transformer(config, self.grid, in_channels)
        width = config.hidden_size
        if config.pooling == "map":
            self.map_head = MapHead(width, Attention(config), layer_norm(config), Mlp(config))
        self.fc_norm = layer_norm(config, config.fc_norm)
        width *= 1 + (config.pooling == "pair")
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
        for block in (m for m in self.modules() if isinstance(m, Block | MapHead)):
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

    def features(self, images: Tensor, paths: Sequence[Sequence[Tensor]] | None = None) -> Tensor:
        """What the head reads: the encoded class token, or all patches as one, (B, D).

        `paths` are for each block the factors (B, 1, 1) of its two branches: stochastic depth.
        """
        pool = self.config.pooling
        x = self.transformer(images, {"token": 1, "pair": 2}.get(pool), paths)
        if pool == "pair":
            return x.flatten(1)  # (B, 2 D)
        if pool != "token":
            x = x[:, self.config.num_prefix :]  # (B, P, D)
        x = self.map_head(x) if pool == "map" else x.mean(dim=1)
        return self.fc_norm(x)

    def forward(self, images: Tensor, paths: Sequence[Sequence[Tensor]] | None = None) -> Tensor:
        x = self.features(images, paths)  # (B, D)
        if hasattr(self, "pre_logits"):
            x = torch.tanh(self.pre_logits(x))  # (B, representation_size)
        return self.head(x)  # (B, num_classes)

    def load_from(self, weights: Mapping, position_grid: tuple | None = None) -> LoadReport:
        """Load an official file: `np.load(path)`, or any mapping from its keys to arrays.

        Everything is checked before the first parameter changes. `position_grid` is the (h, w) in
        patches for which the file was made; it is only needed if that is not square.
        Returns a report of every key. Raises UserError if an array is missing or does not fit.
        """
        return load(self, read_google(weights, position_grid))
