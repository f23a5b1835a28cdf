"""Export a model: to Google's layout (.npz), to timm's (.safetensors) or to ONNX (.onnx).

The file is read back and its logits are compared before it takes its name.
"""

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
from models.interop import exported_means, metadata_of
from models.labels import label_names
from models.modeling import VisionTransformer
from models.pixels import PLAIN
from models.state_dict import WHITE, Checkpoint, Metadata
from models.zoo import resolve_checkpoint
from utils.class_names import read_labels
from utils.cli import Parser, check_output, run_script
from utils.files import flush

# Suffix -> how much the logits may differ, relative to the largest one or to 1.
LIMITS = {".npz": 1e-5, ".safetensors": 1e-5, ".onnx": 1e-4}
FLOAT16_LIMIT = 1e-2  # float16 rounds every weight by up to 1 in 2048
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROTOBUF_LIMIT = 2**31  # bytes; a larger ONNX model keeps its weights in a second file


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    target, half = Path(args.target), args.dtype == "float16"
    check_target(target, half)
    check_output(target, [args.checkpoint, args.labels])
    source = resolve_checkpoint(args.checkpoint, variant=args.model_type, head=True)
    model, metadata = open_model(source, **model_options(args))
    if not model.head.weight.any():
        raise UserError(f"{source}: its head is all zeros: fine-tune it with train.py first")
    largest = max(parameter.abs().max().item() for parameter in model.parameters())
    if half and largest > torch.finfo(torch.float16).max:
        raise UserError(f"{source}: it holds {largest:.6g}, float16 ends at 65504: use float32")
    count = model.num_classes
    classes = metadata.classes or label_names(count) or tuple(map(str, range(count)))
    if args.labels:
        classes = read_labels(args.labels, count)
    stored = replace(metadata, img_size=model.img_size, classes=classes)
    checkpoint = Checkpoint(model.state_dict(), model.config, stored)
    with staged_output(target) as path:
        if target.suffix == ".onnx":
            write_onnx(path, model, checkpoint)
        else:
            write(path, checkpoint, getattr(torch, args.dtype))
        difference = max_logit_difference(model, read_back(path, model))
        limit = FLOAT16_LIMIT if half else LIMITS[target.suffix]
        if not difference <= limit:
            why = f"read back, its logits differ by {difference:.1e}, more than {limit:.0e}"
            raise RunError(f"{target} was not written: {why}")
    size = target.stat().st_size / 2**20
    shape = "x".join(map(str, (model.in_channels, *model.img_size)))
    print(f"{target} ({size:.1f} MiB): read back, its logits differ by {difference:.1e}")
    mean, std = exported_means(checkpoint)
    own = target.suffix == ".safetensors" and {*mean, *std} != {0.5}
    values = f"(pixels / 255 - {mean}) / {std}" if own else "pixels / 127.5 - 1"
    shape += f" float32 ({metadata.pixels.describe(model.img_size)})"
    print(f"input: the image as {shape}, {values}; output: {count} logits")
    for note in npz_limits(model, stored) if target.suffix == ".npz" else ():
        print(f"note: Google's format {note}")
    print("load it with:", *usage(model, target), sep="\n    ")


def build_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__)
    add_checkpoint_flags(parser, labels=True)
    flag = parser.add_argument_group("export").add_argument
    flag("target", metavar="TARGET", help="what to write: NAME.npz, NAME.safetensors or NAME.onnx")
    types = ("float32", "float16")
    flag("--dtype", choices=types, default="float32", help="of the weights; float16 rounds them")
    return parser


def check_target(target: Path, half: bool) -> None:
    """Raise UserError if the suffix names no format, or one that cannot be written here."""
    if target.suffix not in LIMITS:
        raise UserError(f"{target}: the suffix chooses the format: .npz, .safetensors or .onnx")
    if target.suffix != ".onnx":
        return
    if half:
        raise UserError("--dtype float16 is for .npz and .safetensors: an .onnx has float32")
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt")


