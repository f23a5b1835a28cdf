"""Random crops of images in memory, by weights that are looked up. B batch, h w source size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.pixels import Pixels, Window
from utils.augment import DRAWS, Augmentation, resize_with, side_weights


class CropTable:
    """The weights of every crop that an augmentation may take of images of one size.

    Making them takes some 40 kernels on a GPU, looking them up takes one for each side.
    """

    def __init__(
        self, how: Augmentation, recipe: Pixels, source: tuple[int, int], device: torch.device
    ):
        self.recipe, self.source = recipe, source
        window = how.window([0.0] * DRAWS, recipe, *source)
        self.numbers, self.tables = [], []
        for axis in (0, 1):
            side, whole, target = source[axis], window.whole[axis], how.size[axis]
            parts = [(window.box[2 + axis], corner) for corner in range(whole - target + 1)]
            if how.kind.startswith("crop"):
                parts = [(length, 0) for length in range(1, side + 1)]
            lengths, corners = torch.tensor(parts).T
            weights = side_weights(lengths, side, whole, corners, target, recipe)  # (P, side, T)
            if axis == 1:
                weights = torch.cat([weights, weights.flip(2)])  # also of every mirrored part
            # With zeros before the first pixel: the weights of a part that begins at pixel s are
            # read s rows earlier.
            table = F.pad(weights, (0, 0, side, 0)).flatten(0, 1)  # (P 2 side, T)
            self.tables.append(table.to(device))
            self.numbers.append({part: number for number, part in enumerate(parts)})

    def places(self, windows: Sequence[Window], mirrored: Tensor) -> list[Tensor]:
        """Where the weights of each window are: rows (B, h) and columns (B, w) of the tables."""
        of_rows, of_columns = self.numbers
        found = [
            (of_rows[height, y], of_columns[width, x], top, left)
            for (top, left, height, width), _, (y, x) in windows
        ]
        row, column, top, left = torch.tensor(found).T
        column = column + mirrored * len(of_columns)
        pairs = zip((row, column), (top, left), self.source, strict=True)
        firsts = (part * 2 * side + side - start for part, start, side in pairs)
        shifts = map(torch.arange, self.source)
        return [first[:, None] + shift for first, shift in zip(firsts, shifts, strict=True)]

    def resize(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The crops of images (B, C, h, w) at `places`, as `resize_with` returns them."""
        weights = map(F.embedding, (rows, columns), self.tables)  # (B, h, H), (B, w, W)
        return resize_with(images, *weights, self.recipe)
