"""Measure what a frozen model knows: few-shot accuracy by least squares on its features.

As in the ViT paper (arXiv:2010.11929, section 4.1): a few images of each class are drawn, their
features are mapped to targets of -1 and 1 in closed form, and all test images are classified.
n images, D width, C classes.
"""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_flags import (
    add_data_flags,
    add_loader_flags,
    decoding_options,
    loading,
    model_options,
)
from data_utils import check_source, load_data
from flags import add_checkpoint_flags
from models.checkpoints import open_model
from models.cpu import use_cpu_kernels
from models.errors import UserError
from models.modeling import VisionTransformer
from models.zoo import resolve_checkpoint
from utils.cli import Parser, check_output, non_negative_float, positive_int, run_script
from utils.files import atomic_write
from utils.hardware import choose_device, keep_freed_memory
from utils.image_set import ImageSet
from utils.images import Decoding
from utils.seeds import named_seed
from utils.stream import EvalStream


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.l2 == 0:
        raise UserError("--l2 0 leaves the equations without a single solution: use 1, say")
    check_output(args.output, [args.checkpoint])
    check_source(args.dataset, Path(args.data_dir), args.val_fraction)
    device = choose_device(args.device)
    keep_freed_memory(device)
    source = resolve_checkpoint(args.checkpoint, variant=args.model_type, offline=args.offline)
    model, metadata = open_model(source, head=False, **model_options(args))
    model = use_cpu_kernels(model.to(device))
    options = {"skip_unreadable": args.skip_unreadable, "offline": args.offline, "progress": True}
    options |= {"val_fraction": args.val_fraction, "seed": 0}
    options["decoding"] = Decoding.of(model, metadata, **decoding_options(args))
    data = load_data(args.dataset, args.data_dir, **options)
    test, split, _, _ = data.final()
    train = data.train.readable()
    labels = train.labels
    pairs = product(args.shots, range(args.seeds))
    draws = {(shots, seed): draw_shots(labels, shots, seed, data.classes) for shots, seed in pairs}
    drawn = torch.cat(list(draws.values())).unique()  # sorted; no other image is needed
    train_features = features(model, train.subset(drawn), "shots", **loading(args, device))
    test_features = features(model, test, split, **loading(args, device))
    accuracies = {shots: [] for shots in args.shots}
    for (shots, _), indices in draws.items():
        rows = train_features[torch.searchsorted(drawn, indices)]
        score = least_squares(rows, labels[indices], len(data.classes), args.l2)
        correct = score(test_features).argmax(dim=1) == test.labels
        accuracies[shots].append(correct.double().mean().item())
    print(f"{args.checkpoint} on {data.source}: {split} accuracy over {len(test)} images")
    print(f"pixels: {metadata.pixels.describe(model.img_size)}")
    print("shots    mean  deviation  seeds")
    for shots, values in accuracies.items():
        mean, deviation = torch.tensor(values).mean(), torch.tensor(values).std(correction=0)
        print(f"{shots:5d}  {mean:.4f}     {deviation:.4f}  {args.seeds:5d}")
    if args.output:
        result = {"checkpoint": args.checkpoint, "data": data.source, "split": split, "l2": args.l2}
        with atomic_write(args.output) as path:
            path.write_text(json.dumps(result | {"accuracy": accuracies}, indent=1) + "\n")


def build_parser() -> Parser:
    parser = Parser(prog="fewshot.py", description=__doc__, fromfile_prefix_chars="@")
    add_checkpoint_flags(parser)
    add_data_flags(parser)
    add_loader_flags(parser)
    flag = parser.add_argument_group("few-shot").add_argument
    flag("--shots", type=positive_int, nargs="+", default=[1, 5, 10], help="images of each class")
    flag("--seeds", type=positive_int, default=5, help="draws of each number of shots")
    l2_help = "strength of the regularisation, above 0"
    flag("--l2", type=non_negative_float, default=1024.0, help=l2_help)
    flag("--output", metavar="FILE", help="also write every accuracy there, as JSON")
    return parser


@torch.no_grad()
def features(model: VisionTransformer, images: ImageSet, title: str, **loading) -> Tensor:
    """The model's features of all images, (n, D) float64; `loading` is as in EvalStream."""
    stream = EvalStream(images, model.img_size, device=model.head.weight.device, **loading)
    bar = tqdm(stream, desc=title, disable=None)
    return torch.cat([model.features(batch).cpu().double() for batch, _ in bar])


def draw_shots(labels: Tensor, shots: int, seed: int, classes: Sequence[str]) -> Tensor:
    """Indices of `shots` images of every class. More shots of a seed contain its fewer.

    Raises UserError, by the name in `classes`, for a class with fewer images.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "shots"))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            found = f"{len(members)} image{'s' * (len(members) > 1)}, not {shots}"
            raise UserError(f"class {classes[label]!r} has {found}")
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:shots]])
    return torch.cat(chosen)


def least_squares(
    features: Tensor, labels: Tensor, num_classes: int, l2: float
) -> Callable[[Tensor], Tensor]:
    """The function (m, D) -> (m, C) scores that fits features (n, D) to labels (n,).

    Features are standardised by their own mean and deviation. The bias is regularised like the
    weights. The target of an image is 1 for its class and -1 for the others.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5

    def design(rows: Tensor) -> Tensor:
        rows = (rows - mean) / deviation
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)  # (m, D + 1)

    x = design(features)
    targets = 2.0 * torch.nn.functional.one_hot(labels, num_classes).double() - 1  # (n, C)
    if len(x) < x.shape[1]:  # the same solution from a smaller system of equations
        gram = x @ x.T + l2 * torch.eye(len(x), dtype=x.dtype)  # (n, n)
        weights = x.T @ torch.linalg.solve(gram, targets)  # (D + 1, C)
    else:
        gram = x.T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)  # (D + 1, D + 1)
        weights = torch.linalg.solve(gram, x.T @ targets)  # (D + 1, C)
    return lambda rows: design(rows) @ weights


if __name__ == "__main__":
    sys.exit(run_script("fewshot.py", main))
