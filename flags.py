"""The command line: every flag, by group, and what makes a combination wrong."""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from data_utils import DATASETS
from models.configs import CONFIGS, ViTConfig
from models.zoo import variant_of
from run_files import check_no_results, check_other_results
from utils import compiling
from utils.cli import (
    LONGEST_NAME,
    FlagError,
    Parser,
    count,
    image_size,
    number,
    part,
    positive,
)
from utils.precision import LEVELS
from utils.scheduler import DECAYS
from utils.stream import AUGMENTATIONS, PIL_MODES

DEFAULT_MODEL = "ViT-B_16"  # where neither a flag nor a file says which variant it is


def build_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Fine-tune one of Google's Vision Transformers on CIFAR or on your own images.",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--name", required=True, help="name of the run, of its files and of its logs")
    run.add_argument("--output_dir", default="output", help="folder of checkpoints")
    run.add_argument("--seed", type=count, default=42, help="seed of every random number")
    run.add_argument(
        "--eval_every",
        type=positive,
        default=100,
        help="updates between evaluations; there is always one at the end",
    )
    run.add_argument(
        "--compile",
        choices=compiling.CHOICES,
        default="auto",
        help="torch.compile of the training step: auto is on for runs of at least "
        f"{compiling.FEWEST_UPDATES} updates on a GPU, which regain the minute it takes, and off "
        "on a CPU, where it loses",
    )
    run.add_argument(
        "--log_every",
        type=positive,
        default=10,
        help="updates between points of the TensorBoard curves",
    )

    run.add_argument(
        "--eval_only",
        nargs="?",
        const="",
        metavar="FILE",
        help="train nothing: evaluate the model of FILE with its own head, at its own size unless "
        "--img_size says another, and write a report; without FILE that of --pretrained_dir, or if "
        "that is not given either, the best weights of --name",
    )
    run.add_argument(
        "--save_every",
        type=positive,
        default=500,
        help="updates between saves of the whole run; every evaluation saves it too",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from FILE, or from output/<name>_last.pt",
    )
    run.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run"
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="use only algorithms that give the same bits each time, slower on a GPU",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_type",
        choices=list(CONFIGS),
        default=None,
        metavar="NAME",
        help=f"variant, one of {', '.join(CONFIGS)} (default: the file's own, {DEFAULT_MODEL} from "
        "scratch)",
    )
    model.add_argument(
        "--pretrained_dir",
        default="checkpoint/ViT-B_16.npz",
        metavar="FILE",
        help="the .npz, .safetensors or .bin to start from: a path, an https:// address, or "
        "BUCKET/NAME of `python3 -m models.zoo`; a path named like one of Google's files is "
        "fetched to there if it does not exist; `none` trains from scratch",
    )
    model.add_argument(
        "--offline",
        action="store_true",
        help="fetch nothing, weights or data: what is missing is an error",
    )
    model.add_argument(
        "--freeze",
        choices=("none", "backbone"),
        default="none",
        help="`backbone` trains the head alone, a linear probe on features without dropout",
    )
    model.add_argument(
        "--img_size",
        type=image_size,
        default=224,
        help="resolution in pixels, a side or height x width like 192x256",
    )
    model.add_argument(
        "--in_channels",
        type=int,
        choices=list(PIL_MODES),
        default=3,
        help="channels of the images: 1 grey, 3 RGB, 4 RGBA",
    )
    model.add_argument(
        "--dropout_rate",
        type=part,
        default=None,
        help="dropout probability; the variant's own if not given",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=list(DATASETS),
        default="cifar10",
        help="data set; `folder` reads your own images from --data_dir",
    )
    data.add_argument(
        "--data_dir",
        default="data",
        metavar="DIR",
        help="where data lies or is downloaded to; for CIFAR also the archive itself",
    )
    data.add_argument(
        "--val_fraction",
        type=part,
        default=0.0,
        help="part of every class held out of training to select the best weights; "
        "the test images are then looked at once, at the end",
    )
    data.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        default="crop",
        help="training images: a random crop (the earlier port's recipe), crop+flip "
        "(the official one), or plainly resized",
    )
    data.add_argument(
        "--crop_min_area",
        type=part,
        default=0.05,
        help="smallest part of an image that a random crop keeps",
    )
    data.add_argument(
        "--mixup",
        type=number,
        default=0.0,
        help="mixup between neighbours: alpha of its Beta distribution, 0 for off",
    )
    data.add_argument(
        "--cutmix",
        type=number,
        default=0.0,
        help="CutMix between neighbours: alpha, 0 for off; with --mixup too, each pair takes one "
        "of the two at random",
    )
    data.add_argument(
        "--skip_unreadable",
        action="store_true",
        help="decode every image file once at the start, and leave out those that are broken",
    )
    data.add_argument(
        "--num_workers",
        type=count,
        default=4,
        help="processes that decode large images; small ones need none",
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--train_batch_size",
        type=positive,
        default=512,
        help="images of one update, over all processes and micro-batches",
    )
    optim.add_argument(
        "--eval_batch_size",
        type=positive,
        default=64,
        help="images of one evaluation batch of one process",
    )
    optim.add_argument(
        "--gradient_accumulation_steps",
        type=positive,
        default=1,
        help="micro-batches that an update is cut into, to save memory",
    )
    optim.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="keep the inputs of blocks only and compute the rest again, to save memory",
    )
    optim.add_argument(
        "--learning_rate", type=number, default=3e-2, help="highest rate, after the warm-up"
    )
    optim.add_argument(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="SGD with momentum 0.9, or AdamW, which suits training from scratch",
    )
    optim.add_argument(
        "--weight_decay",
        type=number,
        default=0.0,
        help="weight decay: of all parameters with SGD, decoupled and of matrices with AdamW",
    )
    optim.add_argument(
        "--label_smoothing",
        type=part,
        default=0.0,
        help="part of the target that is spread over all classes",
    )
    optim.add_argument("--num_steps", type=positive, default=10000, help="updates in all")
    optim.add_argument(
        "--decay_type",
        choices=DECAYS,
        default="cosine",
        help="how the rate falls after the warm-up",
    )
    optim.add_argument(
        "--warmup_steps", type=count, default=500, help="updates over which the rate rises from 0"
    )
    optim.add_argument(
        "--max_grad_norm",
        type=number,
        default=1.0,
        help="gradients are clipped to this global norm; 0 turns clipping off",
    )

    precision = parser.add_argument_group("mixed precision")
    precision.add_argument(
        "--fp16", action="store_true", help="float16 at --fp16_opt_level; bfloat16 on a CPU"
    )
    precision.add_argument("--bf16", action="store_true", help="bfloat16 at --fp16_opt_level")
    precision.add_argument(
        "--fp16_opt_level",
        choices=LEVELS,
        default="O2",
        help="O0 float32, O1 autocast, O2 half with float32 masters, O3 all half",
    )
    precision.add_argument(
        "--loss_scale",
        type=number,
        default=0.0,
        help="0: dynamic for float16, none for bfloat16; else this scale",
    )
    precision.add_argument(
        "--apex",
        action="store_true",
        help="use the fused SGD of NVIDIA's apex, which must be installed",
    )

    launch = parser.add_argument_group("several processes")
    launch.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="this process's number on its machine; torchrun's environment wins",
    )
    launch.add_argument(
        "--timeout",
        type=number,
        default=30.0,
        help="minutes that processes wait for each other before the run ends with an error",
    )
    return parser


