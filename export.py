"""Export a model: to Google's layout (.npz), to timm's (.safetensors), to ONNX (.onnx), or to a
folder that timm or Hugging Face opens by itself.

It is read back and its logits are compared before it takes its name.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_flags import model_options
from flags import add_checkpoint_flags
from models.checkpoints import open_model, write
from models.errors import RunError, UserError
from models.folders import (
    CARD,
    FILES,
    LAYOUTS,
    layout_limits,
    timm_arguments,
    usage_lines,
    write_folder,
)
from models.hub import CONFIGS, WEIGHTS, push, repository
from models.interop import exported_means
from models.labels import label_names
from models.modeling import VisionTransformer
from models.pixels import PLAIN
from models.state_dict import WHITE, Checkpoint, Metadata
from models.zoo import resolve_checkpoint
from utils.class_names import read_labels
from utils.cli import Parser, check_output, run_script
from utils.files import flush
from utils.images import Decoding, to_input
from utils.onnx_graph import OPSET, write_onnx

# Suffix -> how much the logits may differ, relative to the largest one or to 1.
LIMITS = {".npz": 1e-5, ".safetensors": 1e-5, ".onnx": 1e-4, "timm": 1e-5, "hf": 1e-5}
FLOAT16_LIMIT = 1e-2  # float16 rounds every weight by up to 1 in 2048
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# How much probabilities may differ: our fast resize is off by 1 of 255 here and there.
PIXELS_LIMIT = 1e-2


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    target, half, layout = Path(args.target), args.dtype == "float16", args.layout
    check_flags(args, target)
    own = [Path(args.checkpoint) / name for name in FILES]  # of a folder
    for path in [target / name for name in FILES if target.is_dir()] if layout else [target]:
        check_output(path, [args.checkpoint, args.labels, *own])
    source = resolve_checkpoint(args.checkpoint, variant=args.model_type, head=True)
    model, metadata = open_model(source, **model_options(args))
    if not model.head.weight.any():
        raise UserError(f"{source}: its head is all zeros: fine-tune it with train.py first")
    largest = max(parameter.abs().max().item() for parameter in model.parameters())
    if half and largest > torch.finfo(torch.float16).max:
        raise UserError(f"{source}: it holds {largest:.6g}, float16 ends at 65504: use float32")
    if args.with_pixels and model.in_channels not in (1, 3):
        raise UserError(f"--with_pixels reads 1 or 3 channels, not {model.in_channels}")
    count = model.num_classes
    classes = metadata.classes or label_names(count) or tuple(map(str, range(count)))
    if args.labels:
        classes = read_labels(args.labels, count)
    stored = replace(metadata, img_size=model.img_size, classes=classes)
    checkpoint = Checkpoint(model.state_dict(), model.config, stored)
    card_stays = bool(layout) and (target / CARD).exists()
    with staged_output(target, folder=bool(layout)) as path:
        if layout:
            write_folder(path, layout, checkpoint, getattr(torch, args.dtype), target.name)
        elif target.suffix == ".onnx":
            write_onnx(path, model, checkpoint, half, args.with_pixels)
        else:
            write(path, checkpoint, getattr(torch, args.dtype))
        if args.with_pixels:
            difference = max_probability_difference(path, model, Decoding.of(model, stored))
        else:
            difference = max_logit_difference(model, read_back(path, model, layout, checkpoint))
        limit = PIXELS_LIMIT if args.with_pixels else LIMITS[layout or target.suffix]
        what = "probabilities" if args.with_pixels else "logits"
        if not difference <= (limit := max(limit, half * FLOAT16_LIMIT)):
            why = f"read back, its {what} differ by {difference:.1e}, more than {limit:.0e}"
            raise RunError(f"{target} was not written: {why}")
    size = (target / WEIGHTS if layout else target).stat().st_size / 2**20
    kind = f", ONNX opset {OPSET}" if target.suffix == ".onnx" else ""
    print(f"{target} ({size:.1f} MiB{kind}): read back, its {what} differ by {difference:.1e}")
    if args.with_pixels:
        shape = f"height x width x {model.in_channels}"
        print(f"input: the image as {shape} uint8, of any size; output: {count} probabilities")
    else:
        print(f"input: {input_line(checkpoint, layout or target.suffix)}; output: {count} logits")
    for note in npz_limits(model, stored) if target.suffix == ".npz" else ():
        print(f"note: Google's format {note}")
    if card_stays:
        print(f"note: {target / CARD} was there, and stays as it is")
    for note in layout_limits(layout, checkpoint) if layout else ():
        print(f"note: {LAYOUTS[layout]}'s layout {note}")
    lines = usage_lines(layout, str(target)) if layout else usage(model, target, args.with_pixels)
    print("load it with:", *lines, sep="\n    ")
    if args.push:
        print(f"uploaded: {push(target, args.push, f'export of {source.name}')}")


def build_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__)
    add_checkpoint_flags(parser, labels=True)
    flag = parser.add_argument_group("export").add_argument
    flag(
        "target",
        metavar="TARGET",
        help="what to write: NAME.npz, NAME.safetensors or NAME.onnx; with --layout a folder",
    )
    flag(
        "--layout",
        choices=list(LAYOUTS),
        help="write a folder: timm, for create_model('local-dir:TARGET'); hf, for from_pretrained",
    )
    flag(
        "--with_pixels",
        action="store_true",
        help="an .onnx that reads a uint8 image of any size and returns probabilities",
    )
    flag(
        "--push",
        metavar="hf:ORG/NAME",
        help="upload the folder to the hub; a repository that is made for it is public",
    )
    types = ("float32", "float16")
    flag("--dtype", choices=types, default="float32", help="of the weights; float16 rounds them")
    return parser


def check_flags(args: argparse.Namespace, target: Path) -> None:
    """Raise UserError if the suffix names no format, one that cannot be written, or for flags."""
    if args.push and not (args.layout and args.push.startswith("hf:")):
        raise UserError("--push uploads the folder of a --layout to hf:ORG/NAME")
    if args.push and repository(args.push)[1]:
        raise UserError(f"--push {args.push}: it adds a revision: leave out @ and what follows")
    if args.with_pixels and (args.layout or target.suffix != ".onnx"):
        raise UserError("--with_pixels is for .onnx")
    if args.layout:
        return check_folder(target)
    if target.suffix not in LIMITS:
        formats = ".npz, .safetensors or .onnx; or --layout, which writes a folder"
        raise UserError(f"{target}: the suffix chooses the format: {formats}")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if target.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt")
    return None


def check_folder(target: Path) -> None:
    """Raise UserError if `target` cannot be the folder of a layout: others' files may be in it."""
    if target.suffix in LIMITS or target.is_file():
        raise UserError(f"{target}: --layout writes a folder: give its name")
    others = {path.name for path in target.iterdir()} - set(FILES) if target.is_dir() else ()
    if others:
        raise UserError(f"{target} holds {min(others)}: give a new folder")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")