@contextmanager
def staged_output(target: Path) -> Iterator[Path]:
    """A path with the target's name in a temporary folder beside it.

    When the block ends well, all files in that folder replace those beside the target. Raises
    RunError if the disk refuses.
    """
    target = Path(os.path.realpath(target))  # a link stays a link
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export.") as folder:
            yield Path(folder) / target.name
            # NAME.onnx.data comes before NAME.onnx, which refers to it.
            for file in sorted(Path(folder).iterdir(), reverse=True):
                flush(file)
                file.replace(target.parent / file.name)
        flush(target.parent)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RunError(f"{target} could not be written ({reason})") from error


def write_onnx(path: Path, model: VisionTransformer, checkpoint: Checkpoint) -> None:
    """`images` (batch, C, H, W) -> `logits` (batch, classes), for any batch size."""
    import onnx

    images = torch.zeros(2, model.in_channels, *model.img_size)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    shapes = ({0: torch.export.Dim("batch")},)
    options = {"dynamic_shapes": shapes, "dynamo": True, "verbose": False}
    program = torch.onnx.export(model, (images,), **names, **options)
    program.model.metadata_props.update(metadata_of(checkpoint))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(path), external_data=size > 0.95 * PROTOBUF_LIMIT)
    onnx.checker.check_model(str(path))


def read_back(path: Path, model: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """The exported model as a function of images."""
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


@torch.no_grad()
def max_logit_difference(model: VisionTransformer, other: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of logits on noise; `other` gets one image, then three."""
    shape, generator = (4, model.in_channels, *model.img_size), torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator) * 2 - 1
    logits, others = model(images), torch.cat([other(images[:1]), other(images[1:])])
    difference = (logits - others).abs().max()  # NaN if one of them is
    return (difference / logits.abs().max().clamp(min=1)).item()


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


def usage(model: VisionTransformer, target: Path) -> list[str]:
    """Lines that load the file."""
    config, name = model.config, target.name
    if target.suffix == ".npz":
        return [f"model.load_from(np.load({name!r}), position_grid={model.grid})"]
    if target.suffix == ".onnx":
        session = f"session = onnxruntime.InferenceSession({name!r})"
        return ["import onnxruntime", session, 'session.run(None, {"images": images})[0]']
    created = "# model: timm's hybrid of this variant, from timm.create_model"
    if config.resnet_layers is None:
        words = {"img_size": model.img_size, "patch_size": config.patch_size}
        words |= {"in_chans": model.in_channels, "num_classes": model.num_classes}
        words |= {"embed_dim": config.hidden_size, "depth": config.num_layers}
        words |= {"num_heads": config.num_heads, "mlp_ratio": config.mlp_dim / config.hidden_size}
        words["act_layer"] = {"tanh": "gelu_tanh", "erf": "gelu", "quick": "quick_gelu"}[
            config.gelu
        ]
        if (pool := config.pooling) != "token" or config.fc_norm:
            words |= {"global_pool": "avg" if pool == "mean" else pool, "fc_norm": config.fc_norm}
        if config.classifier == "gap":
            words["class_token"] = False
        if config.num_registers:
            words |= {"reg_tokens": config.num_registers, "no_embed_class": True}
        if config.pre_norm:
            words["pre_norm"] = True
        if config.mlp == "swiglu":  # fc1 gives gates and values
            words |= {"mlp_ratio": 2 * words["mlp_ratio"], "act_layer": "silu"}
        arguments = ", ".join(f"{key}={value!r}" for key, value in words.items())
        if config.mlp == "swiglu":
            arguments += ", mlp_layer=timm.layers.SwiGLUPacked"
        norm = f"partial(torch.nn.LayerNorm, eps={config.norm_eps:g})"
        created = f"model = timm.models.VisionTransformer({arguments}, norm_layer={norm})"
    load = f"model.load_state_dict(safetensors.torch.load_file({name!r}))"
    return ["import safetensors.torch, timm, torch", "from functools import partial", created, load]


if __name__ == "__main__":
    sys.exit(run_script("export.py", main))
