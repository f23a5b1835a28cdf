"""ONNX files: from normal pixels to logits, or from an image of any size to probabilities."""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from models.interop import metadata_of
from models.modeling import VisionTransformer
from models.pixels import LONGEST, Pixels
from models.state_dict import Checkpoint
from utils.augment import side_weights

OPSET = 20  # the first with GELU as one operation
PROTOBUF_LIMIT = 2**31  # bytes; a larger ONNX model keeps its weights in a second file


class FromImage(nn.Module):
    """uint8 pixels (h, w, C) -> probabilities (classes,), as predict.py computes them.

    The resize is a product with `side_weights`, computed inside the graph: onnxruntime's own resize
    does not round as Pillow does.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], how: Pixels):
        super().__init__()
        self.model, self.size, self.how = model, size, how

    def forward(self, image: Tensor) -> Tensor:
        # As Pixels.window, in tensors: the sides are only known when the graph runs.
        sides = [torch.scalar_tensor(side, dtype=torch.float64) for side in image.shape[:2]]
        h, w = self.how.covered(self.size)
        box, whole = sides, [torch.tensor(float(side), dtype=torch.float64) for side in (h, w)]
        if self.how.resize == "smaller_side":
            box = [torch.minimum(sides[i], LONGEST * sides[1 - i]) for i in (0, 1)]
            rounded = torch.floor if h == w else torch.round
            covers = [rounded(whole[1 - i] * box[i] / box[1 - i]) for i in (0, 1)]
            whole = [torch.maximum(a, b) for a, b in zip(whole, covers, strict=True)]
        x = image.permute(2, 0, 1).float()
        for axis in (1, 0):  # columns, then rows, as Pillow does
            margin = (whole[axis] - self.size[axis]) / 2
            corner = torch.floor(margin) if self.how.round_down else torch.round(margin)
            source, first = image.shape[axis], ((sides[axis] - box[axis]) / 2).long()
            # The box first: a strip's ends are cut off. What comes after it has weight 0.
            order = torch.minimum(torch.arange(source) + first, sides[axis].long() - 1)
            x = x.index_select(1 + axis, order)
            arguments = source, whole[axis], corner[None], self.size[axis], self.how
            weights = side_weights(box[axis][None], *arguments)[0]  # (source, target)
            x = x @ weights if axis else (x.mT @ weights).mT
            x = (x + 0.5).floor().clamp(0, 255)
        return self.model((x[None] - 127.5) / 127.5)[0].softmax(0)


class HalfInside(nn.Module):
    """A copy of a model in float16, which reads and returns float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = deepcopy(model).half()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.half()).float()


def write_onnx(
    path: Path, model: VisionTransformer, checkpoint: Checkpoint, half=False, with_pixels=False
) -> None:
    """`images` (batch, C, H, W) -> `logits` (batch, classes), for any batch size.

    `with_pixels`: `image` uint8 (h, w, C) of any size -> `probabilities` (classes,).
    """
    import onnx

    inner, size, channels = HalfInside(model) if half else model, model.img_size, model.in_channels
    Dim = torch.export.Dim
    if with_pixels:
        module = FromImage(inner, size, checkpoint.metadata.pixels)
        example = torch.zeros(size[0] + 6, size[1] + 10, channels, dtype=torch.uint8)
        names = {"input_names": ["image"], "output_names": ["probabilities"]}
        shapes = ({0: Dim("height", min=1, max=2**15), 1: Dim("width", min=1, max=2**15)},)
    else:
        module, example = inner, torch.zeros(2, channels, *size)
        names = {"input_names": ["images"], "output_names": ["logits"]}
        shapes = ({0: Dim("batch")},)
    options = {"dynamic_shapes": shapes, "dynamo": True, "verbose": False, "opset_version": OPSET}
    program = torch.onnx.export(module.eval(), (example,), **names, **options)
    program.model.metadata_props.update(metadata_of(checkpoint))
    size = sum(p.numel() * p.element_size() for p in inner.parameters())
    program.save(str(path), external_data=size > 0.95 * PROTOBUF_LIMIT)
    onnx.checker.check_model(str(path))
