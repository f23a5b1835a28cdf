"""Every variant of the model, one row each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from models.errors import UserError


def both_sides(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of one side, or of both."""
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


WORDS = {"classifier": ("token", "gap"), "pool": (None, "token", "mean", "map", "pair")}
WORDS |= {"gelu": ("tanh", "erf", "quick"), "mlp": ("gelu", "swiglu")}
WORDS |= {"pre_norm": (False, True), "fc_norm": (False, True)}


def is_count(value: object) -> bool:
    return type(value) is int and value > 0


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of one ViT or ResNet+ViT hybrid. Widths are in channels, patches in pixels.

    `classifier` is "token" (the head reads the class token) or "gap" (the head reads the mean over
    all patches, and there is no class token). `representation_size` is the width of the tanh layer
    `pre_logits` before the head; None means no such layer. `resnet_layers` counts the units of
    each ResNet stage: None for no ResNet, () for its stem alone, (3, 4, 9) for R50. In a hybrid
    the patches are cut from the ResNet's feature map. `resnet_width` 1.0 means 64 channels in the
    stem. `gelu` is "tanh" (Google's approximation), "erf" (exact: timm, DeiT, DINOv2, Hugging
    Face) or "quick" (OpenAI's CLIP). `norm_eps` is the epsilon of every LayerNorm.

    The rest is what other families of ViTs need; docs/weights.md says which. `num_registers` are
    tokens without a position between class token and patches. `pre_norm` is a LayerNorm before the
    blocks. With `fc_norm` the last one comes after the pooling. `mlp` is "gelu" or "swiglu".
    `pool` is what the head reads: the class "token", the "mean" of the patches, a "map" (attention
    of one learned query to the patches), or a "pair" (class token and first register, side by
    side). None is the token, or the mean in a "gap" model.
    """

    patch_size: int
    hidden_size: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    classifier: str = "token"
    representation_size: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    resnet_layers: tuple[int, ...] | None = None
    resnet_width: float = 1.0
    gelu: str = "tanh"
    norm_eps: float = 1e-6
    num_registers: int = 0
    pre_norm: bool = False
    pool: str | None = None
    fc_norm: bool = False
    mlp: str = "gelu"

    def __post_init__(self):
        """Raise UserError for a value that no model has: files hold configs, too."""
        for name, value in vars(self).items():
            number = value if type(value) in (int, float) else -1
            if name in WORDS:
                good = type(value) in (str, bool, type(None)) and value in WORDS[name]
            elif name.endswith(("rate", "eps")):
                good = 0 <= number < 1
            elif name == "resnet_width":
                good = 0 < number < 64
            elif name == "resnet_layers":
                good = value is None or (type(value) is tuple and all(map(is_count, value)))
            else:
                none = {"num_registers": 0, "representation_size": None}
                good = is_count(value) or (name in none and value is none[name])
            if not good:
                raise UserError(f"no ViT has {value!r:.40} as its {name}")

    @property
    def pooling(self) -> str:
        """`pool` where it is not None."""
        return self.pool or ("token" if self.classifier == "token" else "mean")

    @property
    def num_prefix(self) -> int:
        """Tokens before those of the patches: the class token and registers."""
        return (self.classifier == "token") + self.num_registers

    @property
    def stem_width(self) -> int:
        """Channels of the ResNet stem."""
        return int(64 * self.resnet_width)

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map from which a hybrid cuts its patches."""
        stages = len(self.resnet_layers)
        return self.stem_width * 4 * 2 ** (stages - 1) if stages else self.stem_width

    @property
    def stride(self) -> int:
        """Pixels between neighbouring patches, along either side."""
        return self.patch_size * 2**self._halvings

    @property
    def _halvings(self) -> int:
        """How often the ResNet halves the image: stem convolution, pool, all stages but one."""
        return 0 if self.resnet_layers is None else 2 + max(0, len(self.resnet_layers) - 1)

    def grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """(h, w) in patches of an image of `img_size` pixels: one number or (height, width).

        Raises UserError if the patches do not tile the image, or the hybrid's feature map.
        """
        pixels = sides = both_sides(img_size)
        for _ in range(self._halvings):
            sides = tuple(ceil(side / 2) for side in sides)  # SAME padding rounds an odd side up
        if min(sides) < self.patch_size or any(side % self.patch_size for side in sides):
            what = "image size" if self.resnet_layers is None else "the ResNet's feature map"
            wrong = next((side for side in pixels if side % self.stride), pixels[0])
            below = wrong // self.stride * self.stride
            sizes = f"{below} or {below + self.stride}" if below else str(self.stride)
            multiple = f"is not a multiple of the patch size {self.patch_size}"
            raise UserError(f"{what} {sides[0]}x{sides[1]} {multiple}; use {sizes}")
        return sides[0] // self.patch_size, sides[1] // self.patch_size


DEFAULT_MODEL = "ViT-B_16"

# Sizes and dropout rates: google-research/vision_transformer, vit_jax/configs/models.py.
# ViT-Mini_8 (the bundled checkpoint), ViT-Ti_4 (both for 32 px images) and ViT-S_14 (DINOv2's
# patch) are additions of this project. Patch 1 of a hybrid is one cell of its feature map.
# fmt: off
CONFIGS: dict[str, ViTConfig] = {
    #                      patch width   mlp heads layers
    "ViT-Mini_8":   ViTConfig( 8,  192,  768,  3,  6),
    "ViT-Ti_4":     ViTConfig( 4,  192,  768,  3, 12),
    "ViT-Ti_16":    ViTConfig(16,  192,  768,  3, 12),
    "ViT-S_14":     ViTConfig(14,  384, 1536,  6, 12),
    "ViT-S_16":     ViTConfig(16,  384, 1536,  6, 12),
    "ViT-S_32":     ViTConfig(32,  384, 1536,  6, 12),
    "ViT-B_8":      ViTConfig( 8,  768, 3072, 12, 12),
    "ViT-B_16":     ViTConfig(16,  768, 3072, 12, 12),
    "ViT-B_32":     ViTConfig(32,  768, 3072, 12, 12),
    "ViT-L_16":     ViTConfig(16, 1024, 4096, 16, 24, dropout_rate=0.1),
    "ViT-L_32":     ViTConfig(32, 1024, 4096, 16, 24),
    "ViT-H_14":     ViTConfig(14, 1280, 5120, 16, 32, dropout_rate=0.1),
    "R+ViT-Ti_16":  ViTConfig( 8,  192,  768,  3, 12, resnet_layers=()),
    "R26+ViT-S_32": ViTConfig( 1,  384, 1536,  6, 12, resnet_layers=(2, 2, 2, 2)),
    "R26+ViT-B_32": ViTConfig( 1,  768, 3072, 12, 12, resnet_layers=(2, 2, 2, 2)),
    "R50+ViT-B_16": ViTConfig( 1,  768, 3072, 12, 12, resnet_layers=(3, 4, 9), dropout_rate=0.1),
    "R50+ViT-L_32": ViTConfig( 1, 1024, 4096, 16, 24, resnet_layers=(3, 4, 6, 3), dropout_rate=0.1),
}
# fmt: on
# The earlier PyTorch port writes hybrids with a minus: R50-ViT-B_16.
CONFIGS |= {name.replace("+", "-"): row for name, row in CONFIGS.items() if "+" in name}


def architecture(config: ViTConfig) -> ViTConfig:
    """`config` with only what decides every parameter but those of head and `pre_logits`."""
    defaults = {"representation_size": None, "gelu": "tanh", "norm_eps": 1e-6}
    defaults["pool"] = "map" if config.pool == "map" else None
    return replace(config, dropout_rate=0.0, attention_dropout_rate=0.0, **defaults)


def for_new_head(config: ViTConfig) -> ViTConfig:
    """`config` without what only a file's own head reads: `pre_logits`, and a second token."""
    pool = None if config.pool == "pair" else config.pool
    return replace(config, representation_size=None, pool=pool)


def as_in(row: ViTConfig, config: ViTConfig) -> ViTConfig:
    """A row of CONFIGS with what its name does not say, as in `config`: tokens, norms, pooling."""
    names = ("classifier", "num_registers", "pre_norm", "pool", "fc_norm")
    return replace(row, **{name: getattr(config, name) for name in names})


def config_names(config: ViTConfig) -> list[str]:
    """The rows of CONFIGS with this architecture, but for what their names do not say."""
    wanted = architecture(config)
    return [name for name, row in CONFIGS.items() if architecture(as_in(row, config)) == wanted]


def config_name(config: ViTConfig) -> str | None:
    """The first of `config_names`, None if there is none."""
    return next(iter(config_names(config)), None)


def describe(config: ViTConfig) -> str:
    """`config_name`, or the sizes of a model that has none."""
    sizes = f"patches of {config.patch_size}, width {config.hidden_size}"
    return config_name(config) or f"ViT ({sizes}, {config.num_layers} blocks)"
