"""What weights are worth: accuracy and loss on the way, every figure at the end or on request."""

import json
from functools import partial
from pathlib import Path

import torch

from building import build_precision
from data_utils import check_source, load_evaluation
from models.zoo import locate
from run_files import report_path, results_path
from utils import dist_util
from utils.allocator import keep_freed_memory
from utils.classifier import Classifier
from utils.cli import FlagError
from utils.files import same_file
from utils.precision import Precision
from utils.report import Outcome, measure, summary, table, write_report, write_results
from utils.run_log import RunLog
from utils.stream import EvalStream, ImageSet, Slice


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def evaluate(model, batches: EvalStream, precision: Precision, log: RunLog) -> Outcome:
    """What `model` makes of all images, each counted once, on all processes together."""

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return at_least_float32(model(images.to(precision.model_dtype)))

    training = model.training
    model.eval()
    outcome = measure(logits_of, batches, bar=partial(log.bar, desc="evaluate", leave=False))
    model.train(training)
    return outcome


def results_head(args, checkpoint, variant: str, model, data: str, split: str, images) -> dict:
    """What the figures of results.json are about."""
    return {"name": args.name, "checkpoint": str(checkpoint), "variant": variant,
            "img_size": list(model.img_size), "data": data, "split": split,
            "images": len(images), "checksum": images.checksum}  # fmt: skip


def outcome_on(args, model, images: ImageSet, precision: Precision, device, log: RunLog) -> Outcome:
    """What `model` makes of every one of `images`, on all processes together."""
    part = Slice(dist_util.rank(), dist_util.world())
    batches = EvalStream(images, model.img_size, batch=args.eval_batch_size, part=part,
                         device=device, workers=args.num_workers)  # fmt: skip
    return evaluate(model, batches, precision, log)


def of_training(args, head: dict) -> dict:
    """What an earlier results.json says of the training of the weights that are evaluated.

    Raises FlagError where its figures are of other images, or another size, than `head`'s: those
    that the training was stated for are not to be lost.
    """
    path = results_path(args)
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if not same_file(earlier["checkpoint"], args.eval_only):
            return {}
        training = {"training": earlier["training"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    same = all(earlier.get(key) == head[key] for key in ("img_size", "split", "checksum"))
    if not same and not args.overwrite:
        raise FlagError(f"{path} states the result of this training on {earlier.get('images')} "
                        "other images, or at another size (were --seed, --val_fraction and "
                        "--img_size given as in training?): --name OTHER --eval_only "
                        f"{args.eval_only} keeps it, --overwrite replaces it")  # fmt: skip
    return training


def evaluate_only(args) -> None:
    """`--eval_only`: a trained model's figures and report, without an update."""
    device = dist_util.start(args.local_rank, args.timeout)
    keep_freed_memory(device)
    log = RunLog(dist_util.rank() == 0)
    check_source(args.dataset, Path(args.data_dir), args.val_fraction, training=False)
    file = dist_util.main_first(
        lambda: locate(args.eval_only, variant=args.model_type, head=True, offline=args.offline)
    )
    trained = Classifier.open(file, img_size=args.img_size, variant=args.model_type,
                              device=device)  # fmt: skip
    model = trained.model
    images, called, source, classes = dist_util.main_first(
        lambda: load_evaluation(
            args.dataset,
            args.data_dir,
            trained.classes,
            by_name=trained.own_names,
            val_fraction=args.val_fraction,
            seed=args.seed,
            channels=model.in_channels,
            skip_unreadable=args.skip_unreadable,
            offline=args.offline,
            progress=log.main,
            say=log.say,
        )
    )
    height, width = model.img_size
    log.say(f"model: {args.eval_only}, {trained.variant}, {height}x{width} pixels; data: {source}, "
            f"{len(images)} {called}")  # fmt: skip
    head = results_head(args, args.eval_only, trained.variant, model, source, called, images)
    training = of_training(args, head)
    precision = build_precision(args, model, device, log)
    outcome = outcome_on(args, model, images, precision, device, log)
    if dist_util.rank() == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        results = head | training | summary(outcome, classes)
        write_results(results_path(args), results)
        files = write_report(report_path(args), outcome, results, images, classes)
        log.say(table(results))
        log.say(f"{called} accuracy {results['accuracy']:.4f}, top-5 "
                f"{results['top5_accuracy']:.4f}, loss {results['loss']:.4f}, calibration error "
                f"{results['calibration_error']:.4f} over {len(images)} images")  # fmt: skip
        log.say(f"figures: {results_path(args)}; {', '.join(str(path) for path in files)}")
    dist_util.barrier()
