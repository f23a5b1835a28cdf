"""Evaluate a checkpoint: accuracy and every other figure, and a report to look at."""

import csv
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from data_flags import (
    add_data_flags,
    add_loader_flags,
    data_options,
    decoding_options,
    loading,
    model_options,
)
from data_utils import EvaluationData, check_source, load_evaluation
from flags import add_checkpoint_flags, add_launch_flags, add_precision_flags, check_name
from models.configs import config_name, describe
from models.errors import UserError
from models.modeling import VisionTransformer
from models.zoo import resolve_checkpoint
from utils import dist_util, figures
from utils.checkpoint import RunPaths
from utils.classifier import Classifier
from utils.cli import Parser, non_negative_int, run_script
from utils.hardware import keep_freed_memory
from utils.image_set import ImageSet
from utils.metrics import (
    BINS,
    Predictions,
    compute_metrics,
    confusion_counts,
    misclassified,
    predict_dataset,
    read_results,
    write_results,
)
from utils.precision import Precision, build_precision
from utils.run_log import RunLog
from utils.stream import EvalStream, Shard

PICTURED = 20  # misclassified images in the picture


def build_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_checkpoint_flags(parser, labels=True)
    add_data_flags(parser)
    add_loader_flags(parser)
    add_precision_flags(parser)
    flag = parser.add_argument_group("run").add_argument
    flag("--name", help="name of the results (default: that of the checkpoint file)")
    flag("--output_dir", default="output", metavar="DIR", help="folder of the results")
    flag("--seed", type=non_negative_int, default=42, help="of the training, for --val_fraction")
    add_launch_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    name = args.name or re.sub(
        r"\.(bin|npz|safetensors|pt|pth|ckpt|pth\.tar)$", "", Path(args.checkpoint).name
    )
    check_name(name)
    paths = RunPaths(args.output_dir, name)
    check_not_training(paths)
    check_source(args.dataset, Path(args.data_dir), args.val_fraction, training=False)
    device = dist_util.init(args.local_rank, args.timeout, args.device)
    keep_freed_memory(device)
    log = RunLog(dist_util.is_main())
    source = resolve_checkpoint(args.checkpoint, args.model_type, head=True, offline=args.offline)
    options = {"labels": args.labels, "device": device, "decoding": decoding_options(args)}
    trained = Classifier.open(source, **options, **model_options(args))
    model = trained.model
    options = {"decoding": trained.decoding, **data_options(args, log)}
    names = {"classes": trained.classes, "named": trained.named}
    data = dist_util.from_main(lambda: load_evaluation(args.dataset, **names, **options))
    height, width = model.img_size
    log.print(f"model: {args.checkpoint}, {describe(model.config)}, {height}x{width} pixels")
    if "; " in (weights := trained.metadata.notes[0]):  # not all of it was plain
        log.print(f"weights: {weights}")
    log.print(f"pixels: {trained.decoding.pixels.describe(model.img_size)}")
    log.print(f"data: {data.source}, {len(data.images)} {data.split} images")
    levels = (args.fp16, args.bf16, args.fp16_opt_level)
    precision = build_precision(model, device, *levels, log=log.print)
    predictions, metrics = evaluate_model(model, data, precision, log, **loading(args, device))

    def write() -> None:
        paths.results.parent.mkdir(parents=True, exist_ok=True)
        header = results_header(name, args.checkpoint, model, data)
        write_results(paths.results, header | metrics)
        files = write_report(paths.report, predictions, metrics, data.images, data.classes)
        print(class_table(metrics["classes"]))
        line = (
            "{split} accuracy {accuracy:.4f}, balanced {balanced_accuracy:.4f}, top-5 "
            "{top5_accuracy:.4f}, loss {loss:.4f}, calibration error {calibration_error:.4f} "
            "over {images} images"
        )
        print(line.format(**header | metrics))
        print(f"results: {paths.results}; report: {', '.join(map(str, files))}")

    dist_util.from_main(write)


def check_not_training(paths: RunPaths) -> None:
    """Raise UserError if the results of a training have this name: they are kept."""
    if "training" in read_results(paths.results):
        raise UserError(f"{paths.results} holds the results of a training: give another --name")


