"""How much a frozen model knows: few-shot accuracy by least squares on its features."""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data_utils import DATASETS, check_source, load_data
from models.configs import CONFIGS
from models.download import DownloadError
from models.structure import WeightsError
from models.zoo import locate
from utils.allocator import keep_freed_memory
from utils.checkpoint import CheckpointError
from utils.classifier import open_model
from utils.cli import FlagError, Parser, check_output, count, image_size, number, part, positive
from utils.fewshot import draw_shots, features_of, least_squares
from utils.files import written_whole
from utils.shell import status_of
from utils.stream import DataError, EvalStream, Slice

USER_ERRORS = (FlagError, DownloadError, WeightsError, CheckpointError, DataError)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.l2 == 0:
        raise FlagError("--l2 0 leaves the equations without a single solution: use 1, say")
    check_output("--output", args.output, [args.checkpoint])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    check_source(args.dataset, Path(args.data_dir), args.val_fraction)
    checkpoint = locate(args.checkpoint, variant=args.model_type)
    model, _ = open_model(checkpoint, img_size=args.img_size, variant=args.model_type, head=False)
    model = model.to(device)
    data = load_data(args.dataset, args.data_dir, val_fraction=args.val_fraction, seed=0,
                     channels=model.in_channels, progress=True)  # fmt: skip
    test, called = data.final()
    draws = {(shots, seed): shots_of(data, shots, seed)
             for shots in args.shots for seed in range(args.seeds)}  # fmt: skip

    # Only images that some draw takes are looked at; `row` is their place among the features.
    used = torch.cat(list(draws.values())).unique()
    row = torch.zeros(len(data.train), dtype=torch.int64)
    row[used] = torch.arange(len(used))

    def features(images, what: str) -> torch.Tensor:
        batches = EvalStream(images, model.img_size, batch=args.eval_batch_size, part=Slice(),
                             device=device, workers=args.num_workers)  # fmt: skip
        return features_of(model, batches, bar=lambda b: tqdm(b, desc=what, disable=None))

    known, unknown = features(data.train.subset(used), "shots"), features(test, called)
    accuracies = {}
    for (shots, _), indices in draws.items():
        scores = least_squares(known[row[indices]], data.train.labels[indices],
                               len(data.classes), args.l2)(unknown)  # fmt: skip
        right = (scores.argmax(dim=1) == test.labels).double().mean().item()
        accuracies.setdefault(shots, []).append(right)
    print(f"{args.checkpoint} on {data.source}: {called} accuracy over {len(test)} images")
    print("shots    mean  deviation  seeds")
    for shots, values in accuracies.items():
        mean, deviation = torch.tensor(values).mean(), torch.tensor(values).std(correction=0)
        print(f"{shots:5d}  {mean:.4f}     {deviation:.4f}  {args.seeds:5d}")
    if args.output:
        facts = {"checkpoint": args.checkpoint, "data": data.source, "split": called, "l2": args.l2}
        with written_whole(args.output) as temporary:
            temporary.write_text(json.dumps(facts | {"accuracy": accuracies}, indent=1) + "\n")


def shots_of(data, shots: int, seed: int) -> torch.Tensor:
    try:
        return draw_shots(data.train.labels, shots, seed)
    except ValueError as error:
        raise DataError(f"--shots {shots}: {error}") from None


def build_parser() -> Parser:
    parser = Parser(
        prog="fewshot.py",
        description=__doc__,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="an .npz, .safetensors or .bin; its head is not used",
    )
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10", help="data set")
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="where data lies")
    parser.add_argument(
        "--val_fraction",
        type=part,
        default=0.0,
        help="fraction of every class that is never drawn from",
    )
    parser.add_argument(
        "--shots", type=positive, nargs="+", default=[1, 5, 10], help="images of each class"
    )
    parser.add_argument("--seeds", type=positive, default=5, help="draws of each number of shots")
    parser.add_argument(
        "--l2", type=number, default=1024.0, help="strength of the regularisation, above 0"
    )
    parser.add_argument("--img_size", type=image_size, help="another resolution than the file's")
    parser.add_argument(
        "--model_type", choices=list(CONFIGS), metavar="NAME",
        help="variant that the file must be; it also says the heads of a .safetensors without "
        "config.json",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="also write every accuracy there, as JSON")
    parser.add_argument("--eval_batch_size", type=positive, default=64, help="images at a time")
    parser.add_argument("--num_workers", type=count, default=4, help="processes that decode images")
    return parser


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell."""
    return status_of("fewshot.py", main, argv, USER_ERRORS)


if __name__ == "__main__":
    sys.exit(run())
