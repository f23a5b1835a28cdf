"""Hand a trained model on: to Google's `.npz`, to timm (`.safetensors`) or to ONNX (`.onnx`).

What was written is read back and its logits are compared; a model card is written beside it.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.configs import CONFIGS
from models.download import DownloadError
from models.interop import FACTS, to_timm
from models.modeling import VisionTransformer
from models.structure import WeightsError
from models.weights import read_npz, to_official
from models.zoo import locate
from utils.checkpoint import CheckpointError, write_npz
from utils.classifier import Classifier, open_model
from utils.cli import FlagError, Parser, check_input, check_output, image_size
from utils.files import SaveError, flush, written_whole
from utils.shell import status_of

USER_ERRORS = (FlagError, DownloadError, WeightsError, CheckpointError)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROTOBUF_LIMIT = 2**31  # bytes; an ONNX file of more keeps its weights in a second file


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    target = Path(args.target)
    if target.suffix not in EXPORTERS:
        raise FlagError(f"{target}: the suffix says the format: .npz, .safetensors or .onnx")
    check_output("TARGET", args.target)
    if target.resolve() == Path(args.checkpoint).resolve():
        raise FlagError(f"{target} is the checkpoint itself")
    export, read_back, limit = EXPORTERS[target.suffix]
    if target.suffix == ".onnx":
        if args.dtype != "float32":
            raise FlagError("--dtype float16 is for .npz and .safetensors: an .onnx has float32")
        check_onnx_packages()
    check_input("--labels", args.labels)
    checkpoint = locate(args.checkpoint, variant=args.model_type, head=True)
    trained = Classifier.open(checkpoint, img_size=args.img_size, labels=args.labels,
                              variant=args.model_type, device="cpu")  # fmt: skip
    if args.dtype == "float16":
        limit = HALF_LIMIT
        check_range(trained, args.checkpoint)
    with new_files(target) as written:  # what was there before stays until these are good
        export(trained, written, args.dtype)
        difference = compare(trained, read_back(written, trained), limit, target)
    card = Path(f"{target}.md")
    with written_whole(card) as temporary:
        temporary.write_text(model_card(trained, args.checkpoint, target, difference), "utf-8")
    print(f"{target} ({target.stat().st_size / 2**20:.1f} MiB): read back, its logits agree to "
          f"{difference:.1e}; its card is {card}")  # fmt: skip
    for note in unsaid(trained, target):
        print(f"note: {note}")


def build_parser() -> Parser:
    parser = Parser(
        prog="export.py",
        description=__doc__,
    )
    parser.add_argument(
        "checkpoint", metavar="FILE", help="a .bin of train.py, an .npz or a .safetensors"
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="what to write: NAME.npz, NAME.safetensors for timm, or NAME.onnx, which needs "
        "requirements-export.txt",
    )
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line")
    parser.add_argument("--img_size", type=image_size, help="another resolution than the file's")
    parser.add_argument(
        "--model_type",
        choices=list(CONFIGS),
        metavar="NAME",
        help="variant that the file must be; it also says the heads of a .safetensors without "
        "config.json",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the weights in the file; float16 halves it, and rounds them",
    )
    return parser


# ----------------------------------------------------------------------------------- the formats


@contextmanager
def new_files(target: Path) -> Iterator[Path]:
    """A path of `target`'s name in a folder of its own; all files there move to `target`'s folder
    if the block ends well. Raises SaveError where they cannot be written."""
    target = Path(os.path.realpath(target))  # a link stays one
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export.") as folder:
            yield Path(folder) / target.name
            for file in sorted(Path(folder).iterdir(), reverse=True):  # ONNX's weights come first
                flush(file)
                file.replace(target.parent / file.name)
        flush(target.parent)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise SaveError(f"{target} could not be written ({why})") from None


def check_range(trained: Classifier, source: str) -> None:
    """Raise CheckpointError where a weight is beyond float16."""
    largest = max(p.abs().max().item() for p in trained.model.parameters())
    if largest > torch.finfo(torch.float16).max:
        raise CheckpointError(f"{source} holds {largest:.6g}, float16 ends at 65504: leave --dtype "
                              "out")  # fmt: skip


def unsaid(trained: Classifier, target: Path) -> list[str]:
    """What a reader of the file must know and cannot read there."""
    model, config = trained.model, trained.model.config
    if target.suffix != ".npz":
        return []
    notes = []
    if (config.gelu, config.norm_eps) != ("tanh", 1e-6):
        notes.append(f"this model has GELU {config.gelu} and LayerNorm eps {config.norm_eps:g}, "
                     "which Google's format does not say: readers take tanh and 1e-06, and get "
                     "slightly other logits; .safetensors says them")  # fmt: skip
    if model.grid[0] != model.grid[1]:
        notes.append(f"its positions form a grid of {model.grid[0]}x{model.grid[1]}, which "
                     "Google's format does not say: give load_from position_grid="
                     f"{model.grid}; .safetensors says it")  # fmt: skip
    return notes


def export_npz(trained: Classifier, path: Path, dtype: str) -> None:
    write_npz(path, to_official(trained.model.state_dict(), trained.model.config, dtype))


def export_timm(trained: Classifier, path: Path, dtype: str) -> None:
    from safetensors.torch import save

    tensors = to_timm(trained.model.state_dict(), trained.model.config)
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    facts = {key: json.dumps(value) for key, value in facts_of(trained).items()}
    with written_whole(path) as temporary:  # save_file would make a file for its owner's eyes only
        temporary.write_bytes(save(tensors, metadata={"format": "pt"} | facts))


def read_back_model(path: Path, trained: Classifier):
    """The model by our own reader. An `.npz` says neither GELU, eps nor the grid's shape."""
    ours = trained.model
    if path.suffix == ".safetensors":
        return open_model(path)[0]
    model = VisionTransformer(ours.config, ours.img_size, ours.num_classes,
                              in_channels=ours.in_channels)  # fmt: skip
    model.load_from(read_npz(path), position_grid=ours.grid)
    return model.eval()


