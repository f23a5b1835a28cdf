"""Say what images show: the classes that a trained model finds likeliest in each of them."""

import csv
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from models.configs import CONFIGS
from models.download import DownloadError
from models.structure import WeightsError
from models.zoo import locate
from utils.allocator import keep_freed_memory
from utils.checkpoint import CheckpointError
from utils.classifier import Classifier, Prediction
from utils.cli import (
    LONGEST_NAME,
    FlagError,
    Parser,
    check_input,
    check_output,
    count,
    image_size,
    make_folder,
    positive,
)
from utils.files import written_whole
from utils.shell import printable, status_of
from utils.stream import DataError, image_files, read_image

USER_ERRORS = (FlagError, DownloadError, WeightsError, CheckpointError, DataError)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    paths = find_images(args.inputs)
    check_output("--output", args.output, [args.checkpoint, args.labels, *paths])
    if args.attention and any(within(args.attention, each) for each in args.inputs):
        raise FlagError(f"--attention {args.attention} lies in a folder of images: its pictures "
                        "would be the next ones to be predicted")  # fmt: skip
    check_input("--labels", args.labels)
    checkpoint = locate(args.checkpoint, variant=args.model_type, head=True)
    classifier = Classifier.open(checkpoint, img_size=args.img_size, labels=args.labels,
                                 variant=args.model_type)  # fmt: skip
    keep_freed_memory(classifier.device)
    if args.attention:
        make_folder("--attention", args.attention)
    if args.output is None:
        failed = predict(args, classifier, paths, sys.stdout)
    else:
        with (
            written_whole(args.output) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            failed = predict(args, classifier, paths, file)
    if failed:
        print(f"predict.py: {failed} of {len(paths)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> Parser:
    parser = Parser(
        prog="predict.py",
        description="Predict the classes of images. Exit status: 0 all predicted; 1 some files "
        "could not be read (each is named on stderr, the others are predicted); 2 wrong use.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="images, folders, quoted globs, or - to read file names from stdin, one a line",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="a .bin of train.py, or an .npz or .safetensors with its own head; "
        "image size, classes and variant come from it",
    )
    parser.add_argument("--top_k", type=positive, default=5, help="classes named for each image")
    parser.add_argument("--format", choices=list(WRITERS), default="table", help="what is written")
    parser.add_argument("--output", metavar="FILE", help="write there; to stdout if not given")
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line")
    parser.add_argument(
        "--attention",
        metavar="DIR",
        help="also write each image there with what the model looked at",
    )
    parser.add_argument("--img_size", type=image_size, help="another resolution than the file's")
    parser.add_argument(
        "--model_type",
        choices=list(CONFIGS),
        metavar="NAME",
        help="variant that the file must be; it also says the heads of a .safetensors without "
        "config.json",
    )
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time")
    parser.add_argument("--num_workers", type=count, default=4, help="processes that decode images")
    return parser  # fmt: skip


def within(path: str, folder: str) -> bool:
    return os.path.isdir(folder) and Path(path).resolve().is_relative_to(Path(folder).resolve())


def find_images(inputs: Iterable[str]) -> list[str]:
    """The files that `inputs` name, in their order; a folder's are sorted, with its sub-folders',
    without hidden ones.

    Names on stdin are taken as they are. Raises FlagError for a name that leads nowhere.
    """
    paths = []
    for name in inputs:
        if name == "-":
            sys.stdin.reconfigure(errors="surrogateescape")  # names may be any bytes
            paths += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        elif os.path.isdir(name):
            found = [str(path) for path in image_files(Path(name))]
            if not found:
                raise FlagError(f"{name} holds no images")
            paths += found
        elif os.path.exists(name):
            paths.append(name)
        elif found := sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p)):
            paths += found
        else:
            raise FlagError(f"{name}: no such file or folder, and no glob that matches one")
    if not paths:
        raise FlagError("the list on stdin is empty")
    return paths


def predict(args, classifier: Classifier, paths: list[str], out) -> int:
    """Write a prediction for every readable file; the others are named on stderr. Their number."""
    failed, drawn = 0, set()
    writer = WRITERS[args.format](out)
    workers = min(args.num_workers, os.cpu_count() or 1, len(paths) // 16)
    found = classifier.predict(paths, top_k=args.top_k, batch=args.batch_size, workers=workers)
    # No bar between lines: `None` is for where stderr is no terminal.
    bar = tqdm(found, total=len(paths), desc="predict", unit="image",
               disable=out.isatty() or None)  # fmt: skip
    for prediction in bar:
        if prediction.error:
            failed += 1
            bar.write(f"predict.py: {printable(prediction.error)}", file=sys.stderr)
            continue
        writer(prediction)
        if args.attention:
            name = picture_name(prediction.path, drawn)
            drawn.add(name)
            write_attention(classifier, prediction, Path(args.attention) / name)
    return failed


def table_writer(out):
    def write(prediction: Prediction) -> None:
        classes = "  ".join(f"{name} {share:.4f}" for name, share in prediction.top)
        print(f"{printable(prediction.path)}: {classes}", file=out)

    return write


def csv_writer(out):
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["file", "rank", "class", "probability"])

    def write(prediction: Prediction) -> None:
        for rank, (name, share) in enumerate(prediction.top, 1):
            rows.writerow([printable(prediction.path), rank, name, f"{share:.6f}"])

    return write


def jsonl_writer(out):
    def write(prediction: Prediction) -> None:
        top = [{"class": name, "probability": round(share, 6)} for name, share in prediction.top]
        print(json.dumps({"file": prediction.path, "top": top}), file=out)

    return write


WRITERS = {"table": table_writer, "csv": csv_writer, "jsonl": jsonl_writer}


def picture_name(path: str, taken: set[str]) -> str:
    """A file name made of `path`, which is none of those `taken`, and not too long."""
    parts = [part for part in Path(path).parts if part not in ("/", "..", ".")]
    name = printable("_".join(parts))
    if f"{name}.png" in taken or len(name.encode()) > LONGEST_NAME:
        short = name.encode()[:LONGEST_NAME].decode(errors="ignore")
        name = f"{short}.{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    return f"{name}.png"


def write_attention(classifier: Classifier, prediction: Prediction, target: Path) -> None:
    """The image with its attention rollout over it."""
    from utils.attention import overlay, rollout

    image = read_image(prediction.path)
    heat = rollout(classifier.model, classifier.pixels(prediction.path))[0]  # (h, w)
    with written_whole(target) as temporary:
        overlay(image, heat).save(temporary)


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell."""
    return status_of("predict.py", main, argv, USER_ERRORS)


if __name__ == "__main__":
    sys.exit(run())
