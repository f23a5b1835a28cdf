"""Predict the classes of images with a trained model."""

import csv
import glob
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_flags import (
    add_decoding_flags,
    add_loader_flags,
    decoding_options,
    loading,
    model_options,
)
from flags import add_checkpoint_flags
from models.errors import UserError
from models.pixels import PLAIN
from models.zoo import resolve_checkpoint
from utils.augment import normalize
from utils.classifier import Classifier, Prediction
from utils.cli import (
    Parser,
    check_output,
    positive_int,
    printable,
    run_script,
)
from utils.files import atomic_write
from utils.hardware import choose_device, keep_freed_memory
from utils.image_index import Index
from utils.images import depth_note, read_image, seen_part
from utils.sources import read_table, visible_files


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    paths = find_images(args.inputs)
    if args.features and (args.output or args.attention or args.labels):
        raise UserError("--features predicts no class: leave --output, --attention, --labels out")
    check_output(args.output or args.features, [args.checkpoint, args.labels, *paths])
    head = not args.features
    checkpoint = resolve_checkpoint(args.checkpoint, variant=args.model_type, head=head)
    options = {"labels": args.labels, "decoding": decoding_options(args), "head": head}
    options["device"] = choose_device(args.device)
    classifier = Classifier.open(checkpoint, **options, **model_options(args))
    keep_freed_memory(classifier.device)
    if "; " in (weights := classifier.metadata.notes[0]):  # not all of it was plain
        print(f"predict.py: weights: {weights}", file=sys.stderr)
    if (recipe := classifier.decoding.pixels) != PLAIN:
        line = f"pixels: {recipe.describe(classifier.model.img_size)}"
        print(f"predict.py: {line}", file=sys.stderr)
    if line := depth_note(paths, classifier.decoding):
        print(f"predict.py: note: {line}", file=sys.stderr)
    if args.attention:
        Path(args.attention).mkdir(parents=True, exist_ok=True)
    options = {"form": args.format, "attention": args.attention, "top_k": args.top_k}
    options |= loading(args, classifier.device)
    if args.features:
        failed = save_features(classifier, paths, args.features, **loading(args, classifier.device))
    elif args.output is None:
        failed = predict(classifier, paths, sys.stdout, **options)
    else:
        with atomic_write(args.output) as path, path.open("w", encoding="utf-8", newline="") as out:
            failed = predict(classifier, paths, out, **options)
    if failed:
        print(f"predict.py: {failed} of {len(paths)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> Parser:
    status = "0 all are predicted; 1 some files could not be read, and are named; 2 wrong use"
    parser = Parser(prog="predict.py", description=f"{__doc__} Exit status: {status}.")
    flag = parser.add_argument
    names = "images, folders, quoted globs, a .csv with the column path, or - for names on stdin"
    flag("inputs", nargs="+", metavar="IMAGE", help=names)
    flag("--top_k", type=count, default=5, help="number of classes for each image, or all")
    flag("--format", choices=list(WRITERS), default="table", help="format of the output")
    flag("--output", metavar="FILE", help="write to this file instead of stdout")
    seen = "also save here, for each image, a picture of where the model looks; keep this "
    flag("--attention", metavar="DIR", help=seen + "folder apart from the images to predict")
    instead = "predict nothing: write there what the head reads, features (n, D), and their names"
    flag("--features", metavar="FILE.npz", help=instead)
    add_checkpoint_flags(parser, labels=True)
    add_decoding_flags(add_loader_flags(parser))
    return parser


def count(text: str) -> int | None:
    """An argument type: a number of classes, or None for `all`."""
    return None if text == "all" else positive_int(text)


def find_images(inputs: Iterable[str]) -> list[str]:
    """The files that `inputs` name, in order; those of a folder and its sub-folders are sorted.

    Names on stdin are taken as they are. Raises UserError for a name that matches nothing.
    """
    paths = []
    for name in inputs:
        if name == "-":
            sys.stdin.reconfigure(errors="surrogateescape")  # a file name may be any bytes
            paths += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
            if any("\0" in path for path in paths):
                raise UserError("names on stdin are lines, without NUL: leave out -print0")
        elif os.path.isdir(name):
            paths += images_in(Path(name))
        elif name.lower().endswith((".csv", ".tsv")) and os.path.isfile(name):
            paths += [
                str(Path(name).parent / row["path"]) for row in read_table(Path(name), {"path"})
            ]
        elif os.path.isfile(name):
            paths.append(name)
        elif found := sorted(filter(os.path.isfile, glob.glob(name, recursive=True))):
            paths += found
        else:
            raise UserError(f"{name}: no such file or folder, and no glob that matches one")
    if not paths:
        raise UserError("the list on stdin is empty")
    return paths


def images_in(folder: Path) -> list[str]:
    """The images below `folder`; other files are counted on stderr. Raises UserError for none."""
    files, index = visible_files(folder), Index(folder)
    heads = zip(files, index.heads(files, f"check {folder}"), strict=True)
    found = [str(path) for path, head in heads if head is not None]
    if line := index.report():
        print(f"predict.py: note: {line}", file=sys.stderr)
    if not found:
        raise UserError(f"{folder} holds no images")
    return found


def predict(classifier: Classifier, paths: list[str], out, form, attention, **options) -> int:
    """Write the predictions to the text file `out`; returns how many files could not be read.

    `form` is a key of WRITERS, `attention` the folder of pictures or None; `options` are those of
    Classifier.predict.
    """
    failed, write = 0, WRITERS[form]
    if form == "csv":
        print("file,rank,class,probability", file=out)
    predictions = classifier.predict(paths, **options)
    # No bar between the lines of a terminal; None: and none if stderr is not a terminal.
    hidden = out.isatty() or None
    bar = tqdm(predictions, total=len(paths), desc="predict", unit="image", disable=hidden)
    for number, prediction in enumerate(bar, 1):
        if prediction.error:
            failed += 1
            bar.write(f"predict.py: {printable(prediction.error)}", file=sys.stderr)
            continue
        write(prediction, out)
        if attention:
            save_attention(classifier, prediction, Path(attention), number)
    return failed


def save_features(classifier: Classifier, paths: list[str], output: str, **loading) -> int:
    """Write `names` (n,) and `features` float32 (n, D) of the images that can be read.

    Returns how many could not. `loading` is as in Classifier.features.
    """
    names, rows = [], []
    features = classifier.features(paths, **loading)
    bar = tqdm(features, total=len(paths), desc="features", unit="image", disable=None)
    for name, found in bar:
        if isinstance(found, UserError):
            bar.write(f"predict.py: {printable(str(found))}", file=sys.stderr)
        else:
            names.append(printable(name))
            rows.append(found)
    shape = len(rows), classifier.model.config.hidden_size
    arrays = {"names": np.array(names, str), "features": np.array(rows, np.float32).reshape(shape)}
    with atomic_write(output) as path, path.open("wb") as file:  # np.savez would add a suffix
        np.savez(file, **arrays)
    return len(paths) - len(rows)


def save_attention(classifier: Classifier, prediction: Prediction, folder: Path, number: int):
    """Save the image and where the model looks; `number` keeps equal names of files apart."""
    from utils.figures import attention_sheet

    model, how = classifier.model, classifier.decoding
    images = normalize(prediction.input[None].to(classifier.device))  # (1, C, H, W)
    part = seen_part(read_image(prediction.path, how), model.img_size, how.pixels)
    # Bytes: file systems allow 255.
    name = f"{number:05d}_{printable(Path(prediction.path).stem)}".encode()[:200]
    with atomic_write(folder / f"{name.decode(errors='ignore')}.jpg") as temporary:
        attention_sheet(model, images, part).save(temporary, quality=90)


def write_table(prediction: Prediction, out) -> None:
    classes = "  ".join(f"{name} {probability:.4f}" for name, probability in prediction.top)
    print(f"{printable(prediction.path)}: {classes}", file=out)


def write_csv(prediction: Prediction, out) -> None:
    path = printable(prediction.path)
    rows = [(path, rank, name, f"{p:.6f}") for rank, (name, p) in enumerate(prediction.top, 1)]
    csv.writer(out, lineterminator="\n").writerows(rows)


def write_jsonl(prediction: Prediction, out) -> None:
    top = [{"class": name, "probability": round(p, 6)} for name, p in prediction.top]
    print(json.dumps({"file": prediction.path, "top": top}), file=out)


WRITERS = {"table": write_table, "csv": write_csv, "jsonl": write_jsonl}


if __name__ == "__main__":
    sys.exit(run_script("predict.py", main))
