"""Every variant that the program knows, one row each."""

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class ViTConfig:
    """The structure of one ViT or ResNet+ViT hybrid; sizes in channels, patches in pixels.

    `classifier` is "token" (the head reads the class token) or "gap" (it reads the mean over all
    patches, and there is no class token). `representation_size` is the width of the tanh layer
    `pre_logits` before the head, None where there is none. `resnet_layers` counts the units of
    each ResNet stage: None for no ResNet, () for its stem alone, (3, 4, 9) for R50. With a ResNet,
    patches are cut from its feature map. `resnet_width` 1.0 means 64 channels in the stem.
    `gelu` is "tanh" (Google's) or "erf" (the exact one, of timm, DeiT, DINOv2, Hugging Face).
    `norm_eps` is that of the LayerNorms.
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

    @property
    def stem_width(self) -> int:
        """Channels of the ResNet stem."""
        return int(64 * self.resnet_width)

    @property
    def feature_channels(self) -> int:
        """Channels of the map that a hybrid's patches are cut from."""
        stages = len(self.resnet_layers)
        return self.stem_width * 4 * 2 ** (stages - 1) if stages else self.stem_width

    @property
    def stride(self) -> int:
        """Pixels between neighbouring patches, along either side."""
        if self.resnet_layers is None:
            return self.patch_size
        return self.patch_size * 2 ** (2 + max(0, len(self.resnet_layers) - 1))

    def grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """(h, w) in patches of an image of `img_size` pixels, one number or (height, width).

        Raises ValueError where the patches do not tile the image, or a hybrid's feature map.
        """
        pixels = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        sides = pixels
        if self.resnet_layers is not None:
            # Stem convolution and pool, then every stage but the first, halve the map. With the
            # official SAME padding an odd side is rounded up.
            for _ in range(2 + max(0, len(self.resnet_layers) - 1)):
                sides = tuple(ceil(side / 2) for side in sides)
        if min(sides) < self.patch_size or any(side % self.patch_size for side in sides):
            what = "image size" if self.resnet_layers is None else "the ResNet's feature map"
            raise ValueError(
                f"{what} {sides[0]}x{sides[1]} is not a multiple of the patch size "
                f"{self.patch_size}; {self._nearest(pixels)}"
            )
        return sides[0] // self.patch_size, sides[1] // self.patch_size

    def _nearest(self, pixels: tuple[int, int]) -> str:
        stride = self.stride
        wrong = next((side for side in pixels if side % stride), pixels[0])
        below, above = wrong // stride * stride, (wrong // stride + 1) * stride
        return f"use {below} or {above}" if below else f"use {above}"


def _tiny(**kw):
    return ViTConfig(hidden_size=192, mlp_dim=768, num_heads=3, num_layers=12, **kw)


def _small(**kw):
    return ViTConfig(hidden_size=384, mlp_dim=1536, num_heads=6, num_layers=12, **kw)


def _base(**kw):
    return ViTConfig(hidden_size=768, mlp_dim=3072, num_heads=12, num_layers=12, **kw)


def _large(**kw):
    return ViTConfig(hidden_size=1024, mlp_dim=4096, num_heads=16, num_layers=24, **kw)


def _huge(**kw):
    return ViTConfig(hidden_size=1280, mlp_dim=5120, num_heads=16, num_layers=32, **kw)


# Sizes and dropout rates: google-research/vision_transformer, vit_jax/configs/models.py.
# ViT-Mini_8 (of the bundled checkpoint), ViT-Ti_4 (both for 32 px images) and ViT-S_14 (DINOv2's
# patch) are additions of this project.
CONFIGS: dict[str, ViTConfig] = {
    "ViT-Mini_8": ViTConfig(patch_size=8, hidden_size=192, mlp_dim=768, num_heads=3, num_layers=6),
    "ViT-Ti_4": _tiny(patch_size=4),
    "ViT-Ti_16": _tiny(patch_size=16),
    "ViT-S_14": _small(patch_size=14),
    "ViT-S_16": _small(patch_size=16),
    "ViT-S_32": _small(patch_size=32),
    "ViT-B_8": _base(patch_size=8),
    "ViT-B_16": _base(patch_size=16),
    "ViT-B_32": _base(patch_size=32),
    "ViT-L_16": _large(patch_size=16, dropout_rate=0.1),
    "ViT-L_32": _large(patch_size=32),
    "ViT-H_14": _huge(patch_size=14, dropout_rate=0.1),
    "R+ViT-Ti_16": _tiny(patch_size=8, resnet_layers=()),
    "R26+ViT-S_32": _small(patch_size=1, resnet_layers=(2, 2, 2, 2)),
    "R26+ViT-B_32": _base(patch_size=1, resnet_layers=(2, 2, 2, 2)),
    "R50+ViT-B_16": _base(patch_size=1, resnet_layers=(3, 4, 9), dropout_rate=0.1),
    "R50+ViT-L_32": _large(patch_size=1, resnet_layers=(3, 4, 6, 3), dropout_rate=0.1),
}
# The earlier port spelled hybrids with a minus: R50-ViT-B_16.
CONFIGS |= {name.replace("+", "-"): row for name, row in CONFIGS.items() if "+" in name}