@contextmanager
def staged_output(target: Path, folder: bool = False) -> Iterator[Path]:
    """A path with the target's name in a temporary folder beside it; that folder for a `folder`.

    When the block ends well, all files in that folder replace those beside the target, or those in
    it; a card that is there stays, and configs of another layout go. Raises RunError if the disk
    refuses.
    """
    target = Path(os.path.realpath(target))  # a link stays a link
    place = target if folder else target.parent
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export.") as staged:
            yield Path(staged) if folder else Path(staged) / target.name
            place.mkdir(exist_ok=True)
            written = set()
            # NAME.onnx.data comes before NAME.onnx, which refers to it.
            for file in sorted(Path(staged).iterdir(), reverse=True):
                if file.name != CARD or not (place / CARD).exists():
                    flush(file)
                    file.replace(place / file.name)
                written.add(file.name)
            for name in {*CONFIGS} - written if folder else ():  # of the other layout
                (place / name).unlink(missing_ok=True)
        flush(place)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RunError(f"{target} could not be written ({reason})") from error


def read_back(path: Path, model: VisionTransformer, layout=None, checkpoint=None) -> Callable:
    """The exported model as a function of images; of a layout, as its library reads it."""
    if layout:
        return read_folder(path, layout, *exported_means(checkpoint))
    if path.suffix == ".safetensors":
        return open_model(path)[0]
    if path.suffix == ".npz":  # it holds neither GELU, eps nor the form of the grid
        config, size, num_classes = model.config, model.img_size, model.num_classes
        other = VisionTransformer(config, size, num_classes, in_channels=model.in_channels)
        with np.load(path) as arrays:
            other.load_from(arrays, position_grid=model.grid)
        return other.eval()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def read_folder(folder: Path, layout: str, mean, std) -> Callable[[Tensor], Tensor]:
    """The model of a layout. Without transformers, our own reader stands in for it."""
    if layout == "timm":
        import timm

        other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    elif find_spec("transformers"):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        other = transformers.ViTForImageClassification.from_pretrained(folder).float().eval()
    else:
        return open_model(folder / WEIGHTS)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def logits(images: Tensor) -> Tensor:
        found = other(((images + 1) / 2 - mean) / std)
        return getattr(found, "logits", found)

    return logits