def evaluate_model(
    model: VisionTransformer,
    data: EvaluationData,
    precision: Precision,
    log: RunLog,
    batch_size: int,
    num_workers: int,
) -> tuple[Predictions, dict]:
    """(predictions, metrics) of every image once, on all processes together."""
    stream = EvalStream(
        data.images,
        model.img_size,
        batch_size=batch_size,
        shard=Shard(dist_util.rank(), dist_util.world_size()),
        device=model.head.weight.device,
        num_workers=num_workers,
    )
    keep = len(data.classes) if len(data.classes) <= figures.MAX_CLASSES else 0
    predictions = predict_dataset(model, stream, precision, log.evaluation_bar, keep)
    return predictions, compute_metrics(predictions, data.classes)


def results_header(
    name: str, checkpoint: str | Path, model: VisionTransformer, data: EvaluationData
) -> dict:
    """What the figures of a results file are about."""
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "variant": config_name(model.config),
        "img_size": list(model.img_size),
        "pixels": data.images.decoding.pixels.describe(model.img_size),
        "data": data.source,
        "split": data.split,
        "images": len(data.images),
        "checksum": data.images.checksum,
    }


def class_table(rows: Sequence[Mapping], most: int = 30) -> str:
    """The figures of each class as text; of many classes, of those with the lowest F1."""
    rows, lines = [row for row in rows if row["images"]], []
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: row["f1"])[:most]
        lines.append(f"the {most} classes with the lowest F1:")
    width = max([5, *(len(row["name"]) for row in rows)])
    lines.append(f"{'class':{width}}  precision  recall      f1  images")
    line = f"{{name:{width}}}  {{precision:9.4f}}  {{recall:6.4f}}  {{f1:6.4f}}  {{images:6d}}"
    return "\n".join([*lines, *(line.format(**row) for row in rows)])


def write_report(
    folder: Path,
    predictions: Predictions,
    metrics: Mapping,
    images: ImageSet,
    classes: Sequence[str],
) -> list[Path]:
    """Write predictions, confusion matrix, misclassified images and reliability diagram.

    An older folder is replaced. More than `figures.MAX_CLASSES` classes get neither matrix nor
    predictions, which would be gigabytes. Returns the files.
    """
    pairs = zip(predictions.label.tolist(), predictions.prediction.tolist(), strict=True)
    names = [(images.name_of(i), classes[a], classes[b]) for i, (a, b) in enumerate(pairs)]
    header, wrong = ("image", "label", "prediction"), misclassified(predictions)
    confidences = predictions.confidence[wrong].tolist()
    rows = [(*names[i], f"{sure:.6f}") for i, sure in zip(wrong, confidences, strict=True)]
    tables = {"misclassified.csv": [(*header, "confidence"), *rows]}
    if predictions.probabilities is not None:
        texts = (map("{:.6g}".format, row.tolist()) for row in predictions.probabilities)
        rows = ((*name, *text) for name, text in zip(names, texts, strict=True))
        tables["predictions.csv"] = chain([(*header, *classes)], rows)
    width, error = 1 / BINS, metrics["calibration_error"]
    diagram = figures.reliability_diagram(metrics["calibration"], width, error)
    pictures = {"reliability.png": diagram}
    if wrong:
        shown, short = wrong[:PICTURED], figures.escape_label
        pairs = zip((names[i] for i in shown), confidences, strict=False)
        titles = [f"{short(b)} {sure:.2f}\nis {short(a)}" for (_, a, b), sure in pairs]
        thumbnails = [figures.thumbnail(images, i) for i in shown]
        pictures["misclassified.png"] = figures.grid(thumbnails, titles, columns=5)
    if len(classes) <= figures.MAX_CLASSES:
        counts = confusion_counts(predictions, len(classes))
        matrix = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
        tables["confusion.csv"] = [["label \\ prediction", *classes], *matrix]
        pictures["confusion.png"] = figures.confusion_matrix(counts, classes)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, table in tables.items():  # the name of an image file may be any bytes
        with (temporary / name).open("w", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
    for name, picture in pictures.items():
        picture.save(temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return sorted(folder / name for name in tables | pictures)


if __name__ == "__main__":
    sys.exit(run_script("evaluate.py", main))