def check_onnx_packages() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FlagError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt")


def export_onnx(trained: Classifier, path: Path, dtype: str) -> None:
    """`images` (batch, C, H, W) in [-1, 1] -> `logits` (batch, classes); the batch is dynamic."""
    import onnx

    model = trained.model
    images = torch.zeros(2, model.in_channels, *model.img_size)
    program = torch.onnx.export(
        model,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    for key, value in facts_of(trained).items():
        program.model.metadata_props[key] = json.dumps(value)
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > 0.95 * PROTOBUF_LIMIT
    program.save(str(path), external_data=large)  # it names the file of its weights
    onnx.checker.check_model(str(path))


def read_back_onnx(path: Path, trained: Classifier):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# Suffix -> how to write, how to read back, and how far apart the logits may be (relative to 1, or
# to the largest logit where that is more).
EXPORTERS = {
    ".npz": (export_npz, read_back_model, 1e-5),
    ".safetensors": (export_timm, read_back_model, 1e-5),
    ".onnx": (export_onnx, read_back_onnx, 1e-4),
}
HALF_LIMIT = 1e-2  # float16 rounds every weight by up to 2^-11 of it


@torch.no_grad()
def compare(trained: Classifier, other, limit: float, target: Path) -> float:
    """The largest difference of logits on noise, one image and three; CheckpointError if large."""
    model, difference = trained.model, 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        images = torch.randn(batch, model.in_channels, *model.img_size, generator=generator)
        ours: Tensor = model(images.clamp(-1, 1))
        gap = (ours - other(images.clamp(-1, 1))).abs().max().item()
        difference = max(difference, gap / max(1.0, ours.abs().max().item()))
    if not difference <= limit:
        raise CheckpointError(f"{target}: read back, its logits differ by {difference:.1e}, more "
                              f"than {limit:.0e}: it was not kept")  # fmt: skip
    return difference


def facts_of(trained: Classifier) -> dict:
    """What no array says: for metadata, which models.interop reads back, and for the card."""
    config, model = trained.model.config, trained.model
    facts = {"num_heads": config.num_heads, "gelu": config.gelu, "norm_eps": config.norm_eps,
             "classes": list(trained.classes), "img_size": list(model.img_size),
             "mean": [0.5] * model.in_channels, "std": [0.5] * model.in_channels}  # fmt: skip
    assert facts.keys() >= set(FACTS)
    return facts


# ---------------------------------------------------------------------------------- the model card


def model_card(trained: Classifier, source: str, target: Path, difference: float) -> str:
    """Markdown: what the model is, how it was trained and measured, and how to use the file."""
    model, config = trained.model, trained.model.config
    height, width = model.img_size
    size = sum(p.numel() for p in model.parameters())
    metrics = trained.record.get("metrics") or {}
    lines = [f"# {target.name}", "",
             f"{trained.variant or 'A Vision Transformer'}, {size:,} parameters, exported from "
             f"`{Path(source).name}`.", "",
             "| | |", "|---|---|",
             f"| input | {model.in_channels} x {height} x {width} float32, pixels "
             "(x - 127.5) / 127.5, the whole image resized bilinearly |",
             f"| output | {model.num_classes} logits |",
             f"| structure | patch {config.patch_size}, width {config.hidden_size}, MLP "
             f"{config.mlp_dim}, {config.num_heads} heads, {config.num_layers} layers, "
             f"classifier {config.classifier} |",
             f"| GELU, LayerNorm eps | {config.gelu}, {config.norm_eps:g} |"]  # fmt: skip
    if trained.record.get("step") is not None:
        lines.append(f"| training | {trained.record['step']} updates |")
    if list(model.img_size) == list(trained.record.get("img_size", model.img_size)):
        lines += [f"| {name} on held-out images | {value:.4f} |" for name, value in metrics.items()]
    lines += [f"| read back | logits agree to {difference:.1e} |", "", "## Use", ""]
    lines += [f"    {line}" for line in USES[target.suffix](trained, target)]
    names = "\n".join(f"{i}. {name}" for i, name in enumerate(trained.classes))
    return "\n".join([*lines, "", "## Classes", "", names, ""])


def use_npz(trained: Classifier, target: Path) -> list[str]:
    notes = [f"# {note}" for note in unsaid(trained, target)]
    if trained.model.grid[0] != trained.model.grid[1]:
        return notes
    return [*notes, "# NAMES: a file of the class names below, one a line",
            f"python3 predict.py --checkpoint {target.name} --labels NAMES IMAGE ..."]  # fmt: skip


def use_timm(trained: Classifier, target: Path) -> list[str]:
    model, config = trained.model, trained.model.config
    arguments = {"img_size": tuple(model.img_size), "patch_size": config.patch_size,
                 "in_chans": model.in_channels, "num_classes": model.num_classes,
                 "embed_dim": config.hidden_size, "depth": config.num_layers,
                 "num_heads": config.num_heads,
                 "mlp_ratio": config.mlp_dim / config.hidden_size}  # fmt: skip
    if config.gelu == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    if config.classifier == "gap":
        arguments |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    if config.resnet_layers is not None:
        return ["# a hybrid: create timm's model of this variant, then load_state_dict(",
                f'#   safetensors.torch.load_file("{target.name}"))']  # fmt: skip
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    lines = ["import timm, torch", "from functools import partial",
             "from safetensors.torch import load_file", ""]  # fmt: skip
    if config.norm_eps != 1e-6:
        words += f", norm_layer=partial(torch.nn.LayerNorm, eps={config.norm_eps:g})"
    return [*lines, f"model = timm.models.VisionTransformer({words})",
            f'model.load_state_dict(load_file("{target.name}"))', "model.eval()"]  # fmt: skip


def use_onnx(trained: Classifier, target: Path) -> list[str]:
    return ["import onnxruntime", "",
            f'session = onnxruntime.InferenceSession("{target.name}")',
            'logits = session.run(None, {"images": images})[0]  # any batch']  # fmt: skip


USES = {".npz": use_npz, ".safetensors": use_timm, ".onnx": use_onnx}


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell."""
    return status_of("export.py", main, argv, USER_ERRORS)


if __name__ == "__main__":
    sys.exit(run())