@torch.no_grad()
def max_logit_difference(model: VisionTransformer, other: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of logits on noise; `other` gets one image, then three."""
    shape, generator = (4, model.in_channels, *model.img_size), torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator) * 2 - 1
    logits, others = model(images), torch.cat([other(images[:1]), other(images[1:])])
    difference = (logits - others).abs().max()  # NaN if one of them is
    return (difference / logits.abs().max().clamp(min=1)).item()


@torch.no_grad()
def max_probability_difference(path: Path, model: VisionTransformer, how: Decoding) -> float:
    """The largest difference from what predict.py computes, for images of three sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator, differences = np.random.default_rng(0), []
    for y, x in ((1, 1), (20, 30), (70, 40)):
        squares = generator.integers(0, 256, (6, 7, model.in_channels), dtype=np.uint8)
        image = squares.repeat(y, axis=0).repeat(x, axis=1)
        wanted = model(to_input(image.squeeze(), model, how))[0].softmax(0)
        differences.append(abs(session.run(None, {"image": image})[0] - wanted.numpy()).max())
    return float(np.max(differences))  # NaN if one of them is


def input_line(checkpoint: Checkpoint, form: str) -> str:
    """What the model reads, in words."""
    metadata, (mean, std) = checkpoint.metadata, exported_means(checkpoint)
    shape = "x".join(map(str, (checkpoint.in_channels, *metadata.img_size)))
    own = form not in (".npz", ".onnx") and {*mean, *std} != {0.5}
    values = f"(pixels / 255 - {mean}) / {std}" if own else "pixels / 127.5 - 1"
    recipe = metadata.pixels.describe(metadata.img_size)
    return f"the image as {shape} float32 ({recipe}), {values}"


def npz_limits(model: VisionTransformer, metadata: Metadata) -> Iterator[str]:
    """What Google's format cannot hold, and a reader must know."""
    gelu, eps, (h, w) = model.config.gelu, model.config.norm_eps, model.grid
    yield "holds no class names"
    if metadata.bit_depth is not None or metadata.background != WHITE:
        yield "does not say how images were decoded: their bit depth and background"
    if metadata.pixels.describe(model.img_size) != PLAIN.describe(model.img_size):
        yield f"does not say how images are resized: {metadata.pixels.describe(model.img_size)}"
    if (gelu, eps) != ("tanh", 1e-6):
        taken = "readers take tanh and 1e-06, and get slightly other logits"
        yield f"does not say that GELU is {gelu} and LayerNorm eps {eps:g}: {taken}"
    if h != w:
        yield f"does not say that the positions form a grid of {h}x{w}"


def usage(model: VisionTransformer, target: Path, with_pixels: bool = False) -> list[str]:
    """Lines that load the file."""
    config, name = model.config, target.name
    if target.suffix == ".npz":
        return [f"model.load_from(np.load({name!r}), position_grid={model.grid})"]
    if target.suffix == ".onnx":
        session = f"session = onnxruntime.InferenceSession({name!r})"
        given = '"image": numpy.array(image)' if with_pixels else '"images": images'
        return ["import numpy, onnxruntime", session, f"session.run(None, {{{given}}})[0]"]
    created = "# model: timm's hybrid of this variant, from timm.create_model"
    if config.resnet_layers is None:
        words = timm_arguments(config, model.img_size, model.in_channels, model.num_classes)
        arguments = ", ".join(f"{key}={value!r}" for key, value in words.items())
        if config.mlp == "swiglu":
            arguments += ", mlp_layer=timm.layers.SwiGLUPacked"
        norm = f"partial(torch.nn.LayerNorm, eps={config.norm_eps:g})"
        created = f"model = timm.models.VisionTransformer({arguments}, norm_layer={norm})"
    load = f"model.load_state_dict(safetensors.torch.load_file({name!r}))"
    return ["import safetensors.torch, timm, torch", "from functools import partial", created, load]


if __name__ == "__main__":
    sys.exit(run_script("export.py", main))
