"""The flags of images that the commands share, and what they become."""

import argparse
from collections.abc import Callable, Mapping
from math import nextafter

import torch
from PIL.ImageColor import getrgb

from data_utils import NAMES
from models.configs import both_sides
from models.errors import UserError
from models.pixels import GOOGLE, INTERPOLATIONS, PLAIN, Pixels
from models.state_dict import Checkpoint
from utils.cli import Parser, fraction, number, positive_int, resize_mode, worker_count
from utils.hardware import DEVICES, EVAL_BATCH_SIZE
from utils.images import MAX_PIXELS, Decoding
from utils.run_log import RunLog

WORKERS = {"type": worker_count, "default": "auto", "metavar": "COUNT"}
WORKERS |= {"help": "processes that decode images; auto: the cores over the processes, up to 16"}
EVAL_BATCH = {"type": positive_int, "metavar": "COUNT"}
EVAL_BATCH |= {"help": "images of one batch in an evaluation (default: 64; 512 on a CUDA GPU)"}
DEVICE = {"choices": DEVICES, "default": "auto"}
DEVICE |= {"help": "auto: a CUDA GPU, if there is one; mps: an Apple GPU, not tested yet"}


# fmt: off
def add_data_flags(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    flag = group.add_argument
    flag("--dataset", type=dataset, default="cifar10", metavar="NAME",
         help=f"{', '.join(NAMES)}, or hf:NAME[:CONFIG] of Hugging Face. folder: your own "
         "images; csv: a table with the columns path,label[,split]")
    flag("--data_dir", default="data", metavar="DIR",
         help="where data lies or is downloaded to; of `csv` the table; for CIFAR also the archive")
    flag("--val_fraction", type=fraction, default=0.0,
         help="fraction of every class held out as the validation set, which selects the weights")
    flag("--skip_unreadable", action="store_true",
         help="decode every image file once at the start, and leave out the broken ones")
    flag("--offline", action="store_true", help="download nothing, neither weights nor data")
    add_decoding_flags(flag)
    return group


def add_pixel_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("pixels (default: those of the checkpoint)").add_argument
    flag("--interpolation", choices=INTERPOLATIONS, help="interpolation of a resize")
    flag("--resize", type=resize_mode, metavar="{squash,smaller_side,PIXELS}",
         help="squash: both sides to the model's; smaller_side: keep the shape, then crop; or the "
         "smaller side in PIXELS")
    flag("--crop_fraction", type=number(float, 0.1, nextafter(1, 2), "a fraction, from 0.1 to 1"),
         metavar="FRACTION", help="side of the central crop / side of the resized image")


def add_decoding_flags(flag) -> None:
    flag("--truncated_images", action="store_true",
         help="take what can be decoded of files that are cut short")
    flag("--max_pixels", type=positive_int, default=MAX_PIXELS, metavar="COUNT",
         help="largest image that is decoded, in pixels")
    flag("--exact_decode", action="store_true",
         help="decode all pixels of a JPEG with more than four times the sides of --img_size")


def add_loader_flags(parser: Parser) -> Callable:
    flag = parser.add_argument_group("loading").add_argument
    flag("--batch_size", type=positive_int, metavar="COUNT",
         help="images at a time (default: 64; 512 on a CUDA GPU)")
    flag("--num_workers", **WORKERS)
    flag("--device", **DEVICE)
    return flag
# fmt: on


def loading(args: argparse.Namespace, device: torch.device) -> dict:
    """Images at a time and workers, from `add_loader_flags`."""
    batch_size = args.batch_size or EVAL_BATCH_SIZE[device.type]
    return {"batch_size": batch_size, "num_workers": args.num_workers}


def data_options(args: argparse.Namespace, log: RunLog) -> dict:
    """What `load_data` and `load_evaluation` take from `add_data_flags`, --seed and the log."""
    names = ("data_dir", "val_fraction", "seed", "skip_unreadable", "offline")
    return {name: getattr(args, name) for name in names} | {"progress": log.main, "log": log.print}


def decoding_options(args: argparse.Namespace) -> dict:
    """The fields of Decoding from `add_decoding_flags`."""
    names = {"truncated": "truncated_images", "max_pixels": "max_pixels", "exact": "exact_decode"}
    return {field: getattr(args, name) for field, name in names.items()}


def pixel_options(args: argparse.Namespace) -> dict:
    """The arguments of Pixels.changed from `add_pixel_flags`: those that are given."""
    names = ("interpolation", "resize", "crop_fraction")
    return {name: x for name in names if (x := getattr(args, name)) is not None}


def model_options(args: argparse.Namespace) -> dict:
    """The arguments of `open_model` from `flags.add_checkpoint_flags`."""
    pixels = pixel_options(args)
    return {"img_size": args.img_size, "variant": args.model_type, "pixels": pixels}


def train_pixels(
    args: argparse.Namespace, saved: Mapping | None, weights: Checkpoint | None
) -> Pixels:
    """The recipe of a training: of the run `saved`, or of the `weights` it starts from."""
    if saved is not None:
        return Pixels.stored(saved.get("pixels", {}))
    start = weights.metadata.pixels if weights else PLAIN
    if start == GOOGLE:  # the model adapts to the pixels, and antialiased ones show more
        start = PLAIN
    pixels = start.changed(both_sides(args.img_size), **pixel_options(args))
    whole = (pixels.resize, pixels.crop_fraction) == ("squash", 1)
    if args.augmentation == "resize_crop" and whole:
        raise UserError("--augmentation resize_crop crops nothing: give --resize, such as 448")
    return pixels


def train_data_options(
    args: argparse.Namespace, log: RunLog, saved: Mapping | None, weights: Checkpoint | None
) -> dict:
    """The fields of data_utils.Options for a training; `saved` is a run that is resumed."""
    depth = None if args.bit_depth == "auto" else int(args.bit_depth)
    background = None if args.background == "none" else getrgb(args.background)[:3]
    pixels = train_pixels(args, saved, weights)
    log.print(f"pixels: {pixels.describe(both_sides(args.img_size))}")
    how = decoding_options(args) | {"pixels": pixels}
    decoding = Decoding(args.in_channels, depth, background, **how)
    unreadable = (saved or {}).get("unreadable", {})
    return data_options(args, log) | {"decoding": decoding, "unreadable": unreadable}


def dataset(text: str) -> str:
    if text not in NAMES and not text.startswith("hf:"):
        names = f"{', '.join(NAMES)} and hf:NAME"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {names}")
    return text


def bit_depth(text: str) -> str:
    if text not in ("auto", "0", *map(str, range(8, 33))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither `auto`, nor 0, nor 8 to 32")
    return text


def colour(text: str) -> str:
    try:
        if text != "none":
            getrgb(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour: white or #ffffff, say") from error
    return text