def parse_flags(argv: list[str] | None, world: int) -> argparse.Namespace:
    """Parse and check everything that can be checked without reading weights or data.

    Raises FlagError with one sentence.
    """
    args = build_parser().parse_args(argv)
    if args.name in ("", ".", "..") or any(mark in args.name for mark in "/\\\0"):
        raise FlagError(f"--name {args.name!r} must be a plain file name, without / or \\")
    if len(os.fsencode(args.name)) > LONGEST_NAME:
        raise FlagError(f"--name is longer than {LONGEST_NAME} bytes: file systems want it shorter")
    if args.fp16 and args.bf16:
        raise FlagError("--fp16 and --bf16 exclude each other: choose one")
    parts = world * args.gradient_accumulation_steps
    training = args.eval_only is None
    if training and args.train_batch_size % parts:
        raise FlagError(
            f"--train_batch_size {args.train_batch_size} is global: it must be a multiple of "
            f"{parts} ({world} processes x {args.gradient_accumulation_steps} micro-batches)"
        )
    if training and (args.mixup or args.cutmix) and args.train_batch_size // parts % 2:
        raise FlagError(
            f"--mixup and --cutmix pair images: a micro-batch of {args.train_batch_size // parts} "
            "is odd, make it even"
        )
    if args.freeze == "backbone" and args.pretrained_dir == "none":
        raise FlagError("--freeze backbone needs weights to stand on: give --pretrained_dir a file")
    if args.freeze == "backbone" and args.dropout_rate:
        raise FlagError("--freeze backbone trains on features without dropout: leave "
                        "--dropout_rate out")  # fmt: skip
    if args.eval_only is not None:
        words = sys.argv[1:] if argv is None else argv
        given = {word.split("=")[0] for word in words}
        if not args.eval_only:
            best = Path(args.output_dir) / f"{args.name}_checkpoint.bin"
            args.eval_only = args.pretrained_dir if "--pretrained_dir" in given else str(best)
        check_other_results(args)
        if "--img_size" not in given:
            args.img_size = None  # the file's own
    elif args.model_type or args.pretrained_dir == "none":
        check_size(CONFIGS[args.model_type or DEFAULT_MODEL], args.img_size)
    elif variant := variant_of(args.pretrained_dir):
        check_size(CONFIGS[variant], args.img_size)
    if args.compile == "on" and not compiling.can_compile():
        raise FlagError("--compile on needs a C++ compiler (g++) and Python's headers, which are "
                        "not here: leave the flag out")  # fmt: skip
    if args.apex:
        if args.optimizer != "sgd":
            raise FlagError(f"--apex is for --optimizer sgd, not {args.optimizer}")
        if args.bf16 and args.fp16_opt_level == "O3":
            raise FlagError("--apex updates no bfloat16 parameters, which --bf16 at O3 has: leave "
                            "it out")  # fmt: skip
        _check_apex()
    if args.resume is not None and args.overwrite:
        raise FlagError("--resume and --overwrite exclude each other: go on, or start anew")
    _check_writable(Path(args.output_dir).absolute(), "--output_dir ")
    if args.eval_only is None:
        _check_writable(Path("logs").absolute(), "the folder of curves, ")
    if not args.overwrite and args.eval_only is None:
        check_no_results(args)
    return args


def check_size(config: ViTConfig, img_size: int | tuple[int, int]) -> None:
    """Raise FlagError unless the variant's patches tile such an image."""
    try:
        config.grid(img_size)
    except ValueError as error:
        raise FlagError(f"--img_size: {error}") from None


def _check_apex() -> None:
    """Raise FlagError unless NVIDIA's apex is here with its kernels: PyPI's is another package."""
    if importlib.util.find_spec("apex") is None:
        raise FlagError("--apex: NVIDIA's apex is not installed; leave the flag out, torch has a "
                        "fused SGD of its own")  # fmt: skip
    if importlib.util.find_spec("amp_C") is None:
        raise FlagError("--apex: the apex that is installed is not NVIDIA's, or was built without "
                        "its kernels: pip uninstall apex, and leave the flag out")  # fmt: skip


def _check_writable(folder: Path, what: str) -> None:
    """Raise FlagError unless files can be made in `folder`, or where it would be made; it is made
    later, so that a command that is refused leaves nothing behind."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise FlagError(f"{what}{folder} cannot be written to: {reason}") from None
