"""Measure what a frozen model knows: classifiers on its features, without training the backbone.

knn: the nearest training images vote. linear: a linear head, whose lr and L2 are chosen on
validation images. fewshot: least squares on a few images of each class.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_flags import add_data_flags, add_loader_flags, decoding_options, loading, model_options
from data_utils import Data, check_source, load_data, split
from flags import add_checkpoint_flags
from models.checkpoints import open_model, read_npz
from models.cpu import use_cpu_kernels
from models.errors import RunError, UserError
from models.modeling import VisionTransformer
from models.zoo import resolve_checkpoint
from utils.cli import Parser, check_output, non_negative_float, positive_int, run_script
from utils.files import atomic_write
from utils.hardware import choose_device, keep_freed_memory
from utils.image_set import ImageSet
from utils.images import Decoding
from utils.metrics import write_results
from utils.probes import draw_shots, least_squares, linear_heads, nearest_neighbours, validate
from utils.stream import EvalStream

METHODS = ("knn", "linear", "fewshot")
KINDS = ("token", "mean", "token+mean", "last4")
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
HELD_OUT = 0.1  # of every class of the training images, if only the test images are left


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
    kind = args.features or model.config.pooling
    if model.config.classifier == "gap" and "mean" != kind != model.config.pooling:
        raise UserError(f"--features {kind}: this model has no class token, so take mean")
    folder = None if args.cache_dir == "none" else Path(args.cache_dir)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    model = use_cpu_kernels(model.to(device))
    features = Features(model, kind, folder, args.data_dir, loading(args, device))
    options = {"skip_unreadable": args.skip_unreadable, "offline": args.offline, "progress": True}
    options |= {"val_fraction": args.val_fraction, "seed": 0}
    options["decoding"] = Decoding.of(model, metadata, **decoding_options(args))
    data = load_data(args.dataset, args.data_dir, **options)
    test, part, _, classes = data.final()
    train = data.train.readable()
    labels, draws, used = train.labels, {}, torch.arange(len(train))
    if "fewshot" in args.methods:
        pairs = product(args.shots, range(args.seeds))
        try:
            draws = {pair: draw_shots(labels, *pair, classes) for pair in pairs}
        except UserError as error:
            raise UserError(f"{error}: give --shots less, or --methods without fewshot") from error
    if set(args.methods) == {"fewshot"}:
        used = torch.cat(list(draws.values())).unique()  # sorted; no other image is needed
    rows, queries = features.of(train.subset(used), "train"), features.of(test, part)
    about = {"checkpoint": args.checkpoint, "data": data.source, "split": part}
    result = about | {"images": len(test), "features": kind}
    wanted, here = test.labels, [each.to(device) for each in (rows, labels, queries)]
    table = ["method   setting                  accuracy  deviation"]
    if "knn" in args.methods:
        found = nearest_neighbours(*here, args.k).items()
        result["knn"] = {k: (x.cpu() == wanted).double().mean().item() for k, x in found}
        table += [row("knn", f"k {k}", value) for k, value in result["knn"].items()]
    if "linear" in args.methods:
        score, chosen = choose_head(args, data, *here[:2], features)
        [accuracy], _ = validate(score, here[2], wanted.to(device))
        result["linear"] = {"accuracy": accuracy} | chosen
        table.append(row("linear", "lr {lr:g}, L2 {l2:g}".format(**chosen), accuracy))
    if "fewshot" in args.methods:
        accuracies, queries = {shots: [] for shots in args.shots}, queries.double()
        for (shots, _), indices in draws.items():
            x = rows[torch.searchsorted(used, indices)].double()
            score = least_squares(x, labels[indices], len(classes), args.l2)
            correct = score(queries).argmax(dim=1) == wanted
            accuracies[shots].append(correct.double().mean().item())
        result["fewshot"] = {"l2": args.l2, "accuracy": accuracies}
        table += [row("fewshot", f"{n} of each class", *each) for n, each in accuracies.items()]
    print(f"{args.checkpoint} on {data.source}: {part} accuracy over {len(test)} images")
    print(f"pixels: {metadata.pixels.describe(model.img_size)}; features: {kind}")
    print("\n".join(table))
    if args.output:
        write_results(args.output, result)


# fmt: off
def build_parser() -> Parser:
    parser = Parser(prog="probe.py", description=__doc__, fromfile_prefix_chars="@")
    add_checkpoint_flags(parser)
    add_data_flags(parser)
    add_loader_flags(parser)
    flag = parser.add_argument_group("features").add_argument
    flag("--methods", choices=METHODS, nargs="+", default=METHODS, help="what classifies them")
    flag("--features", choices=KINDS,
         help="class token, mean of the patches, both, or class tokens of the last four blocks "
         "(default: what the model's head reads)")
    flag("--cache_dir", default="output/features", metavar="DIR",
         help="where features are kept for further runs; none: nowhere")
    flag("--output", metavar="FILE", help="also write every figure there, as JSON")
    flag = parser.add_argument_group("knn").add_argument
    flag("--k", type=positive_int, nargs="+", default=[5, 10, 20], help="neighbours that vote")
    flag = parser.add_argument_group("linear").add_argument
    flag("--rates", type=non_negative_float, nargs="+", default=RATES, metavar="LR", help="first "
         "lr of the heads")
    flag("--l2_grid", type=non_negative_float, nargs="+", default=(0, 1e-3, 1e-2, 0.1),
         metavar="L2", help="weight decay of the heads; each goes with each of --rates")
    flag("--num_steps", type=positive_int, default=2000, help="steps of 256 images")
    flag = parser.add_argument_group("fewshot").add_argument
    flag("--shots", type=positive_int, nargs="+", default=[1, 5, 10], help="images of each class")
    flag("--seeds", type=positive_int, default=5, help="draws of each number of shots")
    flag("--l2", type=non_negative_float, default=1024.0,
         help="strength of the regularisation, above 0")
    return parser
# fmt: on


def row(method: str, setting: str, *values: float) -> str:
    """A line of the table: the mean, and of several draws their deviation."""
    several = torch.tensor(values, dtype=torch.float64)
    deviation = f"     {several.std(correction=0):.4f}" if len(values) > 1 else ""
    return f"{method:8} {setting:24} {several.mean():.4f}{deviation}"


@dataclass
class Features:
    """The features of image sets, computed once and kept in `folder`, if there is one."""

    model: VisionTransformer
    kind: str  # of KINDS
    folder: Path | None
    data_dir: str
    loading: dict  # as in EvalStream

    @torch.no_grad()
    def of(self, images: ImageSet, part: str) -> Tensor:
        """(n, D) float32 on the CPU. `part` is the name of the split."""
        path = self.folder and self.folder / f"{part}_{self.kind}_{self.key(images)}.npz"
        if path and path.is_file():
            try:
                found = torch.from_numpy(read_npz(path)["features"])
                if len(found) != len(images):
                    raise KeyError
                print(f"features: read from {path}")
                return found
            except (UserError, KeyError):
                print(f"note: {path} is damaged: its features are computed again", file=sys.stderr)
        device = self.model.head.weight.device
        stream = EvalStream(images, self.model.img_size, device=device, **self.loading)
        bar = tqdm(stream, desc=part, disable=None)
        found = torch.cat([embed(self.model, batch, self.kind).cpu() for batch, _ in bar])
        if path:
            try:
                with atomic_write(path) as temporary:
                    np.savez(temporary, features=found.numpy())
            except RunError as error:  # a full disk, or another run that writes the same file
                print(f"note: the features are not kept ({error})", file=sys.stderr)
        return found

    def key(self, images: ImageSet) -> str:
        """A hash of all that the features depend on: the model, the images, how they are read.

        Files are not read: they count by name, size and time. The items of a library's data set
        count by name and by the folder of the data.
        """
        model, digest = self.model, hashlib.sha256()
        device = model.head.weight.device.type
        about = model.config, model.img_size, device, asdict(images.decoding)
        tensors = list(model.state_dict().values())
        if images.pixels is not None:
            tensors.append(images.pixels)
        digest.update(repr((about, [tensor.shape for tensor in tensors])).encode())
        for tensor in tensors:
            digest.update(np.ascontiguousarray(tensor.cpu()))
        for path in images.paths or ():
            facts = [os.path.abspath(self.data_dir), str(path)]
            if isinstance(path, Path):
                facts += [path.stat().st_size, path.stat().st_mtime_ns]
            digest.update(repr(facts).encode())
        return digest.hexdigest()[:16]


def embed(model: VisionTransformer, images: Tensor, kind: str) -> Tensor:
    """Features of the `kind`, (B, D), 2 D numbers for token+mean and 4 D for last4, as DINOv2's.

    All are read after the encoder's last LayerNorm. A model of fewer than four blocks has fewer.
    """
    if kind == model.config.pooling:
        return model.features(images)
    if kind == "last4":
        x, encoder, tokens = model.transformer.embeddings(images), model.transformer.encoder, []
        for block in encoder.layer:
            x = block(x)  # (B, N, D)
            tokens.append(encoder.encoder_norm(x[:, 0]))
        return torch.cat(tokens[-4:], dim=1)
    x = model.transformer(images, 1 if kind == "token" else None)  # (B, N, D), or (B, 1, D)
    token, mean = x[:, 0], x[:, model.config.num_prefix :].mean(dim=1)
    return {"token": token, "mean": mean}.get(kind, torch.cat([token, mean], dim=1))


def choose_head(
    args, data: Data, rows: Tensor, labels: Tensor, features: Features
) -> tuple[Callable[[Tensor], Tensor], dict]:
    """(logits of a head on all training images, how it was chosen), from features (n, D).

    Its lr and L2 are those of the grid with the best validation accuracy; of equal ones, the
    lowest loss. The test images have no part in it. Raises UserError for a class of one image.
    """
    if data.test is None:
        if labels.bincount().min() < 2:
            raise UserError("linear holds out images of each class, and one has a single image")
        indices = split(labels.cpu(), HELD_OUT, 0, data.classes)
        fit, val = ((rows[some], labels[some]) for some in indices)
    else:
        images = data.val.readable()
        val = features.of(images, data.val_split).to(rows.device), images.labels.to(rows.device)
        fit = rows, labels
    grid = list(product(args.rates, args.l2_grid))
    count, steps = len(data.classes), args.num_steps
    accuracies, losses = validate(linear_heads(*fit, count, grid, steps), *val)
    best = max(range(len(grid)), key=lambda i: (accuracies[i], -losses[i]))
    lr, l2 = grid[best]
    print(f"linear: of {len(val[1])} validation images {accuracies[best]:.4f} with", end=" ")
    print(f"lr {lr:g} and L2 {l2:g}, the best of {len(grid)} pairs")
    for flag, value, values in (("rates", lr, args.rates), ("l2_grid", l2, args.l2_grid)):
        if value and len(values) > 1 and value in (min(values), max(values)):
            print(f"note: {value:g} is at the edge of --{flag}: more of them may be better")
    figures = zip(grid, accuracies, losses, strict=True)
    validation = [{"lr": a, "l2": b, "accuracy": c, "loss": d} for (a, b), c, d in figures]
    score = linear_heads(rows, labels, count, [grid[best]], steps)
    return score, {"lr": lr, "l2": l2, "validation": validation}


if __name__ == "__main__":
    sys.exit(run_script("probe.py", main))
